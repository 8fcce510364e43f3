"""Products over windows from index expressions: which expressions are one, and the tables that the native kernels run from.

An expression sum A[..] * K[..] is a product over windows when A's last index is a summation alone (the channels), one loop occurs in K only
(the features), the other loops (the pixels) move A by an amount that does not depend on the other summations (the taps), and K by finitely
many amounts (the phases, e.g. of a transposed convolution). Nothing else is asked: strides, dilation, padding, divisions and remainders in the
indices are evaluated point by point, so that a tap outside the tensor is never multiplied. Where the taps form a square and neighbours of a
phase lie one tap apart, minimal filtering applies too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from wager.compile.ollie import rules
from wager.compile.ollie.match import operands
from wager.graph.expression import Loop, Read, Routine, Scope, Tensor
from wager.graph.index import it
from wager.graph.lower.code import strides
from wager.graph.lower.windows import MAX_TAPS, Filter, Group, Lattice, Table

MAX_PHASES = 64
FLAT_PIXELS = 96  # images with fewer pixels are tabled together, so that tiles mix them


@dataclass(frozen=True)
class Windows:
    """The roles of an expression's iterators."""

    scope: Scope
    data: Read
    kernel: Read
    pixels: tuple[Loop, ...]
    feature: Loop
    channel: Loop
    taps: tuple[Loop, ...]


def recognise(scope: Scope) -> Windows | None:
    """The roles, or None when a single-stage expression is no product over windows."""
    pair = operands(scope)
    if pair is None or any(scope.padding):
        return None
    data, kernel = pair
    in_data, in_kernel = (set().union(*(i.iterators for i in read.index)) for read in pair)
    features = [v for v in scope.loops if v[0] in in_kernel and v[0] not in in_data]
    pixels = tuple(v for v in scope.loops if v[0] in in_data)
    if len(features) != 1 or len(pixels) + 1 != len(scope.loops) or features[0][1]:
        return None
    channels = [v for v in scope.sums if data.index and data.index[-1] == it(v[0])]
    if len(channels) != 1 or channels[0][1] or any(v[0] not in in_data & in_kernel for v in scope.sums):
        return None
    if any(channels[0][0] in i.iterators for i in data.index[:-1]):
        return None
    taps = tuple(v for v in scope.sums if v != channels[0])
    if prod(b - a for _, a, b in taps) > MAX_TAPS or channels[0][2] > data.object.shape[-1]:  # type: ignore[union-attr]
        return None
    return Windows(scope, data, kernel, pixels, features[0], channels[0], taps)


def match_windows(scope: Scope, tag: str) -> Iterator[tuple[str, Scope]]:
    """The innermost stage, with the re-indexing stages above it computed in place, as one product over windows."""
    whole = rules.inline_sums(scope)
    if whole is None:
        return
    form = recognise(whole)
    if form is None or table_of(form) is None:
        return
    plain = [replace(t, pads=()) for t in rules.tensors(whole.body)]
    tensor = Tensor(f"{tag}o", whole.shape, (), Routine("windows", whole, tuple(plain)))
    taps = "x".join(str(b - a) for _, a, b in form.taps) or "1"
    loops = tuple((n, 0, b - a) for n, a, b in whole.loops)
    yield (
        f"91 sums in place | 8 windows {taps} of {form.channel[2]} into {form.feature[2]} channels",
        Scope(loops, (), Read(tensor, tuple(it(n) for n, _, _ in loops))),
    )


def _grid(loops: tuple[Loop, ...]) -> dict[str, np.ndarray]:
    """Every combination of the iterators' values, flattened in row-major order."""
    points = np.indices([b - a for _, a, b in loops]).reshape(len(loops), -1)
    return {n: points[d] + a for d, (n, a, _) in enumerate(loops)}


