"""Mirage's concrete search: for every grid, loop range and set of maps, enumerate block graphs on tiles of exactly those sizes.

Same generator, menu, limits and candidate sizes as the symbolic search (prism.search), so that the two can be compared. A graph whose
abstract expression is the target's is checked in finite fields at once. Source: "Mirage: A Multi-Level Superoptimizer for Tensor Programs",
arXiv 2405.05751.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from wager.compile.mirage.abstract import Algebra, Subexpressions, factors, of_program
from wager.compile.mirage.generate import BlockSearch, Limits, Progress, Structure, menu
from wager.compile.prism.family import ARENA_LIMIT, GRID_SIZES, LOOP_SIZES
from wager.compile.prism.mapping import choices
from wager.graph.lower.cpp import arena_bytes
from wager.graph.operators import Shape, ShapeError
from wager.graph.program import BlockBuilder, Builder, Program, cut
from wager.graph.verify.finite_field import verify


@dataclass
class Found:
    """Verified programs, the counters, and where the time went (seconds)."""

    programs: list[Program]
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)


def search(
    program: Program,
    limits: Limits,
    progress: Progress | None = None,
    *,
    grids: Sequence[int] = GRID_SIZES,
    loops: Sequence[int] = LOOP_SIZES,
    least_blocks: int = 1,
    trials: int = 2,
    rng: np.random.Generator | None = None,
) -> Found:
    """Verified single-kernel programs for the sizes in `grids` and `loops`, until the budget ends."""
    progress, rng = progress or Progress(), rng or np.random.default_rng(0)
    algebra = Algebra()
    values = of_program(algebra, program)
    target, shape = values[program.outputs[0]], program.output_shapes[0]
    inputs = [values[i] for i in program.input_positions]
    targets = Subexpressions(algebra, [target], factors(program))
    found = Found([], progress, {"enumeration": 0.0, "verification": 0.0})
    start = time.perf_counter()
    for grid, loop, imaps, fmaps in plans(program, grids, loops, least_blocks):
        progress.mappings += 1
        tiles = [cut(s, (*m, f), (*grid, loop)) for s, m, f in zip(program.input_shapes, imaps, fmaps, strict=True)]
        block = BlockSearch(algebra, targets, menu(program), limits, progress, loop)
        size = math.prod(grid)

        def accept(expressions: list[int], shapes: list[Shape], size: int = size) -> bool:
            return expressions == [target] and math.prod(shapes[0]) * size == math.prod(shape)

        for structure in block.run(inputs, tiles, 1, accept):
            for candidate in close(structure, program, grid, loop, imaps, fmaps):
                tick = time.perf_counter()
                if verify(program, candidate, rng, max_trials=trials, target=0.0):
                    progress.verified += 1
                    found.programs.append(candidate)
                found.seconds["verification"] += time.perf_counter() - tick
        if progress.limit or time.perf_counter() - progress.started > limits.budget_s:
            progress.limit = progress.limit or f"time budget of {limits.budget_s} s"
            break
    found.seconds["enumeration"] = time.perf_counter() - start - found.seconds["verification"]
    return found


def plans(
    program: Program, grid_sizes: Sequence[int], loop_sizes: Sequence[int], least_blocks: int
) -> Iterator[tuple[tuple[int, int, int], int, tuple[tuple[int, ...], ...], tuple[int, ...]]]:
    """Every (grid, loop range, input maps, loop maps) whose cuts are exact; a parallel dimension that cuts nothing has size 1."""
    count = 3 if len(program.output_shapes[0]) > 2 else 2
    shapes = program.input_shapes
    options = [list(choices(len(s), count, True)) for s in shapes]
    for chosen in product(*options):
        used = [any(c[p] >= 0 for c in chosen) for p in range(count + 1)]
        # grid dimensions are interchangeable: columns of the choice in falling order only
        columns = [tuple(c[p] for c in chosen) for p in range(count)]
        if any(a < b for a, b in zip(columns, columns[1:], strict=False)):
            continue
        for sizes in product(*([g for g in grid_sizes if g > 1] if u else (1,) for u in used[:count])):
            grid = (*sizes, *(1 for _ in range(3 - count)))
            if not least_blocks <= math.prod(grid) <= 4096:
                continue
            for loop in [n for n in loop_sizes if n > 1] if used[count] else (1,):
                imaps = tuple((*c[:count], *(-1 for _ in range(3 - count))) for c in chosen)
                fmaps = tuple(c[count] for c in chosen)
                try:
                    for s, m, f in zip(shapes, imaps, fmaps, strict=True):
                        cut(s, (*m, f), (*grid, loop))
                except ShapeError:
                    continue
                yield grid, loop, imaps, fmaps  # type: ignore[misc]


def close(
    structure: Structure,
    program: Program,
    grid: tuple[int, int, int],
    loop: int,
    imaps: Sequence[Sequence[int]],
    fmaps: Sequence[int],
) -> Iterator[Program]:
    """The structure as whole programs: one for each output map that gives the right shape and fits the arena."""
    saved = structure.saved[0]
    tile, shape = structure.nodes[saved].shape, program.output_shapes[0]
    options = [[-1] if g == 1 else range(len(tile)) for g in grid]
    for omap in product(*options):
        whole = tuple(
            t * math.prod(g for g, d in zip(grid, omap, strict=True) if d == dim) for dim, t in enumerate(tile)
        )
        mapped = [d for d in omap if d >= 0]
        if whole != shape or len(mapped) != len(set(mapped)):
            continue
        build = BlockBuilder(program.input_shapes, grid, loop)
        for node, imap, fmap in zip(structure.nodes, imaps, fmaps, strict=False):
            build.input(node["arg"], imap, fmap)
        for node in structure.nodes[structure.arguments :]:
            build.add(node.op, node.inputs, **dict(node.attrs))
        build.output(saved, omap)
        block = build.build()
        if arena_bytes(block, program.input_shapes) > ARENA_LIMIT:
            continue
        kernel = Builder()
        arguments = [kernel.input(s, n) for s, n in zip(program.input_shapes, program.input_names, strict=True)]
        yield kernel.build(*kernel.kernel(arguments, block))
