"""The searches: what they rediscover, Prism against Mirage, pruning on and off, and nine block operators.

    python -m benchmarks.compile.search [--quick] [--budget 60]

Prism and Mirage use the same generator, limits and candidate sizes; both end with the same race over what they found, so the table compares
the time from the program to the best kernel. A search that hits its budget is marked in the facts; its time is then a lower bound.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.compile.superoptimize import machine_facts
from benchmarks.harness import Report, Row, arguments, compare, picture_path, say
from wager.compile.mirage import search as concrete
from wager.compile.mirage.generate import Limits, Progress
from wager.compile.mirage.tune import Timed, race
from wager.compile.prism import search as symbolic
from wager.graph import published
from wager.graph.program import Builder, Program

PRUNING_OPS = range(4, 12)


def normed_matmul_with_gain(tokens: int, hidden: int, out: int) -> Program:
    b = Builder()
    x, gain, w = b.input((tokens, hidden), "x"), b.input((hidden,), "gain"), b.input((hidden, out), "w")
    return b.build(b.matmul(b.mul(b.rms_norm(x), gain), w))


def sheet_programs(quick: bool) -> dict[str, tuple[Program, int]]:
    """Program -> most block operators."""
    s = 4 if quick else 1
    return {
        "RMSNorm+matmul": (published.rmsnorm_matmul(16, 1024 // s, 4096 // s), 8),
        "gated MLP": (published.gated_mlp(8, 512 // s, 2048 // s), 9),
        "LoRA": (published.lora(16, 256 // s, 16, 4096 // s), 9),
        "attention": (published.attention(2, 256 // s, 4096 // s, 64), 9),
    }


def rediscovery(quick: bool) -> dict[str, tuple[Program, Limits, set[str]]]:
    """Program, limits, and the operators that a kernel must hold to count as the fused form."""
    s = 4 if quick else 1
    wide = lambda ops, kernels=1: Limits(max_block_ops=ops, max_kernels=kernels, budget_s=60.0)
    return {
        "RMSNorm with gain+matmul": (normed_matmul_with_gain(16, 1024 // s, 4096 // s), wide(10), {"accum_rms", "div"}),
        "gated MLP": (published.gated_mlp(8, 512 // s, 2048 // s), wide(10), {"silu", "mul"}),
        "LoRA": (published.lora(16, 256 // s, 16, 4096 // s), wide(10), {"add"}),
        "QK-norm attention": (published.qk_norm_attention(2, 256 // s, 4096 // s, 64), wide(11), {"rms_norm", "exp"}),
        "attention split over keys": (published.attention(2, 256 // s, 4096 // s, 64), wide(9, 2), {"accum_width"}),
    }


def main() -> None:
    parser = arguments("Prism against Mirage, pruning, and what the searches find.")
    parser.add_argument("--budget", type=float, default=None, help="seconds of search per program and search")
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("these searches run on a CPU: --device cpu")
    torch.manual_seed(0)
    budget = args.budget or (5.0 if args.quick else 60.0)
    rows: list[Row] = []
    facts: dict[str, Any] = {"rediscovered": found_again(args.quick)}
    for name, (program, ops) in sheet_programs(args.quick).items():
        row, facts[name] = side_by_side(name, program, ops, budget, args.quick)
        rows += row
        say(f"{name}: {facts[name]}")
    facts["pruning"] = pruning(2.0 if args.quick else 8.0)
    facts["nine block operators"] = nine(args.quick, 10.0 if args.quick else 60.0)
    report = Report("compile", "search", rows, facts)
    print(report.table())
    for name, value in facts.items():
        say(f"{name}: {value}")
    if not args.quick:
        report.save(machine_facts())
        say(f"drawn: {draw(facts['pruning'])}")


def found_again(quick: bool) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, (program, limits, needed) in rediscovery(quick).items():
        start = time.perf_counter()
        found = symbolic.search(program, limits, max_families=10_000)
        fused = [f for f in found.families if needed <= {n.op for k in f.kernels for n in k.structure.nodes}]
        out[name] = {
            "families": len(found.families),
            "fused form": len(fused),
            "states": found.progress.states,
            "seconds": round(time.perf_counter() - start, 2),
            "stopped_by": found.progress.limit,
        }
        say(f"{name}: {out[name]}")
    return out


def side_by_side(
    name: str, program: Program, ops: int, budget: float, quick: bool
) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """Both searches from program to best kernel, in turn, each `repeats` times (once each where a search takes long)."""
    limits, threads = Limits(max_block_ops=ops, budget_s=budget), torch.get_num_threads()
    inputs = [torch.randn(s) * 0.1 for s in program.input_shapes]
    record: dict[str, dict[str, Any]] = {}
    winners: dict[str, Timed] = {}
    for mode in ("Mirage", "Prism"):
        start = time.perf_counter()
        if mode == "Prism":
            found = symbolic.search(program, limits)
            candidates = symbolic.members(found.families, program, threads)
        else:
            found = concrete.search(program, limits, least_blocks=threads)
            candidates = found.programs
        search_s = time.perf_counter() - start
        best = race(candidates, {}, inputs, samples=4 if quick else 16)
        whole = time.perf_counter() - start
        record[mode] = {
            "search_s": round(search_s, 3),
            "with_tuning_s": round(whole, 2),
            "states": found.progress.states,
            "states_per_s": round(found.progress.states / max(found.seconds.get("enumeration", search_s), 1e-9)),
            "verified": len(candidates),
            "stopped_by": found.progress.limit,
        }
        if best:
            winners[mode] = best[0]
    if len(winners) < 2:
        return [], record
    ratio = record["Mirage"]["with_tuning_s"] / record["Prism"]["with_tuning_s"]
    record["ratio"] = {
        "search": round(record["Mirage"]["search_s"] / record["Prism"]["search_s"], 1),
        "end_to_end": round(ratio, 2),
    }
    contenders = {f"{m}'s kernel": (lambda t=t: _void(t.run(*inputs))) for m, t in winners.items()}
    return compare(f"{name}: best kernel", contenders, repeats=5 if quick else 25), record


def _void(_: Any) -> None:
    return None


def pruning(budget: float) -> dict[str, Any]:
    """States and seconds by the largest block graph, with and without the subexpression test (RMSNorm+matmul)."""
    program = published.rmsnorm_matmul(16, 1024, 4096)
    out: dict[str, Any] = {}
    for prune in (True, False):
        for ops in PRUNING_OPS:
            progress = Progress()
            start = time.perf_counter()
            limits = Limits(max_block_ops=ops, budget_s=budget, prune=prune)
            structures = sum(1 for _ in symbolic.chains(program, limits, progress))
            seconds = time.perf_counter() - start
            out[f"{'pruned' if prune else 'unpruned'} {ops}"] = {
                "states": progress.states,
                "seconds": round(seconds, 4),
                "structures": structures,
                "stopped_by": progress.limit,
            }
            if progress.limit:
                break
    return out


def nine(quick: bool, budget: float) -> dict[str, Any]:
    """The concrete search over all grids, maps and loops with nine operators, on every core."""
    import os

    out: dict[str, Any] = {}
    for name, (program, _) in sheet_programs(quick).items():
        limits, workers = Limits(max_block_ops=9, budget_s=budget), os.cpu_count() or 1
        start = time.perf_counter()
        found = concrete.search(program, limits, least_blocks=2, workers=workers)
        seconds = time.perf_counter() - start
        out[name] = {
            "states": found.progress.states,
            "seconds": round(seconds, 1),
            "states_per_s": round(found.progress.states / seconds),
            "plans": found.progress.mappings,
            "verified": found.progress.verified,
            "workers": workers,
            "stopped_by": found.progress.limit,
        }
        say(f"nine operators, {name}: {out[name]}")
    return out


def draw(curves: dict[str, Any]) -> str:
    """States by block operators, with and without pruning; a hollow mark hit the time limit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6))
    for mode in ("pruned", "unpruned"):
        points = [(int(k.split()[1]), v) for k, v in curves.items() if k.startswith(mode + " ")]
        (line,) = axis.plot([p[0] for p in points], [max(p[1]["states"], 1) for p in points], label=mode)
        for ops, value in points:
            face = "white" if value["stopped_by"] else line.get_color()
            axis.plot(ops, max(value["states"], 1), "o", color=line.get_color(), markerfacecolor=face)
    axis.set(yscale="log", xlabel="most block operators", ylabel="states", title="RMSNorm + matmul")
    axis.legend()
    figure.tight_layout()
    path = picture_path("compile", "search")
    figure.savefig(path)
    return str(path)


if __name__ == "__main__":
    main()
