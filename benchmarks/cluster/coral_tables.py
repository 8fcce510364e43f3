"""What Coral's comparison prints and draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.cluster import coral_served
from benchmarks.harness import format_table
from wager.cluster.coral import baselines


def show(facts: dict) -> None:
    for part in ("plenty", "budget"):
        if part in facts:
            print(format_table(plenty_lines(facts[part])))
    if "scarce" in facts:
        print(format_table(scarce_lines(facts["scarce"])))
    if "served" in facts:
        print(format_table(coral_served.lines(facts["served"])))
    for label, run in facts.get("epochs", {}).items():
        print(
            f"{label}: {run['columns']} columns, {len(run['seconds'])} epochs, {np.mean(run['seconds']):.2f} s a plan, {max(run['seconds']):.2f} s at most, "
            f"{sum(run['machines_started'])} machines started, {run['cheaper_than_best'] or float('nan'):.2f} times cheaper than the best published baseline"
        )


def plenty_lines(rows: list[dict]) -> list[list[str]]:
    head = ["pool", "split", "columns", "devices", "Coral USD/h", "gap", *baselines.POLICIES, "cheaper than published", "than tuned",
            "any plan at most", "in fractions", "of it mixed", "solve"]  # fmt: skip
    return [head, *(
        [
            f["pool"], "even" if f.get("units") is None else f"{f['units']} units", str(f["columns"]), str(f["devices"]), f"{f['usd_per_h']:.1f}",
            f"{f['gap']:.2%}", *(f"{f[p]['usd_per_h']:.1f}" for p in baselines.POLICIES), shown(f["cheaper_than_best"]), shown(f["cheaper_than_tuned"]),
            shown(f["best_possible"]), f"{f['fractions_usd_per_h']:.1f}", f"{f['mixed_share']:.0%}", f"{f['seconds']:.1f} s",
        ]
        for f in rows
    )]  # fmt: skip


def scarce_lines(rows: list[dict]) -> list[list[str]]:
    head = ["scarce pool", "stock over need", "devices of", "Coral USD/h", "share", "requests/s", *baselines.POLICIES, "share over published", "over tuned",
            "requests over published", "over tuned", "cheaper", "gap", "solve"]  # fmt: skip
    return [head, *(
        [
            f["pool"], f"{f['stock_over_need']}x", f"{f['devices']} of {f['devices_in_stock']}", f"{f['usd_per_h']:.0f}",
            f"{f['factor']:.0%} (at most {f['most_factor']:.0%})", f"{f['requests_per_s']:.0f}",
            *(f"{f[p]['factor']:.0%}, {max(f[p]['requests_per_s'], f[p]['first_come_requests_per_s']):.0f}/s" for p in baselines.POLICIES),
            *(f"{f[k]:.2f}x" for k in ("share_over_best", "share_over_tuned", "requests_over_best", "requests_over_tuned")),
            shown(f["cheaper_than_best"]), f"{f['gap']:.2%}", f"{f['seconds']:.1f} s",
        ]
        for f in rows
    )]  # fmt: skip


def shown(ratio: float | None) -> str:
    """A ratio for people; a dash where a side does not serve everything."""
    return "-" if ratio is None else f"{ratio:.2f}x"


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
