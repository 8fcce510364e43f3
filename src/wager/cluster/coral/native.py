"""What is compiled: the search of `templates` (every multiset of machines, its best pipeline) and the covering knapsack of `lagrange`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from wager.native import build

SOURCES = [Path(__file__).parent / "cpp" / name for name in ("templates.cpp", "cover.cpp")]
MOST_MACHINES, MOST_UNITS = 8, 64  # as in the source


@dataclass(frozen=True)
class Grid:
    """Stages of a pipeline have `units` of the latency budget together, each 1 to `most`; tables_KCL[k - 1]: [C, L + 1] tokens/s with k units."""

    units: int
    tables_KCL: np.ndarray

    @property
    def most(self) -> int:
        return len(self.tables_KCL)


@dataclass(frozen=True)
class Found:
    """By multiset: tokens/s (0: none, or no more than its parts), stage of each machine, units of each stage, grid, whether it beats its parts."""

    rates_U: np.ndarray
    stages_UN: np.ndarray
    units_UN: np.ndarray
    grids_U: np.ndarray
    useful_U: np.ndarray


@cache
def library() -> ctypes.CDLL:
    """Raises BuildError when this machine has no compiler."""
    lib = build.load("wager_coral", SOURCES)
    lib.wager_coral_cover.restype = ctypes.c_double
    return lib


def search(machines_UN: np.ndarray, kinds: int, fits_U: np.ndarray, grids: Sequence[Grid], every: bool) -> Found:
    """machines_UN: all multisets as `templates.multisets` orders them; those that do not fit are not looked at. `every`: the exact rate also
    of those that two smaller ones replace."""
    total, most = machines_UN.shape
    layers = grids[0].tables_KCL.shape[2] - 1
    counts = np.bincount((machines_UN < kinds).sum(1), minlength=most + 1)[1:].astype(np.int64)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    machines, fits = np.ascontiguousarray(machines_UN, np.int8), np.ascontiguousarray(fits_U, np.uint8)
    tables = [np.ascontiguousarray(g.tables_KCL, np.float64) for g in grids]
    pointers = (ctypes.c_void_p * len(grids))(*(t.ctypes.data for t in tables))
    shares = np.array([[g.units, g.most] for g in grids], np.int32).T.copy()
    rates, together = np.zeros(total), np.zeros(total)
    stages, units = np.full((total, most), -1, np.int8), np.zeros((total, most), np.int8)
    grid, useful = np.full(total, -1, np.int8), np.zeros(total, np.uint8)
    library().wager_coral_templates(
        kinds, layers, most, len(grids), _at(shares[0]), _at(shares[1]), pointers, _at(first), _at(counts), _at(machines), _at(fits),
        int(every), _at(rates), _at(together), _at(stages), _at(units), _at(grid), _at(useful),
    )  # fmt: skip
    return Found(rates, stages, units, grid, useful.astype(bool))


def cover(units: int, cost_K: np.ndarray, rate_K: np.ndarray, most_K: np.ndarray) -> tuple[float, np.ndarray]:
    """(least cost of `units` or more, copies of each column): rates are whole numbers; `most_K` below 0 is no limit. Infinite cost: too few."""
    costs, rates, most = (
        np.ascontiguousarray(a, t) for a, t in ((cost_K, float), (rate_K, np.int32), (most_K, np.int32))
    )
    counts = np.zeros(len(costs), np.int32)
    least = library().wager_coral_cover(units, len(costs), _at(costs), _at(rates), _at(most), _at(counts))
    return float(least), counts


def _at(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
