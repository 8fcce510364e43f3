"""Recognises library operators in the innermost stage by the iterator mapping table, and repairs what nearly matches.

For a sum of T1[..] * T2[..] every iterator is a row of a table: which of T1, T2 and the output it occurs in. A matmul needs rows
{T1, out} = m, {T2, out} = n, {T1, T2} = k, {T1, T2, out} = batch. Surplus iterators of a row are fused into one; the re-layout of the inputs
that this needs is a generated kernel (done once for weights, nothing at all where it is only a view). A convolution also needs output
positions and window positions sharing a dimension of T1. Source: arXiv 2208.02025.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

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
                windows.append(Window(d, str(p), cp, str(q), cq, index.const))
    if len(windows) != 2:
        return
    taps = {window.tap for window in windows}
    channels = [s for s in inner.sums if s[0] not in taps]
    positions = {window.loop for window in windows}
    batch = [v for v in inner.loops if v[0] in names[0] and v[0] not in positions and v[0] not in names[1]]
    features = [v for v in inner.loops if v[0] in names[1] and v[0] not in names[0]]
    if len(batch) + len(features) + 2 != len(inner.loops) or not channels or not features:
        return
    if any(c[0] not in names[0] or c[0] not in names[1] for c in channels):
        return
    yield from _conv(scope, inner, pair, windows, batch, features, channels, tag)


class Window(NamedTuple):
    """A dimension of the image that is read at loop * stride + tap * dilation + const."""

    dim: int
    loop: str
    stride: int
    tap: str
    dilation: int
    const: int

    def fitted(self, size: int, ranges: Mapping[str, tuple[int, int]]) -> tuple[int, int, Affine] | None:
        """(positions, padding, where the loop is among them) of a convolution over `size` elements; None where there is none."""
        (low, high), (first, taps) = ranges[self.loop], ranges[self.tap]
        start = low * self.stride + self.const  # the first element that the first window reads
        if first != 0 or start > 0:
            return None
        last = (high - 1) * self.stride + self.const + (taps - 1) * self.dilation
        before, after = -start, max(0, last - size + 1)
        pad = max(before, after) if (max(before, after) - before) % self.stride == 0 else before
        positions = (size + 2 * pad - self.dilation * (taps - 1) - 1) // self.stride + 1
        shift = (pad - before) // self.stride
        if pad < after or positions < shift + high - low:
            return None
        return positions, pad, it(self.loop) - low + shift


def _conv(
    scope: Scope,
    inner: Scope,
    pair: Operands,
    windows: list[Window],
    batch: list[Loop],
    features: list[Loop],
    channels: list[Loop],
    tag: str,
) -> Iterator[tuple[str, Scope]]:
    x, w = pair
    thing = x.object
    assert isinstance(thing, Tensor)
    down, across = windows
    plain = [(d, index) for d, index in enumerate(x.index) if d not in (down.dim, across.dim)]
    if any(not i.plain or len(i.terms) > 1 or i.const or any(c != 1 for _, c in i.terms) for _, i in plain):
        return
    rows, columns = (window.fitted(thing.shape[window.dim], inner.ranges) for window in windows)
    if rows is None or columns is None:
        return
    (height, pad_h, at_h), (width, pad_w, at_w) = rows, columns
    dims = [(f"x{d}", 0, size) for d, size in enumerate(thing.shape)]
    by_name = {next(iter(i.iterators)): dims[d] for d, i in plain if i.terms}
    if any(dim[2] != inner.ranges[name][1] for name, dim in by_name.items()):
        return
    if any(v[0] not in by_name for v in (*batch, *channels)):
        return
    image = Read(replace(thing, pads=()), tuple(it(name) for name, _, _ in dims))
    n_dims, c_dims = ([by_name[v[0]] for v in loops] for loops in (batch, channels))
    groups = [("fn", n_dims), ("fh", [dims[down.dim]]), ("fw", [dims[across.dim]]), ("fc", c_dims)]
    left, _ = relayout(image, groups, f"{tag}l")
    taps = [next(v for v in inner.sums if v[0] == window.tap) for window in windows]
    right, _ = relayout(w, [("ff", features), ("fc", channels), ("fr", [taps[0]]), ("fs", [taps[1]])], f"{tag}r")
    expr = _convolution(left, right, (down, across), (pad_h, pad_w), (length(batch), height, width))
    args = (
        ("stride", (down.stride, across.stride)),
        ("padding", (pad_h, pad_w)),
        ("dilation", (down.dilation, across.dilation)),
    )
    result = Tensor(f"{tag}o", expr.shape, (), Routine("conv", expr, (left, right), args))
    place = (flat(batch), at_h, at_w, flat(features))
    yield (
        f"8 conv {taps[0][2]}x{taps[1][2]} of {length(channels)} into {length(features)} channels",
        with_innermost(scope, Scope(inner.loops, (), Read(result, place), inner.pads)),
    )


def _convolution(
    left: Tensor, right: Tensor, windows: tuple[Window, Window], pads: tuple[int, int], sizes: tuple[int, int, int]
) -> Scope:
    """What the library computes of an image [n, h, w, c] and filters [f, c, r, s]."""
    down, across = windows
    padded = replace(left, pads=(0, pads[0] + down.stride, pads[1] + across.stride, 0))
    at_h = it("fh") * down.stride + it("fr") * down.dilation - pads[0]
    at_w = it("fw") * across.stride + it("fs") * across.dilation - pads[1]
    image = Read(padded, (it("fn"), at_h, at_w, it("fc")))
    filters = Read(right, (it("ff"), it("fc"), it("fr"), it("fs")))
    features, channels, rows, columns = right.shape
    return Scope(
        (("fn", 0, sizes[0]), ("fh", 0, sizes[1]), ("fw", 0, sizes[2]), ("ff", 0, features)),
        (("fc", 0, channels), ("fr", 0, rows), ("fs", 0, columns)),
        Call("mul", (image, filters)),
    )
