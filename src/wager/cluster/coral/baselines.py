"""What Coral is compared with: plans of equal machines, chosen greedily for one model after another.

Homo serves both phases of a model on one kind of machine; Cauchy lets each phase choose its own kind. Both take, again and again, the
template of equal machines with the most tokens per dollar that the remaining stock allows. Homo chooses the kind that makes the whole plan of
a model cheapest; by ratio, as the paper describes it, the kind with the most requests per dollar, also where whole replicas of it are far too large.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from wager.cluster.coral.market import Allocation, Key, Market
from wager.cluster.coral.templates import Library

POLICIES = ("homo", "cauchy")
BY_RATIO = "homo by ratio"


def scaled(libraries: Sequence[Library], market: Market, policy: str, tries: int = 10) -> Allocation:
    """A baseline where stock is too scarce for the full demands: all are scaled down alike until it serves them (bisection), as Coral does.
    Better than letting the first models take everything. `factor` 0 and no machines where it serves nothing."""
    best, low, high, share = Allocation({}, 0.0, 0.0, 0.0, 0.0, 0.0, 0, False), 0.0, 1.0, 1.0
    for _ in range(tries):
        found = greedy(libraries, market, policy, share)
        if found.factor >= 1 - 1e-9:
            best, low = dataclasses.replace(found, factor=share), share
            if share == 1.0:
                break
        else:
            high = share
        share = (low + high) / 2
    return best


def greedy(libraries: Sequence[Library], market: Market, policy: str, share: float = 1.0) -> Allocation:
    """The plan of a baseline for `share` of the demands; `factor` says how much of that the worst-served one gets."""
    stock = market.stock_RC.astype(float).copy()
    running: dict[Key, int] = {}
    shares = []
    for group in _groups(libraries, policy):
        best: tuple[float, float, dict[Key, int], np.ndarray] | None = None
        kinds = {"homo": range(len(market.configurations)), BY_RATIO: [_most_per_dollar(libraries, market, group)]}.get(
            policy, [None]
        )
        for kind in kinds:
            used, plan, worst, price = np.zeros_like(stock), {}, 1.0, 0.0
            for d in group:
                part, took, got, cost = fill(libraries[d], d, market, stock - used, kind, share)
                plan |= part
                used += took
                worst, price = min(worst, got), price + cost
            if best is None or (worst, -price) > (best[0], -best[1]):
                best = (worst, price, plan, used)
        assert best is not None
        shares.append(best[0])
        running |= best[2]
        stock -= best[3]
    price = sum(n * float(libraries[d].counts_UC[u] @ market.price_RC[r]) for (d, r, u), n in running.items())
    return Allocation(running, price, 0.0, 0.0, min(shares, default=1.0), 0.0, 0, False)


def _most_per_dollar(libraries: Sequence[Library], market: Market, group: Sequence[int]) -> int:
    """The kind of machine whose best templates serve the demands of `group` at least cost, were fractions of replicas for rent."""

    def usd_per_h(kind: int) -> float:
        total = 0.0
        for d in group:
            own = libraries[d].equal
            own = own[libraries[d].counts_UC[own, kind] > 0]
            if not len(own):
                return float("inf")
            cost_UR = libraries[d].counts_UC[own] @ market.price_RC.T
            best = float((libraries[d].rates_U[own][:, None] / cost_UR).max())
            total += libraries[d].demand.tokens_per_s / best
        return total

    return min(
        range(len(market.configurations)), key=lambda kind: (not market.stock_RC[:, kind].any(), usd_per_h(kind))
    )


def _groups(libraries: Sequence[Library], policy: str) -> list[list[int]]:
    if policy == "cauchy":
        return [[d] for d in range(len(libraries))]
    by_model: dict[str, list[int]] = {}
    for d, lib in enumerate(libraries):
        by_model.setdefault(lib.demand.model.name, []).append(d)
    return list(by_model.values())


def fill(
    library: Library, demand: int, market: Market, stock: np.ndarray, kind: int | None, factor: float = 1.0
) -> tuple[dict[Key, int], np.ndarray, float, float]:
    """Serve one demand greedily: (replicas, machines used [R, C], share of the demand served, price)."""
    wanted = factor * library.demand.tokens_per_s
    own = library.equal
    if kind is not None:
        own = own[library.counts_UC[own, kind] > 0]
    used, plan, served, price = np.zeros_like(stock), {}, 0.0, 0.0
    cost_UR = library.counts_UC[own] @ market.price_RC.T
    order = np.argsort(-(library.rates_U[own][:, None] / cost_UR).ravel(), kind="stable")
    for flat in order:
        if served >= wanted:
            break
        i, r = divmod(int(flat), len(market.regions))
        u = int(own[i])
        free = stock[r] - used[r]
        needs = library.counts_UC[u]
        fit = int(min(free[c] // needs[c] for c in np.flatnonzero(needs)))
        n = min(fit, int(np.ceil((wanted - served) / library.rates_U[u] - 1e-9)))
        if n > 0:
            plan[demand, r, u] = n
            used[r] += n * needs
            served += n * float(library.rates_U[u])
            price += n * float(cost_UR[i, r])
    return plan, used, min(1.0, served / wanted) if wanted else 1.0, price
