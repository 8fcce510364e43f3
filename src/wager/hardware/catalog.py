"""Data sheets and dated prices, from the catalog that ships with wager or from a file laid out like it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from wager.errors import UsageError
from wager.hardware.cluster import Device

SHIPPED = Path(__file__).parent / "catalog.toml"


@dataclass(frozen=True)
class Offer:
    """An instance that can be rented. spot_usd_per_h is None where there is no spot market."""

    provider: str
    instance: str
    device: str
    count: int
    region: str
    on_demand_usd_per_h: float
    spot_usd_per_h: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Catalog:
    dated: str
    devices: Mapping[str, Device]
    offers: tuple[Offer, ...]
    relative_price: Mapping[str, float]
    l4_usd_per_h: float

    def device(self, name: str) -> Device:
        if name not in self.devices:
            raise UsageError(f"device {name!r} is not in the catalog of {self.dated}; it has {', '.join(self.devices)}")
        return self.devices[name]

    def usd_per_h(self, device: str, count: int = 1) -> float:
        """List price of `count` devices from the relative prices. Raises UsageError for a device without one."""
        if device not in self.relative_price:
            raise UsageError(f"device {device!r} has no relative price; priced are {', '.join(self.relative_price)}")
        return self.relative_price[device] * self.l4_usd_per_h * count


@cache
def load(path: Path = SHIPPED) -> Catalog:
    """Read a catalog. Raises UsageError naming what is wrong in it."""
    try:
        raw: dict[str, Any] = tomllib.loads(Path(path).read_text())
        devices = {
            name: Device(
                name,
                d["memory_gb"] * 1e9,
                d["read_tb_per_s"] * 1e12,
                d["half_tflops"] * 1e12,
                d.get("source", ""),
                d.get("peer_gb_per_s", float("inf")) * 1e9,
            )
            for name, d in raw["devices"].items()
        }
        prices = {name: value for name, value in raw["relative_price"].items() if not name.startswith("l4_")}
        offers = tuple(Offer(**offer) for offer in raw.get("offers", ()))
        catalog = Catalog(str(raw["dated"]), devices, offers, prices, raw["relative_price"]["l4_usd_per_h"])
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise UsageError(f"the catalog {path} cannot be read: {error!r}") from None
    unknown = next((o.device for o in catalog.offers if o.device not in devices), None)
    if unknown:
        raise UsageError(f"an offer in {path} names the device {unknown!r}, which [devices] lacks")
    return catalog
