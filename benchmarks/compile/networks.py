"""Whole networks and single convolutions through OLLIE, against torch.compile (max-autotune, frozen weights) and eager torch.

The band at the size of the OLLIE sheet is too large for `wager.compile` and for eager torch: both would hold all 2.7e9 products of its gather
form (the first as float64 with bounds, to judge the result). There the derived plan itself runs against torch.compile, its first and last
head compared with float64 diagonal by diagonal; the row does not count in the geometric mean of the operators.

python -m benchmarks.compile.networks [--quick] [--only networks|operators] [--budget 40]
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.compile.superoptimize import discard, machine_facts, measure_cases
from benchmarks.compile.workloads import DilatedBand, inductor, networks, single_operators
from benchmarks.harness import Report, Row, arguments, compare, say
from wager.compile.ollie.definitions import banded_matmul
from wager.compile.ollie.realize import Plan
from wager.compile.ollie.search import derive


def main() -> None:
    parser = arguments("OLLIE on networks and operators.")
    parser.add_argument("--budget", type=float, default=None, help="seconds of search per case")
    parser.add_argument("--only", choices=("networks", "operators"), default=None)
    args = parser.parse_args()
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
    if args.only != "networks" and not args.quick:
        row, about = large_band(budget, repeats)
        rows.append(row)
        facts |= about
    report = Report("compile", "networks", rows, facts)
    print(report.table())
    for name, value in facts.items():
        say(f"{name}: {value}")
    if not args.quick:
        report.save(machine_facts())


def large_band(
    budget_s: float,
    repeats: int,
    heads: int = 8,
    length: int = 10000,
    features: int = 512,
    width: int = 32,
    step: int = 4,
) -> tuple[Row, dict[str, Any]]:
    """The dilated band of the OLLIE sheet. Raises RuntimeError where the derived plan leaves the float32 bound of a sum."""
    name = f"dilated band {heads}x{length}x{features} width {width} d{step}"
    say(f"deriving {name}")
    q, k = torch.randn(heads, length, features), torch.randn(heads, length, features)
    scope = banded_matmul(heads, length, features, width, step)
    found = derive(scope, max_depth=2, targets=("banded",), budget_s=budget_s)
    best = found.candidates[0]
    plan = Plan(best.scope, {})
    error = max(_band_error(plan({"A": q, "B": k}), q, k, h, width, step) for h in (0, heads - 1))
    if error > 1.0:
        raise RuntimeError(f"{name}: an error of {error:.2g} times the float32 bound")
    contenders = {
        "torch.compile": inductor(DilatedBand(width, step), [q, k]),
        "wager": lambda: discard(plan({"A": q, "B": k})),
    }
    (row,) = compare(name, contenders, repeats=repeats, unit="s", progress=None)
    return row, {name: {"error": f"{error:.2g} of the float32 bound", "choices": [" | ".join(best.path)]}}


def _band_error(got: torch.Tensor, q: torch.Tensor, k: torch.Tensor, head: int, width: int, step: int) -> float:
    """The largest error of a head's scores, in bounds of a float32 sum in any order."""
    a, reach, length, features = q[head].double(), width * step, q.shape[1], q.shape[2]
    padded, worst = F.pad(k[head].double(), (0, 0, reach, reach)), 0.0
    for d in range(2 * width + 1):
        terms = a * padded[d * step : d * step + length]
        gap = (got[head, :, d].double() - terms.sum(-1)).abs()
        bound = features * 2.0**-24 * terms.abs().sum(-1)
        worst = max(worst, float((gap / bound.clamp_min(1e-30)).max()))
    return worst


if __name__ == "__main__":
    main()