def _cross(rows: dict[str, np.ndarray], columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {n: v[:, None] for n, v in rows.items()} | {n: v[None, :] for n, v in columns.items()}


def _batch(form: Windows) -> Loop | None:
    """The outermost loop, when it only counts whole images."""
    name, low, high = form.pixels[0]
    images = form.data.index[0] == it(name) and low == 0 and high == form.data.object.shape[0]  # type: ignore[union-attr]
    elsewhere = any(name in i.iterators for i in (*form.data.index[1:], *form.kernel.index))
    return form.pixels[0] if images and not elsewhere and form.scope.loops[0] == form.pixels[0] else None


@dataclass(frozen=True)
class Enumerated:
    """Offsets of every pixel [P] and tap [T], which are inside [P, T], and the phase of every pixel [P] with its representative."""

    base: np.ndarray
    delta: np.ndarray
    inside: np.ndarray
    place: np.ndarray
    phase: np.ndarray
    representatives: list[int]
    values: dict[str, np.ndarray]


def table_of(form: Windows, whole_images: bool | None = None) -> Enumerated | None:
    """Evaluates the indices everywhere. None when pixels and taps do not add up independently, or there are too many phases."""
    batch = _batch(form)
    rest = form.pixels[1:] if batch else form.pixels
    if whole_images is None:
        whole_images = batch is not None and prod(b - a for _, a, b in rest) >= FLAT_PIXELS
    pixels = rest if whole_images else form.pixels
    values, taps = _grid(pixels), _grid(form.taps)
    if not pixels:
        values = {}
    count, tap_count = prod(b - a for _, a, b in pixels), prod(b - a for _, a, b in form.taps)
    env = _cross(values, taps) | {form.channel[0]: np.zeros((1, 1), int)}
    if whole_images and batch:
        env[batch[0]] = np.zeros((1, 1), int)
    shape = form.data.object.shape  # type: ignore[union-attr]
    offset, inside = np.zeros((count, tap_count), np.int64), np.ones((count, tap_count), bool)
    for index, size, step in zip(form.data.index[:-1], shape, strides(shape), strict=False):
        at = index.evaluate(env)
        offset += at * step
        inside &= (at >= 0) & (at < size)
    base, delta = offset[:, 0], offset[0] - offset[0, 0]
    if not np.array_equal(offset, base[:, None] + delta[None]):
        return None
    steps = dict(zip((n for n, _, _ in form.scope.loops), strides(form.scope.shape), strict=True))
    place = sum(((values[n] - a) * steps[n] for n, a, _ in pixels), np.zeros(count, np.int64))
    phases = _phases(form, values, taps, count)
    if phases is None:
        return None
    return Enumerated(base, delta, inside, place, *phases, values)


def _phases(form: Windows, values: dict, taps: dict, count: int) -> tuple[np.ndarray, list[int]] | None:
    """Pixels by what they make of the kernel's indices."""
    moving = {n for n in values if any(n in i.iterators for i in form.kernel.index)}
    if not moving:
        return np.zeros(count, int), [0]
    zero = {form.channel[0]: np.zeros((1, 1), int), form.feature[0]: np.zeros((1, 1), int)}
    env = _cross({n: v for n, v in values.items()}, taps) | zero
    rows = [np.broadcast_to(i.evaluate(env), (count, len(next(iter(taps.values()), [0])))) for i in form.kernel.index]
    _, first, phase = np.unique(np.concatenate(rows, axis=1), axis=0, return_index=True, return_inverse=True)
    return (phase.reshape(-1), list(first)) if len(first) <= MAX_PHASES else None


def _weights(
    form: Windows, values: dict[str, np.ndarray], at: int, kernel: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[taps, c, f] of the phase of pixel `at`, and which taps have any weight inside the kernel [T]."""
    taps, shape = _grid(form.taps), kernel.shape
    env = {n: v[at] for n, v in values.items()} | {n: v[:, None, None] for n, v in taps.items()}
    env |= {form.channel[0]: np.arange(form.channel[2])[None, :, None]}
    env |= {form.feature[0]: np.arange(form.feature[2])[None, None, :]}
    size = (prod(b - a for _, a, b in form.taps), form.channel[2], form.feature[2])
    flat, inside = np.zeros(size, np.int64), np.ones(size, bool)
    for index, length, step in zip(form.kernel.index, shape, strides(shape), strict=True):
        where = index.evaluate(env)
        flat += where * step
        inside &= (where >= 0) & (where < length)
    found = kernel.reshape(-1)[np.where(inside, flat, 0)]
    return np.where(inside, found, 0.0).astype(np.float32), np.asarray(inside.any(axis=(1, 2)))


def tabulate(form: Windows, kernel: np.ndarray) -> Table:
    """The tables of the direct kernel. Pixels with the same taps inside are neighbours, those with most first."""
    found = table_of(form)
    assert found is not None
    batch, shape = _batch(form), form.data.object.shape  # type: ignore[union-attr]
    repeated = (
        batch is not None and len(found.base) * batch[2] == prod(b - a for _, a, b in form.pixels) and batch[2] > 1
    )
    repeated = repeated or (batch is not None and batch[0] not in found.values)
    groups = []
    for phase, at in enumerate(found.representatives):
        weight, used = _weights(form, found.values, at, kernel)
        chosen = np.flatnonzero(found.phase == phase)
        inside = found.inside[chosen] & used
        bits = (inside.astype(np.uint64) << np.arange(len(used), dtype=np.uint64)).sum(axis=1, dtype=np.uint64)
        order = np.lexsort((chosen, bits, -inside.sum(axis=1)))
        chosen, bits = chosen[order], bits[order]
        groups.append(Group(found.base[chosen], bits, found.place[chosen], found.delta, weight))
    steps = dict(zip((n for n, _, _ in form.scope.loops), strides(form.scope.shape), strict=True))
    repeats = batch[2] if repeated and batch else 1
    in_step, out_step = (strides(shape)[0], steps[batch[0]]) if repeated and batch else (0, 0)
    sizes = (prod(shape), prod(form.scope.shape))
    return Table(
        tuple(groups), form.channel[2], form.feature[2], steps[form.feature[0]], repeats, in_step, out_step, *sizes
    )


def filterable(form: Windows, kernel: np.ndarray) -> Filter | None:
    """The lattices for minimal filtering, or None when the windows are not square or neighbours are not one tap apart."""
    batch, shape = _batch(form), form.data.object.shape  # type: ignore[union-attr]
    if batch is None or len(form.taps) != 2 or len(form.pixels) != 3 or len(shape) != 4:
        return None
    size = form.taps[0][2]
    steps = dict(zip((n for n, _, _ in form.scope.loops), strides(form.scope.shape), strict=True))
    if any(a or b != size for _, a, b in form.taps) or size not in (2, 3) or steps[form.feature[0]] != 1:
        return None
    found = table_of(form, whole_images=True)
    if found is None:
        return None
    lattices, weights = [], []
    for phase, at in enumerate(found.representatives):
        weight, used = _weights(form, found.values, at, kernel)
        if not used.all():
            return None
        weight = weight.reshape(size, size, *weight.shape[1:])
        axes = [_axis(form, found, phase, d) for d in (0, 1)]
        if axes[0] is None or axes[1] is None or len(found.phase) == 0:
            return None
        covered = prod(sum(x.count for x in a.parts) for a in axes if a)
        if covered != (found.phase == phase).sum():
            return None
        flips = tuple(a.flip for a in axes if a)
        weights.append(np.flip(weight, tuple(d for d in (0, 1) if flips[d])) if any(flips) else weight)
        for i in axes[0].parts:
            for j in axes[1].parts:
                out = (i.first * steps[form.pixels[1][0]] + j.first * steps[form.pixels[2][0]],)
                out += (i.step * steps[form.pixels[1][0]], j.step * steps[form.pixels[2][0]])
                ins = (i.start, j.start, axes[0].step, axes[1].step)
                lattices.append(Lattice(phase, i.count, j.count, *ins, *out))
    in_step, out_step = strides(shape)[0], steps[batch[0]]
    return Filter(
        tuple(lattices), tuple(weights), batch[2], shape[1], shape[2], in_step, out_step, prod(form.scope.shape)
    )


@dataclass(frozen=True)
class _Part:
    """Output positions first + i * step whose windows start at start + i * (tap step)."""

    first: int
    step: int
    count: int
    start: int


@dataclass(frozen=True)
class _Axis:
    step: int
    flip: bool
    parts: tuple[_Part, ...]


def _axis(form: Windows, found: Enumerated, phase: int, d: int) -> _Axis | None:
    """One image dimension of a phase, cut into residue classes of the tap step."""
    (name, low, _), (tap, _, size) = form.pixels[1 + d], form.taps[d]
    index = form.data.index[1 + d]
    if index.iterators - {name, tap} or name not in index.iterators or tap not in index.iterators:
        return None
    values = np.unique(found.values[name][found.phase == phase])
    at = np.broadcast_to(index.evaluate({name: values[:, None], tap: np.arange(size)[None]}), (len(values), size))
    apart = np.unique(np.diff(at, axis=1))
    if len(apart) != 1 or not apart[0]:
        return None
    step, start = abs(int(apart[0])), at.min(axis=1)
    parts = []
    for residue in np.unique(start % step):
        chosen = np.flatnonzero(start % step == residue)
        chosen = chosen[np.argsort(start[chosen])]
        gaps = np.unique(np.diff(values[chosen]))
        if (np.diff(start[chosen]) != step).any() or len(gaps) > 1:
            return None
        gap = int(gaps[0]) if len(gaps) else 0
        parts.append(_Part(int(values[chosen[0]] - low), gap, len(chosen), int(start[chosen[0]])))
    return _Axis(step, bool(apart[0] < 0), tuple(parts))
