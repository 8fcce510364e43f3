"""What can be rented, what is rented, whether that is lawful, and how to get from one plan to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from wager.cluster.coral.stage import Configuration
from wager.cluster.coral.templates import Library
from wager.errors import UsageError, WagerError

Key = tuple[int, int, int]  # demand, region, template


@dataclass(frozen=True)
class Market:
    """What can be rented: stock and USD per hour per region and configuration, [R, C]."""

    regions: tuple[str, ...]
    configurations: tuple[Configuration, ...]
    stock_RC: np.ndarray
    price_RC: np.ndarray

    def __post_init__(self):
        shape = (len(self.regions), len(self.configurations))
        if (
            self.stock_RC.shape != shape
            or self.price_RC.shape != shape
            or (self.stock_RC < 0).any()
            or (self.price_RC <= 0).any()
        ):
            raise UsageError(
                f"stock and prices must be {shape[0]} regions by {shape[1]} configurations, stock not negative, prices positive"
            )


@dataclass(frozen=True)
class Allocation:
    """`running[demand, region, template] = replicas`; `usd_per_h` their price, `penalty_usd` what starting the added ones counts.

    bound: no allocation at this `factor` of the demands costs less (price and penalty together). most_factor: no allocation serves a larger
    common share. scarcity: USD per hour that one more
    machine of a configuration in a region would save (from the linear program), where that is not zero.
    """

    running: Mapping[Key, int]
    usd_per_h: float
    penalty_usd: float
    bound: float
    factor: float
    seconds: float
    columns: int
    proven: bool
    most_factor: float = 1.0
    scarcity: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @property
    def objective(self) -> float:
        return self.usd_per_h + self.penalty_usd

    @property
    def gap(self) -> float:
        return max(0.0, self.objective - self.bound) / max(self.objective, 1e-12)


def check(allocation: Allocation, libraries: Sequence[Library], market: Market, tolerance: float = 1e-6) -> None:
    """Stock, demands and price recomputed in plain arithmetic. Raises WagerError naming what is broken."""
    used_RC = np.zeros(market.stock_RC.shape)
    served = [0.0] * len(libraries)
    price = 0.0
    for (d, r, u), n in allocation.running.items():
        used_RC[r] += n * libraries[d].counts_UC[u]
        served[d] += n * float(libraries[d].rates_U[u])
        price += n * float(libraries[d].counts_UC[u] @ market.price_RC[r])
    if (used_RC > market.stock_RC + tolerance).any():
        r, c = np.argwhere(used_RC > market.stock_RC + tolerance)[0]
        raise WagerError(
            f"the plan rents {used_RC[r, c]:.0f} {market.configurations[c].name} in {market.regions[r]}, there are {market.stock_RC[r, c]:.0f}"
        )
    for lib, rate in zip(libraries, served, strict=True):
        if rate < allocation.factor * lib.demand.tokens_per_s * (1 - tolerance):
            raise WagerError(
                f"the plan serves {rate:.1f} tokens/s of {lib.demand.name}, promised are {allocation.factor * lib.demand.tokens_per_s:.1f}"
            )
    if abs(price - allocation.usd_per_h) > tolerance * max(1.0, price):
        raise WagerError(f"the plan says {allocation.usd_per_h:.4f} USD/h but its machines cost {price:.4f}")


@dataclass(frozen=True)
class Change:
    """What to do to get from one allocation to the next: replicas to start and to drain."""

    start: Mapping[Key, int]
    drain: Mapping[Key, int]


def reconcile(current: Mapping[Key, int], target: Mapping[Key, int]) -> Change:
    keys = {*current, *target}
    steps = {k: target.get(k, 0) - current.get(k, 0) for k in keys}
    return Change({k: n for k, n in steps.items() if n > 0}, {k: -n for k, n in steps.items() if n < 0})
