"""Sequoia's planner against an exhaustive sweep, on times and acceptance measured here: by price, and by running the trees.

    python -m benchmarks.serve.speculate.planner --model DIR --draft DIR --data DIR [--quick]

By price: every number of nodes from 2 to --max-size and every depth, the best tree of each by the dynamic program, priced by the measured
t(batch, n). By running: a grid of such trees in the engine beside the planner's own, interleaved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Report, compare, say
from benchmarks.serve.speculate.common import Engine, methods, read_prompts, roofline, speculation_arguments
from wager.serve.params import SamplingParams
from wager.serve.speculate.hardware_profile import HardwareProfile, measure_profile
from wager.serve.speculate.tree_plan import GrowMap, TreeTables, plan_tree

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)


def main() -> None:
    parser = speculation_arguments("The planner against an exhaustive sweep.")
    parser.add_argument("--max-size", type=int, default=48)
    parser.set_defaults(temperatures="0", prompts=6, tokens=48)
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.tokens = 2, 24
    first = Engine(args, methods(args.draft, quantization=args.draft_quantization)["sequoia"])
    prompts = read_prompts(first.llm, args.data, args.prompts)
    params = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True)
    for _ in range(1 if args.quick else 3):
        first.rate(prompts, params)  # counts acceptance
    core: Any = first.llm.engine.core
    drafter = core.speculator.drafters["sequoia"]
    p = drafter.choice.counters[True].p.tolist()
    profile = measure_profile(
        core.runner, drafter.draft, sizes=SIZES, batches=(1,), context_tokens=128, repeats=3 if args.quick else 9,
        overhead_ms=drafter.choice.profile.overhead,
    )  # fmt: skip
    trees, by_price = sweep(p, profile, args.max_size)
    planned = plan_tree(p, profile, max_size=args.max_size, max_depth=12, max_branch=16)
    best_size, best_depth = max(by_price, key=by_price.__getitem__)
    facts: dict[str, Any] = {
        "acceptance": p, "planned": [len(planned) + 1, planned.depth, planned.expected_speedup],
        "best of the sweep": [best_size, best_depth, by_price[best_size, best_depth]],
        "planned over best, by price": planned.expected_speedup / max(1.0, by_price[best_size, best_depth]),
        "roofline": roofline(first, True, first.tokens_per_step),
    }  # fmt: skip
    grid = [(n, d) for n in (3, 5, 8, 12, 20) for d in (2, 4) if (n, d) in trees]
    shaped = Engine(args, {"method": "sequoia", "draft": args.draft, "tree": [-1] * args.max_size})
    contenders = {"planned": planned if len(planned) else GrowMap.chain(1)}
    contenders |= {f"{n} nodes, depth {d}": trees[n, d] for n, d in (grid[::3] if args.quick else grid)}
    plain = Engine(args, None)
    runs: dict[str, Callable[[], float]] = {"plain": lambda: plain.rate(prompts, params)}
    for name, tree in contenders.items():
        runs[name] = lambda t=tree: with_tree(shaped, t).rate(prompts, params)
    rows = compare("T=0, batch 1", runs, repeats=args.repeats or (2 if args.quick else 5), warmup=1, unit="tok/s", higher_is_better=True, progress=say)  # fmt: skip
    point, low, high = over_the_best({row.ours: row.samples[row.ours] for row in rows}, "planned")
    facts["planned over best, by running"] = point
    facts["planned over best, by running, 95 % interval"] = [low, high]
    report = Report("serve", f"speculation_planner_{Path(args.model).name}", rows, facts)
    print(report.table())
    for name, value in facts.items():
        print(f"{name}: {value}")
    if not args.quick:
        print(f"written: {report.save()}")


def sweep(
    p: list[float], profile: HardwareProfile, most: int
) -> tuple[dict[tuple[int, int], GrowMap], dict[tuple[int, int], float]]:
    """The best tree of every size and depth, and its expected speed-up."""
    tables = TreeTables(p, most, 13)
    trees, speed = {}, {}
    for n in range(2, most + 1):
        for levels in range(2, 14):
            if math.isfinite(tables.expected_tokens(n, levels)):
                tree = tables.tree(n, levels)
                trees[n, levels - 1] = tree
                speed[n, levels - 1] = (
                    tree.expected_tokens * profile.target_ms(1, 1) / profile.step_ms(1, n, tree.frontiers)
                )
    return trees, speed


def over_the_best(samples: dict[str, list[float]], ours: str) -> tuple[float, float, float]:
    """The median of `ours` over the best median of all, and its 95 % interval when whole rounds are drawn again.

    The best of many noisy medians is an overestimate, so the ratio of equals lies below one.
    """
    values_CR = np.array(list(samples.values()))
    mine = list(samples).index(ours)
    drawn_BR = np.random.default_rng(0).integers(0, values_CR.shape[1], (2000, values_CR.shape[1]))
    medians_BC = np.median(values_CR[:, drawn_BR], axis=2).T
    low, high = np.quantile(medians_BC[:, mine] / medians_BC.max(1), [0.025, 0.975])
    medians_C = np.median(values_CR, axis=1)
    return float(medians_C[mine] / medians_C.max()), float(low), float(high)


def with_tree(engine: Engine, tree: GrowMap) -> Engine:
    """The same engine growing another tree."""
    core: Any = engine.llm.engine.core
    core.speculator.drafters["sequoia"].choice.fixed = tree
    return engine


if __name__ == "__main__":
    main()
