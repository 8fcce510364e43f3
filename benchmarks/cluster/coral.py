"""Coral against plans of equal machines: what a plan costs, what it serves when machines are scarce, how long a plan takes.

Pools and costs are in `coral_pools`. The cost of a plan is a sum of prices and exact; only the solve time depends on the machine. Every plan, also
the baselines', passes `check`. Settings: as many machines as one likes; the same with the latency budget split as suits each stage best, for Coral and
baselines alike; stock over ten epochs from published spot availability, one trace per region and shape; and scarce stock, where the demands are set so that
the stock serves a given multiple of them. `homo` and `cauchy` are greedy by capacity per dollar, as published; `tuned` is the best of all baselines, those in hindsight
included, each with templates of at most 1, 2, ... machines, which the published ones do not choose. `best_possible` is how much cheaper than the best published
baseline any plan of these templates could be: the baseline's cost over the proven bound. `fractions` is what the templates with the most tokens per dollar would cost if
parts of replicas were for rent: no library of these machines' efficiency comes below. Scarce stock is compared by the share of its demand that the worst-served
model gets, against baselines scaled down alike, and by requests/s of all models, where baselines may also serve the first models in full and the last not at all.
Last, plans serve requests in simulation (`coral_served`).
"""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.cluster import coral_pools as pools
from benchmarks.cluster import coral_served, coral_tables
from benchmarks.harness import RESULTS, Report, arguments, picture_path, say
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
EPOCH_LIMIT_S = 3.5  # with a million columns more comes before and after
MUCH = 50.0


def market(pool: pools.Pool, stock: np.ndarray | float) -> Market:
    price = pools.prices(pool)
    regions = tuple(f"region-{i}" for i in range(pool.regions))
    return Market(regions, pools.configurations(pool), np.broadcast_to(stock, price.shape).astype(float), price)


def served(plan: Allocation, libraries: Sequence[Library], rates: dict[str, float]) -> float:
    """Requests/s that get both their prefill and their decoding."""
    return sum(rates[model] * share for model, share in coral_served.shares(plan, libraries).items())


def priced(pool: pools.Pool, libraries: Sequence[Library], stock: np.ndarray | float, limit_s: float = LIMIT_S) -> dict:
    """Coral and every baseline on one market."""
    rent = market(pool, stock)
    plan = Allocator(libraries, rent).allocate(time_limit_s=limit_s)
    check(plan, libraries, rent)
    devices_C = np.array([c.count for c in rent.configurations])
    found = {
        "pool": pool.name, "templates": sum(map(len, libraries)), "columns": plan.columns, "usd_per_h": plan.usd_per_h,
        "bound": plan.bound, "gap": plan.gap, "seconds": plan.seconds, "factor": plan.factor, "most_factor": plan.most_factor,
        "requests_per_s": served(plan, libraries, pool.rates), "asked_per_s": sum(pool.rates.values()),
        "mixed_share": mixed_share(plan, libraries, rent), "fractions_usd_per_h": fractions(libraries, rent),
        "devices": int(sum(n * (libraries[d].counts_UC[u] @ devices_C) for (d, _, u), n in plan.running.items())),
        "devices_in_stock": int((rent.stock_RC @ devices_C).sum()),
    }  # fmt: skip
    rivals = {}
    for name in baselines.POLICIES:
        rivals[name] = baselines.scaled(libraries, rent, name), baselines.greedy(libraries, rent, name)
        for one in rivals[name]:
            check(one, libraries, rent)
        scaled, first_come = rivals[name]
        found[name] = {
            "usd_per_h": scaled.usd_per_h,
            "factor": scaled.factor,
            "requests_per_s": served(scaled, libraries, pool.rates),
            "first_come_factor": first_come.factor,
            "first_come_requests_per_s": served(first_come, libraries, pool.rates),
        }
    tuned = [*(scaled for scaled, _ in rivals.values()), *smaller_baselines(pool, libraries, rent)]
    found |= compared(plan, found, [rivals[name][0] for name in baselines.PUBLISHED], tuned)
    return found


