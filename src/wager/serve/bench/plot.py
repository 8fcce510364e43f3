"""Pictures of a load test: latency distributions, and what happened over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from wager.errors import UsageError
from wager.serve.bench.client import Result
from wager.serve.bench.summary import meets, values_ms

BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#9ca3af"


def plot_run(
    results: Sequence[Result], duration_s: float, path: Path, title: str, goodput_ms: Mapping[str, float] | None = None
) -> None:
    """Four panels into `path` (png or svg): TTFT and ITL distributions with p50 and p99, TTFT over time, request and goodput rates."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'wager[plot]'") from None
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    (ttft, itl), (over_time, rates) = figure.subplots(2, 2)
    figure.suptitle(title)
    draw_distribution(ttft, values_ms(results, "ttft"), "time to first token (ms)")
    draw_distribution(itl, values_ms(results, "itl"), "inter-token latency (ms)")
    draw_ttft_over_time(over_time, results)
    draw_rates(rates, results, duration_s, goodput_ms)
    for axes in (ttft, itl, over_time, rates):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_distribution(axes, values: Sequence[float], label: str) -> None:
    """Share of measurements at or below each value, on a log axis, with the median and the 99th percentile marked."""
    axes.set(xlabel=label, ylabel="share of measurements", ylim=(0, 1.02))
    if not values:
        return
    ordered = np.sort(values)
    axes.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), color=BLUE, where="post")
    if ordered[0] > 0:
        axes.set_xscale("log")
    for p, color in ((50, GREY), (99, ORANGE)):
        at = float(np.percentile(ordered, p))
        axes.axvline(at, color=color, linestyle="--", linewidth=1, label=f"p{p} = {at:.4g} ms")
    axes.legend(frameon=False, loc="lower right")


def draw_ttft_over_time(axes, results: Sequence[Result]) -> None:
    done = [r for r in results if r.ok]
    axes.scatter([r.start_s for r in done], [1e3 * r.ttft_s for r in done], s=12, color=BLUE, label="finished")
    failed = [r.start_s for r in results if not r.ok]
    if failed:
        axes.scatter(failed, np.zeros(len(failed)), marker="x", color=ORANGE, label="failed")
        axes.legend(frameon=False)
    axes.set(xlabel="time of the request (s)", ylabel="time to first token (ms)")


def draw_rates(axes, results: Sequence[Result], duration_s: float, goodput_ms: Mapping[str, float] | None) -> None:
    """Requests per second by arrival, and those that met every limit."""
    edges = np.linspace(0, max(duration_s, 1e-9), 21)
    width = float(edges[1] - edges[0])
    starts = np.array([r.start_s for r in results])
    axes.stairs(np.histogram(starts, edges)[0] / width, edges, color=GREY, fill=True, label="sent")
    if goodput_ms:
        good = np.array([r.start_s for r in results if meets(r, goodput_ms)])
        limits = ", ".join(f"{k} ≤ {v:g} ms" for k, v in goodput_ms.items())
        axes.stairs(np.histogram(good, edges)[0] / width, edges, color=BLUE, linewidth=2, label=f"within {limits}")
    axes.set(xlabel="time of the request (s)", ylabel="requests per second")
    axes.legend(frameon=False)
