"""Replays availability and requests under a policy: how long requests take, what is generated twice, what it costs.

Policies: `spotserve` (see `migrate`); `reparallelize` restarts the engines in the layout that the published controller chooses, loads weights
from storage and computes interrupted requests again; `reroute` keeps the shape of its pipelines and drops or adds whole ones.

Clocks: a machine's removal is known `notice_s` before; a machine that joins is ready at its time in the trace. Nothing else of the
future is known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wager.cluster.spotserve.baselines import Reroute, Restart
from wager.cluster.spotserve.cloud import Cloud
from wager.cluster.spotserve.latency import Layout, ServedModel
from wager.cluster.spotserve.load import Load
from wager.cluster.spotserve.migrate import Migrate, Skills
from wager.cluster.spotserve.outcome import Outcome
from wager.cluster.spotserve.service import Served, Service
from wager.cluster.spotserve.transition import Mover
from wager.errors import UsageError
from wager.hardware.availability import Availability
from wager.simulate.trace import Arrival

POLICIES = ("spotserve", "reparallelize", "reroute")
__all__ = ["POLICIES", "Cloud", "Outcome", "Skills", "SpotSimulation"]


@dataclass(frozen=True)
class _Event:
    """Sorted by time, then notices before removals before joins before ticks."""

    time_s: float
    kind: str
    nodes: frozenset[str] = frozenset()
    leave_s: float = 0.0


class SpotSimulation:
    """One run. `run` may be called once."""

    def __init__(
        self, model: ServedModel, availability: Availability, arrivals: Sequence[Arrival], policy: str, cloud: Cloud,
        shape: Layout | None = None, continuous: bool = True, skills: Skills | None = None,
    ):  # fmt: skip
        """shape: pipeline and tensor degree and batch that `reroute` keeps; chosen for the first machines when left out. continuous: requests join
        at any step; otherwise pipelines serve whole batches, as when the policies were published. skills: of `spotserve`."""
        if policy not in POLICIES:
            raise UsageError(f"policy {policy!r} is unknown; use one of {', '.join(POLICIES)}")
        self.availability, self.cloud = availability, cloud
        arrivals = sorted(arrivals, key=lambda a: a.arrival_s)
        requests = [Served(i, a.arrival_s, a.output_tokens) for i, a in enumerate(arrivals)]
        output = max(a.output_tokens for a in arrivals)
        context = max(a.prompt_tokens + a.output_tokens for a in arrivals)
        self.service, self.outcome = Service(model, requests, continuous), Outcome(requests)
        load = Load([r.arrival_s for r in requests], cloud.rate_window_s, cloud.expected_rate)
        known = self.service, cloud, load, self.outcome, context, output
        self.migrate = None
        if policy == "spotserve":
            mover = Mover(model, cloud, context, output)
            self.migrate = Migrate(
                self.service, mover, load, self.outcome, np.random.default_rng(0), skills or Skills()
            )
        self.baseline = Restart(*known) if policy == "reparallelize" else Reroute(*known, shape=shape)

    def run(self) -> Outcome:
        """Play the whole trace, then serve what is left on the last machines for up to one trace length more."""
        if self.migrate is not None:
            self._play_migrating(self.migrate)
        else:
            self._play_baseline()
        last = max(self.availability.end_s, self.outcome.requests[-1].arrival_s) * 2 + 600
        self.service.serve_until(last)
        out, c = self.outcome, self.cloud
        out.node_seconds = self.availability.node_seconds()
        out.cost_usd = out.node_seconds / 3600 * c.spot_usd_per_h
        out.on_demand_usd = out.node_seconds / 3600 * c.on_demand_usd_per_h
        return out

    def _changes(self) -> list[tuple[float, set[str], set[str]]]:
        """(time, joining, leaving), in order."""
        events = [e for e in self.availability.events if e.node]
        return [
            (
                at,
                {e.node for e in events if e.time_s == at and e.joins},
                {e.node for e in events if e.time_s == at and not e.joins},
            )
            for at in sorted({e.time_s for e in events})
        ]

    def _play_baseline(self) -> None:
        """Between two changes the policy looks at the load every half rate window."""
        members: set[str] = set()
        changes = self._changes()
        step, end = self.cloud.rate_window_s / 2, self.availability.end_s
        for (at, joining, leaving), until in zip(changes, [*(c[0] for c in changes[1:]), end], strict=True):
            self.service.serve_until(at)
            members = (members | joining) - leaving
            self.baseline.changed(at, members)
            look = at + step
            while look < until - self.cloud.notice_s - step and self.cloud.overload_factor:
                self.service.serve_until(look)
                self.baseline.tick(look)
                look += step

    def _play_migrating(self, policy: Migrate) -> None:
        events = self._events()
        while events or policy.pending is not None:
            pending = policy.pending
            if pending is not None and (not events or pending.stop_s <= events[0].time_s):
                self.service.serve_until(pending.stop_s, sharp=pending.deadline_s < float("inf"))
                policy.stop(pending.stop_s)
                continue
            event = events.popleft()
            self.service.serve_until(event.time_s)
            if event.kind == "notice":
                policy.notice(event.time_s, set(event.nodes), event.leave_s)
            elif event.kind == "left":
                policy.left(event.time_s, set(event.nodes))
            elif event.kind == "joined":
                policy.joined(event.time_s, set(event.nodes))
            else:
                policy.tick(event.time_s)

    def _events(self) -> deque[_Event]:
        events = []
        for at, joining, leaving in self._changes():
            if leaving:
                gone = frozenset(leaving)
                events.append(_Event(max(0.0, at - self.cloud.notice_s), "notice", gone, at))
                events.append(_Event(at, "left", gone))
            if joining:
                events.append(_Event(at, "joined", frozenset(joining)))
        if self.cloud.overload_factor:
            step = self.cloud.rate_window_s / 2
            events += [_Event(step * i, "tick") for i in range(1, int(self.availability.end_s / step))]
        order = ("notice", "left", "joined", "tick")
        return deque(sorted(events, key=lambda e: (e.time_s, order.index(e.kind))))