def compared(plan: Allocation, found: dict, published: Sequence[Allocation], tuned: Sequence[Allocation]) -> dict:
    """Coral's plan over the best published and the best tuned baseline."""

    def least(others: Sequence[Allocation]) -> float:
        return min((o.usd_per_h for o in others if o.factor >= plan.factor * (1 - 1e-9)), default=float("nan"))

    def requests(names: Sequence[str]) -> float:
        return max(max(found[n]["requests_per_s"], found[n]["first_come_requests_per_s"]) for n in names)

    ratios = {
        "cheaper_than_best": least(published) / plan.usd_per_h,
        "cheaper_than_tuned": least(tuned) / plan.usd_per_h,
        "best_possible": least(published) / plan.bound,
    }
    return {name: ratio if np.isfinite(ratio) else None for name, ratio in ratios.items()} | {
        "share_over_best": plan.factor / max(*(o.factor for o in published), 1e-9),
        "share_over_tuned": plan.factor / max(*(o.factor for o in tuned), 1e-9),
        "requests_over_best": found["requests_per_s"] / requests(baselines.PUBLISHED),
        "requests_over_tuned": found["requests_per_s"] / requests(baselines.POLICIES),
        "never_worse": all(
            o.factor < plan.factor * (1 - 1e-6) or (o.factor <= plan.factor * (1 + 1e-6) and o.usd_per_h >= plan.usd_per_h * (1 - 1e-6))
            for o in tuned
        ),
    }  # fmt: skip


def fractions(libraries: Sequence[Library], rent: Market) -> float:
    """USD per hour for the demands at the most tokens per dollar of any template in any region."""
    return sum(
        lib.demand.tokens_per_s * float(((lib.counts_UC @ rent.price_RC.T).min(1) / lib.rates_U).min())
        for lib in libraries
    )


def smaller_baselines(pool: pools.Pool, libraries: Sequence[Library], rent: Market) -> list[Allocation]:
    """Every baseline with templates of at most 1, 2, ... machines."""
    found = []
    for most in range(1, pool.max_nodes):
        smaller = [restricted(lib, most) for lib in libraries]
        if all(map(len, smaller)):
            found += [baselines.scaled(smaller, rent, p) for p in baselines.POLICIES]
    return found


def restricted(library: Library, most: int) -> Library:
    """The templates of at most so many machines."""
    rows = np.flatnonzero(library.counts_UC.sum(1) <= most)
    return library.only(rows)


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
    columns = sum(map(len, libraries)) * pool.regions
    run: dict = {
        "columns": columns,
        "seconds": [],
        "machines_started": [],
        "usd_per_h": [],
        "factor": [],
        "best_baseline_usd_per_h": [],
    }
    for now in stock:
        rent = market(pool, now)
        begun = time.perf_counter()
        plan = Allocator(libraries, rent, share).allocate(lawful(current, libraries, rent), time_limit_s=EPOCH_LIMIT_S)
        run["seconds"].append(time.perf_counter() - begun)
        check(plan, libraries, rent)
        change = reconcile(current, plan.running)
        run["machines_started"].append(
            sum(n * int(libraries[d].counts_UC[u].sum()) for (d, _, u), n in change.start.items())
        )
        run["usd_per_h"].append(plan.usd_per_h)
        run["factor"].append(plan.factor)
        others = [baselines.scaled(libraries, rent, p) for p in baselines.PUBLISHED]
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


@dataclass(frozen=True)
class Shelf:
    """Libraries built in this run; pools that differ in rates alone share their templates."""

    data: Path
    roofline: Roofline
    ready: dict[tuple, list[Library]] = field(default_factory=dict)

    def libraries(self, pool: pools.Pool) -> list[Library]:
        key = pool.devices, pool.max_nodes, pool.units, pool.trace, tuple(pool.rates)
        if key not in self.ready:
            begun = time.perf_counter()
            found = self.ready[key] = pools.libraries(pool, self.data, self.roofline)
            count = sum(len(lib.useful) for lib in found)
            say(f"{pool.name}: {count} templates that no smaller ones replace, {time.perf_counter() - begun:.1f} s")
        return pools.rated(self.ready[key], pool, self.data)


def main() -> None:
    parser = arguments(__doc__ or "", repeats=False)
    parser.add_argument("--data", type=Path, required=True, help="folder of the shared data sets")
    parser.add_argument(
        "--part",
        nargs="+",
        choices=("all", *PARTS),
        default=["all"],
        help="only these settings; the others stay as recorded",
    )
    args = parser.parse_args()
    roofline, left_out = pools.fitted(args.data)
    say(f"roofline {roofline}; median error on a machine it has not seen {np.median(list(left_out.values())):.0%}")
    facts = {} if args.part == ["all"] else recorded()
    shelf = Shelf(args.data, roofline)
    for part in PARTS if args.part == ["all"] else args.part:
        facts[part] = PARTS[part](shelf, args.quick)
    facts |= {"roofline": vars(roofline), "left_out_error": left_out}
    coral_tables.show(facts)
    if args.quick:
        return
    if "plenty" in facts:
        coral_tables.draw(facts["plenty"], picture_path("cluster", "coral"))
    print(f"written: {Report('cluster', 'coral', [], facts=facts).save()}")


