"""Derivation rules on index expressions (OLLIE, arXiv 2208.02025). Each is exact over the reals.

An expression under derivation is a chain of stages; rules act on the innermost one, which holds the computation. A rule yields the whole
expressions it can produce. Numbers are the field's: 1 split, 2 merge, 3 stage split, 4 stage merge, 5 range tightening, 9 magnification.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from wager.graph.expression import (
    Body,
    Call,
    Read,
    Scope,
    Tensor,
    extents,
    in_range,
    map_reads,
    reads,
    substitute,
)
from wager.graph.index import Affine, floordiv, it, remainder

Step = tuple[str, Scope]


def stages(scope: Scope) -> list[Scope]:
    """The chain from the outside in."""
    chain = [scope]
    while isinstance(chain[-1].body, Read) and isinstance(chain[-1].body.object, Scope):
        chain.append(chain[-1].body.object)
    return chain


def rebuild(chain: Sequence[Scope]) -> Scope:
    """The expression whose stages are `chain`; each keeps its index into the next."""
    scope = chain[-1]
    for outer in reversed(chain[:-1]):
        assert isinstance(outer.body, Read)
        scope = replace(outer, body=Read(scope, outer.body.index))
    return scope


def with_innermost(scope: Scope, inner: Scope) -> Scope:
    return rebuild([*stages(scope)[:-1], inner])


def fresh(scope: Scope, count: int) -> list[str]:
    """Names that occur nowhere in the expression."""
    used = set()
    for stage in stages(scope):
        used |= {n for n, _, _ in (*stage.loops, *stage.sums)}
    names, i = [], 0
    while len(names) < count:
        if f"i{i}" not in used:
            names.append(f"i{i}")
        i += 1
    return names


def wrap(scope: Scope, inner: Scope, index: Sequence[Affine]) -> Scope:
    """Puts `inner` under a stage that has the loops of the old innermost stage and reads `inner` at `index`."""
    old = stages(scope)[-1]
    return with_innermost(scope, Scope(old.loops, (), Read(inner, tuple(index)), old.pads))


def split_sum(scope: Scope) -> Iterator[Step]:
    """1: a summation of length n becomes k*x1 + x2, k in (2, 3)."""
    inner = stages(scope)[-1]
    for name, low, high in inner.sums:
        length = high - low
        for k in (2, 3):
            if low == 0 and length <= 10 and length % k == 0 and length > k:
                a, b = fresh(scope, 2)
                sums = [s for s in inner.sums if s[0] != name]
                by = {name: it(a) * k + it(b)}
                new = replace(inner, sums=((a, 0, length // k), (b, 0, k), *sums), body=substitute(inner.body, by))
                yield f"1 split {name} by {k}", with_innermost(scope, new)


def merge_variables(scope: Scope) -> Iterator[Step]:
    """2: two loops that occur in one dimension of one tensor as x + s*y."""
    inner = stages(scope)[-1]
    loops = {n: (a, b) for n, a, b in inner.loops}
    seen = set()
    for read in reads(inner.body):
        for index in read.index:
            if not index.plain:
                continue
            names = [n for n, _ in index.terms if n in loops]
            for x in names:
                for y in names:
                    a, c = index.coefficient(str(x)), index.coefficient(str(y))
                    if x == y or abs(a) != 1 or (x, y, a * c) in seen:
                        continue
                    seen.add((x, y, a * c))
                    step = a * c
                    two = _two_to_two(scope, inner, str(x), str(y), step)
                    if two is not None:
                        yield f"2 merge {x}{step:+d}*{y}", two
                    one = _two_to_one(scope, inner, str(x), str(y), step)
                    if one is not None:
                        yield f"2 merge {x}{step:+d}*{y} into one", one


def _two_to_two(scope: Scope, inner: Scope, x: str, y: str, step: int) -> Scope | None:
    """j1 = x + step*y, j2 = y. None when a read would leave a tensor's padding."""
    ranges = inner.ranges
    j1, j2 = fresh(scope, 2)
    low, high = (it(x) + it(y) * step).bounds(ranges)
    rest = [loop for loop in inner.loops if loop[0] not in (x, y)]
    loops = ((j1, low, high + 1), (j2, *ranges[y]), *rest)
    new = Scope(loops, inner.sums, substitute(inner.body, {x: it(j1) - it(j2) * step, y: it(j2)}))
    if not in_range(new):
        return None
    return wrap(scope, new, [it(x) + it(y) * step, it(y), *(it(n) for n, _, _ in rest)])


