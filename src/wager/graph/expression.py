"""Tensor algebra as index expressions (OLLIE, arXiv 2208.02025; EinNet, OSDI 2023).

A `Scope` is a loop nest: loops (their order is the output layout), summations, a body, and a zero padding around every loop's range. A body is
a `Read` of a tensor or of another scope (a stage: its result is an intermediate tensor), a scalar `Call` of bodies, or a constant. Reads
inside a tensor's padding are zero, beyond it they are an error. Every expression can be evaluated at any set of output points, which is
the reference semantics of everything derived from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from math import factorial, prod
from typing import TypeAlias, Union

import numpy as np

from wager.errors import UsageError
from wager.graph.index import Affine, Div, Mod

Loop = tuple[str, int, int]
CHUNK = 1 << 21


class OutOfRange(UsageError):
    """An expression reads beyond a tensor's padding."""


@dataclass(frozen=True)
class Tensor:
    """An input, or with `source` the named result of a matched operator or generated kernel. `pads`: zeros on both sides per dimension."""

    name: str
    shape: tuple[int, ...]
    pads: tuple[int, ...] = ()
    source: Routine | None = None

    @property
    def padding(self) -> tuple[int, ...]:
        return self.pads or (0,) * len(self.shape)


@dataclass(frozen=True)
class Routine:
    """How a tensor is computed: by a library operator (`matmul`, `conv`) or a generated kernel (`eoperator`); `expr` is what it means."""

    kind: str
    expr: Scope
    inputs: tuple[Tensor, ...] = ()
    args: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Read:
    object: Tensor | Scope
    index: tuple[Affine, ...]


@dataclass(frozen=True)
class Call:
    """A scalar function: add, sub, mul, div, maximum, or a unary function of the operator table."""

    fn: str
    args: tuple[Body, ...]
    attrs: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Number:
    value: float


Body: TypeAlias = Union[Read, Call, Number]  # noqa: UP007 - Call refers to it before it exists


@dataclass(frozen=True)
class Scope:
    """L loops, sum over sums, of body. Ranges are half open."""

    loops: tuple[Loop, ...]
    sums: tuple[Loop, ...]
    body: Body
    pads: tuple[int, ...] = ()

    @property
    def padding(self) -> tuple[int, ...]:
        return self.pads or (0,) * len(self.loops)

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        return {n: (a, b) for n, a, b in (*self.loops, *self.sums)}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(b - a for _, a, b in self.loops)

    @property
    def flops(self) -> int:
        return 2 * prod(b - a for _, a, b in (*self.loops, *self.sums))

    def __str__(self) -> str:
        return text(self)


def reads(body: Body) -> Iterator[Read]:
    """The reads of a body, left to right, not entering scopes."""
    if isinstance(body, Read):
        yield body
    elif isinstance(body, Call):
        for a in body.args:
            yield from reads(a)


def substitute(body: Body, by: Mapping[str, Affine], ranges: Mapping[str, tuple[int, int]] | None = None) -> Body:
    """Replaces iterators in the indices of a body (scopes bind their own iterators and stay)."""
    if isinstance(body, Read):
        return Read(body.object, tuple(i.substitute(by, ranges) for i in body.index))
    if isinstance(body, Call):
        return replace(body, args=tuple(substitute(a, by, ranges) for a in body.args))
    return body


def map_reads(body: Body, function) -> Body:
    """A body with every read replaced by `function(read)`."""
    if isinstance(body, Read):
        return function(body)
    if isinstance(body, Call):
        return replace(body, args=tuple(map_reads(a, function) for a in body.args))
    return body


def in_range(scope: Scope) -> bool:
    """Whether every read of this scope's body stays within the object's extent plus padding."""
    for read in reads(scope.body):
        for index, (low, high), pad in zip(read.index, extents(read.object), read.object.padding, strict=True):
            a, b = index.bounds(scope.ranges)
            if a < low - pad or b >= high + pad:
                return False
    return True


