"""Rules between expressions: independent outputs computed apart, alike expressions computed as one, a producer inside its consumer.

On programs: products and convolutions that read one value are joined (weights side by side, the results are slices).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from wager.compile.ollie.convolutions import Fused
from wager.compile.ollie.rules import fresh, merge_stages
from wager.graph.expression import Body, Read, Scope, Tensor, fingerprint, map_reads, reads, substitute
from wager.graph.index import it, number
from wager.graph.program import Program


def split(scope: Scope, loop: str) -> list[Scope]:
    """One expression per value of a loop, that loop gone; stacked along its place they are the original."""
    name, low, high = next(v for v in scope.loops if v[0] == loop)
    at = scope.loops.index((name, low, high))
    rest = (*scope.loops[:at], *scope.loops[at + 1 :])
    pads = (*scope.padding[:at], *scope.padding[at + 1 :])
    ranges = dict(scope.ranges)
    return [Scope(rest, scope.sums, substitute(scope.body, {name: number(v)}, ranges), pads) for v in range(low, high)]


def merge(scopes: Sequence[Scope], stacked: str) -> Scope | None:
    """One expression over a new outermost loop for expressions that differ only in which tensor stands at one place.

    The tensors of that place are stacked along a new first dimension in an input called `stacked`. None when they differ in more.
    """
    first = scopes[0]
    names = [[r.object.name for r in reads(s.body) if isinstance(r.object, Tensor)] for s in scopes]
    if len({len(n) for n in names}) != 1 or any(
        not isinstance(r.object, Tensor) for s in scopes for r in reads(s.body)
    ):
        return None
    places = [p for p, column in enumerate(zip(*names, strict=True)) if len(set(column)) > 1]
    if len(places) != 1:
        return None
    one = [_renamed(s, names[i][places[0]], stacked) for i, s in enumerate(scopes)]
    if len({fingerprint(s) for s in one}) != 1 or any(names[0].count(n[places[0]]) > 1 for n in names):
        return None
    (group,) = fresh(first, 1)

    def stack(read: Read) -> Read:
        thing = read.object
        if not isinstance(thing, Tensor) or thing.name != names[0][places[0]]:
            return read
        pads = (0, *thing.pads) if thing.pads else ()
        return Read(Tensor(stacked, (len(scopes), *thing.shape), pads), (it(group), *read.index))

    pads = (0, *first.padding) if any(first.padding) else ()
    return Scope(((group, 0, len(scopes)), *first.loops), first.sums, map_reads(first.body, stack), pads)


def _renamed(scope: Scope, old: str, new: str) -> Scope:
    def rename(read: Read) -> Read:
        thing = read.object
        return Read(replace(thing, name=new), read.index) if isinstance(thing, Tensor) and thing.name == old else read

    return replace(scope, body=map_reads(scope.body, rename))


def fuse(consumer: Scope, producers: Mapping[str, Scope]) -> Scope:
    """The consumer with reads of the named tensors replaced by the expressions that make them; pure re-indexing disappears.

    A tensor's padding becomes the stage's: what lies outside was zero and stays zero.
    """

    def inside(read: Read) -> Body:
        thing = read.object
        if isinstance(thing, Scope):
            return Read(fuse(thing, producers), read.index)
        if thing.source is not None or thing.name not in producers:
            return read
        made = producers[thing.name]
        index = tuple(i + low for i, (_, low, _) in zip(read.index, made.loops, strict=True))
        pads = tuple(p + q for p, q in zip(made.padding, thing.padding, strict=True))
        return Read(replace(made, pads=pads if any(pads) else ()), index)

    return merge_stages(replace(consumer, body=map_reads(consumer.body, inside)))


# ── programs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Joint:
    """Convolutions of one value as one; `parts`: (last node, first channel, end) of each."""

    fused: Fused
    parts: tuple[tuple[int, int, int], ...]


def alike(program: Program, found: Sequence[Fused], position: int) -> list[Joint]:
    """Convolutions that read the same value with the same window and activation, side by side. `position` names the first new value."""
    groups: dict[object, list[Fused]] = {}
    for f in found:
        feature_axis = 1 if f.node["transposed"] else 0
        window = tuple(s for d, s in enumerate(f.weight.shape) if d != feature_axis)
        groups.setdefault((f.source, f.node.attrs, window, f.activation, f.attrs), []).append(f)
    joints = []
    for members in groups.values():
        if len(members) < 2 or program.nodes[members[0].source].op == "const":
            continue
        joints.append(_join(members, position + len(joints)))
    return joints


def _join(members: Sequence[Fused], position: int) -> Joint:
    first, counts = members[0], [f.features for f in members]
    weight = torch.cat([f.weight for f in members], 1 if first.node["transposed"] else 0).contiguous()
    bias = None
    if any(f.bias is not None for f in members):
        bias = torch.cat([torch.zeros(f.features) if f.bias is None else f.bias.float() for f in members])
    slope = torch.cat([f.slope for f in members if f.slope is not None]) if first.slope is not None else None
    shape = (first.node.shape[0], sum(counts), *first.node.shape[2:])
    node = replace(first.node, shape=shape)
    fused = Fused(position, position, first.source, node, weight, bias, first.activation, first.attrs, slope)
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return Joint(fused, tuple((f.last, e - c, e) for f, c, e in zip(members, counts, ends, strict=True)))


def parallel_products(program: Program, known: Mapping[int, object]) -> list[list[int]]:
    """Groups of two-dimensional products with constant right sides that read one value."""
    groups: dict[int, list[int]] = {}
    for i, node in enumerate(program.nodes):
        if node.op == "matmul" and len(node.shape) == 2 and node.inputs[1] in known and node.inputs[0] not in known:
            groups.setdefault(node.inputs[0], []).append(i)
    return [g for g in groups.values() if len(g) > 1]
