"""What `wager.compile` finds against torch.compile (max-autotune, frozen weights) and eager torch, interleaved in one run.

    python -m benchmarks.compile.superoptimize [--system ollie|mirage|prism] [--quick] [--budget 60]

OLLIE: the networks and operators of its sheet. Prism and Mirage: attention as written, LoRA, gated MLP, RMSNorm+matmul. For Prism the facts
also hold both searches side by side on the same limits and sizes: time, states, verified programs, and the best kernel's time.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch

from benchmarks.compile.workloads import inductor, networks, programs, single_operators
from benchmarks.harness import Report, Row, arguments, compare, say
from wager.compile.api import compile
from wager.compile.mirage import search as concrete
from wager.compile.mirage.generate import Limits, Progress
from wager.compile.mirage.tune import race
from wager.compile.prism import search as symbolic
from wager.graph import published
from wager.graph.program import Program


def main() -> None:
    parser = arguments("wager.compile against torch.compile.")
    parser.add_argument("--system", choices=("ollie", "mirage", "prism"), default="prism")
    parser.add_argument("--budget", type=float, default=None, help="seconds of search per program")
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("these kernels run on a CPU: --device cpu")
    torch.manual_seed(0)
    budget = args.budget or (5.0 if args.quick else 60.0)
    repeats = args.repeats or (3 if args.quick else 25)
    rows, facts = measure(args.system, args.quick, budget, repeats)
    if args.system == "prism":
        facts["search"] = searches(args.quick, budget)
        facts["pruning"] = pruning(args.quick, budget)
    report = Report("compile", args.system, rows, facts)
    print(report.table())
    for name, value in facts.items():
        say(f"{name}: {value}")
    if not args.quick:
        report.save(machine_facts())


def machine_facts() -> dict[str, Any]:
    from wager.native import build

    return {"isa": build.isa(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def measure(system: str, quick: bool, budget: float, repeats: int) -> tuple[list[Row], dict[str, Any]]:
    cases = {**networks(quick), **single_operators(quick)} if system == "ollie" else programs(quick)
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    for name, (module, inputs) in cases.items():
        say(f"compiling {name}")
        done = compile(module, inputs, search=system, time_budget_s=budget, samples=4 if quick else 16)
        baseline = inductor(module, inputs)

        def eager(module=module, inputs=inputs) -> None:
            with torch.no_grad():
                module(*inputs)

        contenders = {
            "torch.compile": baseline,
            "wager": lambda done=done, inputs=inputs: _void(done(*inputs)),
            "eager": eager,
        }
        rows += [r for r in compare(name, contenders, repeats=repeats, unit="s", progress=None) if r.ours == "wager"]
        found = done.report()
        facts[name] = {"used": found.used, "search_s": round(found.seconds, 1), **found.counters}
    facts["geomean"] = math.exp(statistics.mean(math.log(r.ratio) for r in rows))
    return rows, facts


def _void(_: Any) -> None:
    return None


def sheet_programs(quick: bool) -> dict[str, tuple[Program, int]]:
    """Program -> most block operators."""
    s = 4 if quick else 1
    return {
        "RMSNorm+matmul": (published.rmsnorm_matmul(16, 1024 // s, 4096 // s), 8),
        "gated MLP": (published.gated_mlp(8, 512 // s, 2048 // s), 10),
        "LoRA": (published.lora(16, 256 // s, 16, 4096 // s), 10),
        "attention": (published.attention(2, 256 // s, 4096 // s, 64), 10),
    }


def searches(quick: bool, budget: float) -> dict[str, Any]:
    """Both searches on equal limits and candidate sizes, ending with the race over what each found."""
    out: dict[str, Any] = {}
    threads = torch.get_num_threads()
    for name, (program, ops) in sheet_programs(quick).items():
        limits = Limits(max_block_ops=ops, budget_s=budget)
        inputs = [torch.randn(s) * 0.1 for s in program.input_shapes]
        record: dict[str, Any] = {}
        for mode in ("symbolic", "concrete"):
            start = time.perf_counter()
            if mode == "symbolic":
                found = symbolic.search(program, limits)
                candidates, families = symbolic.members(found.families, program, threads), len(found.families)
            else:
                concrete_found = concrete.search(program, limits, least_blocks=threads)
                found, candidates, families = concrete_found, concrete_found.programs, len(concrete_found.programs)
            search_s = time.perf_counter() - start
            best = race(candidates, {}, inputs, samples=2 if quick else 16)
            record[mode] = {
                "search_s": round(search_s, 2),
                "with_tuning_s": round(time.perf_counter() - start, 2),
                "states": found.progress.states,
                "verified": families,
                "stopped_by": found.progress.limit,
                "best_ms": best[0].seconds * 1e3 if best else None,
            }
        out[name] = record
        say(f"{name}: {record}")
    return out


def pruning(quick: bool, budget: float) -> dict[str, Any]:
    """States and seconds by the largest block graph, with and without the subexpression test (RMSNorm+matmul)."""
    program = published.rmsnorm_matmul(16, 1024, 4096)
    out: dict[str, Any] = {}
    for prune in (True, False):
        for ops in range(5, 9 if quick else 12):
            progress = Progress()
            start = time.perf_counter()
            found = sum(
                1 for _ in symbolic.chains(program, Limits(max_block_ops=ops, budget_s=budget, prune=prune), progress)
            )
            seconds = time.perf_counter() - start
            out[f"{'pruned' if prune else 'unpruned'} {ops}"] = {
                "states": progress.states,
                "seconds": round(seconds, 3),
                "states_per_s": round(progress.states / max(seconds, 1e-9)),
                "structures": found,
                "stopped_by": progress.limit,
            }
            if progress.limit:
                break
    return out


if __name__ == "__main__":
    main()
