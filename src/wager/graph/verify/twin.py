"""Shrunken twins: the same pair of programs at the smallest sizes that keep its structure.

Every loop range above 1 becomes 2, every grid extent 2 (4 or 8 where two steps share it), every other dimension above 1 becomes 2 or a small multiple, all cuts stay exact and
both programs keep equal inputs. Sizes are unknowns tied by operators ("these two dimensions are equal", "this one is that one times 2"),
solved with a union-find whose edges carry ratios. Checking a twin is thousands of times cheaper than checking the original, and the error
bound of a finite-field trial is far better, because fewer exponentials are summed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import replace
from fractions import Fraction
from typing import Any

from wager.graph.operators import BINARY, UNARY, Shape, ShapeError
from wager.graph.program import BlockGraph, Node, Program, check, pack

Key = Hashable
ONE = "one"
GRID_EXTENTS = (2, 4, 8)
"""What a grid extent becomes, tried in this order."""


class _Sizes:
    """Unknown sizes; find(k) = (root, ratio) with size(k) = ratio * size(root). Grid extents shrink to `grid`, loops and folds to 2."""

    def __init__(self, grid: int) -> None:
        self.grid = grid
        self.parent: dict[Key, tuple[Key, Fraction]] = {}

    def find(self, key: Key) -> tuple[Key, Fraction]:
        ratio = Fraction(1)
        while key in self.parent:
            key, step = self.parent[key]
            ratio *= step
        return key, ratio

    def tie(self, a: Key, b: Key, ratio: int | Fraction = 1) -> None:
        """size(a) = ratio * size(b). Raises ShapeError on a contradiction."""
        (root_a, ra), (root_b, rb) = self.find(a), self.find(b)
        if root_a == root_b:
            if ra != ratio * rb:
                raise ShapeError("sizes cannot shrink consistently")
        elif root_a == ONE:
            self.parent[root_b] = (root_a, ra / (ratio * rb))
        else:
            self.parent[root_a] = (root_b, ratio * rb / ra)


def shrink(*programs: Program) -> list[Program]:
    """Twins of programs that share their inputs. Raises ShapeError when the sizes cannot shrink together (then check the originals)."""
    for grid in GRID_EXTENTS[:-1]:
        try:
            return _shrink(programs, grid)
        except ShapeError:  # a grid cut here may be folded in two steps there: it needs more parts
            continue
    return _shrink(programs, GRID_EXTENTS[-1])


def _shrink(programs: tuple[Program, ...], grid: int) -> list[Program]:
    sizes, originals = _Sizes(grid), {}
    for which, program in enumerate(programs):
        _tie_program(which, program, sizes, originals)
        for i, position in enumerate(program.input_positions):
            for d in range(len(program.nodes[position].shape)):
                sizes.tie((which, position, d), (0, programs[0].input_positions[i], d))
        for i, position in enumerate(program.outputs):
            for d in range(len(program.nodes[position].shape)):
                sizes.tie((which, position, d), (0, programs[0].outputs[i], d))
    values = _solve(sizes, originals)
    twins = [_rebuild(which, program, values, grid) for which, program in enumerate(programs)]
    for twin in twins:
        check(twin)
    return twins


def _extents(block: BlockGraph, grid: int) -> tuple[int, ...]:
    return (*(min(g, grid) for g in block.grid), _small(block.loop))


def _small(extent: int) -> int:
    return 2 if extent > 1 else 1


def _declare(key: Key, shape: Shape, sizes: _Sizes, originals: dict[Key, int]) -> None:
    for d, size in enumerate(shape):
        originals[(*_tuple(key), d)] = size
        if size == 1:
            sizes.tie((*_tuple(key), d), ONE)


def _tuple(key: Any) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else (key,)


def _tie_program(which: int, program: Program, sizes: _Sizes, originals: dict[Key, int]) -> None:
    shapes = [n.shape for n in program.nodes]
    for i, node in enumerate(program.nodes):
        _declare((which, i), node.shape, sizes, originals)
        if node.op == "kernel":
            assert node.block is not None
            _tie_block((which, i), node, sizes, originals)
        elif node.op == "result":
            block = program.nodes[node.inputs[0]].block
            assert block is not None
            saved = [j for j, n in enumerate(block.nodes) if n.op == "output"][node["index"]]
            for d in range(len(node.shape)):
                parts = math.prod(
                    min(g, sizes.grid) for g, m in zip(block.grid, block.nodes[saved]["omap"], strict=True) if m == d
                )
                sizes.tie((which, i, d), (which, node.inputs[0], saved, d), parts)
        elif node.op not in ("input", "const"):
            _tie_operator(node, (which, i), [(which, j) for j in node.inputs], [shapes[j] for j in node.inputs], sizes)


def _tie_block(owner: tuple[int, int], node: Node, sizes: _Sizes, originals: dict[Key, int]) -> None:
    block = node.block
    assert block is not None
    for i, inner in enumerate(block.nodes):
        key = (*owner, i)
        _declare(key, inner.shape, sizes, originals)
        if inner.op == "input":
            source = (owner[0], node.inputs[inner["arg"]])
            for d in range(len(inner.shape)):
                parts = math.prod(
                    extent
                    for extent, m in zip(_extents(block, sizes.grid), (*inner["imap"], inner["fmap"]), strict=True)
                    if m == d
                )
                sizes.tie((*source, d), (*key, d), parts)
        else:
            inputs = [(*owner, j) for j in inner.inputs]
            _tie_operator(inner, key, inputs, [block.nodes[j].shape for j in inner.inputs], sizes)


def _tie_operator(
    node: Node, key: tuple[int, ...], inputs: list[tuple[int, ...]], shapes: list[Shape], sizes: _Sizes
) -> None:
    rank = len(node.shape)
    if node.op in UNARY or node.op in ("rms_norm", "softmax", "accum", "output"):
        for d in range(rank):
            sizes.tie((*key, d), (*inputs[0], d))
    elif node.op in BINARY:
        for source, shape in zip(inputs, shapes, strict=True):
            for d, size in enumerate(shape):
                if size > 1:
                    sizes.tie((*key, d + rank - len(shape)), (*source, d))
    elif node.op == "matmul":
        a, b = inputs
        sizes.tie((*a, len(shapes[0]) - 1), (*b, len(shapes[1]) - 2))
        sizes.tie((*key, rank - 2), (*a, len(shapes[0]) - 2))
        sizes.tie((*key, rank - 1), (*b, len(shapes[1]) - 1))
        for source, shape in zip(inputs, shapes, strict=True):
            for d in range(len(shape) - 2):
                if shape[d] > 1:
                    sizes.tie((*key, d + rank - len(shape)), (*source, d))
    elif node.op in ("sum", "accum_sum", "accum_rms", "accum_width"):
        dim = node.get("dim", -1) % rank
        for d in range(rank):
            if d != dim:
                sizes.tie((*key, d), (*inputs[0], d))
        if node.shape[dim] > 1:
            sizes.tie((*inputs[0], dim), (*key, dim), _small(shapes[0][dim] // node.shape[dim]))
    elif node.op == "permute":
        for d, source in enumerate(node["order"]):
            sizes.tie((*key, d), (*inputs[0], source))
    else:
        raise ShapeError(f"{node.op} has no shrunken form")


def _solve(sizes: _Sizes, originals: dict[Key, int]) -> dict[Key, int]:
    members: dict[Key, list[tuple[Key, Fraction]]] = defaultdict(list)
    for key in originals:
        root, ratio = sizes.find(key)
        members[root].append((key, ratio))
    values: dict[Key, int] = {}
    for root, group in members.items():
        base = 1 if root == ONE else math.lcm(*(ratio.denominator for _, ratio in group))
        if root != ONE and any(base * ratio == 1 for key, ratio in group if originals[key] > 1):
            base *= 2  # a dimension above 1 stays above 1, or dropping a sum over it would go unseen
        for key, ratio in group:
            value = base * ratio
            if value.denominator != 1 or (originals[key] > 1) != (value > 1):
                raise ShapeError("sizes cannot shrink without losing a dimension")
            values[key] = int(value)
    return values


def _rebuild(which: int, program: Program, values: dict[Key, int], grid: int) -> Program:
    nodes = []
    for i, node in enumerate(program.nodes):
        shape = tuple(values[(which, i, d)] for d in range(len(node.shape)))
        block = node.block and _rebuild_block((which, i), node.block, values, grid)
        nodes.append(replace(node, shape=shape, block=block, attrs=_attrs(node, shape)))
    return Program(tuple(nodes), program.outputs)


def _rebuild_block(owner: tuple[int, int], block: BlockGraph, values: dict[Key, int], grid: int) -> BlockGraph:
    nodes = []
    for i, node in enumerate(block.nodes):
        shape = tuple(values[(*owner, i, d)] for d in range(len(node.shape)))
        nodes.append(replace(node, shape=shape, attrs=_attrs(node, shape)))
    x, y, z, loop = _extents(block, grid)
    return BlockGraph((x, y, z), loop, tuple(nodes), block.threads)


def _attrs(node: Node, shape: Shape) -> Any:
    attrs = dict(node.attrs)
    if "width" in attrs:
        attrs["width"] = shape[attrs.get("dim", -1)]
    if node.op == "input" and "shape" in attrs:
        attrs["shape"] = shape
    return pack(attrs)
