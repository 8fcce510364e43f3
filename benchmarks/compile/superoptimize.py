"""What `wager.compile` finds against torch.compile (max-autotune, frozen weights) and eager torch, interleaved in one run.

    python -m benchmarks.compile.superoptimize [--system ollie|mirage|prism] [--quick] [--budget 60]

OLLIE: the networks and operators of its sheet. Prism and Mirage: attention as written, LoRA, gated MLP, RMSNorm+matmul. The searches against
each other: benchmarks.compile.search.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch

from benchmarks.compile.workloads import inductor, networks, programs, single_operators
from benchmarks.harness import Report, Row, arguments, compare, say
from wager.compile.api import compile


def main() -> None:
    parser = arguments("wager.compile against torch.compile.")
    parser.add_argument("--system", choices=("ollie", "mirage", "prism"), default="prism")
    parser.add_argument("--budget", type=float, default=None, help="seconds of search per program")
    args = parser.parse_args()
    torch.manual_seed(0)
    budget = args.budget or (5.0 if args.quick else 60.0)
    repeats = args.repeats or (3 if args.quick else 25)
    rows, facts = measure(args.system, args.quick, budget, repeats)
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
    rows, facts = measure_cases(system, cases, quick, budget, repeats)
    facts["geomean"] = math.exp(statistics.mean(math.log(r.ratio) for r in rows))
    return rows, facts


def measure_cases(
    system: str, cases: dict[str, Any], quick: bool, budget: float, repeats: int
) -> tuple[list[Row], dict[str, Any]]:
    """A row and the report of the compilation for every case."""
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    for name, (module, inputs) in cases.items():
        say(f"compiling {name}")
        done = compile(module, inputs, search=system, time_budget_s=budget, samples=4 if quick else 24, cache=False)
        baseline = inductor(module, inputs)

        def eager(module=module, inputs=inputs) -> None:
            with torch.no_grad():
                module(*inputs)

        contenders = {
            "torch.compile": baseline,
            "wager": lambda done=done, inputs=inputs: discard(done(*inputs)),
            "eager": eager,
        }
        rows += [r for r in compare(name, contenders, repeats=repeats, unit="s", progress=None) if r.ours == "wager"]
        found = done.report()
        facts[name] = {"used": found.used, "search_s": round(found.seconds, 1), **found.counters}
        if system == "ollie":
            facts[name]["choices"] = found.details
    return rows, facts


def discard(_: Any) -> None:
    return None


if __name__ == "__main__":
    main()
