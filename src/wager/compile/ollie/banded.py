"""Recognises products with a band of a matrix (Longformer's attention) in the innermost stage by the iterator mapping table.

With T1[..] * T2[..] summed, a row iterator m occurs in T1, in the output, and in one dimension of T2 together with a diagonal iterator d, both
with stride 1. If d is a loop and only T2's, the sum runs over what both share: out[b,m,d] = sum over f of T1[b,m,f] * T2[b,m+d+offset,f] (G2BMM). If d
is summed and T1 has it too, T2's other loops are the features: out[b,m,f] = sum over d of T1[b,m,d] * T2[b,m+d+offset,f] (GBMM). Surplus iterators of a
row of the table are fused into one. Other strides are near misses: rule 7 (`rules.residues`) brings a dilated band here. Source: arXiv 2208.02025.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from wager.compile.ollie.match import flat, injective, length, operands, relayout
from wager.compile.ollie.rules import stages, with_innermost
from wager.graph.expression import Call, Loop, Read, Routine, Scope, Tensor
from wager.graph.index import it
from wager.graph.lower.banded import MAX_DIAGONALS, BandedProduct, Rows
from wager.graph.lower.code import strides


@dataclass(frozen=True)
class _Roles:
    """What every iterator is; `dim` is T2's dimension with the band, `offset` what a row starts at, with rows and diagonals from 0."""

    kind: str
    row: Loop
    diagonal: Loop
    batch: list[Loop]
    features: list[Loop]
    dim: int
    offset: int


def match_banded(scope: Scope, tag: str) -> Iterator[tuple[str, Scope]]:
    """The expression with its innermost stage replaced by a banded product of re-laid-out inputs, either operand as T1."""
    inner = stages(scope)[-1]
    pair = operands(inner)
    for a, b in (pair, pair[::-1]) if pair else ():
        for roles in _roles(inner, a, b):
            done = _banded(inner, a, b, roles, tag)
            if done is not None:
                name = "G2BMM" if roles.kind == "products" else "GBMM"
                sizes = f"{length(roles.batch)}x{length([roles.row])}, {length([roles.diagonal])} diagonals"
                yield f"8 {name} {sizes} of {length(roles.features)} features", with_innermost(scope, done)


def _names(read: Read) -> set[str]:
    return set().union(*(i.iterators for i in read.index)) if read.index else set()


def _roles(inner: Scope, a: Read, b: Read) -> Iterator[_Roles]:
    loops, sums = {v[0]: v for v in inner.loops}, {v[0]: v for v in inner.sums}
    in_a, in_b = _names(a), _names(b)
    for d, index in enumerate(b.index):
        if not index.plain or len(index.terms) != 2 or any(c != 1 for _, c in index.terms):
            continue
        pair = [str(n) for n, _ in index.terms]
        for m, w in (pair, pair[::-1]):
            if m not in loops or m not in in_a or sum(m in i.iterators for i in b.index) > 1:
                continue
            if w in loops and w not in in_a:
                kind, features = "products", [v for v in inner.sums]
                fits = all(n in in_a and n in in_b for n in sums)
            elif set(sums) == {w} and w in in_a:
                kind, features = "sums", [v for v in inner.loops if v[0] in in_b and v[0] not in in_a]
                fits = True
            else:
                continue
            batch = [v for v in inner.loops if v[0] in in_a & in_b and v[0] != m]
            rest = {m, *(v[0] for v in batch)} | ({w} if kind == "products" else {v[0] for v in features})
            if fits and features and rest == set(loops):
                row, diagonal = loops[m], (loops | sums)[w]
                yield _Roles(kind, row, diagonal, batch, features, d, index.const + row[1] + diagonal[1])


def _banded(inner: Scope, a: Read, b: Read, roles: _Roles, tag: str) -> Scope | None:
    """The stage as a re-indexed routine; None where an input is not reached once per element or T2's other dimensions are no plain iterators."""
    thing, others = b.object, {v[0]: v for v in (*roles.batch, *roles.features)}
    assert isinstance(thing, Tensor)
    if not injective(a, [*inner.loops, *inner.sums]) or length([roles.diagonal]) > MAX_DIAGONALS:
        return None
    for d, index in enumerate(b.index):
        if d != roles.dim and (len(index.terms) != 1 or index != it(str(index.terms[0][0]))):
            return None
        if d != roles.dim and others.pop(str(index.terms[0][0]), ("", 0, 0))[1:] != (0, thing.shape[d]):
            return None
    if others:
        return None
    last = ("ff", roles.features) if roles.kind == "products" else ("fd", [roles.diagonal])
    left, _ = relayout(a, [("fb", roles.batch), ("fm", [roles.row]), last], f"{tag}l")
    whole = Read(replace(thing, pads=()), tuple(it("row") if d == roles.dim else i for d, i in enumerate(b.index)))
    rows = ("row", 0, thing.shape[roles.dim])
    right, _ = relayout(whole, [("fb", roles.batch), ("fj", [rows]), ("ff", roles.features)], f"{tag}r")
    return _routine(inner, left, right, roles, tag)


