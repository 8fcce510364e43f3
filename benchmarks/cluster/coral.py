"""Coral against plans of equal machines: what a plan costs, what it serves when machines are scarce, how long a plan takes.

Pools and costs are in `coral_pools`. The cost of a plan is a sum of prices and exact; only the solve time depends on the machine. Every plan, also
the baselines', passes `check`. Three settings: as many machines as one likes; stock over ten epochs from published spot availability, one trace per
region and shape; and scarce stock, where the demands are set so that the stock is a given multiple of what serving them takes. Where a plan cannot
serve everything, all demands are scaled down alike, the baselines' too: the share served is the goodput. `best_possible` is how much cheaper than
the best baseline any plan of these templates could be: the baseline's cost over the proven bound. `homo` takes for a model the kind of machine that makes
its whole plan cheapest; `homo by ratio`, the greedy choice as published, the one with the most requests per dollar, which costs more. `tuned` is a baseline that may also choose how many
machines its templates have at most, which the published ones do not: the greedy choice of large replicas that serve more than is asked costs them.
Last, plans of all three serve requests in simulation (`coral_served`).
"""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.cluster import coral_pools as pools
from benchmarks.cluster import coral_served
from benchmarks.harness import RESULTS, Report, arguments, format_table, picture_path, say
from wager.cluster.coral import baselines
from wager.cluster.coral.allocate import Allocator
from wager.cluster.coral.market import Allocation, Market, check, reconcile
from wager.cluster.coral.templates import Library
from wager.errors import WagerError
from wager.hardware.availability import read_counts
from wager.hardware.layer_cost import Roofline

PLENTY = 1000.0
START_UP_SHARE = 0.1  # six minutes of start-up, counted as if a machine then ran for an hour
LIMIT_S = 4.5  # of solving; a bar of 5 s with what comes before and after
MUCH = 50.0


def market(pool: pools.Pool, stock: np.ndarray | float) -> Market:
    price = pools.prices(pool)
    regions = tuple(f"region-{i}" for i in range(pool.regions))
    return Market(regions, pools.configurations(pool), np.broadcast_to(stock, price.shape).astype(float), price)


def served(plan: Allocation, libraries: Sequence[Library], rates: dict[str, float]) -> float:
    """Requests/s that get both their prefill and their decoding."""
    share = np.zeros(len(libraries))
    for (d, _, u), n in plan.running.items():
        share[d] += n * libraries[d].rates_U[u] / libraries[d].demand.tokens_per_s
    both: dict[str, float] = {}
    for lib, s in zip(libraries, share, strict=True):
        both[lib.demand.model.name] = min(both.get(lib.demand.model.name, 1.0), float(s))
    return sum(rates[name] * s for name, s in both.items())


def priced(pool: pools.Pool, libraries: Sequence[Library], stock: np.ndarray | float, limit_s: float = LIMIT_S) -> dict:
    """Coral and every baseline on one market."""
    rent = market(pool, stock)
    plan = Allocator(libraries, rent).allocate(time_limit_s=limit_s)
    check(plan, libraries, rent)
    others = {p: baselines.scaled(libraries, rent, p) for p in baselines.POLICIES}
    described = baselines.scaled(libraries, rent, baselines.BY_RATIO)
    for other in (*others.values(), described):
        check(other, libraries, rent)
    devices_C = np.array([c.count for c in rent.configurations])
    found = {
        "pool": pool.name, "templates": sum(map(len, libraries)), "columns": plan.columns, "usd_per_h": plan.usd_per_h,
        "bound": plan.bound, "gap": plan.gap, "seconds": plan.seconds, "factor": plan.factor, "most_factor": plan.most_factor,
        "requests_per_s": served(plan, libraries, pool.rates), "asked_per_s": sum(pool.rates.values()),
        "mixed_share": mixed_share(plan, libraries, rent),
        "devices": int(sum(n * (libraries[d].counts_UC[u] @ devices_C) for (d, _, u), n in plan.running.items())),
        "devices_in_stock": int((rent.stock_RC @ devices_C).sum()),
    }  # fmt: skip
    for name, other in others.items():
        first_come = baselines.greedy(libraries, rent, name)
        found[name] = {
            "usd_per_h": other.usd_per_h,
            "factor": other.factor,
            "requests_per_s": served(other, libraries, pool.rates),
            "first_come_requests_per_s": served(first_come, libraries, pool.rates),
        }
    found[baselines.BY_RATIO] = {"usd_per_h": described.usd_per_h, "factor": described.factor}
    able = [o.usd_per_h for o in others.values() if o.factor >= plan.factor * (1 - 1e-9)]
    tuned = [o.usd_per_h for o in tuned_baselines(pool, libraries, rent) if o.factor >= plan.factor * (1 - 1e-9)]
    found["cheaper_than_tuned"] = min(tuned) / plan.usd_per_h if tuned else None
    found["cheaper_than_best"] = min(able) / plan.usd_per_h if able else None
    found["best_possible"] = min(able) / plan.bound if able else None
    found["goodput_over_best"] = plan.factor / max(max(o.factor for o in others.values()), 1e-9)
    found["never_worse"] = all(o.factor <= plan.factor * (1 + 1e-6) for o in others.values()) and all(
        cost >= plan.usd_per_h * (1 - 1e-6) for cost in able
    )
    return found


