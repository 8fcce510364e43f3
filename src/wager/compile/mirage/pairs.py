"""Mirage's concrete search over two kernels in a row: the first splits a sum over its blocks, the second merges the parts (flash-decoding).

For every plan of the first kernel that no single kernel could have (see regions.py), every graph on its tiles that saves several values, and
every way in which blocks leave them side by side: every plan and graph of a second kernel over what was saved. As in the symbolic search the
second kernel has no loop and starts by summing what it reads. What computes the program's expression is checked in finite fields at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product

from wager.compile.mirage.enumerate import Enumerator
from wager.compile.mirage.generate import Progress, Structure
from wager.compile.mirage.plans import Plan
from wager.compile.mirage.regions import grid_maps
from wager.compile.prism.family import ARENA_LIMIT
from wager.compile.prism.mapping import Ties
from wager.compile.prism.search import merges, saved_expressions
from wager.graph.lower.tiles import arena_bytes
from wager.graph.operators import Shape, ShapeError
from wager.graph.program import BlockBuilder, BlockGraph, Builder, Program, cut


def splitting(plans: Iterator[Plan], program: Program) -> Iterator[Plan]:
    """The plans with which blocks cannot compute parts of the output: some grid dimension cuts a sum."""
    count = 3 if len(program.output_shapes[0]) > 2 else 2
    whole = set(grid_maps(program, count))
    for plan in plans:
        grid, _, imaps, _ = plan
        columns = tuple(sorted((tuple(m[p] for m in imaps) for p in range(count)), reverse=True))
        if columns not in whole and math.prod(grid) > 1:
            yield plan


def second_plans(shapes: Sequence[Shape], out: Shape, sizes: Sequence[int], least_blocks: int) -> Iterator[Plan]:
    """Grids over the output's dimensions, each cutting that dimension of whatever has it whole; no loop."""
    rank = len(out)
    for grid in product(*((1, *[g for g in sizes if g > 1 and n % g == 0]) for n in out)):
        cuts = [d for d in range(rank) if grid[d] > 1]
        if math.prod(grid) < least_blocks or len(cuts) > 3:
            continue
        chosen = [grid[d] for d in cuts] + [1] * (3 - len(cuts))
        imaps = []
        for shape in shapes:
            row = [d if len(shape) == rank and shape[d] == out[d] else -1 for d in cuts]
            imaps.append((*row, *[-1] * (3 - len(cuts))))
        yield (chosen[0], chosen[1], chosen[2]), 1, tuple(imaps), tuple(-1 for _ in shapes)


def pairs(
    plan: Plan,
    program: Program,
    target: int,
    inputs: Sequence[int],
    first: Enumerator,
    second: Enumerator,
    sizes: Sequence[int],
    least_blocks: int,
    progress: Progress,
) -> Iterator[Program]:
    """Two-kernel programs whose first kernel follows this plan and whose expression is the target; not yet verified."""
    grid, loop, imaps, fmaps = plan
    tiles = [cut(s, (*m, f), (*grid, loop)) for s, m, f in zip(program.input_shapes, imaps, fmaps, strict=True)]
    algebra, limits = first.algebra, first.limits
    for structure in first.run(
        inputs, tiles, limits.max_outputs, lambda e, _: len(e) > 1 and target not in e, progress, loop
    ):
        saved = saved_expressions(algebra, structure, inputs, loop)
        block = closed(structure, program.input_shapes, plan)
        if block is None:
            continue
        shapes = [block.output_shape(o) for o in block.outputs]
        for after in second_plans(shapes, program.output_shapes[0], sizes, least_blocks):
            if progress.limit:
                return
            yield from _merged(program, block, saved, shapes, after, second, target, progress)


def _merged(
    program: Program,
    block: BlockGraph,
    saved: Sequence[int],
    shapes: Sequence[Shape],
    plan: Plan,
    second: Enumerator,
    target: int,
    progress: Progress,
) -> Iterator[Program]:
    grid, loop, imaps, fmaps = plan
    out = program.output_shapes[0]
    part = math.prod(out) // math.prod(grid)
    try:
        tiles = [cut(s, (*m, f), (*grid, loop)) for s, m, f in zip(shapes, imaps, fmaps, strict=True)]
    except ShapeError:
        return
    wanted: Callable[[list[int], list[Shape]], bool] = lambda e, s: e == [target] and math.prod(s[0]) == part
    for structure in second.run(saved, tiles, 1, wanted, progress, loop):
        if not merges(structure):
            continue
        merge = closed(structure, shapes, plan)
        if merge is not None and merge.output_shape(merge.outputs[0]) == out:
            build = Builder()
            given = [build.input(s, n) for s, n in zip(program.input_shapes, program.input_names, strict=True)]
            yield build.build(*build.kernel(build.kernel(given, block), merge))


def closed(structure: Structure, arguments: Sequence[Shape], plan: Plan) -> BlockGraph | None:
    """The structure as a block graph; None when blocks would write one another's parts or the arena is too small.

    Results of blocks lie side by side along the dimension that the grid cuts, and those of a split sum along the last.
    """
    grid, loop, imaps, fmaps = plan
    ties = Ties(structure)
    cuts = [{ties.find((i, m[p])) for i, m in enumerate(imaps) if m[p] >= 0} for p in range(3)]
    build = BlockBuilder(arguments, grid, loop)
    try:
        for node, imap, fmap in zip(structure.nodes, imaps, fmaps, strict=False):
            build.input(node["arg"], imap, fmap)
        for node in structure.nodes[structure.arguments :]:
            build.add(node.op, node.inputs, **dict(node.attrs))
        for value in structure.saved:
            dims = [ties.find((value, d)) for d in range(len(structure.nodes[value].shape))]
            omap = [
                -1 if grid[p] == 1 else next((d for d, c in enumerate(dims) if c in cuts[p]), len(dims) - 1)
                for p in range(3)
            ]
            used = [d for d in omap if d >= 0]
            if len(used) != len(set(used)):
                return None
            build.output(value, omap)
        block = build.build()
    except ShapeError:
        return None
    return block if arena_bytes(block, arguments) <= ARENA_LIMIT else None
