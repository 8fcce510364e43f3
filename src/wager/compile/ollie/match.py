"""Recognises library operators in the innermost stage by the iterator mapping table, and repairs what nearly matches.

For a sum of T1[..] * T2[..] every iterator is a row of a table: which of T1, T2 and the output it occurs in. A matmul needs rows
{T1, out} = m, {T2, out} = n, {T1, T2} = k, {T1, T2, out} = batch. Surplus iterators of a row are fused into one; the re-layout of the inputs
that this needs is a generated kernel (done once for weights, nothing at all where it is only a view). A convolution also needs output
positions and window positions sharing a dimension of T1. Source: arXiv 2208.02025.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from wager.compile.ollie.rules import stages, with_innermost
from wager.graph.expression import Call, Loop, Read, Routine, Scope, Tensor
from wager.graph.index import Affine, floordiv, it, remainder

Operands = tuple[Read, Read]


def operands(scope: Scope) -> Operands | None:
    """The two tensor reads of a product with summation."""
    body = scope.body
    if not (isinstance(body, Call) and body.fn == "mul" and len(body.args) == 2 and scope.sums):
        return None
    a, b = body.args
    if isinstance(a, Read) and isinstance(b, Read) and isinstance(a.object, Tensor) and isinstance(b.object, Tensor):
        return a, b
    return None


def table(scope: Scope, pair: Operands) -> dict[str, list[Loop]]:
    """Rows of the iterator mapping table: m, n, k, batch, and `other` for what no matmul has."""
    names = [set().union(*(i.iterators for i in read.index)) if read.index else set() for read in pair]
    rows: dict[str, list[Loop]] = {"m": [], "n": [], "k": [], "batch": [], "other": []}
    for loop in scope.loops:
        a, b = loop[0] in names[0], loop[0] in names[1]
        rows["batch" if a and b else "m" if a else "n" if b else "other"].append(loop)
    for loop in scope.sums:
        rows["k" if loop[0] in names[0] and loop[0] in names[1] else "other"].append(loop)
    return rows


def injective(read: Read, loops: Sequence[Loop]) -> bool:
    """Every element is reached by one iterator tuple: by rising stride, stride * length stays within the next stride."""
    for index in read.index:
        if not index.plain:
            return False
        lengths = {n: b - a for n, a, b in loops}
        used = sorted((abs(c), lengths[str(n)]) for n, c in index.terms if n in lengths)
        if any(s * n > t for (s, n), (t, _) in zip(used, used[1:], strict=False)):
            return False
    counts: dict[str, int] = {}
    for index in read.index:
        for n in index.iterators:
            counts[n] = counts.get(n, 0) + 1
    return all(c == 1 for c in counts.values())


def flat(loops: Sequence[Loop]) -> Affine:
    """The position of an iterator tuple in row-major order."""
    total = Affine()
    for n, a, b in loops:
        total = total * (b - a) + (it(n) - a)
    return total


def length(loops: Sequence[Loop]) -> int:
    return prod(b - a for _, a, b in loops)


def unflatten(name: str, loops: Sequence[Loop]) -> dict[str, Affine]:
    """Each iterator as digits of the fused one."""
    by, size, total = {}, 1, length(loops)
    ranges = {name: (0, total)}
    for n, a, b in reversed(loops):
        by[n] = remainder(floordiv(it(name), size, ranges), b - a, ranges) + a
        size *= b - a
    return by


def relayout(read: Read, groups: Sequence[tuple[str, Sequence[Loop]]], name: str) -> tuple[Tensor, Scope]:
    """A tensor whose dimensions are fused groups of iterators of `read`, and the expression that makes it."""
    by: dict[str, Affine] = {}
    for fused, loops in groups:
        by |= unflatten(fused, loops)
    loops = tuple((fused, 0, length(group)) for fused, group in groups)
    ranges = {n: (a, b) for n, a, b in loops}
    expr = Scope(loops, (), Read(read.object, tuple(i.substitute(by, ranges) for i in read.index)))
    tensor = Tensor(name, expr.shape, (), Routine("eoperator", expr, (_bare(read.object),)))
    return tensor, expr


def _bare(thing: Tensor | Scope) -> Tensor:
    assert isinstance(thing, Tensor)
    return replace(thing, pads=())


def match_matmul(scope: Scope, tag: str) -> Iterator[tuple[str, Scope]]:
    """The expression with its innermost stage replaced by a matmul of re-laid-out inputs."""
    inner = stages(scope)[-1]
    pair = operands(inner)
    if pair is None:
        return
    rows = table(inner, pair)
    if rows["other"] or not (rows["m"] and rows["n"] and rows["k"]):
        return
    if not injective(pair[0], [*inner.loops, *inner.sums]) or not injective(pair[1], [*inner.loops, *inner.sums]):
        return
    # the order of fused m follows the first input's dimensions, so that its re-layout is a view where it can be one
    m, k = _by_position(pair[0], rows["m"]), _by_position(pair[0], rows["k"])
    for n in _orders(rows["n"]):
        yield from _matmul(scope, inner, pair, rows["batch"], m, n, k, tag)


def _orders(loops: list[Loop]) -> list[list[Loop]]:
    """Orders of the fused n: what the output reads fastest goes last."""
    longest = sorted(loops, key=lambda loop: loop[2] - loop[1])
    return [longest] if longest == loops else [longest, loops]


def _by_position(read: Read, loops: list[Loop]) -> list[Loop]:
    """Loops in the order of the dimensions (and falling strides) in which `read` uses them."""

    def key(loop: Loop) -> tuple[int, int]:
        for d, index in enumerate(read.index):
            if loop[0] in index.iterators:
                return d, -abs(index.coefficient(loop[0]))
        return len(read.index), 0

    return sorted(loops, key=key)


def _matmul(
    scope: Scope, inner: Scope, pair: Operands, batch: list[Loop], m: list[Loop], n: list[Loop], k: list[Loop], tag: str
) -> Iterator[tuple[str, Scope]]:
    lead = [("fb", batch)] if batch else []
    left, _ = relayout(pair[0], [*lead, ("fm", m), ("fk", k)], f"{tag}l")
    right, _ = relayout(pair[1], [*lead, ("fk", k), ("fn", n)], f"{tag}r")
    index: list[Affine] = [it("fb")] if batch else []
    loops = tuple([*((("fb", 0, length(batch)),) if batch else ()), ("fm", 0, length(m)), ("fn", 0, length(n))])
    product = Call("mul", (Read(left, (*index, it("fm"), it("fk"))), Read(right, (*index, it("fk"), it("fn")))))
    expr = Scope(loops, (("fk", 0, length(k)),), product)
    result = Tensor(f"{tag}o", expr.shape, (), Routine("matmul", expr, (left, right)))
    place: tuple[Affine, ...] = (flat(batch), flat(m), flat(n)) if batch else (flat(m), flat(n))
    yield (
        f"8 matmul [{length(m)},{length(k)}]x[{length(k)},{length(n)}]",
        with_innermost(scope, Scope(inner.loops, (), Read(result, place), inner.pads)),
    )


def match_conv(scope: Scope, tag: str) -> Iterator[tuple[str, Scope]]:
    """As a two-dimensional convolution: two output positions share dimensions of T1 with two window positions of T2."""
    inner = stages(scope)[-1]
    pair = operands(inner)
    if pair is None:
        return
    x, w = pair
    names = [set().union(*(i.iterators for i in read.index)) for read in pair]
    loops = {n: (a, b) for n, a, b in inner.loops}
    sums = {n: (a, b) for n, a, b in inner.sums}
    windows = []
    for d, index in enumerate(x.index):
        if len(index.terms) == 2 and index.plain:
            (p, cp), (q, cq) = index.terms
            if p in sums and q in loops:
                (p, cp), (q, cq) = (q, cq), (p, cp)
            if p in loops and q in sums and cp > 0 and cq > 0 and q in names[1] and p not in names[1]:
                windows.append((d, str(p), cp, str(q), cq, index.const))
    if len(windows) != 2:
        return
    window_sums = {v[3] for v in windows}
    channels = [s for s in inner.sums if s[0] not in window_sums]
    positions = {v[1] for v in windows}
    batch = [v for v in inner.loops if v[0] in names[0] and v[0] not in positions and v[0] not in names[1]]
    features = [v for v in inner.loops if v[0] in names[1] and v[0] not in names[0]]
    if len(batch) + len(features) + 2 != len(inner.loops) or not channels or not features:
        return
    if any(c[0] not in names[0] or c[0] not in names[1] for c in channels):
        return
    yield from _conv(scope, inner, pair, windows, batch, features, channels, tag)


def _conv(
    scope: Scope,
    inner: Scope,
    pair: Operands,
    windows: list,
    batch: list[Loop],
    features: list[Loop],
    channels: list[Loop],
    tag: str,
) -> Iterator[tuple[str, Scope]]:
    x, w = pair
    thing = x.object
    assert isinstance(thing, Tensor)
    ranges = inner.ranges
    for d, index in enumerate(x.index):
        if d not in [v[0] for v in windows] and (
            not index.plain or len(index.terms) > 1 or index.const or any(c != 1 for _, c in index.terms)
        ):
            return
    (dh, h, sh, r, lh, ch), (dw, ww, sw, s, lw, cw) = windows
    sizes, pads, shifts = [], [], []
    for d, p, stride, q, dilation, const in windows:
        (pa, pb), (qa, qb) = ranges[p], ranges[q]
        if qa != 0:
            return
        start = pa * stride + const  # the first element that the first window reads
        stop = (pb - 1) * stride + const + (qb - 1) * dilation
        low, high = max(0, -start), max(0, stop - thing.shape[d] + 1)
        if start > 0:
            return
        pad = max(low, high) if (max(low, high) - low) % stride == 0 else low
        if pad < high:
            return
        full = (thing.shape[d] + 2 * pad - dilation * (qb - 1) - 1) // stride + 1
        shift = (pad - low) // stride
        if full < shift + pb - pa:
            return
        sizes.append(full)
        pads.append(pad)
        shifts.append(it(p) - pa + shift)
    window = [next(v for v in inner.sums if v[0] == q) for q in (r, s)]
    plain = Read(replace(thing, pads=()), tuple(it(f"x{d}") for d in range(len(thing.shape))))
    dims = [(f"x{d}", 0, size) for d, size in enumerate(thing.shape)]
    by_name = {next(iter(i.iterators)): dims[d] for d, i in enumerate(x.index) if len(i.terms) == 1}
    try:
        n_dims = [by_name[v[0]] for v in batch]
        c_dims = [by_name[v[0]] for v in channels]
    except KeyError:
        return
    if any(dims[d][2] != ranges[next(iter(i.iterators))][1] for d, i in enumerate(x.index) if len(i.terms) == 1):
        return
    left, _ = relayout(plain, [("fn", n_dims), ("fh", [dims[dh]]), ("fw", [dims[dw]]), ("fc", c_dims)], f"{tag}l")
    right, _ = relayout(w, [("ff", features), ("fc", channels), ("fr", [window[0]]), ("fs", [window[1]])], f"{tag}r")
    n, f, c = length(batch), length(features), length(channels)
    padded = replace(left, pads=(0, pads[0] + sh, pads[1] + sw, 0))
    at_h = it("fh") * sh + it("fr") * lh - pads[0]
    at_w = it("fw") * sw + it("fs") * lw - pads[1]
    product = Call(
        "mul", (Read(padded, (it("fn"), at_h, at_w, it("fc"))), Read(right, (it("ff"), it("fc"), it("fr"), it("fs"))))
    )
    expr = Scope(
        (("fn", 0, n), ("fh", 0, sizes[0]), ("fw", 0, sizes[1]), ("ff", 0, f)),
        (("fc", 0, c), ("fr", 0, window[0][2]), ("fs", 0, window[1][2])),
        product,
    )
    args = (("stride", (sh, sw)), ("padding", tuple(pads)), ("dilation", (lh, lw)))
    result = Tensor(f"{tag}o", expr.shape, (), Routine("conv", expr, (left, right), args))
    place = (flat(batch), shifts[0], shifts[1], flat(features))
    yield (
        f"8 conv {window[0][2]}x{window[1][2]} of {c} into {f} channels",
        with_innermost(scope, Scope(inner.loops, (), Read(result, place), inner.pads)),
    )
