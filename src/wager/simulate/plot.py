"""Pictures of a timeline: which machine was busy when, tokens and active requests over time."""

from __future__ import annotations

from pathlib import Path

from wager.errors import UsageError
from wager.simulate.timeline import Timeline


def plot(timeline: Timeline, path: str | Path, bucket_s: float = 1.0) -> Path:
    """Write a Gantt chart over two time series as .png or .svg. The timeline must have kept its busy intervals. Raises UsageError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("plots need matplotlib: pip install 'wager[plot]'") from None
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"{path} must end in .png or .svg")
    figure = Figure(figsize=(11, 3 + 0.25 * len(timeline.busy)), layout="constrained")
    gantt, tokens = figure.subplots(2, 1, sharex=True, height_ratios=[len(timeline.busy) + 2, 6])
    for row, (_, intervals) in enumerate(timeline.busy.items()):
        gantt.broken_barh([(start, end - start) for start, end, _ in intervals], (row - 0.4, 0.8))
    gantt.set_yticks(range(len(timeline.busy)), list(timeline.busy))
    gantt.set_ylim(len(timeline.busy) - 0.5, -0.5)  # the first machine on top
    gantt.set_xlim(0, timeline.end_s)
    gantt.set_title("machines at work")
    series = timeline.series(bucket_s)
    tokens.plot(series["time_s"], series["tokens_per_s"], label="output tokens/s")
    tokens.plot(series["time_s"], series["active"], label="active requests")
    tokens.set_xlabel("seconds")
    tokens.legend()
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    figure.savefig(temporary)
    temporary.replace(path)
    return path