def extents(thing: Tensor | Scope) -> list[tuple[int, int]]:
    if isinstance(thing, Tensor):
        return [(0, s) for s in thing.shape]
    return [(a, b) for _, a, b in thing.loops]


def inputs_of(scope: Scope) -> dict[str, Tensor]:
    """The input tensors (without a source) by name, through stages and routines."""
    found: dict[str, Tensor] = {}
    for read in reads(scope.body):
        thing = read.object
        if isinstance(thing, Scope):
            found |= inputs_of(thing)
        elif thing.source is None:
            found.setdefault(thing.name, thing)
        else:
            found |= inputs_of(thing.source.expr)
    return found


# ── evaluation ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def evaluate(scope: Scope, tensors: Mapping[str, np.ndarray], points: np.ndarray | None = None) -> np.ndarray:
    """The values at `points` [P, loops] (absolute loop values), or the whole output. Raises OutOfRange."""
    if points is not None:
        return _Evaluator(tensors).scope(scope, [points[:, d] for d in range(points.shape[1])])
    grid = np.indices(scope.shape).reshape(len(scope.loops), -1)
    index = [grid[d] + scope.loops[d][1] for d in range(len(scope.loops))]
    return _Evaluator(tensors).scope(scope, index).reshape(scope.shape)


class _Evaluator:
    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self.tensors = tensors

    def scope(self, scope: Scope, index: Sequence[np.ndarray]) -> np.ndarray:
        """At points inside the loop ranges."""
        count = len(index[0]) if index else 1
        inner = prod(b - a for _, a, b in scope.sums)
        step = max(1, CHUNK // max(inner, 1))
        if count > step:
            return np.concatenate([self.scope(scope, [i[s : s + step] for i in index]) for s in range(0, count, step)])
        sums = np.indices([b - a for _, a, b in scope.sums]).reshape(len(scope.sums), inner)
        env = {name: np.repeat(i, inner) for (name, _, _), i in zip(scope.loops, index, strict=True)}
        env |= {name: np.tile(s + a, count) for (name, a, _), s in zip(scope.sums, sums, strict=True)}
        value = np.broadcast_to(self.body(scope.body, env, count * inner), (count * inner,))
        return value.reshape(count, inner).sum(axis=1)

    def body(self, body: Body, env: Mapping[str, np.ndarray], count: int) -> np.ndarray:
        if isinstance(body, Number):
            return np.full(count, body.value)
        if isinstance(body, Call):
            return call(body.fn, [self.body(a, env, count) for a in body.args], dict(body.attrs))
        return self.read(body, env, count)

    def read(self, read: Read, env: Mapping[str, np.ndarray], count: int) -> np.ndarray:
        index = [np.broadcast_to(i.evaluate(env), (count,)) for i in read.index]
        thing = read.object
        inside = np.ones(count, dtype=bool)
        for i, (low, high), pad in zip(index, extents(thing), thing.padding, strict=True):
            if count and (i.min() < low - pad or i.max() >= high + pad):
                raise OutOfRange(f"index {i.min()}..{i.max()} of a dimension [{low}, {high}) with padding {pad}")
            inside &= (i >= low) & (i < high)
        chosen = [i[inside] for i in index]
        if isinstance(thing, Scope):
            values = self.scope(thing, chosen)
        elif thing.source is not None:
            expr = thing.source.expr
            values = self.scope(expr, [c + a for c, (_, a, _) in zip(chosen, expr.loops, strict=True)])
        else:
            values = self.tensors[thing.name][tuple(chosen)]
        out = np.zeros(count, dtype=values.dtype)
        out[inside] = values
        return out


def call(fn: str, args: Sequence[np.ndarray], attrs: Mapping[str, float]) -> np.ndarray:
    from wager.graph.domains import Float64

    if fn in ("add", "sub", "mul", "div", "maximum"):
        return Float64().binary(fn, args[0], args[1])
    return Float64().unary(fn, args[0], dict(attrs))


# ── text and fingerprints ───────────────────────────────────────────────────────────────────────────────────────────────

SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}


