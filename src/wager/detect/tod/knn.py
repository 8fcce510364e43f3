"""Exact k nearest neighbours in float64, found cheaply.

Propose: a float32 (or fp16 / bf16) scan keeps every pair that could belong to the answer under `bounds`. Verify: the kept pairs are computed in
float64 and the nearest chosen, ties by smaller index. Rows whose candidate list overflows are searched in float64. In few dimensions a
tree over the distinct points proposes instead. Whatever proposes, whatever the tiles and the number of threads or processes, the
result has the same bits, because only float64 distances decide.
Exact. Source: TOD (arXiv 2110.14007).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.spatial import KDTree

from wager.detect.tod import bounds, native
from wager.detect.tod.batching import PLACES, Execution, row_blocks

BOXES_MIN_ROWS = 2000
PLACES_SAMPLE = 4096
TREE_MAX_FEATURES = 20
TREE_MIN_ROWS = 2000
SCAN_NS = (0.5, 0.01)  # a pair, and each of its features: less than a scan takes on one core of today


@dataclass(frozen=True)
class Neighbors:
    """distance_RK and index_RK of each row's nearest, nearest first, ties by smaller index; how they were found in `facts`."""

    distance_RK: np.ndarray
    index_RK: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)

    def first(self, k: int) -> Neighbors:
        """The nearest k of them: a longer list serves a shorter one."""
        if k == self.index_RK.shape[1]:
            return self
        return Neighbors(
            np.ascontiguousarray(self.distance_RK[:, :k]), np.ascontiguousarray(self.index_RK[:, :k]), self.facts
        )

    def with_self(self) -> Neighbors:
        """Lists that count a row as its own neighbour at distance 0 (duplicates of smaller index come before it), of the same length."""
        rows, k = self.index_RK.shape
        own_R = np.arange(rows)
        distance = np.concatenate([np.zeros((rows, 1)), self.distance_RK], 1)
        index = np.concatenate([own_R[:, None], self.index_RK], 1)
        order = np.lexsort((index, distance), axis=1)[:, :k]
        return Neighbors(np.take_along_axis(distance, order, 1), np.take_along_axis(index, order, 1), self.facts)


def exact_neighbors(query_RD: np.ndarray, base_ND: np.ndarray, k: int, self_from: int = -1) -> Neighbors:
    """The definition: all float64 distances, the k smallest by (distance, index). self_from >= 0: row r is base row self_from + r."""
    distance, index = _outputs(len(query_RD), k)
    n, d = base_ND.shape
    native.call("wager_knn_exact", query_RD, base_ND, len(query_RD), n, d, self_from, np.int32(k), distance, index)
    return Neighbors(distance, index, {"method": "fp64"})


