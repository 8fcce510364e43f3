"""What the command line says about a replay: latencies, the bill by kind of machine, and the log of what happened."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from wager.cluster.plan_file import write_lines
from wager.cluster.spotserve.bill import bill, catalog_prices
from wager.cluster.spotserve.cloud import Cloud
from wager.cluster.spotserve.outcome import Outcome
from wager.cluster.spotserve.rent import Rental
from wager.errors import UsageError

RESERVE = 2  # machines to spare where nothing else is said


def rental_of(reserve: int | None, allow_on_demand: bool, boot_s: float, most: int | None) -> Rental | None:
    """None: every machine of the trace is taken. Raises UsageError for what would then be ignored."""
    if reserve is None and not allow_on_demand:
        if boot_s != Rental.boot_s or most is not None:
            raise UsageError(
                "--boot and --max-machines are about asking for machines: give --reserve or --allow-on-demand"
            )
        return None
    return Rental(RESERVE if reserve is None else reserve, allow_on_demand, boot_s, most)


def cloud_of(
    profile: str, rate: float, grace_s: float, min_gpus: int, spot_usd: float | None, on_demand_usd: float | None
) -> tuple[Cloud, str]:
    """The cloud, and a line that says where its prices are from."""
    source = "as given"
    if spot_usd is None or on_demand_usd is None:
        spot, on_demand, source = catalog_prices(profile)
        if (spot_usd, on_demand_usd) != (None, None):
            source += ", and as given"
        spot_usd, on_demand_usd = (
            spot if spot_usd is None else spot_usd,
            on_demand if on_demand_usd is None else on_demand_usd,
        )
    cloud = Cloud(
        expected_rate=rate,
        notice_s=grace_s,
        min_gpus=min_gpus,
        spot_usd_per_h=spot_usd,
        on_demand_usd_per_h=on_demand_usd,
    )
    return cloud, f"prices: spot {spot_usd:g}, on-demand {on_demand_usd:g} USD/h ({source})"


def summary(policy: str, out: Outcome, cloud: Cloud) -> str:
    """One line."""
    paid = bill(out.leases, cloud)
    parts = " + ".join(f"{paid.seconds[kind] / 3600:.2f} h {kind} {paid.usd[kind]:.2f}" for kind in paid.usd)
    return (
        f"{policy:<14} p50 {out.quantile(0.5):7.1f} s  p99 {out.quantile(0.99):7.1f} s  finished {len(out.latencies_s)}/{len(out.requests)}  "
        f"computed again {out.recomputed_tokens} tokens  {paid.total_usd:.2f} USD ({parts}), all on demand {out.on_demand_usd:.2f}"
    )


def write_events(outcomes: Mapping[str, Outcome], path: Path) -> list[str]:
    """The logs in order of time, as policy,time_s,event,what; the lines to print: the log itself where `path` is "-"."""
    rows = [(policy, h) for policy, out in outcomes.items() for h in sorted(out.happened, key=lambda h: h.time_s)]
    if str(path) == "-":
        return [f"{policy:<14} {h.time_s:9.1f} s  {h.kind:<9} {h.what}" for policy, h in rows]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["policy", "time_s", "event", "what"])
    table.writerows([policy, f"{h.time_s:.3f}", h.kind, h.what] for policy, h in rows)
    write_lines(text.getvalue().splitlines(), path)
    return [f"wrote {path}"]
