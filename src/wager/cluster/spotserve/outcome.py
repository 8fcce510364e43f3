"""What a replay says: latencies, layouts, bytes moved, tokens computed twice, and the bill."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from wager.cluster.spotserve.bill import Lease
from wager.cluster.spotserve.latency import Layout
from wager.cluster.spotserve.service import Served
from wager.errors import WagerError


@dataclass(frozen=True, order=True)
class Happening:
    """A line of the log. kind: asked, joined, notice, left, released, layout, migration, stopped, resumed, lost."""

    time_s: float
    kind: str
    what: str


@dataclass
class Outcome:
    """`requests` in order of arrival. layouts: (from when, which); moves: (began, ready) of each migration; leases: what is
    paid for; happened: the log, in no order."""

    requests: list[Served]
    layouts: list[tuple[float, Layout | None]] = field(default_factory=list)
    moves: list[tuple[float, float]] = field(default_factory=list)
    stalls_s: float = 0.0
    moved_bytes: float = 0.0
    leases: list[Lease] = field(default_factory=list)
    happened: list[Happening] = field(default_factory=list)
    node_seconds: float = 0.0
    cost_usd: float = 0.0
    on_demand_usd: float = 0.0

    @property
    def latencies_s(self) -> np.ndarray:
        """Of the finished."""
        return np.array([r.finished_s - r.arrival_s for r in self.requests if r.finished_s is not None])

    @property
    def recomputed_tokens(self) -> int:
        return sum(r.generated - r.done for r in self.requests)

    def quantile(self, q: float) -> float:
        if not len(self.latencies_s):
            raise WagerError("no request finished; the machines of this trace never hold the model")
        return float(np.quantile(self.latencies_s, q))

    def log(self, at_s: float, kind: str, what: str) -> None:
        self.happened.append(Happening(at_s, kind, what))

    def adopted(self, at_s: float, layout: Layout | None, ready_s: float) -> None:
        """A layout that begins at `at_s`; pipelines that do not go on stand still until `ready_s`."""
        before = self.layouts[-1][1] if self.layouts else None
        if layout != before or ready_s > at_s:
            self.log(at_s, "layout", f"{described(before)} -> {described(layout)}")
        if ready_s > at_s:
            self.log(at_s, "stopped", f"until {ready_s:.1f} s at most")
            self.log(ready_s, "resumed", described(layout))
        self.layouts.append((at_s, layout))
        self.stalls_s += max(0.0, ready_s - at_s)

    def moved(self, at_s: float, ready_s: float, still_s: float, layout: Layout | None, size_bytes: float) -> None:
        """The same, by a migration: pipelines that do not go on stand still until `still_s`, all bytes are there at `ready_s`."""
        self.adopted(at_s, layout, still_s)
        if size_bytes:
            self.log(at_s, "migration", f"{size_bytes / 1e9:.2f} GB, done at {ready_s:.1f} s")
        self.moves.append((at_s, ready_s))
        self.moved_bytes += size_bytes


def described(layout: Layout | None) -> str:
    if layout is None:
        return "none"
    return f"{layout.data} x {layout.pipeline} stages x {layout.tensor} shards, batch {layout.batch}"