def tuned_baselines(pool: pools.Pool, libraries: Sequence[Library], rent: Market) -> list[Allocation]:
    """Every baseline with templates of at most 1, 2, ... machines."""
    found = []
    for most in range(1, pool.max_nodes + 1):
        smaller = [restricted(lib, most) for lib in libraries]
        if all(map(len, smaller)):
            found += [baselines.scaled(smaller, rent, p) for p in baselines.POLICIES]
    return found


def restricted(library: Library, most: int) -> Library:
    """The templates of at most so many machines."""
    rows = np.flatnonzero(library.counts_UC.sum(1) <= most)
    return Library(library.demand, library.counts_UC[rows], library.rates_U[rows], library.stages_UN[rows])


def mixed_share(plan: Allocation, libraries: Sequence[Library], rent: Market) -> float:
    """Of the money, what goes into replicas of unequal machines."""
    mixed = sum(
        n * float(libraries[d].counts_UC[u] @ rent.price_RC[r])
        for (d, r, u), n in plan.running.items()
        if (libraries[d].counts_UC[u] > 0).sum() > 1
    )
    return mixed / plan.usd_per_h if plan.usd_per_h else 0.0


def stock_over_time(data: Path, shape: tuple[int, int], epochs: int, rng: np.random.Generator) -> np.ndarray:
    """[epochs, R, C] machines, each row of a published trace of 16 instances from a random start."""
    path = data / "spot-traces" / "skypilot-availability.csv"
    with open(path, newline="") as handle:
        names = sorted({row["trace"] for row in csv.DictReader(handle) if int(row["value"]) >= 8})
    traces = [read_counts(path, name)[1] for name in names]
    stock = np.zeros((epochs, *shape))
    for r, c in np.ndindex(*shape):
        counts = traces[int(rng.integers(len(traces)))]
        start = int(rng.integers(max(1, len(counts) - epochs * 6)))
        stock[:, r, c] = counts[start : start + epochs * 6 : 6][:epochs]
    return stock


def times(pool: pools.Pool, multiple: float) -> pools.Pool:
    """The pool with every rate multiplied."""
    return dataclasses.replace(pool, rates={name: rate * multiple for name, rate in pool.rates.items()})


def most(pool: pools.Pool, libraries: Sequence[Library], stock: np.ndarray, data: Path) -> float:
    """The largest multiple of the rates that Coral serves with this stock."""
    much = times(pool, MUCH)
    plan = Allocator(pools.rated(libraries, much, data), market(pool, stock)).allocate(time_limit_s=2 * LIMIT_S)
    if plan.factor >= 1:
        raise WagerError(f"the stock of {pool.name} serves {MUCH} times its rates: that is not scarce")
    return MUCH * plan.factor


def epochs_run(pool: pools.Pool, libraries: Sequence[Library], stock: np.ndarray, share: float) -> dict:
    """Plan again each epoch with what runs; seconds, started machines, money, and what the baselines would cost."""
    current: dict = {}
    run: dict = {"seconds": [], "machines_started": [], "usd_per_h": [], "factor": [], "best_baseline_usd_per_h": []}
    for now in stock:
        rent = market(pool, now)
        begun = time.perf_counter()
        plan = Allocator(libraries, rent, share).allocate(lawful(current, libraries, rent), time_limit_s=LIMIT_S)
        run["seconds"].append(time.perf_counter() - begun)
        check(plan, libraries, rent)
        change = reconcile(current, plan.running)
        run["machines_started"].append(
            sum(n * int(libraries[d].counts_UC[u].sum()) for (d, _, u), n in change.start.items())
        )
        run["usd_per_h"].append(plan.usd_per_h)
        run["factor"].append(plan.factor)
        others = [baselines.scaled(libraries, rent, p) for p in baselines.POLICIES]
        able = [o.usd_per_h for o in others if o.factor >= plan.factor * (1 - 1e-9)]
        run["best_baseline_usd_per_h"].append(min(able, default=None))
        current = dict(plan.running)
    pairs = [(b, c) for b, c in zip(run["best_baseline_usd_per_h"], run["usd_per_h"], strict=True) if b is not None]
    run["cheaper_than_best"] = sum(b for b, _ in pairs) / sum(c for _, c in pairs) if pairs else None
    return run


