"""The searches: what they rediscover, Prism against Mirage, pruning on and off, and nine block operators.

    python -m benchmarks.compile.search [--quick] [--budget 60] [--data DIR] [--only rediscovery|race|pruning|nine]

DIR (optional) is the folder that holds `compilers/`: how many published graphs the search finds by itself is then counted too.
Prism and Mirage use the same generator, limits and candidate sizes; both end with the same race over what they found, so the table compares
the time from the program to the best kernel. A search that hits its budget is marked in the facts; its time is then a lower bound.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.compile.forms import form
from benchmarks.compile.superoptimize import machine_facts
from benchmarks.harness import Report, Row, arguments, compare, load_results, picture_path, say
from wager.compile.mirage import search as concrete
from wager.compile.mirage.enumerate import library
from wager.compile.mirage.generate import Limits, Progress
from wager.compile.mirage.tune import Timed, race
from wager.compile.prism import search as symbolic
from wager.compile.prism.family import Family, representative
from wager.compile.prism.mapping import count
from wager.graph import published
from wager.graph.lower.library import parts
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
        "attention": (published.attention(2, 256 // s, 4096 // s, 64), 10),
    }


@dataclass(frozen=True)
class Wanted:
    """A program, the limits of its search, the operators that a kernel must hold to count as the fused form, and its published file."""

    program: Program
    limits: Limits
    needed: set[str]
    file: str = ""


def rediscovery(quick: bool) -> dict[str, Wanted]:
    s = 4 if quick else 1
    wide = lambda ops, kernels=1: Limits(max_block_ops=ops, max_kernels=kernels, budget_s=20.0 if quick else 90.0)
    split, normed = {"accum_width", "exp", "div"}, {"accum_rms", "div"}
    return {
        "RMSNorm with gain+matmul": Wanted(normed_matmul_with_gain(16, 1024 // s, 4096 // s), wide(11), normed),
        "RMSNorm+matmul, batch 1": Wanted(published.PROGRAMS["rmsnorm_bs1"](), wide(11), normed, "rmsnorm_bs1"),
        "RMSNorm+matmul, batch 8": Wanted(published.PROGRAMS["rmsnorm_bs8"](), wide(11), normed, "rmsnorm_bs8"),
        "gated MLP": Wanted(published.gated_mlp(8, 4096, 4096), wide(11), {"silu", "mul"}, "gated_mlp"),
        "LoRA": Wanted(published.lora(16, 256, 16, 4096), wide(11), {"add"}, "lora"),
        "nTrans": Wanted(published.ntrans(8, 4096), wide(10), {"rms_norm", "mul"}, "ntrans_bs1"),
        "QK-norm attention": Wanted(published.qk_norm_attention(2, 256, 4096 // s, 64), wide(11), {"rms_norm", "exp"}),
        "GQA split over keys": Wanted(published.attention(16, 256, 4096, 64), wide(10, 2), split, "gqa_bs8"),
        "MQA split over keys": Wanted(published.attention(1, 1024, 4096, 64), wide(10, 2), split, "mqa_bs1"),
    }


SECTIONS = ("rediscovery", "race", "pruning", "nine")


def main() -> None:
    parser = arguments("Prism against Mirage, pruning, and what the searches find.", repeats=False)
    parser.add_argument("--budget", type=float, default=None, help="seconds of search per program and search")
    parser.add_argument("--data", default=os.environ.get("WAGER_DATA"), help="folder that holds compilers/ (optional)")
    parser.add_argument("--only", choices=SECTIONS, default=None, help="one part; the record keeps the others")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows, facts = recorded() if args.only and not args.quick else ([], {})
    for section in SECTIONS if args.only is None else (args.only,):
        rows, found = run_section(section, rows, args)
        facts |= found
    report = Report("compile", "search", rows, facts)
    if rows:
        print(report.table())
    for name, value in facts.items():
        say(f"{name}: {value}")
    if not args.quick:
        report.save(machine_facts())
        if "pruning" in facts:
            say(f"drawn: {draw(facts['pruning'])}")


def recorded() -> tuple[list[Row], dict[str, Any]]:
    """Rows and facts of the record, so that one part can be measured again."""
    for found in load_results():
        if (found["wing"], found["system"]) == ("compile", "search"):
            return [Row(**row) for row in found["rows"]], found["facts"]
    return [], {}


def run_section(section: str, rows: list[Row], args: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """The rows (new ones for the race) and the facts of one part."""
    if section == "rediscovery":
        counts = count([2, 2, 2], [True, True, False], 2, [(0, 1, 1, 0)])
        return rows, {"mapping counts": counts, "rediscovered": found_again(args.quick, args.data)}
    if section == "pruning":
        return rows, {"pruning": pruning(2.0 if args.quick else 8.0)}
    if section == "nine":
        return rows, {"nine block operators": nine(args.quick, args.budget or (10.0 if args.quick else 600.0))}
    rows, facts = [], {}
    for name, (program, ops) in sheet_programs(args.quick).items():
        row, facts[name] = side_by_side(name, program, ops, args.budget or (5.0 if args.quick else 60.0), args.quick)
        rows += row
        say(f"{name}: {facts[name]}")
    return rows, {"Prism against Mirage": facts}


def found_again(quick: bool, data: str | None) -> dict[str, Any]:
    """What the symbolic search proves; with `data` also how many of the published graphs are members of what it found without seeing them."""
    out: dict[str, Any] = {}
    for name, wanted in rediscovery(quick).items():
        start = time.perf_counter()
        found = symbolic.search(wanted.program, wanted.limits, max_families=100_000, workers=os.cpu_count() or 1)
        operators = [{n.op for k in f.kernels for n in k.structure.nodes} for f in found.families]
        out[name] = {
            "families": len(found.families),
            "fused form": sum(wanted.needed <= ops for ops in operators),
            "states": found.progress.states,
            "seconds": round(time.perf_counter() - start, 2),
            "stopped_by": found.progress.limit,
        }
        if data and wanted.file:
            graphs = published.load(Path(data) / "compilers" / "mugraphs" / f"{wanted.file}.json")
            forms = {form(m) for f in found.families if (m := _member(f, wanted.program)) is not None}
            out[name]["published graphs among them"] = f"{sum(form(g) in forms for g in graphs)} of {len(graphs)}"
        say(f"{name}: {out[name]}")
    return out


def _member(family: Family, program: Program) -> Program | None:
    sizes = representative(family, program.input_shapes)
    return None if sizes is None else family.instantiate(program.input_shapes, sizes)


SEARCHES = ("Mirage", "Mirage with region filter", "Prism")
"""The published concrete search, the same with the filter of mirage.regions, and the symbolic one."""


def side_by_side(
    name: str, program: Program, ops: int, budget: float, quick: bool
) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """Each search from program to best kernel, once; nothing that one compiles is there for another. Then the kernels against each other."""
    library()
    parts()  # the enumerator and the products that kernels share are built once, before the clock starts
    inputs = [torch.randn(s) * 0.1 for s in program.input_shapes]
    record: dict[str, dict[str, Any]] = {}
    winners: dict[str, Timed] = {}
    for mode in SEARCHES:
        with tempfile.TemporaryDirectory() as folder:
            before = os.environ.get("WAGER_CACHE")
            os.environ["WAGER_CACHE"] = folder
            try:
                record[mode], best = from_program_to_kernel(mode, program, Limits(ops, budget_s=budget), inputs, quick)
            finally:
                os.environ.pop("WAGER_CACHE")
                if before is not None:
                    os.environ["WAGER_CACHE"] = before
        if best is not None:
            winners[mode] = best
    ours = record["Prism"]
    for mode in SEARCHES[:2]:
        theirs = record[mode]
        ours[f"faster than {mode}"] = {
            "search": round(theirs["search_s"] / ours["search_s"], 1),
            "end_to_end": round(theirs["with_tuning_s"] / ours["with_tuning_s"], 2),
        }
    if len(winners) < 2 or "Prism" not in winners:
        return [], record
    baseline = "Mirage" if "Mirage" in winners else SEARCHES[1]
    kept = {baseline: winners[baseline], "Prism": winners["Prism"]}
    contenders = {f"{m}'s kernel": (lambda t=t: _void(t.run(*inputs))) for m, t in kept.items()}
    return compare(f"{name}: best kernel", contenders, repeats=5 if quick else 25), record


def from_program_to_kernel(
    mode: str, program: Program, limits: Limits, inputs: list[torch.Tensor], quick: bool
) -> tuple[dict[str, Any], Timed | None]:
    threads = torch.get_num_threads()
    start = time.perf_counter()
    if mode == "Prism":
        found = symbolic.search(program, limits)
        candidates = symbolic.members(found.families, program, threads)
    else:
        found = concrete.search(program, limits, least_blocks=threads, regions=mode != "Mirage")
        candidates = found.programs
    search_s = time.perf_counter() - start
    best = race(candidates, {}, inputs, samples=4 if quick else 8)
    facts = {
        "search_s": round(search_s, 3),
        "with_tuning_s": round(time.perf_counter() - start, 2),
        "states": found.progress.states,
        "states_per_s": round(found.progress.states / max(found.seconds.get("enumeration", search_s), 1e-9)),
        "verified": len(candidates),
        "best_ms": round(best[0].seconds * 1e3, 3) if best else None,
        "stopped_by": found.progress.limit,
    }
    return facts, best[0] if best else None


def _void(_: Any) -> None:
    return None


PRUNERS = {"normal form": Limits(), "e-graph": Limits(pruning="e-graph"), "none": Limits(prune=False)}


def pruning(budget: float) -> dict[str, Any]:
    """States, seconds and structures by the largest block graph: two ways of pruning, and none (RMSNorm+matmul)."""
    program = published.rmsnorm_matmul(16, 1024, 4096)
    out: dict[str, Any] = {}
    for name, kind in PRUNERS.items():
        for ops in PRUNING_OPS:
            progress = Progress()
            start = time.perf_counter()
            limits = replace(kind, max_block_ops=ops, budget_s=budget)
            structures = {str(c) for c in symbolic.chains(program, limits, progress)}
            out[f"{name} {ops}"] = {
                "states": progress.states,
                "seconds": round(time.perf_counter() - start, 4),
                "structures": len(structures),
                "stopped_by": progress.limit,
                "found": structures,
            }
            exact = out.get(f"normal form {ops}")
            if exact is not None and not progress.limit and not exact["stopped_by"]:
                out[f"{name} {ops}"]["same as normal form"] = structures == exact["found"]
            if progress.limit:
                break
    for value in out.values():
        del value["found"]
    return out


def nine(quick: bool, budget: float) -> dict[str, Any]:
    """The concrete search over all grids, maps and loops with nine operators, on every core."""
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
            "of": sum(1 for _ in concrete.plans(program, concrete.GRID_SIZES, concrete.LOOP_SIZES, 2)),
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

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for what, unit, least, axis in (("states", "states", 1, axes[0]), ("seconds", "s", 1e-4, axes[1])):
        for mode, style in zip(PRUNERS, ("-", "--", "-"), strict=True):
            points = [(int(k.rsplit(" ", 1)[1]), v) for k, v in curves.items() if k.startswith(mode + " ")]
            (line,) = axis.plot([p[0] for p in points], [max(p[1][what], least) for p in points], style, label=mode)
            for ops, value in points:
                face = "white" if value["stopped_by"] else line.get_color()
                axis.plot(ops, max(value[what], least), "o", color=line.get_color(), markerfacecolor=face)
        axis.set(yscale="log", xlabel="most block operators", ylabel=unit)
        axis.grid(alpha=0.3)
    axes[0].legend(title="pruning by")
    figure.suptitle("RMSNorm + matmul: the search with and without pruning (hollow: hit the time limit)", fontsize=10)
    figure.tight_layout()
    path = picture_path("compile", "search")
    figure.savefig(path)
    return str(path)


if __name__ == "__main__":
    main()
