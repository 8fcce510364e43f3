"""What Coral is compared with: plans of equal machines, chosen greedily for one model after another.

Homo serves both phases of a model on one kind of machine; Cauchy lets each phase choose its own kind. Both take, again and again, the
template of equal machines with the most tokens per dollar that the remaining stock allows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wager.cluster.coral.allocate import Allocation, Key, Market
from wager.cluster.coral.templates import Library

POLICIES = ("homo", "cauchy")


def equal_machines(library: Library) -> np.ndarray:
    """Templates whose machines are all of one configuration."""
    return np.flatnonzero((library.counts_UC > 0).sum(1) == 1)


def greedy(libraries: Sequence[Library], market: Market, policy: str) -> Allocation:
    """The plan of a baseline; `factor` is the share of the worst-served demand."""
    stock = market.stock_RC.astype(float).copy()
    running: dict[Key, int] = {}
    shares = []
    for group in _groups(libraries, policy):
        best: tuple[float, float, dict[Key, int], np.ndarray] | None = None
        kinds = range(len(market.configurations)) if policy == "homo" else [None]
        for kind in kinds:
            used, plan, share, price = np.zeros_like(stock), {}, 1.0, 0.0
            for d in group:
                part, took, got, cost = fill(libraries[d], d, market, stock - used, kind)
                plan |= part
                used += took
                share, price = min(share, got), price + cost
            if best is None or (share, -price) > (best[0], -best[1]):
                best = (share, price, plan, used)
        assert best is not None
        shares.append(best[0])
        running |= best[2]
        stock -= best[3]
    price = sum(n * float(libraries[d].counts_UC[u] @ market.price_RC[r]) for (d, r, u), n in running.items())
    return Allocation(running, price, 0.0, 0.0, min(shares, default=1.0), 0.0, 0, False)


def _groups(libraries: Sequence[Library], policy: str) -> list[list[int]]:
    if policy == "cauchy":
        return [[d] for d in range(len(libraries))]
    by_model: dict[str, list[int]] = {}
    for d, lib in enumerate(libraries):
        by_model.setdefault(lib.demand.model.name, []).append(d)
    return list(by_model.values())


def fill(
    library: Library, demand: int, market: Market, stock: np.ndarray, kind: int | None
) -> tuple[dict[Key, int], np.ndarray, float, float]:
    """Serve one demand greedily: (replicas, machines used [R, C], share of the demand served, price)."""
    wanted = library.demand.tokens_per_s
    own = equal_machines(library)
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
