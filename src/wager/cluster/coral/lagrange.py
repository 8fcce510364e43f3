"""Coral's allocation taken apart by demand: what stock is worth becomes a price, then every demand is a small problem of its own.

Under the duals of the stock rows each demand wants its tokens/s at least cost and nothing ties it to the others. Of its templates only those
matter that no other gives at least the rate for no more money: a short list out of a library of any length. The sum of the small optima is a
lower bound on the whole; where the small solutions fit the stock together they are a plan. With plenty of stock the duals are zero and the two
meet: the plan is optimal, whatever a time-limited branch and bound would have said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from wager.cluster.coral import native

PARTS = 20_000  # of a demand, in which rates are counted


@dataclass(frozen=True)
class Column:
    """A template that may run: `cost` includes what its machines' scarcity is worth; at most `most` replicas at that cost."""

    region: int
    template: int
    cost: float
    rate: float
    most: float


def frontier(cost_U: np.ndarray, rate_U: np.ndarray) -> np.ndarray:
    """Rows that no other row beats in both: in descending order of rate, those cheaper than all before."""
    order = np.lexsort((cost_U, -rate_U))
    cheapest = np.minimum.accumulate(np.concatenate([[np.inf], cost_U[order][:-1]]))
    return order[cost_U[order] < cheapest]


def cheapest(columns: Sequence[Column], wanted: float) -> tuple[float, dict[tuple[int, int], int] | None]:
    """(lower bound on the cost of `wanted` tokens/s, replicas of a solution or None where all columns are too few).

    Exact but for rates in whole parts of the demand: rounded up they give the bound, and where that solution serves the demand also as they are, the optimum;
    rounded down a plan."""
    cost_K = np.array([max(c.cost, 0.0) for c in columns])
    parts_K = np.minimum(np.array([c.rate for c in columns]) / wanted, 1.0) * PARTS
    most_K = np.array([c.most if np.isfinite(c.most) else -1 for c in columns])
    bound, counts = native.cover(PARTS, cost_K, np.ceil(parts_K), most_K)
    if np.isinf(bound):
        return bound, None
    if counts @ parts_K < PARTS * (1 - 1e-9):
        found, counts = native.cover(PARTS, cost_K, np.floor(parts_K * (1 + 1e-12)), most_K)
        if np.isinf(found):
            return bound, None
    chosen: dict[tuple[int, int], int] = {}
    for column, count in zip(columns, counts.tolist(), strict=True):
        if count:
            key = column.region, column.template
            chosen[key] = chosen.get(key, 0) + count
    return bound, chosen


def columns_of(
    price_UR: np.ndarray,
    worth_UR: np.ndarray,
    rate_U: np.ndarray,
    useful_U: np.ndarray,
    current: Mapping[tuple[int, int], int],
    start_up_share: float,
) -> list[Column]:
    """What can matter to one demand: the frontier of what may be added anywhere, and everything that runs now.

    worth_UR: what the machines of a template are worth elsewhere, from the duals of the stock.
    """
    cost_UR = price_UR[useful_U] * (1 + start_up_share) + worth_UR[useful_U]
    region_U = cost_UR.argmin(1)  # in another region a template costs more and serves no more
    cost_U, rate_U_useful = cost_UR[np.arange(len(cost_UR)), region_U], rate_U[useful_U]
    found = [
        Column(int(region_U[i]), int(useful_U[i]), float(cost_U[i]), float(rate_U_useful[i]), float("inf"))
        for i in frontier(cost_U, rate_U_useful)
        if rate_U_useful[i] > 0
    ]
    for (r, u), count in current.items():
        found.append(Column(r, u, float(price_UR[u, r] + worth_UR[u, r]), float(rate_U[u]), float(count)))
    return found