def _routine(inner: Scope, left: Tensor, right: Tensor, roles: _Roles, tag: str) -> Scope:
    m, d, f = length([roles.row]), length([roles.diagonal]), length(roles.features)
    beyond = max(0, -roles.offset, m + d - 2 + roles.offset - right.shape[1] + 1)
    padded = replace(right, pads=(0, beyond, 0))
    diagonal, feature = ("fd", 0, d), ("ff", 0, f)
    loop, summed = (diagonal, feature) if roles.kind == "products" else (feature, diagonal)
    index = (it("fb"), it("fm") + it("fd") + roles.offset, it("ff"))
    body = Call("mul", (Read(left, (it("fb"), it("fm"), it(summed[0]))), Read(padded, index)))
    expr = Scope((("fb", 0, length(roles.batch)), ("fm", 0, m), loop), (summed,), body)
    args = (("kind", roles.kind), ("offset", roles.offset))
    result = Tensor(f"{tag}o", expr.shape, (), Routine("banded", expr, (left, right), args))
    kept = [roles.diagonal] if roles.kind == "products" else roles.features
    return Scope(inner.loops, (), Read(result, (flat(roles.batch), flat([roles.row]), flat(kept))), inner.pads)


def rows_of(tensor: Tensor) -> tuple[Tensor, Rows] | None:
    """The tensor that holds the rows of a re-laid-out [batch, rows, width] operand, and where they start in it; None when rows are no runs.

    Indices are evaluated for every row, through re-layouts of re-layouts, so that none of them has to be copied.
    """
    if tensor.source is None or tensor.source.kind != "eoperator":
        return (tensor, Rows.contiguous(*tensor.shape)) if len(tensor.shape) == 3 else None
    expr = tensor.source.expr
    batch, count = (b - a for _, a, b in expr.loops[:2])
    points = np.indices((batch, count)).reshape(2, -1)
    env = {n: points[i] + a for i, (n, a, _) in enumerate(expr.loops[:2])}
    inside = np.ones(batch * count, bool)
    while True:
        read, (last, low, high) = expr.body, expr.loops[-1]
        if expr.sums or any(expr.padding) or not isinstance(read, Read) or not isinstance(read.object, Tensor):
            return None
        thing, index = read.object, read.index
        if (low, index[-1]) != (0, it(last)) or thing.shape[-1] != high or any(last in i.iterators for i in index[:-1]):
            return None
        at = [np.broadcast_to(i.evaluate(env), inside.shape) for i in index[:-1]]
        for i, size in zip(at, thing.shape, strict=False):
            inside &= (i >= 0) & (i < size)
        if thing.source is None or thing.source.kind != "eoperator":
            starts = sum(
                (i * s for i, s in zip(at, strides(thing.shape), strict=False)), np.zeros_like(inside, np.int64)
            )
            return replace(thing, pads=()), Rows(np.where(inside, starts, -1).reshape(batch, count))
        expr = thing.source.expr
        env = {n: np.where(inside, i, 0) + a for (n, a, _), i in zip(expr.loops, at, strict=False)}


def placed(scope: Scope) -> Rows | None:
    """Where the rows of the banded product that `scope` re-indexes go in its result (-1: nowhere); None when it does more than move rows."""
    read = scope.body
    if scope.sums or any(scope.padding) or not isinstance(read, Read) or not isinstance(read.object, Tensor):
        return None
    thing, (last, low, high) = read.object, scope.loops[-1]
    if thing.source is None or thing.source.kind != "banded" or (low, read.index[-1]) != (0, it(last)):
        return None
    if high != thing.shape[-1] or any(last in i.iterators for i in read.index[:-1]):
        return None
    outer = [b - a for _, a, b in scope.loops[:-1]]
    points = np.indices(outer).reshape(len(outer), -1)
    env = {n: points[i] + a for i, (n, a, _) in enumerate(scope.loops[:-1])}
    count = points.shape[1]
    batch, row = (np.broadcast_to(i.evaluate(env), (count,)) for i in read.index[:-1])
    starts = np.full(thing.shape[:2], -1, np.int64)
    inside = (batch >= 0) & (batch < thing.shape[0]) & (row >= 0) & (row < thing.shape[1])
    if not inside.all() or len(np.unique(batch * thing.shape[1] + row)) != count:
        return None
    starts[batch, row] = np.arange(count) * high
    return Rows(starts)


def product(
    tensor: Tensor, left: Rows, right: Rows, out: Rows | None = None, shape: tuple[int, ...] = ()
) -> BandedProduct:
    """The native form of a matched banded product; without `out` the result lies as the routine says."""
    assert tensor.source is not None
    args, expr = dict(tensor.source.args), tensor.source.expr
    sizes = {n: b - a for n, a, b in (*expr.loops, *expr.sums)}
    out = out or Rows.contiguous(*expr.shape)
    return BandedProduct(
        str(args["kind"]), left, right, out, sizes["ff"], sizes["fd"], int(str(args["offset"])), shape or expr.shape
    )
