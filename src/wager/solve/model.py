"""A linear program with integer columns as plain data, built row by row, and what a solver says about it.

Shape legend: C columns (variables), R rows (constraints).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.sparse import csr_array

from wager.errors import UsageError

INFINITE = float("inf")
Status = Literal["optimal", "feasible", "infeasible", "unbounded", "unknown"]


@dataclass
class LinearModel:
    """maximise or minimise sum_c objective_c x_c with row_lower <= A x <= row_upper and lower <= x <= upper, some x integer."""

    maximize: bool = False
    names: list[str] = field(default_factory=list)
    objective: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    row_names: list[str] = field(default_factory=list)
    row_lower: list[float] = field(default_factory=list)
    row_upper: list[float] = field(default_factory=list)
    _entries: list[tuple[list[int], list[float]]] = field(default_factory=list)

    def add(
        self, name: str, lower: float = 0.0, upper: float = INFINITE, objective: float = 0.0, integer: bool = False
    ) -> int:
        """A new column; returns its index. Raises UsageError when no value fits its bounds."""
        if not lower <= upper or np.isnan(objective):
            raise UsageError(f"column {name}: bounds [{lower}, {upper}] or objective {objective} make no sense")
        self.names.append(name)
        self.objective.append(float(objective))
        self.lower.append(float(lower))
        self.upper.append(float(upper))
        self.integer.append(integer)
        return len(self.names) - 1

    def binary(self, name: str, objective: float = 0.0) -> int:
        return self.add(name, 0, 1, objective, integer=True)

    def row(
        self, terms: Mapping[int, float] | Sequence[tuple[int, float]], lower: float = -INFINITE,
        upper: float = INFINITE, name: str = "",
    ) -> int:  # fmt: skip
        """lower <= sum of coefficient times column <= upper; a column named twice counts with the sum. Returns the row's index."""
        pairs = list(terms.items()) if isinstance(terms, Mapping) else list(terms)
        if any(not 0 <= c < len(self.names) for c, _ in pairs):
            raise UsageError(f"row {name or len(self.row_lower)} names a column that does not exist")
        self._entries.append(([c for c, _ in pairs], [float(v) for _, v in pairs]))
        self.row_lower.append(float(lower))
        self.row_upper.append(float(upper))
        self.row_names.append(name or f"r{len(self.row_lower) - 1}")
        return len(self.row_lower) - 1

    @property
    def matrix_RC(self) -> csr_array:
        counts = [len(columns) for columns, _ in self._entries]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        columns = np.array([c for cs, _ in self._entries for c in cs], np.int32)
        values = np.array([v for _, vs in self._entries for v in vs], float)
        matrix = csr_array((values, columns, starts), shape=(len(counts), len(self.names)))
        matrix.sum_duplicates()
        return matrix

    def evaluate(self, x_C: np.ndarray) -> float:
        return float(np.dot(self.objective, x_C))

    def violation(self, x_C: np.ndarray) -> float:
        """The largest amount by which `x_C` breaks a row, a bound or integrality; 0 for a feasible point. Independent of any solver."""
        x = np.asarray(x_C, float)
        parts = [np.array(self.lower) - x, x - np.array(self.upper)]
        if self.row_lower:
            activity_R = self.matrix_RC @ x
            parts += [np.array(self.row_lower) - activity_R, activity_R - np.array(self.row_upper)]
        whole = np.array(self.integer, bool)
        parts.append(np.abs(x - np.round(x))[whole])
        return max((float(p.max()) for p in parts if p.size), default=0.0) if len(x) else 0.0


@dataclass(frozen=True)
class Solution:
    """`x` and `value` are the best found (absent when none was); `bound` is proven: no solution is better than it.

    `gap` is |value - bound| relative to the larger of the two, infinite without a value. `duals` (rows) come with a linear
    program only; a dual is the change of the optimum per unit of the row's binding side.
    """

    status: Status
    value: float | None
    bound: float
    x: np.ndarray | None
    seconds: float
    solver: str
    duals: np.ndarray | None = None

    @property
    def found(self) -> bool:
        return self.x is not None

    @property
    def gap(self) -> float:
        if self.value is None or not np.isfinite(self.bound):
            return INFINITE
        return abs(self.value - self.bound) / max(abs(self.value), abs(self.bound), 1e-12)
