"""The neighbour scan of the processor: int8 or float32 proposes under a proved bound, boxes rule most of the base out, float64 decides.

Base rows are brought into an order in which neighbours in space are neighbours in memory and packed into panels; a panel's box along the
directions of largest variance bounds the distance of everything in it from below, because an orthonormal projection shortens distances.
int8: rows are rounded to 255 levels; their distance in whole numbers is exact and differs from the true one by at most the two residuals,
which are measured. float32: the bound is `bounds.slack`. Which of the two is quicker, a sample of the rows says; the answers are the same.
Exact. Source: TOD (arXiv 2110.14007) for quantization with verification; bounds and boxes are derived here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from wager.detect.tod import bounds, native
from wager.detect.tod.batching import PLACES, Execution, row_blocks
from wager.errors import UsageError

BOXES_MIN_ROWS = 2000  # below it everything is near enough
DIRECTIONS_SAMPLE = 2048
DIRECT_FEATURES = 256  # up to here directions come from all eigenvectors
INT8_FEATURES = (40, 16000)  # fewer: multiplying is not what takes the time; more: lengths leave int32
GROUP, SAMPLE_GROUPS = 96, 2  # rows that the scan takes together, and how many of them a trial takes
SAFE_NORM2 = 1e30  # longer scaled rows are searched in float64 alone


@dataclass(frozen=True)
class Levels:
    """int8 panels; see cpp/lists.h for the members."""

    words: np.ndarray | None
    half: np.ndarray | None
    odd: np.ndarray | None
    residual: np.ndarray | None
    coarsest: np.ndarray | None

    def arrays(self) -> tuple[np.ndarray | None, ...]:
        return self.words, self.half, self.odd, self.residual, self.coarsest


NO_LEVELS = Levels(None, None, None, None, None)


@dataclass(frozen=True)
class Panels:
    """Consecutive base rows, packed: float32 panels with norms, boxes, levels, and the row of each column."""

    panel: np.ndarray
    norm2: np.ndarray
    norm: np.ndarray
    longest: np.ndarray
    low_box: np.ndarray
    high_box: np.ndarray
    levels: Levels
    row: np.ndarray


class Scan:
    """Neighbours by a scan over panels."""

    def __init__(self, base_ND: np.ndarray, k: int, execution: Execution):
        self.base_ND, self.k, self.execution, self.facts = base_ND, k, execution, {}
        self.capacity = 4 * k + 64
        n, d = base_ND.shape
        self.centre_D, self.scale = centre_and_scale(base_ND)
        self.slack = np.float32(bounds.slack(d) * (1 + 2.0**-20))
        boxes = n >= BOXES_MIN_ROWS
        self.directions_DP = directions(base_ND, self.centre_D, self.scale) if boxes else np.empty((d, 0))
        self.block_rows, self.chunk_columns = execution.scan_tiles(n, d, k, self.capacity, width())
        self.int8 = self.wants_int8()
        self.resident = self.pack(0, n) if self.chunk_columns >= n else None
        if self.int8 and self.resident is not None and execution.precision == "auto":
            self.int8 = self.int8_pays()
            if not self.int8:
                self.resident = replace(self.resident, levels=NO_LEVELS)
        self.name = f"scan {'int8' if self.int8 else 'fp32'}"

    def wants_int8(self) -> bool:
        """Whether int8 was asked for or is worth a try. Raises UsageError where the processor cannot."""
        able = bool(native.library().wager_knn_has_int8()) and self.base_ND.shape[1] <= INT8_FEATURES[1]
        if self.execution.precision == "int8" and not able:
            raise UsageError(
                "precision 'int8' needs a processor with AVX-512 VNNI and at most 16,000 features; use 'auto'"
            )
        if self.execution.precision != "auto":
            return self.execution.precision == "int8"
        n, d = self.base_ND.shape
        return able and d >= INT8_FEATURES[0] and n >= BOXES_MIN_ROWS and self.chunk_columns >= n

    def int8_pays(self) -> bool:
        """Whether rows that lie together in space, as a group of the scan does, are found sooner with int8."""
        assert self.resident is not None
        starts = np.linspace(0, len(self.base_ND) - GROUP, SAMPLE_GROUPS).astype(np.int64)
        sample = self.resident.row[(starts[:, None] + np.arange(GROUP)).ravel()].astype(np.int64)
        query, seconds = np.ascontiguousarray(self.base_ND[sample]), {}
        for self.int8 in (False, True):
            start = time.perf_counter()
            self.search(query, sample)
            seconds[self.int8] = time.perf_counter() - start
        self.facts["int8_time"] = seconds[True] / seconds[False]
        return seconds[True] < seconds[False]

    def pack(self, start: int, stop: int) -> Panels:
        """Base rows start..stop."""
        rows, (d, places) = stop - start, self.directions_DP.shape
        base = self.base_ND[start:stop]
        place_RP, order = self.arrange(base)
        panels = -(-rows // width())
        columns = panels * width()
        panel, norm2, norm, longest = (np.empty(size, np.float32) for size in (columns * d, columns, columns, panels))
        low, high = np.empty((places, panels), np.float32), np.empty((places, panels), np.float32)
        native.call(
            "wager_knn_pack", base, self.centre_D, self.scale, order, place_RP, rows, d, places, panel, norm2, norm, longest, low, high,
        )  # fmt: skip
        levels = self.pack_levels(base, order, panels) if self.int8 else NO_LEVELS
        return Panels(panel, norm2, norm, longest, low, high, levels, order)

    def arrange(self, points_RD: np.ndarray, safe_R: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Places of rows along the directions, and the rows' order by place; rows that are not safe get place 0."""
        rows, (d, places) = len(points_RD), self.directions_DP.shape
        place_RP, order = np.empty((rows, places), np.float32), np.arange(rows, dtype=np.int32)
        if places:
            native.call(
                "wager_knn_places", points_RD, self.centre_D, self.scale, self.directions_DP, rows, d, places, place_RP
            )
            if safe_R is not None:
                place_RP[~safe_R] = 0
            native.call("wager_knn_order", place_RP, places, order, rows, width())
        return place_RP, order

    def pack_levels(self, base: np.ndarray, order: np.ndarray, panels: int) -> Levels:
        d, columns = base.shape[1], panels * width()
        words = np.empty(columns * word_bytes(d), np.int8)
        half, odd = np.empty(columns, np.int32), np.empty(columns, np.int32)
        residual, coarsest = np.empty(columns, np.float32), np.empty(panels, np.float32)
        native.call(
            "wager_knn_pack_levels", base, self.centre_D, self.scale, order, len(base), d, words, half, odd, residual, coarsest,
        )  # fmt: skip
        return Levels(words, half, odd, residual, coarsest)

    def chunks(self) -> Iterator[tuple[int, Panels]]:
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
        (rows, d), own_R = query_RD.shape, own_R.astype(np.int64)
        asked = Asked.of(query_RD, self)
        index = np.empty((rows, self.capacity), np.int32)
        low, high = np.empty((rows, self.capacity), np.float32), np.empty((rows, self.capacity), np.float32)
        count = np.where(asked.safe_R, 0, -1).astype(np.int32)
        threshold = np.where(asked.safe_R, np.finfo(np.float32).max, -np.inf).astype(np.float32)
        settled = 0
        for first, panels in self.chunks():
            for order, levels in asked.parts(panels):
                settled += native.call(
                    "wager_knn_scan", query_RD, asked.minus_twice_RD, asked.norm2_R, asked.norm_R, asked.place_RP,
                    asked.words if levels.words is not None else None, asked.length_R, asked.residual_R, own_R, order, len(order),
                    self.base_ND, panels.panel, panels.norm2, panels.norm, panels.longest, panels.low_box, panels.high_box,
                    *levels.arrays(), panels.row, first, len(panels.row), d, asked.place_RP.shape[1], np.int32(self.k),
                    np.int32(self.capacity), self.slack, float(self.scale), index, low, high, count, threshold,
                )  # fmt: skip
        distance, found = np.empty((rows, self.k)), np.empty((rows, self.k), np.int64)
        verified = np.zeros(1, np.int64)
        whole = native.call(
            "wager_knn_decide", query_RD, self.base_ND, own_R, rows, len(self.base_ND), d, np.int32(self.k), np.int32(self.capacity),
            index, low, count, threshold, distance, found, verified,
        )  # fmt: skip
        facts = {
            "verified_pairs": int(verified[0]) + int(settled),
            "settled_pairs": int(settled),
            "fp64_rows": int(whole),
        }
        return distance, found, facts


