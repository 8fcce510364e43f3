"""A small program on a GPU: the symbolic search as on a CPU, its open sizes chosen for the device, members raced as Triton kernels.

Families are found and proved with all sizes open (prism.search). Here their sizes are filled in for a GPU: enough blocks for its
multiprocessors, tiles that fit registers and shared memory. A price ranks the members, the best are compiled and timed in CUDA graphs, and
the leaders are timed again with other numbers of warps and pipeline stages. What wins is certified like every program. Sources: arXiv
2604.15272 (parameter instantiation), 2405.05751 (section 7).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from heapq import nsmallest
from itertools import product
from typing import Any

import torch
from torch import Tensor

from wager.compile import cache as found_before
from wager.compile.fused import Settings, Told, certificate, refusal
from wager.compile.mirage.generate import Progress
from wager.compile.prism import search as prism_search
from wager.compile.prism.family import Family, block_of, member_sizes
from wager.compile.report import Report
from wager.compile.views import absorb, restore
from wager.errors import UsageError
from wager.graph import cuda_timer
from wager.graph.lower.triton import TritonProgram
from wager.graph.lower.triton_source import SHARED_BYTES, Launch, default_launch, loaded_bytes, padded
from wager.graph.operators import Shape
from wager.graph.program import BlockGraph, Program
from wager.graph.trace import Traced

GRIDS = (2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
LOOPS = (2, 4, 8, 16, 32, 64, 128)
"""Sizes that really cut: a family with fewer open dimensions stands for the size 1."""
LEAST_BLOCKS = 32
MOST_TILE = 32_768  # entries of one tile: 256 registers a thread in four warps, 128 in eight
MOST_KEPT = 65_536  # entries of all accumulators of a block
MULTIPROCESSORS = 132
DRAM_BYTES_PER_S = 3.0e12
CACHE_BYTES_PER_S = 5.5e12
BLOCK_BYTES_PER_S = 60e9  # that one multiprocessor draws
MATRIX_FLOPS = 3e14
VECTOR_FLOPS = 2e13
FUNCTIONS_PER_S = 3e12
LAUNCH_S, START_S, TURN_S = 2e-6, 1e-6, 0.15e-6
WARPS = (2, 4, 8, 16)
STAGES = (1, 2, 3, 4, 6)
KEPT_AFTER_FIRST = 4
COMPILERS = 4


def sides(shape: Shape) -> int:
    """Entries of a tile as it lies in registers."""
    return math.prod(padded(s) for s in shape)


def fits(block: BlockGraph, shapes: Sequence[Shape]) -> bool:
    """Whether tiles fit a multiprocessor, with one loop turn's tiles in shared memory (two where the loop turns)."""
    kept = sum(sides(n.shape) for n in block.nodes if n.op.startswith("accum"))
    if kept > MOST_KEPT or loaded_bytes(block, 2) * (1 if block.loop == 1 else 2) > SHARED_BYTES:
        return False
    for node in block.nodes:
        size = sides(node.shape)
        if node.op == "matmul":
            a, b = (block.nodes[i].shape for i in node.inputs)
            if 1 in (a[-2], a[-1], b[-1]):
                size = max(size, sides((*a, b[-1])))  # multiplied entry by entry
        if size > MOST_TILE:
            return False
    return True