def recorded() -> dict:
    """What an earlier run of the other parts has written."""
    path = RESULTS / "cluster" / "coral.json"
    return json.loads(path.read_text())["facts"] if path.exists() else {}


def nodes(quick: bool, scarce: bool = False) -> int:
    """Machines of a template at most: as published; fewer where stock is so scarce that the search for whole replicas takes all the time there is."""
    return 2 if quick else 4 if scarce else 6


def plenty(shelf: Shelf, quick: bool) -> list[dict]:
    most, code = nodes(quick), "azure_llm_2023_code"
    cases = [pools.core(most), pools.extended(most), pools.extended(most, share="large")]
    if not quick:
        cases += [pools.extended(most, share="small"), pools.core(most, code)]
        cases += [pools.extended(most, code, share=share) for share in ("even", "large")]
    return [priced(pool, shelf.libraries(pool), PLENTY) for pool in cases]


def budget(shelf: Shelf, quick: bool) -> list[dict]:
    """Even and free split of the latency budget, for Coral and the baselines."""
    most, units = (2, 6) if quick else (4, 12)
    cases = [pools.core(most), pools.extended(most), pools.extended(most, share="large")]
    if not quick:
        cases.append(pools.extended(most, "azure_llm_2023_code"))
    cases = [dataclasses.replace(pool, units=u) for pool in cases for u in (None, units)]
    return [priced(pool, shelf.libraries(pool), PLENTY) | {"units": pool.units} for pool in cases]


def scarce_pools(shelf: Shelf, quick: bool, most: int) -> list[tuple[pools.Pool, float, np.ndarray]]:
    """(pool, stock over need as published, stock over time); most: machines of a template in the extended pools."""
    rng, small = np.random.default_rng(0), pools.core(nodes(quick))
    cases = [(small, 1.25), (pools.extended(most), 1.75), (pools.extended(most, share="large"), 1.75)]
    epochs = 2 if quick else 10
    return [(pool, above, stock_over_time(shelf.data, pools.prices(pool).shape, epochs, rng)) for pool, above in cases]


def epochs(shelf: Shelf, quick: bool) -> dict[str, dict]:
    runs = {}
    for number, (pool, _, stock) in enumerate(scarce_pools(shelf, quick, nodes(quick))):
        for share in (START_UP_SHARE, 0.0) if number == 0 else (START_UP_SHARE,):
            label = f"{pool.name}, start-up share {share:g}"
            runs[label] = epochs_run(pool, shelf.libraries(pool), stock, share)
            say(f"{label}: {runs[label]['cheaper_than_best']}")
    return runs


def scarce(shelf: Shelf, quick: bool) -> list[dict]:
    rows = []
    for (pool, above, stock), scale in zip(
        scarce_pools(shelf, quick, nodes(quick, scarce=True)), (0.125, 0.25, 0.25), strict=True
    ):
        first, libraries = np.floor(stock[0] * scale), shelf.libraries(pool)
        largest = most(pool, libraries, first, shelf.data)
        for multiple in (above, 1.0, 0.5):
            asked = times(pool, largest / multiple)
            row = priced(asked, pools.rated(libraries, asked, shelf.data), first)
            rows.append(row | {"stock_over_need": multiple, "rates_multiplied": largest / multiple})
            say(f"{pool.name}, {multiple} times the need: {row['factor']:.1%}, gap {row['gap']:.2%}")
    return rows


def in_simulation(shelf: Shelf, quick: bool) -> list[dict]:
    cases = [pools.core(2)] if quick else [pools.core(6), pools.extended(4), pools.extended(4, share="large")]
    cases += [] if quick else [dataclasses.replace(pools.core(6), units=12)]
    rows = []
    for pool in cases:
        row = coral_served.served(pool, shelf.libraries(pool), market(pool, PLENTY), shelf.data, shelf.roofline)
        rows.append(row | {"units": pool.units})
        say(f"{pool.name} served in simulation: {row['coral']['good']:.1%} in time")
    pool, _, stock = scarce_pools(shelf, quick, nodes(quick))[0]
    libraries, first = shelf.libraries(pool), np.floor(stock[0] * 0.125)
    asked = times(pool, most(pool, libraries, first, shelf.data))
    wanted = pools.rated(libraries, asked, shelf.data)
    rows.append(coral_served.served(asked, wanted, market(pool, first), shelf.data, shelf.roofline) | {"scarce": True})
    return rows


PARTS = {"plenty": plenty, "budget": budget, "epochs": epochs, "scarce": scarce, "served": in_simulation}


if __name__ == "__main__":
    main()
