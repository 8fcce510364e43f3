"""Whole plans for scarce stock: demands packed one after another, the one that found no room first in the next try.

The allocation program's relaxation shares a large replica among many demands; with few machines of each kind whole replicas do not fit that way,
and branch and bound may find nothing in time. Here each demand in turn takes the replicas with the most tokens per dollar that still fit, where
dollars include what the stock is worth elsewhere and a replica counts for no more than is still wanted. A demand that finds no room moves to the
front of the next try. A search without proof: it gives incumbents, the linear program the bound.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from wager.cluster.coral.templates import Library

NOISE = 0.25  # of the logarithm of what a template costs, in later tries
TRIES = 16
MOST_COLUMNS = 12_000  # of a demand
HALVINGS = 40
CLOSE = 5e-3  # between the largest share reached and one that was not

Plan = dict[tuple[int, int, int], int]


class Packer:
    """cost_UR of each library: price of a template in each region."""

    def __init__(self, libraries: Sequence[Library], costs: Sequence[np.ndarray], stock_RC: np.ndarray):
        self.libraries, self.stock_RC = libraries, stock_RC.astype(float)
        self._counts, self._rates, self._cost, self._at = [], [], [], []
        for lib, cost_UR in zip(libraries, costs, strict=True):
            at_F2 = self._fitting(lib)
            self._at.append(at_F2)
            self._counts.append(lib.machines_UC[at_F2[:, 1]])
            self._rates.append(lib.rates_U[at_F2[:, 1]])
            self._cost.append(cost_UR[at_F2[:, 1], at_F2[:, 0]])

    def _fitting(self, lib: Library) -> np.ndarray:
        """[F, 2] region and template of what fits the stock alone, the templates of fewest machines where all are too many to look through."""
        by_size = lib.useful[np.argsort(lib.counts_UC[lib.useful].sum(1), kind="stable")]
        most = MOST_COLUMNS // len(self.stock_RC)
        fitting = [by_size[(lib.machines_UC[by_size] <= stock_C).all(1)][:most] for stock_C in self.stock_RC]
        regions = np.repeat(np.arange(len(fitting)), [len(f) for f in fitting])
        return np.stack([regions, np.concatenate(fitting)], 1).astype(int)

    @property
    def num_columns(self) -> int:
        """Replicas, by demand, region and template, that are tried."""
        return sum(map(len, self._at))

    def columns(self) -> list[tuple[int, int, int]]:
        return [(d, int(r), int(u)) for d, at_F2 in enumerate(self._at) for r, u in at_F2]

    def share(self, plan: Plan) -> float:
        """Of the worst-served demand, at most 1."""
        served = np.zeros(len(self.libraries))
        for (d, _, u), n in plan.items():
            served[d] += n * float(self.libraries[d].rates_U[u])
        wanted = np.array([lib.demand.tokens_per_s for lib in self.libraries])
        return float(min(1.0, (served / np.maximum(wanted, 1e-12)).min(initial=1.0)))

    def pack(self, factor: float, worth_RC: np.ndarray, end_s: float, tries: int = TRIES) -> Plan | None:
        """A plan for `factor` of every demand, or None when `tries` orders or the time until `end_s` gave none."""
        rng = np.random.default_rng(0)
        dear = [
            cost + (counts * worth_RC[at_F2[:, 0]]).sum(1)
            for cost, counts, at_F2 in zip(self._cost, self._counts, self._at, strict=True)
        ]
        order = sorted(range(len(self.libraries)), key=lambda d: -self._least(d, factor, dear[d]))
        for attempt in range(tries):
            costs = dear if attempt < tries // 4 else [c * np.exp(rng.normal(0, NOISE, len(c))) for c in dear]
            plan, failed = self._in_order(order, factor, costs)
            if plan is not None or time.perf_counter() > end_s:
                return plan
            order.remove(failed)
            order.insert(0, failed)
        return None

    def largest(self, worth_RC: np.ndarray, low: float, high: float, end_s: float) -> tuple[float, Plan | None]:
        """The largest common share in (low, high] for which a plan was found, and that plan: bisection on the share."""
        best: Plan | None = None
        factor = high
        for _ in range(HALVINGS):
            if high - low <= CLOSE * high or time.perf_counter() > end_s:
                break
            plan = self.pack(factor, worth_RC, end_s)
            if plan is None:
                high = factor
            else:
                best, low = plan, max(factor, min(high, self.share(plan)))
            factor = (low + high) / 2
        return low, best

    def _least(self, d: int, factor: float, cost_F: np.ndarray) -> float:
        wanted = max(factor * self.libraries[d].demand.tokens_per_s, 1e-12)
        return float((cost_F * np.maximum(1.0, wanted / self._rates[d])).min(initial=np.inf))

    def _in_order(self, order: Sequence[int], factor: float, costs: Sequence[np.ndarray]) -> tuple[Plan | None, int]:
        """(plan, -1), or (None, the demand that found no room)."""
        free_RC, plan = self.stock_RC.copy(), {}
        for d in order:
            wanted = factor * self.libraries[d].demand.tokens_per_s
            left = wanted
            counts_FC, rates_F, at_F2 = self._counts[d], self._rates[d], self._at[d]
            fits_F = (counts_FC <= free_RC[at_F2[:, 0]]).all(1) if len(at_F2) else np.zeros(0, bool)
            while left > 1e-9 * wanted:
                score_F = np.where(fits_F, costs[d] / np.minimum(rates_F, left), np.inf)
                if not fits_F.any():
                    return None, d
                pick = int(np.argmin(score_F))
                r, u = map(int, at_F2[pick])
                needs_C = counts_FC[pick]
                used = needs_C > 0
                room = int((free_RC[r][used] // needs_C[used]).min())
                n = max(1, min(room, int(left / rates_F[pick])))
                plan[d, r, u] = plan.get((d, r, u), 0) + n
                free_RC[r] -= n * needs_C
                left -= n * float(rates_F[pick])
                here = at_F2[:, 0] == r
                fits_F[here] = (counts_FC[here] <= free_RC[r]).all(1)
        return plan, -1
