"""What parts of the compiler are worth: Prism's ablations, tuning a family again, layouts, and how fast generated kernels move memory.

    python -m benchmarks.compile.variants [--quick] [--budget 20] [--only ablation|retune|layouts|eoperators]

ablation: RMSNorm+matmul with one kind of map concrete, without symmetry breaking, without pruning. retune: one Prism search and a tuning for each
of six batch sizes against six Mirage searches. layouts: the same kernels with layouts chosen by the integer program and all row-major (permuted
inputs are then rearranged at every call). eoperators: gigabytes per second of generated memory-bound kernels against a copy of as many bytes.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.compile.superoptimize import machine_facts
from benchmarks.compile.workloads import single_operators
from benchmarks.harness import Report, Row, arguments, compare, load_results, say
from wager.compile.api import compile, freeze
from wager.compile.mirage import search as concrete
from wager.compile.mirage.enumerate import library
from wager.compile.mirage.generate import Limits
from wager.compile.mirage.tune import race
from wager.compile.ollie.convolutions import expression, find_convolutions
from wager.compile.ollie.realize import Plan
from wager.compile.ollie.search import derive
from wager.compile.prism import search as symbolic
from wager.compile.prism.ablation import KINDS, search_with_concrete
from wager.compile.prism.retune import retune
from wager.graph import published
from wager.graph.execute import Executable
from wager.graph.lower.library import parts
from wager.graph.timer import quick_time
from wager.graph.trace import trace

SECTIONS = ("ablation", "retune", "layouts", "eoperators")
BATCHES = (2, 4, 8, 16, 32, 64)


def main() -> None:
    parser = arguments("What parts of the compiler are worth.", repeats=False)
    parser.add_argument("--budget", type=float, default=None, help="seconds of search per program")
    parser.add_argument("--only", choices=SECTIONS, default=None, help="one part; the record keeps the others")
    args = parser.parse_args()
    torch.manual_seed(0)
    library()
    parts()  # built once, before any clock starts
    budget = args.budget or (4.0 if args.quick else 20.0)
    rows, facts = recorded() if args.only and not args.quick else ([], {})
    for section in SECTIONS if args.only is None else (args.only,):
        new, facts[section] = {
            "ablation": ablation,
            "retune": tuned_again,
            "layouts": layouts,
            "eoperators": bandwidth,
        }[section](args.quick, budget)
        rows = [r for r in rows if not r.workload.startswith(section)] + new
        for name, value in facts[section].items():
            say(f"{section}, {name}: {value}")
    report = Report("compile", "variants", rows, facts)
    if rows:
        print(report.table())
    if not args.quick:
        report.save(machine_facts())


def recorded() -> tuple[list[Row], dict[str, Any]]:
    for found in load_results():
        if (found["wing"], found["system"]) == ("compile", "variants"):
            return [Row(**row) for row in found["rows"]], found["facts"]
    return [], {}


def ablation(quick: bool, budget: float) -> tuple[list[Row], dict[str, Any]]:
    """Seconds, states and families of the search, whole and with a part taken away."""
    program = published.rmsnorm_matmul(16, 1024, 4096)
    limits = Limits(max_block_ops=8 if quick else 9, budget_s=budget)
    runs = {
        "symbolic": lambda: symbolic.search(program, limits),
        **{f"{kind} concrete": lambda kind=kind: search_with_concrete(kind, program, limits) for kind in KINDS},
        "grid dimensions told apart": lambda: symbolic.search(program, limits, symmetric=False),
        "prefixes not pruned": lambda: symbolic.search(program, replace(limits, prune=False)),
    }
    facts = {}
    for name, run in runs.items():
        start = time.perf_counter()
        found = run()
        facts[name] = {
            "seconds": round(time.perf_counter() - start, 3),
            "states": found.progress.states,
            "mappings": found.progress.mappings,
            "families": len(found.families),
            "stopped_by": found.progress.limit,
        }
    return [], facts


def tuned_again(quick: bool, budget: float) -> tuple[list[Row], dict[str, Any]]:
    """One search and six tunings against six searches; and what tuning loses against a search for each size."""
    batches, hidden, out = (BATCHES[1:4], 256, 1024) if quick else (BATCHES, 1024, 4096)
    limits = Limits(max_block_ops=8, budget_s=budget)
    programs = {b: published.rmsnorm_matmul(b, hidden, out) for b in batches}
    inputs = {b: [torch.randn(s) * 0.1 for s in p.input_shapes] for b, p in programs.items()}
    start = time.perf_counter()
    families = symbolic.search(programs[16 if 16 in programs else batches[0]], limits).families
    tuned = {b: retune(families, programs[b], inputs[b], samples=8) for b in batches}
    ours_s, threads = time.perf_counter() - start, torch.get_num_threads()
    start, theirs = time.perf_counter(), {}
    for b, program in programs.items():
        found = concrete.search(program, limits, least_blocks=threads, regions=False)
        theirs[b] = race(found.programs, {}, inputs[b], samples=8)
    facts: dict[str, Any] = {
        "one search and a tuning for each size": f"{ours_s:.2f} s",
        "a Mirage search for each size": f"{time.perf_counter() - start:.2f} s",
        "times faster": round((time.perf_counter() - start) / ours_s, 1),
    }
    rows, losses = [], []
    for b, program in programs.items():
        best = race(
            symbolic.members(symbolic.search(program, limits).families, program, threads), {}, inputs[b], samples=24
        )
        pair = {"searched for this size": best[0], "tuned again": tuned[b]}
        calls = {n: (lambda t=t, b=b: _void(t.run(*inputs[b]))) for n, t in pair.items()}
        rows += compare(f"retune, batch {b}", calls, repeats=5 if quick else 21)
        losses.append(1 / rows[-1].ratio - 1)
    facts["slower than searched, by size"] = {b: f"{loss:+.1%}" for b, loss in zip(programs, losses, strict=True)}
    return rows, facts


def keys_as_stored(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(q @ k.transpose(-1, -2))
    return (weights / weights.sum(-1, keepdim=True)) @ v


def gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(torch.nn.functional.linear(x, gate)) * torch.nn.functional.linear(x, up)


def layouts(quick: bool, budget: float) -> tuple[list[Row], dict[str, Any]]:
    """Kernels of programs whose inputs lie transposed: with layouts chosen, and all row-major."""
    s = 4 if quick else 1
    cases = {
        "attention, keys as stored": (
            keys_as_stored,
            [torch.randn(2, 256, 64) * 0.1, torch.randn(2, 4096 // s, 64), torch.randn(2, 4096 // s, 64)],
        ),
        "gated MLP, weights as inputs": (
            gated,
            [torch.randn(8, 512), *(torch.randn(2048 // s, 512) / 22 for _ in range(2))],
        ),
    }
    rows, facts = [], {}
    for name, (function, inputs) in cases.items():
        done = compile(function, inputs, search="prism", time_budget_s=budget, samples=12, cache=False)
        if done.run is None:
            facts[name] = done.report().reason
            continue
        plain = Executable(done.run.program, done.traced.constants, {})
        ways = {"row-major": plain, "layouts chosen": done.run}
        calls = {way: (lambda run=run, data=inputs: _void(run(*data))) for way, run in ways.items()}
        rows += compare(f"layouts: {name}", calls, repeats=5 if quick else 25)
        facts[name] = {
            "arguments": [list(o) for o in next(iter(done.run.layouts.values())).arguments],
            "tiles copied": [len(x.copied) for x in done.run.layouts.values()],
        }
    return rows, facts


def bandwidth(quick: bool, budget: float) -> tuple[list[Row], dict[str, Any]]:
    """Every generated kernel of the best matrix-product form of each operator: bytes read and written per second."""
    facts: dict[str, Any] = {}
    for name, (module, inputs) in single_operators(quick).items():
        traced = freeze(trace(module, inputs))
        plain = Executable(traced.program, traced.constants)
        known = {i: v for i, v in enumerate(plain.values) if isinstance(v, Tensor)}
        convolutions = find_convolutions(plain.program, known)
        if not convolutions:
            continue
        (fused,) = convolutions
        scope = expression(plain.program, fused)
        found = derive(scope, max_depth=3, targets=("matmul",), budget_s=budget / 4, keep=1)
        if not found.candidates:
            facts[name] = f"no matrix product was derived ({found.limit})"
            continue
        plan = Plan(found.candidates[0].scope, {"K": fused.weight})
        data = inputs[0].permute(0, 2, 3, 1).contiguous()
        facts[name] = [measured(step) for step in plan.profile({"A": data}) if step.kind == "eoperator"]
    return [], facts


def measured(step: Any) -> str:
    """A kernel's bandwidth beside that of a copy that reads and writes as many bytes."""
    source = torch.empty(max(step.bytes_moved // 8, 1))
    target = torch.empty_like(source)
    copy_s = quick_time(lambda: target.copy_(source), rounds=15)
    rate, best = step.bytes_moved / step.seconds / 1e9, step.bytes_moved / copy_s / 1e9
    return f"{step.bytes_moved / 1e6:.2f} MB at {rate:.1f} GB/s (copy {best:.1f} GB/s, {rate / best:.0%})"


def _void(_: Any) -> None:
    return None


if __name__ == "__main__":
    main()
