"""The cost meter: who was rented, of which kind, from when to when, and what that comes to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from wager.cluster.spotserve.cloud import Cloud
from wager.errors import UsageError
from wager.hardware import catalog
from wager.hardware.availability import Availability

SPOT, ON_DEMAND = "spot", "on-demand"


@dataclass(frozen=True)
class Lease:
    """A machine that is paid for from `from_s` to `to_s`; kind: spot or on-demand."""

    node: str
    kind: str
    from_s: float
    to_s: float

    @property
    def seconds(self) -> float:
        return self.to_s - self.from_s


@dataclass(frozen=True)
class Bill:
    """Machine seconds and USD of each kind."""

    seconds: dict[str, float]
    usd: dict[str, float]

    @property
    def total_usd(self) -> float:
        return sum(self.usd.values())


def bill(leases: Iterable[Lease], cloud: Cloud) -> Bill:
    """Every lease at the price of its kind."""
    price = {SPOT: cloud.spot_usd_per_h, ON_DEMAND: cloud.on_demand_usd_per_h}
    seconds = dict.fromkeys(price, 0.0)
    for lease in leases:
        seconds[lease.kind] += lease.seconds
    return Bill(seconds, {kind: s / 3600 * price[kind] for kind, s in seconds.items()})


def lifetimes(availability: Availability) -> list[Lease]:
    """Spot machines that are rented whenever a trace has them."""
    since: dict[str, float] = {}
    found = []
    for event in availability.events:
        if event.node and event.joins:
            since.setdefault(event.node, event.time_s)
        elif event.node in since:
            found.append(Lease(event.node, SPOT, since.pop(event.node), event.time_s))
    return found + [Lease(node, SPOT, start, availability.end_s) for node, start in since.items()]


def catalog_prices(profile: str) -> tuple[float, float, str]:
    """(spot USD/h, on-demand USD/h, where they are from) of the machine that a profile such as "T4-4x/..." was measured on. Raises UsageError
    when the dated catalog has no spot offer of it."""
    shelf = catalog.load()
    device, _, count = profile.split("/")[0].partition("-")
    for offer in shelf.offers:
        if (
            offer.device == device
            and f"{offer.count}x" == count
            and offer.on_demand_usd_per_h
            and offer.spot_usd_per_h is not None
        ):
            return (
                offer.spot_usd_per_h,
                offer.on_demand_usd_per_h,
                f"{offer.provider} {offer.instance}, catalog of {shelf.dated}",
            )
    raise UsageError(
        f"the catalog of {shelf.dated} has no spot offer of {count} {device}; give --spot-price and --on-demand-price"
    )
