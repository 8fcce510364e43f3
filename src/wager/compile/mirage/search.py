"""Mirage's concrete search: for every grid, loop range and set of maps, enumerate block graphs on tiles of exactly those sizes.

Same generator, menu, limits and candidate sizes as the symbolic search (prism.search), so that the two can be compared. A graph whose
abstract expression is the target's is checked in finite fields at once. Source: "Mirage: A Multi-Level Superoptimizer for Tensor Programs",
arXiv 2405.05751.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

import numpy as np

from wager.compile.mirage.abstract import Algebra, of_program
from wager.compile.mirage.enumerate import Enumerator
from wager.compile.mirage.generate import Limits, Progress, Structure, menu
from wager.compile.mirage.lookup import pruner
from wager.compile.mirage.pairs import pairs, splitting
from wager.compile.mirage.regions import grid_maps
from wager.compile.prism.family import ARENA_LIMIT, GRID_SIZES, LOOP_SIZES
from wager.compile.prism.mapping import choices
from wager.compile.units import Journal, fingerprint, run
from wager.graph.lower.cpp import arena_bytes
from wager.graph.operators import Shape, ShapeError
from wager.graph.program import BlockBuilder, Builder, Program, cut, from_json, to_json
from wager.graph.verify.finite_field import verify


@dataclass
class Found:
    """Verified programs, the counters, and where the time went (seconds)."""

    programs: list[Program]
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)


Plan = tuple[tuple[int, int, int], int, tuple[tuple[int, ...], ...], tuple[int, ...]]
"""Grid, loop range, input maps, loop maps."""
UNIT_PLANS = 32


def search(
    program: Program,
    limits: Limits,
    progress: Progress | None = None,
    *,
    grids: Sequence[int] = GRID_SIZES,
    loops: Sequence[int] = LOOP_SIZES,
    least_blocks: int = 1,
    regions: bool = True,
    trials: int = 2,
    seed: int = 0,
    workers: int = 1,
    state: str | Path | None = None,
) -> Found:
    """Verified programs for the sizes in `grids` and `loops`, until the budget ends: of one kernel, with `max_kernels` 2 then of two.

    `regions` skips maps with which no block could compute its part (without it the search is the published one).
    `state`: a file that keeps what is finished; a search that was stopped goes on from it. The result does not depend on `workers`.
    """
    progress = progress or Progress()
    found = Found([], progress, {"enumeration": 0.0, "verification": 0.0})
    start = time.perf_counter()
    settings = [vars(limits) | {"budget_s": 0}, list(grids), list(loops), least_blocks, regions, trials, seed]
    journal = Journal(state, fingerprint("mirage", to_json(program), settings))
    units = chain(
        ((False, batch) for batch in batched(plans(program, grids, loops, least_blocks, regions), UNIT_PLANS)),
        ((True, batch) for batch in batched(_openings(program, limits, grids, loops, least_blocks), UNIT_PLANS)),
    )
    work = Explorer(to_json(program), limits, trials, seed, time.time() + limits.budget_s, tuple(grids), least_blocks)
    before = dict(vars(progress))
    totals = {name: 0 for name in ("states", "pruned", "structures", "mappings", "verified")}
    for _, _, result in run(units, work, journal, lambda: progress.look(limits), workers):
        for name in totals:
            totals[name] += result[name]
            setattr(progress, name, before[name] + totals[name])
        found.seconds["verification"] += result["verification_s"]
        found.programs += [from_json(text) for text in result["programs"]]
    if not progress.limit and time.perf_counter() - progress.started > limits.budget_s:
        progress.limit = f"time budget of {limits.budget_s} s"
    found.seconds["enumeration"] = max(0.0, (time.perf_counter() - start) * workers - found.seconds["verification"])
    return found


def _openings(
    program: Program, limits: Limits, grids: Sequence[int], loops: Sequence[int], least_blocks: int
) -> Iterator[Plan]:
    """Plans of a first of two kernels."""
    if limits.max_kernels > 1:
        yield from splitting(plans(program, grids, loops, least_blocks, regions=False), program)


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


class Explorer:
    """Searches a batch of plans; travels to worker processes. What it learns about expressions stays with it from batch to batch."""

    def __init__(
        self,
        program: str,
        limits: Limits,
        trials: int,
        seed: int,
        deadline: float,
        grids: tuple[int, ...] = GRID_SIZES,
        least_blocks: int = 1,
    ):
        self.settings = (program, limits, trials, seed, deadline, grids, least_blocks)
        self.enumerator: Enumerator | None = None

    def __reduce__(self) -> Any:
        return Explorer, self.settings

    def _prepare(self) -> None:
        text, limits, *_ = self.settings
        self.program = from_json(text)
        algebra = Algebra()
        values = of_program(algebra, self.program)
        self.target, self.shape = values[self.program.outputs[0]], self.program.output_shapes[0]
        self.inputs = [values[i] for i in self.program.input_positions]
        targets = pruner(algebra, self.program, [self.target], limits, tiled=True)
        self.enumerator = Enumerator(algebra, targets, menu(self.program), limits)
        self.second = Enumerator(algebra, targets, menu(self.program, width=self.shape[-1]), limits)

    def __call__(self, unit: tuple[bool, Sequence[Plan]]) -> dict[str, Any] | None:
        """What was found and counted in a batch of plans (of one kernel, or of the first of two); None when the deadline came first."""
        if self.enumerator is None:
            self._prepare()
        paired, batch = unit
        _, limits, trials, seed, deadline, *_ = self.settings
        progress = Progress()
        limits = replace(limits, budget_s=max(0.0, deadline - time.time()))
        result: dict[str, Any] = {"programs": [], "verification_s": 0.0}
        step = self._pairs if paired else self._plan
        for plan in batch:
            step(plan, limits, progress, result, trials, np.random.default_rng([seed, progress.mappings]))
            if progress.limit.startswith("time"):
                return None
        names = ("states", "pruned", "structures", "mappings", "verified")
        return result | {name: getattr(progress, name) for name in names}

    def _plan(
        self, plan: Plan, limits: Limits, progress: Progress, result: dict, trials: int, rng: np.random.Generator
    ) -> None:
        grid, loop, imaps, fmaps = plan
        program, target, whole = self.program, self.target, math.prod(self.shape)
        progress.mappings += 1
        tiles = [cut(s, (*m, f), (*grid, loop)) for s, m, f in zip(program.input_shapes, imaps, fmaps, strict=True)]
        size = math.prod(grid)

        def accept(expressions: list[int], shapes: list[Shape]) -> bool:
            return expressions == [target] and math.prod(shapes[0]) * size == whole

        assert self.enumerator is not None
        self.enumerator.limits = limits
        for structure in self.enumerator.run(self.inputs, tiles, 1, accept, progress, loop):
            for candidate in close(structure, program, grid, loop, imaps, fmaps):
                tick = time.perf_counter()
                if verify(program, candidate, rng, max_trials=trials, target=0.0):
                    progress.verified += 1
                    result["programs"].append(to_json(candidate))
                result["verification_s"] += time.perf_counter() - tick

    def _pairs(
        self, plan: Plan, limits: Limits, progress: Progress, result: dict, trials: int, rng: np.random.Generator
    ) -> None:
        """Two kernels, the first by this plan."""
        assert self.enumerator is not None
        self.enumerator.limits = self.second.limits = limits
        *_, grids, least_blocks = self.settings
        progress.mappings += 1
        found = pairs(
            plan, self.program, self.target, self.inputs, self.enumerator, self.second, grids, least_blocks, progress
        )  # fmt: skip
        for candidate in found:
            tick = time.perf_counter()
            if verify(self.program, candidate, rng, max_trials=trials, target=0.0):
                progress.verified += 1
                result["programs"].append(to_json(candidate))
            result["verification_s"] += time.perf_counter() - tick


def plans(
    program: Program, grid_sizes: Sequence[int], loop_sizes: Sequence[int], least_blocks: int, regions: bool = True
) -> Iterator[Plan]:
    """Every (grid, loop range, input maps, loop maps) whose cuts are exact; a parallel dimension that cuts nothing has size 1.

    `regions`: only grid maps that give every block what its part of the output depends on. Grid dimensions are interchangeable: one order.
    """
    count, shapes = (3 if len(program.output_shapes[0]) > 2 else 2), program.input_shapes
    loops = list(product(*(range(-1, len(s)) for s in shapes)))
    for columns in grid_maps(program, count) if regions else _any_maps(shapes, count):
        used = [any(d >= 0 for d in column) for column in columns]
        imaps = tuple((*(c[i] for c in columns), *(-1 for _ in range(3 - count))) for i in range(len(shapes)))
        for sizes in product(*([g for g in grid_sizes if g > 1] if u else (1,) for u in used)):
            grid = (*sizes, *(1 for _ in range(3 - count)))
            if not least_blocks <= math.prod(grid) <= 4096:
                continue
            try:
                tiles = [cut(s, m, grid) for s, m in zip(shapes, imaps, strict=True)]
            except ShapeError:
                continue
            for fmaps in loops:
                for loop in [n for n in loop_sizes if n > 1] if any(f >= 0 for f in fmaps) else (1,):
                    if all(f < 0 or not t[f] % loop for t, f in zip(tiles, fmaps, strict=True)):
                        yield grid, loop, imaps, fmaps  # type: ignore[misc]


def _any_maps(shapes: Sequence[Shape], count: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Every well-formed choice of columns, in falling order."""
    for chosen in product(*(list(choices(len(s), count, False)) for s in shapes)):
        columns = tuple(tuple(c[p] for c in chosen) for p in range(count))
        if all(a >= b for a, b in zip(columns, columns[1:], strict=False)):
            yield columns


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
