"""Rules for loops that are read in steps: residue classes become a dimension of their own (OLLIE's rules 1 and 7, arXiv 2208.02025)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from wager.compile.ollie.rules import Step, fresh, pad_for, stages, tensors, wrap
from wager.graph.expression import Body, Read, Routine, Scope, Tensor, map_reads, reads, substitute
from wager.graph.index import Affine, floordiv, it, remainder


def undilate(scope: Scope) -> Iterator[Step]:
    """1 and 7: where windows skip (x + k*r), the loop becomes (x1, x2) with x = k*x1 + x2 and the tensor's dimension (quotient, remainder).

    The window is then dense in the quotient, and the remainder only counts, like the images of a batch. Refused where k does not divide
    the dimension, the loop or the offset, or the loop occurs elsewhere.
    """
    inner = stages(scope)[-1]
    loops = {n: (a, b) for n, a, b in inner.loops}
    for read, thing, d, name, uses in _unit_loops(inner):
        index, (low, high) = read.index[d], loops[name]
        steps = {c for n, c in index.terms if n not in loops}
        k = min(steps, default=1)
        if k < 2 or low or uses != 1 or len(index.terms) != len(steps) + 1:
            continue
        if not any(length % k for length in (*steps, index.const, thing.shape[d], high)):
            yield f"7 {thing.name} by {k} along {d}", _by_residue(scope, inner, read, d, name, k)


def _unit_loops(inner: Scope) -> Iterator[tuple[Read, Tensor, int, str, int]]:
    """(read, its tensor, dimension, loop that it reads there with stride 1, how many indices of the stage the loop occurs in)."""
    loops = {n for n, _, _ in inner.loops}
    everywhere = [i for r in reads(inner.body) for i in r.index]
    for read in reads(inner.body):
        if not isinstance(read.object, Tensor):
            continue
        for d, index in enumerate(read.index):
            for name in [str(n) for n, c in index.terms if n in loops and c == 1] if index.plain else []:
                yield read, read.object, d, name, sum(name in i.iterators for i in everywhere)


def by_remainder(thing: Tensor | Scope, d: int, k: int) -> Tensor:
    """The tensor with dimension d as (quotient, remainder) by k: a generated re-layout of what it is made from.

    Where k does not divide the dimension the last quotient is filled up with zeros. The padding holds for every remainder by itself.
    """
    assert isinstance(thing, Tensor)
    count = -(-thing.shape[d] // k)
    shape = (*thing.shape[:d], count, k, *thing.shape[d + 1 :])
    pads = (*thing.padding[:d], -(-thing.padding[d] // k), 0, *thing.padding[d + 1 :])
    loops = tuple((f"l{i}", 0, s) for i, s in enumerate(shape))
    index = [it(n) for n, _, _ in loops]
    index[d : d + 2] = [index[d] * k + index[d + 1]]
    beyond = tuple(count * k - thing.shape[d] if i == d else 0 for i in range(len(thing.shape)))
    bare: Body = Read(replace(thing, pads=beyond if any(beyond) else ()), tuple(index))
    if thing.source is not None and thing.source.kind == "eoperator" and not any(beyond):
        old = thing.source.expr
        by = {n: i for (n, _, _), i in zip(old.loops, index, strict=True)}
        bare = substitute(old.body, by, {n: (a, b) for n, a, b in loops})
    expr = Scope(loops, (), bare)
    return Tensor(f"{thing.name}_{d}by{k}", shape, pads, Routine("eoperator", expr, tuple(tensors(bare))))


def residues(scope: Scope) -> Iterator[Step]:
    """1 and 7 for a loop that several tensors read: where one reads it in steps (x + k*w), x becomes (x1, x2) with x = k*x1 + x2.

    That tensor's dimension becomes (quotient, remainder); rows of one remainder are then neighbours, with zero padding at both ends of each
    remainder. k need not divide anything but the offset and the other steps: what is added is zero and is not read.
    """
    inner = stages(scope)[-1]
    lows = {n: low for n, low, _ in inner.loops}
    for read, thing, d, name, uses in _unit_loops(inner):
        index = read.index[d]
        steps = [abs(c) for n, c in index.terms if n != name]
        k = min(steps, default=1)
        if k > 1 and uses > 1 and not lows[name] and not any(c % k for c in steps) and index.const % k == 0:
            yield f"7 {thing.name} by {k} along {d}", _by_residue(scope, inner, read, d, name, k)


def _by_residue(scope: Scope, inner: Scope, read: Read, d: int, name: str, k: int) -> Scope:
    a, b = fresh(scope, 2)
    at = next(i for i, v in enumerate(inner.loops) if v[0] == name)
    length = inner.loops[at][2]
    loops = (*inner.loops[:at], (a, 0, -(-length // k)), (b, 0, k), *inner.loops[at + 1 :])
    rest = read.index[d] - it(name)
    quotient = it(a) + Affine(tuple((n, c // k) for n, c in rest.terms), rest.const // k)
    moved = Read(by_remainder(read.object, d, k), (*read.index[:d], quotient, it(b), *read.index[d + 1 :]))
    body = map_reads(inner.body, lambda r: moved if r == read else r)
    place = [it(n) for n, _, _ in inner.loops]
    place[at : at + 1] = [floordiv(it(name), k), remainder(it(name), k)]
    split = Scope(loops, inner.sums, substitute(body, {name: it(a) * k + it(b)}))
    return wrap(scope, pad_for(split), place)
