"""Exact k nearest neighbours in float64, found cheaply.

Propose: a scan in int8 or float32 (or fp16 / bf16 by matrix products) keeps every pair that could belong to the answer under a proved bound, and
leaves out what boxes prove to be too far. Verify: the kept pairs are computed in float64 and the nearest chosen, ties by smaller index; a list
that runs full of near-ties is decided on the spot. Where many rows of few features are copies, a tree over the distinct points proposes.
Whatever proposes, whatever the tiles and the number of threads or processes, the
result has the same bits, because only float64 distances decide.
Exact. Source: TOD (arXiv 2110.14007).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.spatial import KDTree

from wager.detect.tod import native
from wager.detect.tod.batching import Execution, row_blocks
from wager.detect.tod.scan import Scan

TREE_MAX_FEATURES = 20
TREE_MIN_ROWS = 2000
TREE_REPEATED = 0.1  # share of rows that are copies


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
    """The searcher: the one asked for, or for 'auto' the tree over distinct points where few features and many copies make it the quicker one."""
    if execution.search == "fp64" or (execution.precision == "fp64" and execution.device == "cpu"):
        return Exhaustive(base_ND, k, execution)
    if execution.device != "cpu" and execution.precision not in ("fp16", "bf16"):
        from wager.detect.tod.device_knn import DeviceSearch

        return DeviceSearch(base_ND, k, execution)
    if execution.device != "cpu" or execution.precision in ("fp16", "bf16"):
        from wager.detect.tod.torch_knn import TorchScan

        return TorchScan(base_ND, k, execution)
    if execution.search == "tree":
        return Tree(base_ND, k, execution)
    n, d = base_ND.shape
    if (
        execution.search == "auto"
        and n >= TREE_MIN_ROWS
        and d <= TREE_MAX_FEATURES
        and repeated_share(base_ND) > TREE_REPEATED
    ):
        return Tree(base_ND, k, execution)
    return Scan(base_ND, k, execution)


def repeated_share(base_ND: np.ndarray) -> float:
    """About how many of the rows are copies of an earlier one (rows of equal sums of weighted features pass for copies)."""
    weights_D = np.random.default_rng(0).uniform(1, 2, base_ND.shape[1])
    return 1 - len(np.unique((base_ND * weights_D).sum(1))) / len(base_ND)


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