def nearest(
    query_RD: np.ndarray | None,
    base_ND: np.ndarray,
    k: int,
    execution: Execution | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Neighbors:
    """The k nearest base rows of every query row; without `query_RD`, of every base row, itself (by index) left out.

    Arrays are float64, C-contiguous. Raises UsageError for an unknown precision, CapacityError when the budget cannot hold one tile.
    """
    execution = execution or Execution()
    base_ND = np.ascontiguousarray(base_ND, dtype=np.float64)
    query_RD = None if query_RD is None else np.ascontiguousarray(query_RD, dtype=np.float64)
    searcher = choose(query_RD, base_ND, k, execution)
    rows = len(base_ND if query_RD is None else query_RD)
    distance, index = _outputs(rows, k)
    totals: dict[str, float] = {}
    from wager.detect.tod.workers import run_blocks

    blocks = list(row_blocks(rows, searcher.block_rows))
    done = 0
    for (start, stop), (part_d, part_i, facts) in run_blocks(searcher, query_RD, blocks, execution):
        distance[start:stop], index[start:stop] = part_d, part_i
        for name, value in facts.items():
            totals[name] = totals.get(name, 0) + value
        done += stop - start
        if progress:
            progress(done, rows)
    return Neighbors(distance, index, searcher.facts | totals | {"method": searcher.name, "rows": rows, "k": k})


def choose(query_RD: np.ndarray | None, base_ND: np.ndarray, k: int, execution: Execution) -> Any:
    """The searcher: the one asked for, or for 'auto' a tree where a sample of queries says that it is the quicker one."""
    if execution.search == "fp64" or execution.precision == "fp64":
        return Exhaustive(base_ND, k, execution)
    if execution.device != "cpu" or execution.precision in ("fp16", "bf16"):
        from wager.detect.tod.torch_knn import TorchScan

        return TorchScan(base_ND, k, execution)
    if execution.search == "tree":
        return Tree(base_ND, k, execution)
    n, d = base_ND.shape
    if execution.search == "auto" and d <= TREE_MAX_FEATURES and n >= TREE_MIN_ROWS:
        return quicker(query_RD, base_ND, k, execution)
    return Scan(base_ND, k, execution)


def quicker(query_RD: np.ndarray | None, base_ND: np.ndarray, k: int, execution: Execution) -> Any:
    """Time both on even samples of the rows. The answers are the same, so the choice may follow the clock."""
    points = base_ND if query_RD is None else query_RD
    tree = Tree(base_ND, k, execution)
    tree_us = per_row_us(tree, points, query_RD is None, 1024, tries=2)
    n, d = base_ND.shape
    fewest_us = n * (SCAN_NS[0] + SCAN_NS[1] * d) / native.threads() * 1e-3
    if tree_us < fewest_us:  # not worth a try
        tree.facts["tree_us_per_row"] = tree_us
        return tree
    scan = Scan(base_ND, k, execution)
    scan_us = per_row_us(scan, points, query_RD is None, 384, tries=1)
    chosen = tree if tree_us < scan_us else scan
    chosen.facts |= {"tree_us_per_row": tree_us, "scan_us_per_row": scan_us}
    return chosen


def per_row_us(searcher: Any, points: np.ndarray, own: bool, sample: int, tries: int) -> float:
    """Microseconds a row, the best of the tries."""
    picked = np.unique(np.linspace(0, len(points) - 1, min(sample, len(points))).astype(np.int64))
    query, seconds = np.ascontiguousarray(points[picked]), []
    for _ in range(tries):
        start = time.perf_counter()
        searcher.search(query, picked if own else np.full(len(picked), -1))
        seconds.append(time.perf_counter() - start)
    return min(seconds) / len(picked) * 1e6


def _outputs(rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.empty((rows, k)), np.empty((rows, k), np.int64)


class Exhaustive:
    """float64 over all pairs."""

    name = "fp64"

    def __init__(self, base_ND: np.ndarray, k: int, execution: Execution):
        self.base_ND, self.k, self.execution, self.facts = base_ND, k, execution, {}
        self.block_rows = execution.batch_rows or 4096

    def block(self, query_RD: np.ndarray | None, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, dict]:
        points = self.base_ND if query_RD is None else query_RD
        found = exact_neighbors(points[start:stop], self.base_ND, self.k, start if query_RD is None else -1)
        return found.distance_RK, found.index_RK, {}


class Scan:
    """The float32 scan in C++: candidates under `bounds.slack` where boxes do not rule them out, decided in float64."""

    name = "scan fp32"

    def __init__(self, base_ND: np.ndarray, k: int, execution: Execution):
        self.base_ND, self.k, self.execution, self.facts = base_ND, k, execution, {}
        self.capacity = 4 * k + 64
        n, d = base_ND.shape
        self.centre_D, self.scale = centre_and_scale(base_ND)
        self.slack = np.float32(bounds.slack(d) * (1 + 2.0**-20))
        self.directions_DP = (
            directions(base_ND, self.centre_D, self.scale) if n >= BOXES_MIN_ROWS else np.empty((d, 0))
        )
        width = native.library().wager_knn_width()
        self.block_rows, self.chunk_columns = execution.scan_tiles(n, d, k, self.capacity, width)
        self.resident = self.pack(0, n) if self.chunk_columns >= n else None

    def pack(self, start: int, stop: int) -> tuple[np.ndarray, ...]:
        """Panels, squared norms, norms, boxes (least and most along each direction) and the order of base rows start..stop."""
        rows, width, (d, places) = stop - start, native.library().wager_knn_width(), self.directions_DP.shape
        base, place_RP, order = self.base_ND[start:stop], np.empty((rows, places), np.float32), np.arange(rows, dtype=np.int32)
        if places:
            native.call(
                "wager_knn_places", base, self.centre_D, self.scale, self.directions_DP, rows, d, places, place_RP
            )  # fmt: skip
            native.call("wager_knn_order", place_RP, places, order, rows, width)
        panels = -(-rows // width)
        panel, norm2, norm = (np.empty(size, np.float32) for size in (panels * d * width, panels * width, panels * width))
        low, high = np.empty((places, panels), np.float32), np.empty((places, panels), np.float32)
        native.call(
            "wager_knn_pack", base, self.centre_D, self.scale, order, place_RP, rows, d, places, panel, norm2, norm, low, high
        )  # fmt: skip
        return panel, norm2, norm, low, high, order

    def chunks(self) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
        if self.resident is not None:
            yield 0, self.resident
            return
        for start, stop in row_blocks(len(self.base_ND), self.chunk_columns):
            yield start, self.pack(start, stop)

    def block(self, query_RD: np.ndarray | None, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, dict]:
        """Neighbours of rows start..stop."""
        points = self.base_ND if query_RD is None else query_RD
        own = np.arange(start, stop) if query_RD is None else np.full(stop - start, -1)
        return self.search(np.ascontiguousarray(points[start:stop]), own)

    def search(self, query_RD: np.ndarray, own_R: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict]:
        """Neighbours of loose rows; own_R names the base row to leave out, or -1."""
        (rows, d), places, own_R = query_RD.shape, self.directions_DP.shape[1], own_R.astype(np.int64)
        low_RD, place_RP, order = np.empty((rows, d), np.float32), np.empty((rows, places), np.float32), np.arange(rows, dtype=np.int32)
        norm2_R, norm_R = np.empty(rows, np.float32), np.empty(rows, np.float32)
        native.call(
            "wager_knn_rows", query_RD, self.centre_D, self.scale, self.directions_DP, rows, d, places, np.float32(-2), low_RD,
            norm2_R, norm_R, place_RP,
        )  # fmt: skip
        count, threshold = np.zeros(rows, np.int32), np.full(rows, np.finfo(np.float32).max, np.float32)
        unsafe = ~(norm2_R <= 1e30)  # a query far outside the base: float32 cannot hold it
        count[unsafe], threshold[unsafe] = -1, -np.inf
        if places:
            place_RP[unsafe] = 0
            native.call("wager_knn_order", place_RP, places, order, rows, native.library().wager_knn_width())
        index = np.empty((rows, self.capacity), np.int32)
        low, high = np.empty((rows, self.capacity), np.float32), np.empty((rows, self.capacity), np.float32)
        settled = 0
        for first, (panel, norm2, norm, low_box, high_box, base_row) in self.chunks():
            settled += native.call(
                "wager_knn_scan", query_RD, low_RD, norm2_R, norm_R, place_RP, own_R, order, rows, self.base_ND, panel, norm2, norm,
                low_box, high_box, base_row, first, len(base_row), d, places, np.int32(self.k), np.int32(self.capacity), self.slack,
                float(self.scale), index, low, high, count, threshold,
            )  # fmt: skip
        distance, found = _outputs(rows, self.k)
        verified = np.zeros(1, np.int64)
        whole = native.call(
            "wager_knn_decide", query_RD, self.base_ND, own_R, rows, len(self.base_ND), d, np.int32(self.k), np.int32(self.capacity),
            index, low, count, threshold, distance, found, verified,
        )  # fmt: skip
        return distance, found, {"verified_pairs": int(verified[0]) + int(settled), "settled_pairs": int(settled), "fp64_rows": int(whole)}


class Tree:
    """A k-d tree over the distinct points proposes; lists that may be cut inside a tie are asked for again, longer."""

    name = "tree"

    def __init__(self, base_ND: np.ndarray, k: int, execution: Execution):
        self.base_ND, self.k, self.execution, self.facts = base_ND, k, execution, {}
        order = np.lexsort(base_ND.T[::-1])
        new = np.ones(len(order), bool)
        new[1:] = (base_ND[order[1:]] != base_ND[order[:-1]]).any(1)
        self.start = np.append(np.flatnonzero(new), len(order)).astype(np.int64)
        group = np.cumsum(new) - 1
        self.member = order[np.lexsort((order, group))].astype(np.int64)
        self.distinct_GD = np.ascontiguousarray(base_ND[self.member[self.start[:-1]]])
        self.group_R = np.empty(len(order), np.int64)
        self.group_R[order] = group
        self.tree = KDTree(self.distinct_GD, leafsize=16, balanced_tree=False)
        self.block_rows = execution.batch_rows or execution.tree_rows(k)
        self.facts["distinct"] = len(self.distinct_GD)

    def block(self, query_RD: np.ndarray | None, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, dict]:
        points = self.base_ND if query_RD is None else query_RD
        own = np.arange(start, stop) if query_RD is None else np.full(stop - start, -1)
        return self.search(np.ascontiguousarray(points[start:stop]), own)

    def ask(self, query_RD: np.ndarray, own_R: np.ndarray, width: int) -> np.ndarray:
        """The nearest distinct points of every row. Rows of the base ask once for each distinct point, in an order that is near in space."""
        repeat = slice(None)
        if len(own_R) and own_R.min() >= 0:
            asked, repeat = np.unique(self.group_R[own_R], return_inverse=True)
            query_RD = self.distinct_GD[asked]
        _, found = self.tree.query(query_RD, k=width, workers=native.threads())
        return np.ascontiguousarray(found.reshape(len(query_RD), width)[repeat], dtype=np.int64)

    def search(self, query_RD: np.ndarray, own_R: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict]:
        """Neighbours of loose rows; own_R names the base row to leave out, or -1."""
        rows, groups = len(query_RD), len(self.distinct_GD)
        distance, index = _outputs(rows, self.k)
        todo, width, again = np.arange(rows), min(self.k + 4, groups), 0
        while len(todo):
            query = np.ascontiguousarray(query_RD[todo])
            found = self.ask(query, own_R[todo], width)
            part_d, part_i = _outputs(len(todo), self.k)
            done = np.zeros(len(todo), np.uint8)
            native.call(
                "wager_knn_expand", query, self.distinct_GD, len(todo), query.shape[1], found, width, groups, self.start,
                self.member, np.ascontiguousarray(own_R[todo], dtype=np.int64), np.int32(self.k), part_d, part_i, done,
            )  # fmt: skip
            finished = done.astype(bool)
            distance[todo[finished]], index[todo[finished]] = part_d[finished], part_i[finished]
            todo, width = todo[~finished], min(2 * width, groups)
            again += len(todo)
        return distance, index, {"asked_again_rows": again}


def directions(base_ND: np.ndarray, centre_D: np.ndarray, scale: float) -> np.ndarray:
    """Orthonormal directions (columns) along which a sample of the base varies most. Any would do for exactness; these rule out most."""
    n, d = base_ND.shape
    sample_SD = (base_ND[np.linspace(0, n - 1, min(n, PLACES_SAMPLE)).astype(np.int64)] - centre_D) * scale
    if d <= 256:
        _, vectors_DD = np.linalg.eigh(sample_SD.T @ sample_SD)
        return np.ascontiguousarray(vectors_DD[:, ::-1][:, :PLACES])
    found_DP = np.random.default_rng(0).normal(size=(d, PLACES))
    for _ in range(3):
        found_DP, _ = np.linalg.qr(sample_SD.T @ (sample_SD @ found_DP))
    return np.ascontiguousarray(found_DP)


def centre_and_scale(base_ND: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean of the base and the power of two that brings the largest centred value to [0.5, 1]. Distances do not see the centre."""
    centre_D = base_ND.mean(0)
    largest = max(float((base_ND.max(0) - centre_D).max()), float((centre_D - base_ND.min(0)).max()))
    return centre_D, 2.0 ** -np.ceil(np.log2(largest)) if largest > 0 else 1.0