def price_s(block: BlockGraph, shapes: Sequence[Shape], item: int) -> float:
    """Seconds that rank kernels: bytes from memory, from the cache and through each multiprocessor, arithmetic, and loop turns."""
    turn = item * sum(math.prod(n.shape) for n in block.inputs if n["fmap"] >= 0)
    once = item * sum(math.prod(n.shape) for n in block.inputs if n["fmap"] < 0)
    part = once + turn * block.loop
    whole = item * (sum(map(math.prod, shapes)) + sum(math.prod(block.output_shape(o)) for o in block.outputs))
    launch = default_launch(block, item)
    together = max(1, min(4, SHARED_BYTES // max(1, loaded_bytes(block, item) * launch.stages)))
    waves = math.ceil(block.blocks / (MULTIPROCESSORS * together))
    moved = max(
        whole / DRAM_BYTES_PER_S,
        part * block.blocks / CACHE_BYTES_PER_S,
        part * math.ceil(block.blocks / MULTIPROCESSORS) / BLOCK_BYTES_PER_S,
    )
    computed = sum(_arithmetic_s(block, i) for i in range(len(block.nodes))) * max(block.blocks, MULTIPROCESSORS)
    return LAUNCH_S + max(moved, computed) + 0.3 * min(moved, computed) + waves * (START_S + TURN_S * block.loop)


def _arithmetic_s(block: BlockGraph, i: int) -> float:
    """A node's share of the device's time, for one block among as many as there are multiprocessors."""
    node = block.nodes[i]
    turns = 1 if block.after[i] and not node.op.startswith("accum") else block.loop
    if node.op == "matmul":
        a, b = (block.nodes[j].shape for j in node.inputs)
        thin = 1 in (a[-2], a[-1], b[-1])
        products = 2 * sides(node.shape) * padded(a[-1])
        return turns * products / (VECTOR_FLOPS if thin else MATRIX_FLOPS)
    if node.op in ("input", "output"):
        return 0.0
    rate = FUNCTIONS_PER_S if node.op in ("exp", "silu", "gelu", "tanh", "sigmoid") else VECTOR_FLOPS
    return turns * sides(node.shape) / rate


@dataclass(frozen=True)
class Member:
    """A program of a family, with its price and how its kernels start."""

    program: Program
    price: float
    launches: tuple[Launch, ...]


def members(families: Sequence[Family], program: Program, item: int, most: int) -> list[Member]:
    """The `most` cheapest members by price, cheapest first."""
    priced: list[tuple[float, int, Any]] = []
    for least in (LEAST_BLOCKS, 1):  # e.g. few rows that cannot be cut: few blocks are all there is
        for at, family in enumerate(families):
            for sizes in member_sizes(family, program.input_shapes, least, grids=GRIDS, loops=LOOPS, fits=fits):
                priced.append((_chain_price(family, program.input_shapes, sizes, item), at, sizes))
        if priced:
            break
    found: list[Member] = []
    for price, at, sizes in nsmallest(most, priced):
        member = families[at].instantiate(program.input_shapes, sizes, program.input_names)
        launches = tuple(default_launch(n.block, item) for n in member.kernels if n.block is not None)
        found.append(Member(member, price, launches))
    return found


def _chain_price(family: Family, shapes: Sequence[Shape], sizes: Sequence[Any], item: int) -> float:
    total = 0.0
    for kernel, size in zip(family.kernels, sizes, strict=True):
        block = block_of(kernel, shapes, size)
        total += price_s(block, shapes, item)
        shapes = [block.output_shape(o) for o in block.outputs]
    return total


def launches_of(block: BlockGraph, item: int) -> list[Launch]:
    """The starts that fit a block."""
    held = max(1, loaded_bytes(block, item))
    largest = max(sides(n.shape) for n in block.nodes)
    stages = [s for s in STAGES if s == 1 or (s <= block.loop and s * held <= SHARED_BYTES)]
    warps = [w for w in WARPS if largest // (32 * w) <= 256 and w * 32 <= max(64, largest)]
    return [Launch(w, s) for w, s in product(warps or [4], stages if block.loop > 1 else [1])]


def other_launches(member: Member, item: int) -> Iterator[Member]:
    """The member with every other start of one of its kernels."""
    for k, node in enumerate(member.program.kernels):
        assert node.block is not None
        for launch in launches_of(node.block, item):
            if launch != member.launches[k]:
                yield replace(member, launches=(*member.launches[:k], launch, *member.launches[k + 1 :]))


@dataclass
class Raced:
    """A member that runs, and its seconds a call (infinite when it could not be compiled or run)."""

    member: Member
    run: TritonProgram
    seconds: float = math.inf
    fault: str = ""


Clock = Callable[[Callable[[], Any]], float]


def race(
    some: Sequence[Member],
    original: Program,
    constants: dict[str, Tensor],
    inputs: Sequence[Tensor],
    clock: Clock | None = None,
    tune: bool = True,
) -> list[Raced]:
    """All members that run, fastest first. The first few by time are raced again with other starts (`tune`)."""
    item = inputs[0].dtype.itemsize
    done = _timed(some, original, constants, inputs, clock)
    if tune and done:
        others = [m for r in done[:KEPT_AFTER_FIRST] for m in other_launches(r.member, item)]
        done = sorted([*done, *_timed(others, original, constants, inputs, clock)], key=lambda r: r.seconds)
    return done


def _timed(
    some: Sequence[Member],
    original: Program,
    constants: dict[str, Tensor],
    inputs: Sequence[Tensor],
    clock: Clock | None,
) -> list[Raced]:
    clock = clock or cuda_timer.quick_time
    runs = [Raced(m, TritonProgram(restore(m.program, original), constants, m.launches)) for m in some]

    def ready(raced: Raced) -> None:
        try:
            raced.run.prepare(*inputs)
        except Exception as error:  # whatever a compiler says of one candidate: it is skipped
            raced.fault = f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor(COMPILERS) as pool:
        list(pool.map(ready, runs))
    with cuda_timer.alone():
        for raced in runs:
            if not raced.fault:
                try:
                    raced.seconds = clock(lambda r=raced: r.run(*inputs))
                except Exception as error:  # e.g. more shared memory than there is
                    raced.fault = f"{type(error).__name__}: {error}"
    return sorted((r for r in runs if not r.fault), key=lambda r: r.seconds)


def superoptimize(
    traced: Traced,
    inputs: Sequence[Tensor],
    settings: Settings,
    say: Callable[[str], None] | None = None,
    clock: Clock | None = None,
) -> tuple[Any, Program, Report]:
    """What runs (None: the original), its program, and the report. Raises UsageError for a search that has no GPU form."""
    if settings.search != "prism":
        raise UsageError(f"search {settings.search!r} makes kernels for a CPU; on a GPU use prism")
    program = absorb(traced.program)
    report = Report(settings.search, "original", "", 0.0, 0.0, 0.0, 0.0)
    report.reason = refusal(program)
    if report.reason:
        return None, traced.program, report
    kind = str(inputs[0].dtype), [tuple(x.stride()) for x in inputs]
    place = found_before.path(
        traced.program, settings.search, settings.limits, settings.samples, device_name(inputs[0]), kind
    )
    known = _remembered(place, settings)
    some = known or _found(program, settings, inputs[0].dtype.itemsize, report, say)
    if not some:
        return None, traced.program, report
    if say:
        say(f"{len(some)} members to time, priced {some[0].price * 1e6:.1f} us and more")
    best = race(some, traced.program, traced.constants, inputs, clock, tune=not known)
    report.counters["timed"] = len(best)
    report.details += [_told(r) for r in best[:10]]
    if not best:
        report.reason = "no candidate could be compiled; the original is kept"
        return None, traced.program, report
    winner = best[0]
    whole = winner.run.program
    sure, report.reason = certificate(traced.program, whole)
    if not sure:
        return None, traced.program, report
    report.used = settings.search
    if settings.cache and not known:
        launches = [[launch.warps, launch.stages] for launch in winner.member.launches]
        found_before.write(place, winner.member.program, {"launches": launches, "price": winner.member.price})
    return winner.run, whole, report


def device_name(x: Tensor) -> str:
    return torch.cuda.get_device_name(x.device) if x.is_cuda else str(x.device)


def _told(raced: Raced) -> str:
    kernels = [n.block for n in raced.member.program.kernels if n.block is not None]
    sizes = "; ".join(
        f"grid {'x'.join(map(str, b.grid))} loop {b.loop} warps {launch.warps} stages {launch.stages}"
        for b, launch in zip(kernels, raced.member.launches, strict=True)
    )
    return f"{raced.seconds * 1e6:.2f} us (priced {raced.member.price * 1e6:.1f}): {sizes}"


def _remembered(place: Any, settings: Settings) -> list[Member]:
    known = found_before.read(place) if settings.cache else None
    if known is None or "launches" not in known[1]:
        return []
    program, counters = known
    return [Member(program, counters.get("price", 0.0), tuple(Launch(*row) for row in counters["launches"]))]


def _found(
    program: Program, settings: Settings, item: int, report: Report, say: Callable[[str], None] | None
) -> list[Member]:
    """Members to time; empty, with the reason in the report, when the search found none."""
    counters = Progress(listener=Told(say) if say else None)
    found = prism_search.search(program, settings.limits, counters, workers=settings.workers, state=settings.state)
    report.counters = {k: v for k, v in vars(counters).items() if isinstance(v, int) and not isinstance(v, bool)}
    report.counters["families"] = len(found.families)
    if counters.limit:
        report.counters["stopped by"] = counters.limit
    some = members(found.families, program, item, settings.samples)
    if not some:
        stopped = (
            counters.limit or f"max_block_ops {settings.limits.max_block_ops}: nothing of that size fits the device"
        )
        report.reason = f"0 graphs found ({stopped}); the original is kept"
    return some
