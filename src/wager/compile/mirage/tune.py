"""Compiles and times concrete programs: the last step of Mirage and of Prism.

Candidates are ranked by a cheap bound (bytes that blocks move, and arithmetic), compiled a batch at a time, and raced by successive halving:
everyone runs a little, the faster half runs more. The winner is timed against the baseline by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wager.errors import WagerError
from wager.graph.execute import Executable, known_values
from wager.graph.lower.layout import choose
from wager.graph.lower.library import generate, prepare
from wager.graph.lower.tiles import Layout
from wager.graph.program import Program
from wager.graph.timer import quick_time

CACHE_BYTES_PER_S = 60e9
FLOPS = 150e9
SECOND_LEVEL_BYTES = 512 * 1024
FUNCTIONS = frozenset(("exp", "silu", "tanh", "gelu", "sigmoid"))  # a dozen multiplications each
LIBRARY_CALL_S = 5e-6


def bound_s(program: Program, threads: int) -> float:
    """A price that only ranks: every block reads its tiles through the cache and multiplies; too few blocks idle threads.

    Library operators count too."""
    total = library_s(program, threads)
    for node in program.kernels:
        block = node.block
        assert block is not None
        moved = 4 * sum(math.prod(n.shape) * (block.loop if n["fmap"] >= 0 else 1) for n in block.inputs)
        flops, small = 0, 0.0
        for n in block.nodes:
            if n.op == "matmul":
                k = block.nodes[n.inputs[0]].shape[-1]
                flops += 2 * math.prod(n.shape) * k * block.loop
                small += (n.shape[-1] % 32 != 0) + (n.shape[-2] < 6) + (k < 64) + 0.3 * (n.shape[-2] % 8 != 0)
            elif n.op in FUNCTIONS:
                flops += 15 * math.prod(n.shape) * block.loop
        waves = math.ceil(block.blocks / threads)
        kept = 4 * sum(math.prod(n.shape) for n in block.nodes if n.op not in ("input", "output"))
        crowded = 1.0 + max(0.0, kept / SECOND_LEVEL_BYTES - 0.5)
        total += waves * (moved / CACHE_BYTES_PER_S + flops / FLOPS * (1 + 0.5 * small) * crowded + 1e-7 * block.loop)
    return total


def library_s(program: Program, threads: int) -> float:
    """The same price for the library operators beside the kernels: whole tensors in and out, arithmetic, and a call each."""
    total = 0.0
    for node in program.nodes:
        if node.op in ("input", "const", "kernel", "result", "permute", "reshape", "expand"):
            continue
        shapes = [program.nodes[i].shape for i in node.inputs]
        moved = 4 * sum(math.prod(s) for s in (*shapes, node.shape))
        flops = 2 * math.prod(node.shape) * shapes[0][-1] if node.op == "matmul" else 0
        flops += 15 * math.prod(node.shape) if node.op in FUNCTIONS else 0
        total += LIBRARY_CALL_S + (moved / CACHE_BYTES_PER_S + flops / FLOPS) / threads
    return total


@dataclass
class Timed:
    """A program that runs, and its median in seconds."""

    program: Program
    seconds: float
    run: Callable[..., list[Tensor]]


Planned = tuple[Program, list[str], dict[int, Layout]]


def _planned(program: Program, constants: Mapping[str, Tensor]) -> Planned | None:
    """The pruned program, its kernels' C++ text, and their layouts; None when a kernel has no C++ form."""
    program = program.pruned()
    known, texts = known_values(program, constants), []
    try:
        layouts = choose(program, known)
        for i, node in enumerate(program.nodes):
            if node.block is not None:
                held = [a for a, j in enumerate(node.inputs) if j in known]
                texts.append(generate(node, [program.nodes[j].shape for j in node.inputs], held, layouts[i]).text)
    except WagerError:
        return None
    return program, texts, layouts


def _runner(plan: Planned, constants: Mapping[str, Tensor]) -> Executable | None:
    try:
        return Executable(plan[0], constants, plan[2])
    except WagerError:
        return None


def race(
    programs: Sequence[Program],
    constants: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    *,
    samples: int = 12,
    on_timed: Callable[[int], None] | None = None,
) -> list[Timed]:
    """The best `samples` by bound, compiled and timed; fastest first. Programs that do not compile are skipped."""
    threads = torch.get_num_threads()
    ranked = sorted(programs, key=lambda p: bound_s(p, threads))[:samples]
    plans = [_planned(p, constants) for p in ranked]
    prepare([text for plan in plans if plan is not None for text in plan[1]])
    runners = [None if plan is None else _runner(plan, constants) for plan in plans]
    alive = [Timed(p, math.inf, r) for p, r in zip(ranked, runners, strict=True) if r is not None]
    rounds = 3
    while alive:
        for candidate in alive:
            candidate.seconds = quick_time(lambda c=candidate: c.run(*inputs), rounds=rounds)
        alive.sort(key=lambda t: t.seconds)
        if on_timed:
            on_timed(len(alive))
        if rounds >= 12 or len(alive) == 1:
            break
        alive, rounds = alive[: max(1, len(alive) // 2)], rounds * 2
    return alive
