"""Floating-point check with a bound that knows how much was accumulated.

The reference is evaluated in float64 together with a running error bound for float32: every operator adds the rounding of its own result
(gamma_n for a sum of n terms) to what its operands' errors become. A candidate may reorder sums, so its own error obeys the same bound; the
two may differ by `slack` times it. No fixed tolerance is involved: a fixed one rejects valid tilings at large sums and passes small bugs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wager.graph.domains import FLOAT_UNARY, Float64, NotInDomain
from wager.graph.interpret import last_uses, run
from wager.graph.program import Program

UNIT = 2.0**-24
FUNCTION_ULPS = 8.0
"""How many units in the last place an approximated function (exp, tanh, ...) may be off."""
VIEWS = ("expand", "permute", "slice")
STORED = {"float32": (0.0, 0.0), "float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 0.0)}
"""What storing a result in a type adds to float32's rounding: a part of the value, and half the step near zero."""


@dataclass(frozen=True)
class Rounded:
    """A value and a bound of its float32 error."""

    value: np.ndarray
    error: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


class RunningError:
    """Float64 values with first-order error bounds: arithmetic and sums in float32, every result stored in `dtype`."""

    def __init__(self, dtype: str = "float32") -> None:
        """Raises KeyError for a type without a bound."""
        self.float = Float64()
        self.part, self.least = STORED[dtype]

    def _stored(self, x: Rounded) -> Rounded:
        return Rounded(x.value, x.error + self.part * np.abs(x.value) + self.least) if self.part else x

    def constant(self, value: float) -> Rounded:
        x = np.asarray(float(value))
        return Rounded(x, np.abs(x) * UNIT)

    def lift(self, x: np.ndarray) -> Rounded:
        """An exact float32 input."""
        return Rounded(x, np.zeros_like(x))

    def move(self, function: Callable, x: Rounded) -> Rounded:
        return Rounded(function(x.value), function(x.error))

    def combine(self, function: Callable, values: list[Rounded]) -> Rounded:
        return Rounded(function([v.value for v in values]), function([v.error for v in values]))

    def unary(self, op: str, x: Rounded, attrs: dict[str, Any]) -> Rounded:
        """The function's change over [x - e, x + e], from its ends and the centre, plus its own rounding."""
        value = FLOAT_UNARY[op](x.value, **attrs)
        with np.errstate(all="ignore"):
            low, high = FLOAT_UNARY[op](x.value - x.error, **attrs), FLOAT_UNARY[op](x.value + x.error, **attrs)
            spread = 1.5 * np.fmax(np.abs(low - value), np.abs(high - value))
        return self._stored(Rounded(value, spread + FUNCTION_ULPS * UNIT * np.abs(value)))

    def binary(self, op: str, a: Rounded, b: Rounded) -> Rounded:
        value = self.float.binary(op, a.value, b.value)
        if op in ("add", "sub", "maximum"):
            error = a.error + b.error
        elif op == "mul":
            error = np.abs(a.value) * b.error + np.abs(b.value) * a.error + a.error * b.error
        elif op == "div":
            floor = np.maximum(np.abs(b.value) - b.error, 1e-300)
            error = (a.error + np.abs(value) * b.error) / floor
        else:
            raise NotInDomain(f"{op} has no running error")
        return self._stored(Rounded(value, error + UNIT * np.abs(value)))

    def matmul(self, a: Rounded, b: Rounded) -> Rounded:
        size_a, size_b = np.abs(a.value), np.abs(b.value)
        count = a.value.shape[-1]
        error = (
            np.matmul(size_a, b.error) + np.matmul(a.error, size_b + b.error) + gamma(count) * np.matmul(size_a, size_b)
        )
        return self._stored(Rounded(np.matmul(a.value, b.value), error))

    def sum(self, x: Rounded, axes: tuple[int, ...]) -> Rounded:
        count = int(np.prod([x.shape[a] for a in axes]))
        size = np.abs(x.value).sum(axis=axes, keepdims=True)
        total = x.value.sum(axis=axes, keepdims=True)
        return self._stored(Rounded(total, x.error.sum(axis=axes, keepdims=True) + gamma(count) * size))

    def max(self, x: Rounded, axes: tuple[int, ...]) -> Rounded:
        return Rounded(x.value.max(axis=axes, keepdims=True), x.error.max(axis=axes, keepdims=True))


def gamma(count: int) -> float:
    """The classical factor of a sum of `count` products."""
    return (count + 1) * UNIT / (1 - (count + 1) * UNIT)


@dataclass(frozen=True)
class FloatVerdict:
    """`worst`: the largest difference as a multiple of the bound; below 1 is within it."""

    equal: bool
    worst: float

    def __bool__(self) -> bool:
        return self.equal


def compare(
    program: Program,
    inputs: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    slack: float = 2.0,
    dtype: str = "float32",
) -> FloatVerdict:
    """Whether `outputs` lie within `slack` running error bounds of the program's float64 result for these inputs.

    `dtype`: what values are stored in (float32, float16 or bfloat16); sums are held in float32 in any case.
    """
    return judge(expected(program, inputs, dtype), outputs, slack)


def expected(program: Program, inputs: Sequence[np.ndarray], dtype: str = "float32") -> list[Rounded]:
    """The program's float64 results for these inputs (exact in `dtype`), with their error bounds."""
    domain = RunningError(dtype)
    return run(program, [domain.lift(np.asarray(x, dtype=np.float64)) for x in inputs], domain)


def memory_needed(program: Program) -> int:
    """About how many bytes `compare` holds at most: of every value in use its float64 and its bound, of an operator's operands and result
    as much again for what comes up on the way. A view takes no memory and keeps what it looks at."""
    last, held, most = last_uses(program), 0, 0
    for at in reversed(range(len(program.nodes))):
        if program.nodes[at].op in VIEWS:
            viewed = program.nodes[at].inputs[0]
            last[viewed] = max(last[viewed], last[at])
    sizes = [0 if node.op in VIEWS else 16 * math.prod(node.shape) for node in program.nodes]
    ends: dict[int, int] = {}
    for size, end in zip(sizes, last, strict=True):
        ends[end] = ends.get(end, 0) + size
    for at, node in enumerate(program.nodes):
        held += sizes[at]
        most = max(most, held + sizes[at] + sum(sizes[i] for i in node.inputs))
        held -= ends.get(at, 0)
    return most


def judge(wanted: Sequence[Rounded], outputs: Sequence[np.ndarray], slack: float = 2.0) -> FloatVerdict:
    """Whether `outputs` lie within `slack` error bounds of what is `wanted`."""
    worst = 0.0
    for want, got in zip(wanted, outputs, strict=True):
        if not np.all(np.isfinite(got)) or got.shape != want.shape:
            return FloatVerdict(False, np.inf)
        gap = np.abs(np.asarray(got, dtype=np.float64) - want.value)
        bound = slack * (want.error + 1e-37)
        worst = max(worst, float((gap / bound).max(initial=0)))
    return FloatVerdict(worst <= 1, worst)
