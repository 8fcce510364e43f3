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
from wager.compile.mirage.kernel_level import KernelLevel, Prefix, Step
from wager.compile.mirage.lookup import pruner
from wager.compile.mirage.pairs import pairs, splitting
from wager.compile.mirage.plans import Plan, plans
from wager.compile.prism.family import ARENA_LIMIT, GRID_SIZES, LOOP_SIZES
from wager.compile.units import Journal, fingerprint, run
from wager.graph.lower.tiles import arena_bytes
from wager.graph.operators import Shape
from wager.graph.program import BlockBuilder, Builder, Program, cut, from_json, to_json
from wager.graph.verify.finite_field import verify


@dataclass
class Found:
    """Verified programs, the counters, and where the time went (seconds)."""

    programs: list[Program]
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)


Unit = tuple[str, Any]
"""A kind and what to search: a batch of plans ("single"; "pair": of the first of two kernels), or, "mixed", the library operators that a
kernel graph begins with, the values that its first custom kernel reads, and a batch of plans for that."""
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
    """Verified programs for the sizes in `grids` and `loops`, until the budget ends: of one kernel, with `max_kernels` 2 then of two in a row.

    With `max_library_ops` come last the graphs that mix custom kernels and library operators (see kernel_level.py).
    `regions` skips maps with which no block could compute its part (without it the search is the published one).
    `state`: a file that keeps what is finished; a search that was stopped goes on from it. The result does not depend on `workers`.
    """
    progress = progress or Progress()
    found = Found([], progress, {"enumeration": 0.0, "verification": 0.0})
    start = time.perf_counter()
    settings = [vars(limits) | {"budget_s": 0}, list(grids), list(loops), least_blocks, regions, trials, seed]
    journal = Journal(state, fingerprint("mirage", to_json(program), settings))
    sizes = (tuple(grids), tuple(loops), least_blocks)
    units: Iterator[Unit] = chain(
        (("single", batch) for batch in batched(plans(program, *sizes, regions), UNIT_PLANS)),
        (("pair", batch) for batch in batched(_openings(program, limits, *sizes), UNIT_PLANS)),
        (("mixed", opening) for opening in _mixed(program, limits, *sizes)),
    )
    work = Explorer(to_json(program), limits, trials, seed, time.time() + limits.budget_s, *sizes)
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


def _level(program: Program, limits: Limits, sizes: tuple) -> KernelLevel:
    algebra = Algebra()
    targets = pruner(algebra, program, [of_program(algebra, program)[program.outputs[0]]], limits, tiled=True)
    return KernelLevel(program, algebra, targets, limits, *sizes)


def _mixed(program: Program, limits: Limits, *sizes: Any) -> Iterator[tuple[tuple[Step, ...], tuple[int, ...], list]]:
    """Library operators, what the first custom kernel reads, and a batch of its plans."""
    if limits.max_library_ops < 1:
        return
    level = _level(program, limits, sizes)
    turns = [
        (prefix.steps, inputs, batched(level.plans(prefix, inputs), UNIT_PLANS))
        for prefix in level.openings()
        for inputs in level.arguments(prefix)
    ]
    while turns:  # all openings in turn, so that a short search sees something of each
        left = []
        for steps, inputs, batches in turns:
            if (batch := next(batches, None)) is not None:
                yield steps, inputs, batch
                left.append((steps, inputs, batches))
        turns = left


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
        loops: tuple[int, ...] = LOOP_SIZES,
        least_blocks: int = 1,
    ):
        self.settings = (program, limits, trials, seed, deadline, grids, loops, least_blocks)
        self.level: KernelLevel | None = None

    def __reduce__(self) -> Any:
        return Explorer, self.settings

    def _prepare(self) -> None:
        text, limits, *_, grids, loops, least_blocks = self.settings
        self.program = from_json(text)
        self.level = _level(self.program, limits, (grids, loops, least_blocks))
        self.target, self.shape = self.level.target, self.level.shape
        self.inputs = [v.expression for v in self.level.start.values]
        self.enumerator = self.level.enumerator
        wider = menu(self.program, width=self.shape[-1])
        self.second = Enumerator(self.level.algebra, self.level.targets, wider, limits)

    def __call__(self, unit: Unit) -> dict[str, Any] | None:
        """What was found and counted in a unit; None when the deadline came first."""
        if self.level is None:
            self._prepare()
        assert self.level is not None
        kind, batch = unit
        _, limits, trials, seed, deadline, *_ = self.settings
        progress = Progress()
        limits = replace(limits, budget_s=max(0.0, deadline - time.time()))
        self.level.limits = self.enumerator.limits = self.second.limits = limits
        result: dict[str, Any] = {"programs": [], "verification_s": 0.0}
        steps, arguments, plans = batch if kind == "mixed" else ((), (), batch)
        for plan in plans:
            rng = np.random.default_rng([seed, progress.mappings])
            progress.mappings += 1
            if kind == "mixed":
                found = self._mixed(self.level.opened(steps), arguments, plan, progress)
            else:
                found = self._pairs(plan, progress) if kind == "pair" else self._single(plan, progress)
            self._record(found, progress, result, trials, rng)
            if progress.limit.startswith("time"):
                return None
        names = ("states", "pruned", "structures", "mappings", "verified")
        return result | {name: getattr(progress, name) for name in names}

    def _record(
        self, found: Iterator[Program], progress: Progress, result: dict, trials: int, rng: np.random.Generator
    ) -> None:
        """Keeps what computes the program."""
        for candidate in found:
            tick = time.perf_counter()
            if verify(self.program, candidate, rng, max_trials=trials, target=0.0):
                progress.verified += 1
                result["programs"].append(to_json(candidate))
            result["verification_s"] += time.perf_counter() - tick

    def _single(self, plan: Plan, progress: Progress) -> Iterator[Program]:
        """One kernel, cut by this plan."""
        grid, loop, imaps, fmaps = plan
        program, target, whole = self.program, self.target, math.prod(self.shape)
        tiles = [cut(s, (*m, f), (*grid, loop)) for s, m, f in zip(program.input_shapes, imaps, fmaps, strict=True)]
        size = math.prod(grid)

        def accept(expressions: list[int], shapes: list[Shape]) -> bool:
            return expressions == [target] and math.prod(shapes[0]) * size == whole

        for structure in self.enumerator.run(self.inputs, tiles, 1, accept, progress, loop):
            yield from close(structure, program, grid, loop, imaps, fmaps)

    def _pairs(self, plan: Plan, progress: Progress) -> Iterator[Program]:
        """Two kernels, the first by this plan."""
        *_, grids, _, least_blocks = self.settings
        yield from pairs(
            plan, self.program, self.target, self.inputs, self.enumerator, self.second, grids, least_blocks, progress
        )  # fmt: skip

    def _mixed(self, opening: Prefix, arguments: tuple[int, ...], plan: Plan, progress: Progress) -> Iterator[Program]:
        """Library operators, then a custom kernel by this plan, then what may follow."""
        assert self.level is not None
        for prefix in self.level.custom(opening, arguments, plan, progress):
            yield from self.level.graphs(prefix, progress)


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
