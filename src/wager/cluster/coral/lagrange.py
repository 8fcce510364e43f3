"""Coral's allocation taken apart by demand: what stock is worth becomes a price, then every demand is a small problem of its own.

Under the duals of the stock rows each demand wants its tokens/s at least cost and nothing ties it to the others. Of its templates only those
matter that no other gives at least the rate for no more money: a short list out of a library of any length. The sum of the small optima is a
lower bound on the whole; where the small solutions fit the stock together they are a plan. With plenty of stock the duals are zero and the two
meet: the plan is optimal, whatever a time-limited branch and bound would have said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from wager.solve import LinearModel, solve

GAP = 1e-4


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


def cheapest(
    columns: list[Column], wanted: float, time_limit_s: float
) -> tuple[float, dict[tuple[int, int], int] | None]:
    """(lower bound on the cost of `wanted` tokens/s, replicas of a solution or None)."""
    program = LinearModel()
    numbers = [program.add("", 0, c.most, max(c.cost, 0.0), integer=True) for c in columns]
    program.row([(n, c.rate / wanted) for n, c in zip(numbers, columns, strict=True)], lower=1.0)
    answer = solve(program, time_limit_s=time_limit_s, gap=GAP)
    bound = max(0.0, answer.bound) if np.isfinite(answer.bound) else 0.0
    if answer.x is None:
        return bound, None
    chosen: dict[tuple[int, int], int] = {}
    for number, column in zip(numbers, columns, strict=True):
        count = round(float(answer.x[number]))
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
    regions = cost_UR.shape[1]
    best = frontier(cost_UR.ravel(), np.repeat(rate_U[useful_U], regions))
    found = []
    for flat in best:
        i, r = divmod(int(flat), regions)
        u = int(useful_U[i])
        if rate_U[u] > 0:
            found.append(Column(r, u, float(cost_UR[i, r]), float(rate_U[u]), float("inf")))
    for (r, u), count in current.items():
        found.append(Column(r, u, float(price_UR[u, r] + worth_UR[u, r]), float(rate_U[u]), float(count)))
    return found
