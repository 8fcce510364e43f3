"""Whole networks and single convolutions through OLLIE, against torch.compile (max-autotune, frozen weights) and eager torch.

python -m benchmarks.compile.networks [--quick] [--only networks|operators] [--budget 40]
"""

from __future__ import annotations

import math
import statistics

import torch

from benchmarks.compile.superoptimize import machine_facts, measure_cases
from benchmarks.compile.workloads import networks, single_operators
from benchmarks.harness import Report, arguments, say


def main() -> None:
    parser = arguments("OLLIE on networks and operators.")
    parser.add_argument("--budget", type=float, default=None, help="seconds of search per case")
    parser.add_argument("--only", choices=("networks", "operators"), default=None)
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("these kernels run on a CPU: --device cpu")
    torch.manual_seed(0)
    budget = args.budget or (8.0 if args.quick else 30.0)
    repeats = args.repeats or (3 if args.quick else 25)
    groups = {"networks": networks(args.quick), "operators": single_operators(args.quick)}
    rows, facts = [], {}
    for group, cases in groups.items():
        if args.only in (None, group):
            found, about = measure_cases("ollie", cases, args.quick, budget, repeats)
            rows += found
            facts |= about
            facts[f"{group} geomean"] = math.exp(statistics.mean(math.log(r.ratio) for r in found))
    report = Report("compile", "networks", rows, facts)
    print(report.table())
    for name, value in facts.items():
        say(f"{name}: {value}")
    if not args.quick:
        report.save(machine_facts())


if __name__ == "__main__":
    main()
