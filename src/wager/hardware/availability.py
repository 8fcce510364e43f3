"""Which machines were there when: traces of joining and leaving nodes, and counts of what could be had.

Readers take the published layouts: membership events (time_ms,event,node, optionally several segments), run-length coded counts
(trace,gap_seconds,start_tick,length_ticks,value) and sampled counts.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wager.errors import UsageError


@dataclass(frozen=True)
class Membership:
    """A node joins or leaves. `rate` (requests/s), where set, is a new load that begins then; `node` is then empty if nobody moves."""

    time_s: float
    node: str
    joins: bool
    rate: float | None = None


@dataclass(frozen=True)
class Availability:
    """Events in order of time until `end_s`."""

    events: tuple[Membership, ...]
    end_s: float

    def alive(self, time_s: float) -> set[str]:
        """Nodes that are up just after `time_s`."""
        up: set[str] = set()
        for event in self.events:
            if event.time_s > time_s:
                break
            if event.node:
                (up.add if event.joins else up.discard)(event.node)
        return up

    def node_seconds(self) -> float:
        """Total time that nodes were up: what a bill counts."""
        since: dict[str, float] = {}
        total = 0.0
        for event in self.events:
            if event.node and event.joins:
                since.setdefault(event.node, event.time_s)
            elif event.node in since:
                total += event.time_s - since.pop(event.node)
        return total + sum(self.end_s - start for start in since.values())


def read_membership(path: str | Path, segment: str | None = None) -> Availability:
    """Events time_ms,event(add/remove/other/DONE),node; `segment` picks the rows of one segment where the file has several."""
    events: list[Membership] = []
    end_s = 0.0
    with open(path, newline="") as handle:
        for line, row in enumerate(csv.DictReader(handle), 2):
            if segment is not None and row.get("segment") != segment:
                continue
            try:
                time_s, kind = float(row["time_ms"]) / 1e3, row["event"]
                rate = float(row["required_throughput_req_per_s"]) if row.get("required_throughput_req_per_s") else None
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"line {line} of {path} is no membership event: {error!r}") from None
            end_s = max(end_s, time_s)
            if kind in ("add", "remove"):
                events.append(Membership(time_s, row["node"], kind == "add", rate))
            elif kind == "other":
                events.append(Membership(time_s, "", False, rate))
            elif kind != "DONE":
                raise UsageError(f"line {line} of {path}: event {kind!r} is unknown")
    if not events:
        raise UsageError(f"{path} has no events" + (f" of segment {segment!r}" if segment else ""))
    return Availability(tuple(sorted(events, key=lambda e: e.time_s)), end_s)


def read_counts(path: str | Path, trace: str) -> tuple[float, np.ndarray]:
    """(seconds between samples, instances up at each sample) of a run-length coded trace."""
    runs: list[tuple[int, int, int]] = []
    gap = 0.0
    with open(path, newline="") as handle:
        for row in csv.DictReader(handle):
            if row["trace"] == trace:
                gap = float(row["gap_seconds"])
                runs.append((int(row["start_tick"]), int(row["length_ticks"]), int(row["value"])))
    if not runs:
        raise UsageError(f"{path} has no trace {trace!r}")
    counts = np.zeros(max(start + length for start, length, _ in runs), int)
    for start, length, value in runs:
        counts[start : start + length] = value
    return gap, counts


def from_counts(gap_s: float, counts: Sequence[int]) -> Availability:
    """Membership from counts: a fall takes the node that came last, a rise brings a new one."""
    events, up, born = [], [], 0
    for tick, count in enumerate(counts):
        while len(up) > count:
            events.append(Membership(tick * gap_s, up.pop(), False))
        while len(up) < count:
            up.append(f"node-{born}")
            events.append(Membership(tick * gap_s, up[-1], True))
            born += 1
    return Availability(tuple(events), len(counts) * gap_s)