def text(thing: Scope | Body | Tensor) -> str:
    """Readable form: {L n:0:1 h:0:7 S c:0:512 | A[n,h,c] * K[c]}."""
    if isinstance(thing, Scope):
        head = "L " + " ".join(
            f"{n}:{a}:{b}" + (f"~{p}" if p else "") for (n, a, b), p in zip(thing.loops, thing.padding, strict=True)
        )
        if thing.sums:
            head += " S " + " ".join(f"{n}:{a}:{b}" for n, a, b in thing.sums)
        return "{" + head + " | " + text(thing.body) + "}"
    if isinstance(thing, Tensor):
        return thing.name + ("~" + ",".join(map(str, thing.padding)) if any(thing.padding) else "")
    if isinstance(thing, Read):
        return f"{text(thing.object)}[{', '.join(map(str, thing.index))}]"
    if isinstance(thing, Call):
        if thing.fn in SIGNS:
            return "(" + f" {SIGNS[thing.fn]} ".join(text(a) for a in thing.args) + ")"
        return f"{thing.fn}({', '.join(text(a) for a in thing.args)})"
    return str(thing.value)


def fingerprint(scope: Scope) -> str:
    """Equal for expressions that differ in names, in the order of sums, or in the operands of a commutative call; different otherwise.

    A loop is known by its position and range, a sum by its range and where it occurs; ties between sums are broken by trying them all.
    """
    labels = {n: f"L{i}[{a},{b})" for i, (n, a, b) in enumerate(scope.loops)}
    colours = {n: f"S[{a},{b})" for n, a, b in scope.sums}
    for _ in range(2):
        colours = {n: f"{colours[n]}<{_canon(scope.body, labels | colours | {n: '@'})}>" for n in colours}
        short = {c: f"c{i}" for i, c in enumerate(sorted(set(colours.values())))}
        colours = {n: f"{short[colours[n]]}[{a},{b})" for n, a, b in scope.sums}
    groups: dict[str, list[str]] = {}
    for n, colour in sorted(colours.items(), key=lambda t: t[1]):
        groups.setdefault(colour, []).append(n)
    best = None
    if prod(factorial(len(g)) for g in groups.values()) > 5040:
        raise UsageError("an expression with that many alike summations has no fingerprint")
    for choice in product(*(permutations(g) for g in groups.values())):
        order = {n: f"s{i}" for i, n in enumerate(n for group in choice for n in group)}
        body = _canon(scope.body, labels | {n: f"{order[n]}{colours[n].split('[')[1]}" for n in order})
        best = body if best is None or body < best else best
    head = ",".join(f"[{a},{b})~{p}" for (_, a, b), p in zip(scope.loops, scope.padding, strict=True))
    return f"{{{head}|{sorted((a, b) for _, a, b in scope.sums)}|{best}}}"


def _canon(body: Body, labels: Mapping[str, str]) -> str:
    if isinstance(body, Number):
        return repr(body.value)
    if isinstance(body, Call):
        args = [_canon(a, labels) for a in body.args]
        if body.fn in ("add", "mul", "maximum"):
            args.sort()
        return f"{body.fn}{body.attrs or ''}({';'.join(args)})"
    thing = body.object
    if isinstance(thing, Scope):
        name = fingerprint(thing)
    elif thing.source is None:
        name = f"{thing.name}{thing.shape}~{thing.padding}"
    else:
        name = f"<{fingerprint(thing.source.expr)}~{thing.padding}>"
    return f"{name}[{','.join(_canon_index(i, labels) for i in body.index)}]"


def _canon_index(index: Affine, labels: Mapping[str, str]) -> str:
    parts = []
    for atom, c in index.terms:
        if isinstance(atom, Div):
            parts.append(f"{c}*({_canon_index(atom.of, labels)})/{atom.by}")
        elif isinstance(atom, Mod):
            parts.append(f"{c}*({_canon_index(atom.of, labels)})%{atom.by}")
        else:
            parts.append(f"{c}*{labels[atom]}")
    return "+".join(sorted(parts)) + f"+{index.const}"