def lawful(current: dict, libraries: Sequence[Library], rent: Market) -> dict:
    """What of the running plan the stock still holds."""
    free, kept = rent.stock_RC.copy(), {}
    for (d, r, u), n in current.items():
        needs = libraries[d].counts_UC[u]
        fit = int(min(n, *(free[r][c] // needs[c] for c in np.flatnonzero(needs))))
        if fit > 0:
            kept[d, r, u] = fit
            free[r] -= fit * needs
    return kept


def draw(found: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.6 * len(found) + 1.5), layout="constrained")
    axes = figure.subplots()
    for offset, who in ((-0.27, "coral"), (0.0, "homo"), (0.27, "cauchy")):
        values = [f["usd_per_h"] if who == "coral" else f[who]["usd_per_h"] for f in found]
        axes.barh([i + offset for i in range(len(found))], values, 0.25, label=who)
    axes.set_yticks(range(len(found)), [f["pool"] for f in found])
    axes.set_xlabel("USD per hour for the full demand (list prices, machines not scarce)")
    axes.legend()
    figure.savefig(path)


def built(cases: Sequence[pools.Pool], data: Path, roofline: Roofline) -> dict[str, list[Library]]:
    """Libraries by pool; pools that differ in rates alone share their templates."""
    ready: dict[tuple, list[Library]] = {}
    found = {}
    for pool in cases:
        key = pool.devices, pool.max_nodes, pool.trace, tuple(pool.rates)
        if key not in ready:
            begun = time.perf_counter()
            ready[key] = pools.libraries(pool, data, roofline)
            count, useful = sum(map(len, ready[key])), sum(len(lib.useful) for lib in ready[key])
            say(f"{pool.name}: {count} templates, {useful} undominated, {time.perf_counter() - begun:.1f} s")
        found[pool.name] = pools.rated(ready[key], pool, data)
    return found


def shown(ratio: float | None) -> str:
    """A ratio for people; a dash where a side does not serve everything."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, required=True, help="folder of the shared data sets")
    parser.add_argument(
        "--part",
        choices=("all", "pools", "many", "served"),
        default="all",
        help="many: only solve times with many templates; served: only requests in simulation",
    )
    args = parser.parse_args()
    roofline, left_out = pools.fitted(args.data)
    say(f"roofline {roofline}; median error on a machine it has not seen {np.median(list(left_out.values())):.0%}")
    facts = {} if args.part == "all" else recorded()
    if args.part in ("all", "pools"):
        facts |= measured(args.data, args.quick, roofline)
    facts |= {"roofline": vars(roofline), "left_out_error": left_out}
    if args.part in ("all", "served"):
        facts["served"] = in_simulation(args.data, args.quick, roofline)
    if args.part in ("all", "many") and not args.quick:
        facts["many_templates"] = many(args.data, roofline, np.random.default_rng(0))
    show(facts)
    if "plenty" in facts:
        draw(facts["plenty"], picture_path("cluster", "coral"))
    print(f"written: {Report('cluster', 'coral', [], facts=facts).save()}")


def recorded() -> dict:
    """What an earlier run of the other parts has written."""
    path = RESULTS / "cluster" / "coral.json"
    return json.loads(path.read_text())["facts"] if path.exists() else {}


def measured(data: Path, quick: bool, roofline: Roofline) -> dict:
    small, large, scarce = (
        (2, 2, 2) if quick else (6, 5, 4)
    )  # of the core pool as the paper; of the extended one what is built in two minutes, with less where time limits the solver
    code = "azure_llm_2023_code"
    even, heavy = pools.extended(large), pools.extended(large, share="large")
    cases = [pools.core(small), even, heavy]
    if not quick:
        cases += [pools.core(small, code), pools.extended(large, code), pools.extended(large, share="small")]
    libraries = built(cases, data, roofline)
    facts: dict = {"max_machines": {"core": small, "extended": large, "extended, scarce and over time": scarce}}
    facts["plenty"] = [priced(pool, libraries[pool.name], PLENTY) for pool in cases]
    rng = np.random.default_rng(0)
    facts["epochs"], facts["scarce"] = {}, []
    for pool in (even, heavy):
        libraries[pool.name] = [restricted(lib, scarce) for lib in libraries[pool.name]]
    even, heavy = (dataclasses.replace(pool, max_nodes=scarce) for pool in (even, heavy))
    for pool, above, scale in ((cases[0], 1.25, 0.125), (even, 1.75, 0.25), (heavy, 1.75, 0.25)):
        stock = stock_over_time(data, pools.prices(pool).shape, 2 if quick else 10, rng)
        for share in (START_UP_SHARE, 0.0) if pool is cases[0] else (START_UP_SHARE,):
            label = f"{pool.name}, start-up share {share:g}"
            facts["epochs"][label] = epochs_run(pool, libraries[pool.name], stock, share)
            say(f"{label}: {facts['epochs'][label]['cheaper_than_best']}")
        scarce_stock = np.floor(stock[0] * scale)
        largest = most(pool, libraries[pool.name], scarce_stock, data)
        for multiple in (above, 1.0, 0.5):
            asked = times(pool, largest / multiple)
            row = priced(asked, pools.rated(libraries[pool.name], asked, data), scarce_stock)
            facts["scarce"].append(row | {"stock_over_need": multiple, "rates_multiplied": largest / multiple})
    return facts


def in_simulation(data: Path, quick: bool, roofline: Roofline) -> list[dict]:
    cases = [pools.core(2)] if quick else [pools.core(5), pools.extended(3), pools.extended(3, share="large")]
    libraries = built(cases, data, roofline)
    rows = []
    for pool in cases:
        rows.append(coral_served.served(pool, libraries[pool.name], market(pool, PLENTY), data, roofline))
        say(f"{pool.name} served in simulation: {rows[-1]['coral']['good']:.1%} in time")
    return rows


def many(data: Path, roofline: Roofline, rng: np.random.Generator) -> dict:
    """Solve times with templates of up to five machines."""
    pool = pools.extended(5)
    libraries = built([pool], data, roofline)[pool.name]
    run = epochs_run(pool, libraries, stock_over_time(data, pools.prices(pool).shape, 3, rng), START_UP_SHARE)
    return run | {"templates": sum(map(len, libraries)), "columns": Allocator(libraries, market(pool, 1.0)).num_columns}


def show(facts: dict) -> None:
    head = [
        "pool",
        "columns",
        "devices",
        "Coral USD/h",
        "gap",
        *baselines.POLICIES,
        baselines.BY_RATIO,
        "cheaper than best",
        "than tuned",
        "any plan at most",
        "of it mixed",
        "solve",
    ]
    print(format_table([head, *(
        [
            f["pool"], str(f["columns"]), str(f["devices"]), f"{f['usd_per_h']:.1f}", f"{f['gap']:.2%}",
            *(f"{f[p]['usd_per_h']:.1f}" if p in f else "-" for p in (*baselines.POLICIES, baselines.BY_RATIO)), shown(f["cheaper_than_best"]),
            shown(f["cheaper_than_tuned"]), shown(f["best_possible"]), f"{f['mixed_share']:.0%}", f"{f['seconds']:.1f} s",
        ]
        for f in facts.get("plenty", [])
    )]))  # fmt: skip
    head = [
        "scarce pool",
        "stock over need",
        "devices of",
        "Coral USD/h",
        "share",
        *baselines.POLICIES,
        "goodput over best",
        "cheaper",
        "solve",
    ]
    print(format_table([head, *(
        [
            f["pool"], f"{f['stock_over_need']}x", f"{f['devices']} of {f['devices_in_stock']}", f"{f['usd_per_h']:.0f}", f"{f['factor']:.0%} (at most {f['most_factor']:.0%})",
            *(f"{f[p]['factor']:.0%} at {f[p]['usd_per_h']:.0f}" for p in baselines.POLICIES), f"{f['goodput_over_best']:.2f}x",
            shown(f["cheaper_than_best"]), f"{f['seconds']:.1f} s",
        ]
        for f in facts.get("scarce", [])
    )]))  # fmt: skip
    if "served" in facts:
        print(format_table(coral_served.lines(facts["served"])))
    runs = dict(facts.get("epochs", {}))
    if "many_templates" in facts:
        runs[f"{facts['many_templates']['columns']} columns"] = facts["many_templates"]
    for label, run in runs.items():
        print(
            f"{label}: {len(run['seconds'])} epochs, {np.mean(run['seconds']):.2f} s a plan, {max(run['seconds']):.2f} s at most, "
            f"{sum(run['machines_started'])} machines started, {run['cheaper_than_best'] or float('nan'):.2f} times cheaper than the best baseline"
        )


if __name__ == "__main__":
    main()