def _two_to_one(scope: Scope, inner: Scope, x: str, y: str, step: int) -> Scope | None:
    """z = x + step*y where step is the length of x, both ranges from 0: a mixed-radix number."""
    ranges = inner.ranges
    (xa, xb), (ya, yb) = ranges[x], ranges[y]
    if xa or ya or step != xb or xb < 2:
        return None
    (z,) = fresh(scope, 1)
    rest = [loop for loop in inner.loops if loop[0] not in (x, y)]
    top = {z: (0, xb * yb)}
    digits = {x: remainder(it(z), step), y: floordiv(it(z), step)}

    def index(old: Affine) -> Affine:
        a, b = old.coefficient(x), old.coefficient(y)
        if a and b == a * step:
            return old - it(x) * a - it(y) * b + it(z) * a
        return old.substitute(digits, ranges | top)

    body = map_reads(inner.body, lambda r: Read(r.object, tuple(index(i) for i in r.index)))
    new = Scope(((z, 0, xb * yb), *rest), inner.sums, body)
    if not in_range(new):
        return None
    return wrap(scope, new, [it(x) + it(y) * step, *(it(n) for n, _, _ in rest)])


def split_stage(scope: Scope) -> Iterator[Step]:
    """3: some summations move to an outer stage; the inner one loops over them."""
    inner = stages(scope)[-1]
    for size in range(1, len(inner.sums)):
        for chosen in combinations(inner.sums, size):
            rest = tuple(s for s in inner.sums if s not in chosen)
            new = Scope((*chosen, *inner.loops), rest, inner.body)
            outer = Scope(
                inner.loops, chosen, Read(new, tuple(it(n) for n, _, _ in (*chosen, *inner.loops))), inner.pads
            )
            yield f"3 sum {','.join(n for n, _, _ in chosen)} outside", with_innermost(scope, outer)


def merge_stages(scope: Scope) -> Scope:
    """4: pure re-indexing stages disappear, as often as possible. Paddings move onto the object that is read."""
    chain, at = stages(scope), 0
    while at + 1 < len(chain):
        merged = _merge_pair(chain[at], chain[at + 1])
        if merged is None:
            at += 1
        else:
            chain = [*chain[:at], merged, *chain[at + 2 :]]
            at = max(0, at - 1)
    return rebuild(chain)


def _merge_pair(outer: Scope, inner: Scope) -> Scope | None:
    if inner.sums or not isinstance(inner.body, Read) or not isinstance(outer.body, Read):
        return None
    by = {n: index for (n, _, _), index in zip(inner.loops, outer.body.index, strict=True)}
    thing, deeper = inner.body.object, inner.body.index
    pads = list(thing.padding)
    for (name, low, high), index in zip(inner.loops, outer.body.index, strict=True):
        a, b = index.bounds(outer.ranges)
        if a >= low and b < high:
            continue
        places = [d for d, i in enumerate(deeper) if name in i.iterators]
        if len(places) != 1 or deeper[places[0]] != it(name) + deeper[places[0]].const:
            return None
        d, shift = places[0], deeper[places[0]].const
        if extents(thing)[d] != (low + shift, high + shift):
            return None
        pads[d] = max(pads[d], low - a, b - high + 1)
    body = substitute(Read(replace(thing, pads=tuple(pads)), deeper), by, outer.ranges)
    return replace(outer, body=body)


def inline_sums(scope: Scope) -> Scope | None:
    """91: the chain as one stage, the innermost sums computed where they are read. None where a padded stage would be read outside."""
    chain = stages(merge_stages(scope))
    while len(chain) > 1:
        outer, inner = chain[-2], chain[-1]
        assert isinstance(outer.body, Read)
        for index, (_, low, high) in zip(outer.body.index, inner.loops, strict=True):
            a, b = index.bounds(outer.ranges)
            if a < low or b >= high:
                return None
        names = {n for n, _, _ in (*outer.loops, *outer.sums)}
        if names & {n for n, _, _ in inner.sums}:
            renamed = dict(zip((n for n, _, _ in inner.sums), fresh(scope, len(inner.sums)), strict=True))
            sums = tuple((renamed[n], a, b) for n, a, b in inner.sums)
            inner = replace(inner, sums=sums, body=substitute(inner.body, {o: it(n) for o, n in renamed.items()}))
        by = {n: index for (n, _, _), index in zip(inner.loops, outer.body.index, strict=True)}
        ranges = outer.ranges | {n: (a, b) for n, a, b in inner.sums}
        whole = Scope(outer.loops, (*outer.sums, *inner.sums), substitute(inner.body, by, ranges), outer.pads)
        chain = [*chain[:-2], whole]
    return chain[0]