@dataclass(frozen=True)
class Asked:
    """Query rows as the scan reads them; `order` visits them by place. safe_R: float32 can hold the row."""

    minus_twice_RD: np.ndarray
    norm2_R: np.ndarray
    norm_R: np.ndarray
    place_RP: np.ndarray
    words: np.ndarray | None
    length_R: np.ndarray | None
    residual_R: np.ndarray
    order: np.ndarray
    safe_R: np.ndarray

    @staticmethod
    def of(query_RD: np.ndarray, scan: Scan) -> Asked:
        (rows, d), how = query_RD.shape, (scan.centre_D, scan.scale)
        low_RD, norm2_R, norm_R = (
            np.empty((rows, d), np.float32),
            np.empty(rows, np.float32),
            np.empty(rows, np.float32),
        )
        native.call("wager_knn_rows", query_RD, *how, rows, d, np.float32(-2), low_RD, norm2_R, norm_R)
        words, length_R, residual_R = None, None, np.zeros(rows, np.float32)
        if scan.int8:
            words, length_R = np.empty((rows, word_bytes(d)), np.uint8), np.empty(rows, np.int32)
            native.call("wager_knn_row_levels", query_RD, *how, rows, d, words, length_R, residual_R)
        safe_R = norm2_R <= SAFE_NORM2
        place_RP, order = scan.arrange(query_RD, safe_R)
        return Asked(low_RD, norm2_R, norm_R, place_RP, words, length_R, residual_R, order, safe_R)

    def parts(self, panels: Panels) -> Iterator[tuple[np.ndarray, Levels]]:
        """Rows to scan with levels, and rows to scan in float32: all without levels, else those far outside the base, whose levels say little."""
        if panels.levels.coarsest is None or self.words is None:
            yield self.order, NO_LEVELS
            return
        near_R = self.residual_R <= 2 * panels.levels.coarsest.max()
        for chosen_R, levels in ((near_R, panels.levels), (~near_R, NO_LEVELS)):
            if chosen_R.any():
                yield np.ascontiguousarray(self.order[chosen_R[self.order]]), levels


def width() -> int:
    """Columns of a panel."""
    return native.library().wager_knn_width()


def word_bytes(d: int) -> int:
    return -(-d // 4) * 4


def even_rows(n: int, count: int) -> np.ndarray:
    """Up to `count` row numbers, evenly spread."""
    return np.unique(np.linspace(0, n - 1, min(count, n)).astype(np.int64))


def directions(base_ND: np.ndarray, centre_D: np.ndarray, scale: float) -> np.ndarray:
    """Orthonormal directions (columns) along which a sample of the base varies most. Any would do for exactness; these rule out most."""
    sample_SD = (base_ND[even_rows(len(base_ND), DIRECTIONS_SAMPLE)] - centre_D) * scale
    d = base_ND.shape[1]
    if d <= DIRECT_FEATURES:
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
