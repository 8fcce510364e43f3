"""Coral against plans of equal machines: what a plan costs, what it serves when machines are scarce, how long a plan takes.

Pools and costs are in `coral_pools`. The cost of a plan is a sum of prices and exact; only the solve time depends on the machine. Every plan, also
the baselines', passes `check`. Stock over time comes from published spot availability, one trace per region and shape.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.cluster import coral_pools as pools
from benchmarks.harness import Report, arguments, format_table, picture_path, say
from wager.cluster.coral import baselines
from wager.cluster.coral.allocate import Allocator
from wager.cluster.coral.market import Allocation, Market, check, reconcile
from wager.cluster.coral.templates import Library
from wager.errors import WagerError
from wager.hardware.availability import read_counts

PLENTY = 1000.0
START_UP_SHARE = 0.1  # six minutes of start-up, counted as if a machine then ran for an hour
LIMIT_S = 5.0


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


def priced(pool: pools.Pool, libraries: Sequence[Library], stock: np.ndarray | float, limit_s: float) -> dict:
    """Coral and every baseline on one market."""
    rent = market(pool, stock)
    plan = Allocator(libraries, rent).allocate(time_limit_s=limit_s)
    check(plan, libraries, rent)
    others = {p: baselines.greedy(libraries, rent, p) for p in baselines.POLICIES}
    for other in others.values():
        check(other, libraries, rent)
    found = {
        "pool": pool.name, "templates": sum(map(len, libraries)), "columns": plan.columns, "usd_per_h": plan.usd_per_h,
        "bound": plan.bound, "gap": plan.gap, "seconds": plan.seconds, "factor": plan.factor,
        "requests_per_s": served(plan, libraries, pool.rates), "asked_per_s": sum(pool.rates.values()),
        "mixed_share": mixed_share(plan, libraries, rent),
    }  # fmt: skip
    for name, other in others.items():
        found[name] = {
            "usd_per_h": other.usd_per_h,
            "factor": other.factor,
            "requests_per_s": served(other, libraries, pool.rates),
        }
    able = [o.usd_per_h for o in others.values() if o.factor >= plan.factor * (1 - 1e-9)]
    found["cheaper_than_best"] = min(able) / plan.usd_per_h if able else None
    found["never_worse"] = all(o.factor <= plan.factor * (1 + 1e-9) for o in others.values()) and all(
        cost >= plan.usd_per_h * (1 - 1e-9) for cost in able
    )
    return found


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


def least_scale(pool: pools.Pool, libraries: Sequence[Library], base: np.ndarray) -> float:
    """The smallest multiple of the stock (machines rounded down) that serves everything, to 5 %."""

    def enough(scale: float) -> bool:
        try:
            return Allocator(libraries, market(pool, np.floor(base * scale))).allocate(time_limit_s=2.0).factor == 1.0
        except WagerError:
            return False

    low, high = 0.0, 1.0
    while not enough(high) and high < 64:
        low, high = high, high * 2
    while high - low > 0.05 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def epochs_run(pool: pools.Pool, libraries: Sequence[Library], stock: np.ndarray, share: float) -> dict:
    """Plan again each epoch with what runs; seconds, started machines, money."""
    current: dict = {}
    seconds, started, usd, worse = [], [], [], 0
    for now in stock:
        rent = market(pool, now)
        begun = time.perf_counter()
        plan = Allocator(libraries, rent, share).allocate(lawful(current, libraries, rent), time_limit_s=LIMIT_S)
        seconds.append(time.perf_counter() - begun)
        check(plan, libraries, rent)
        change = reconcile(current, plan.running)
        started.append(sum(n * int(libraries[d].counts_UC[u].sum()) for (d, _, u), n in change.start.items()))
        usd.append(plan.usd_per_h)
        worse += any(baselines.greedy(libraries, rent, p).factor > plan.factor * (1 + 1e-9) for p in baselines.POLICIES)
        current = dict(plan.running)
    return {"seconds": seconds, "machines_started": started, "usd_per_h": usd, "epochs_worse_than_a_baseline": worse}


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


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, required=True, help="folder of the shared data sets")
    args = parser.parse_args()
    roofline, left_out = pools.fitted(args.data)
    say(f"roofline {roofline}; median error on a machine it has not seen {np.median(list(left_out.values())):.0%}")
    nodes = 2 if args.quick else 4
    code = "azure_llm_2023_code"
    cases = [
        pools.core(nodes),
        pools.core(nodes, code),
        *(pools.extended(min(nodes, 3), share=s) for s in ("even", "large", "small")),
    ]
    cases = cases[:1] + cases[2:3] if args.quick else [*cases, pools.extended(3, code)]
    built = {}
    for pool in cases:
        built[pool.name] = pools.libraries(pool, args.data, roofline)
        say(f"{pool.name}: {sum(map(len, built[pool.name]))} templates")
    plenty = [priced(pool, built[pool.name], PLENTY, 3 * LIMIT_S) for pool in cases]
    rng = np.random.default_rng(0)
    scarce, epochs, facts = [], 2 if args.quick else 6, {}
    for pool, above in ((cases[0], 1.25), (next(p for p in cases if p.name.startswith("extended")), 1.75)):
        libraries = built[pool.name]
        stock = stock_over_time(args.data, pools.prices(pool).shape, epochs, rng)
        scale = least_scale(pool, libraries, stock[0])
        tight = priced(pool, libraries, np.floor(stock[0] * scale * above), 3 * LIMIT_S)
        scarce.append(tight | {"stock_over_least": above})
        say(f"{pool.name}: least stock {scale:.2f} times the trace")
        widened = np.floor(stock * scale * above)
        facts[f"epochs, {pool.name}"] = {
            f"start-up share {s:g}": epochs_run(pool, libraries, widened, s) for s in (START_UP_SHARE, 0.0)
        }
    head = ["pool", "columns", "Coral USD/h", "gap", "homo", "cauchy", "cheaper than best", "of it mixed", "solve"]
    print(format_table([head, *(
        [
            f["pool"], str(f["columns"]), f"{f['usd_per_h']:.1f}", f"{f['gap']:.2%}", f"{f['homo']['usd_per_h']:.1f}",
            f"{f['cauchy']['usd_per_h']:.1f}", f"{f['cheaper_than_best'] or float('nan'):.2f}x", f"{f['mixed_share']:.0%}", f"{f['seconds']:.1f} s",
        ]
        for f in plenty
    )]))  # fmt: skip
    head = [
        "scarce pool",
        "stock over least",
        "Coral req/s",
        "homo",
        "cauchy",
        "asked",
        "worst share",
        "homo",
        "cauchy",
    ]
    print(format_table([head, *(
        [
            f["pool"], f"{f['stock_over_least']}x", *(f"{v:.1f}" for v in (f["requests_per_s"], f["homo"]["requests_per_s"], f["cauchy"]["requests_per_s"], f["asked_per_s"])),
            *(f"{v:.0%}" for v in (f["factor"], f["homo"]["factor"], f["cauchy"]["factor"])),
        ]
        for f in scarce
    )]))  # fmt: skip
    for name, runs in facts.items():
        for label, run in runs.items():
            print(
                f"{name}, {label}: {np.mean(run['seconds']):.2f} s a plan, {max(run['seconds']):.2f} s at most, {sum(run['machines_started'])} machines started"
            )
    draw(plenty, picture_path("cluster", "coral"))
    facts |= {"roofline": vars(roofline), "left_out_error": left_out, "plenty": plenty, "scarce": scarce}
    print(f"written: {Report('cluster', 'coral', [], facts=facts).save()}")


if __name__ == "__main__":
    main()