def tighten(scope: Scope) -> Scope | None:
    """5: loops shrink to where the product can be non-zero; what was cut off becomes zero padding of the stage."""
    inner = stages(scope)[-1]
    if not is_product(inner.body):
        return None
    loops, pads, changed = [], [], False
    for (name, low, high), pad in zip(inner.loops, inner.padding, strict=True):
        a, b = low, high - 1
        for read in reads(inner.body):
            for index, (start, end) in zip(read.index, extents(read.object), strict=True):
                c = index.coefficient(name)
                if c == 0 or not index.plain:
                    continue
                rest_low, rest_high = (index - it(name) * c).bounds(inner.ranges)
                first, last = start - rest_high, end - 1 - rest_low
                if c > 0:
                    a, b = max(a, -(-first // c)), min(b, last // c)
                else:
                    a, b = max(a, -(-last // c)), min(b, first // c)
        if a > b:
            return None
        changed |= (a, b + 1) != (low, high)
        loops.append((name, a, b + 1))
        pads.append(max(pad, a - low + pad if a > low else 0, high - b - 1 + pad if b + 1 < high else 0))
    if not changed:
        return None
    tight = replace(inner, loops=tuple(loops), pads=tuple(pads))
    if inner is scope:  # the output keeps its shape
        return wrap(
            scope,
            replace(tight, pads=tuple(p - q for p, q in zip(pads, inner.padding, strict=True))),
            [it(n) for n, _, _ in loops],
        )
    return with_innermost(scope, tight)


def magnify(scope: Scope) -> Iterator[Step]:
    """9: a summation grows by one; the added terms read zero padding of at least one factor."""
    inner = stages(scope)[-1]
    if not is_product(inner.body):
        return
    for at, (name, low, high) in enumerate(inner.sums):
        if low != 0 or not 2 < high <= 10:
            continue
        sums = (*inner.sums[:at], (name, low, high + 1), *inner.sums[at + 1 :])
        last = inner.ranges | {name: (high, high + 1)}
        if not any(_misses(read, last) for read in reads(inner.body)):
            continue
        grown = inner.ranges | {name: (low, high + 1)}
        body = map_reads(inner.body, lambda r, grown=grown: _pad_for(r, grown))
        yield f"9 magnify {name} to {high + 1}", with_innermost(scope, replace(inner, sums=sums, body=body))


def _misses(read: Read, ranges: dict[str, tuple[int, int]]) -> bool:
    """Whether the read is certainly outside the object's extent."""
    for index, (start, end) in zip(read.index, extents(read.object), strict=True):
        a, b = index.bounds(ranges)
        if a >= end or b < start:
            return True
    return False


def _pad_for(read: Read, ranges: dict[str, tuple[int, int]]) -> Read:
    """The read with zero padding wide enough for every index in `ranges`."""
    pads = list(read.object.padding)
    for d, (index, (start, end)) in enumerate(zip(read.index, extents(read.object), strict=True)):
        a, b = index.bounds(ranges)
        pads[d] = max(pads[d], start - a, b - end + 1)
    return Read(replace(read.object, pads=tuple(pads)), read.index)


def is_product(body: Body) -> bool:
    """Whether a zero factor makes the body zero."""
    if isinstance(body, Call):
        return body.fn == "mul" and all(is_product(a) for a in body.args)
    return isinstance(body, Read)


def pad_for(scope: Scope) -> Scope:
    """A single-stage scope whose tensors carry the padding that its reads need."""
    return replace(scope, body=map_reads(scope.body, lambda r: _pad_for(r, scope.ranges)))


def tensors(body: Body) -> list[Tensor]:
    return [r.object for r in reads(body) if isinstance(r.object, Tensor)]
