"""Replays availability and requests under a policy: how long requests take, what is generated twice, what it costs.

Policies: `spotserve` (see `migrate`); `reparallelize` restarts the engines in the layout that the published controller chooses, loads weights
from storage and computes interrupted requests again; `reroute` keeps the shape of its pipelines and drops or adds whole ones.

Machines: all that the trace has, as long as it has them; or, with a `Rental`, those that the policy asks for (see `rent`).

Clocks: a machine's removal is known `notice_s` before; a machine that joins is ready at its time in the trace. Nothing else of the
future is known.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wager.cluster.spotserve import controller
from wager.cluster.spotserve.baselines import Reroute, Restart
from wager.cluster.spotserve.bill import bill, lifetimes
from wager.cluster.spotserve.cloud import Cloud
from wager.cluster.spotserve.latency import Layout, ServedModel
from wager.cluster.spotserve.load import Load
from wager.cluster.spotserve.migrate import Migrate, Skills
from wager.cluster.spotserve.outcome import Outcome
from wager.cluster.spotserve.rent import Event, Rental, Renter
from wager.cluster.spotserve.service import Served, Service
from wager.cluster.spotserve.transition import Mover
from wager.errors import UsageError
from wager.hardware.availability import Availability
from wager.simulate.trace import Arrival

POLICIES = ("spotserve", "reparallelize", "reroute")
__all__ = ["POLICIES", "Cloud", "Outcome", "Rental", "Skills", "SpotSimulation"]


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
        rental: Rental | None = None,
    ):  # fmt: skip
        """shape: pipeline and tensor degree and batch that `reroute` keeps; chosen for the first machines when left out. continuous: requests join
        at any step; otherwise pipelines serve whole batches, as when the policies were published. skills: of `spotserve`. rental: how machines are asked for; without it
        whatever the trace has is taken."""
        if policy not in POLICIES:
            raise UsageError(f"policy {policy!r} is unknown; use one of {', '.join(POLICIES)}")
        self.availability, self.cloud, self.rental = availability, cloud, rental
        arrivals = sorted(arrivals, key=lambda a: a.arrival_s)
        requests = [Served(i, a.arrival_s, a.output_tokens) for i, a in enumerate(arrivals)]
        output = max(a.output_tokens for a in arrivals)
        context = max(a.prompt_tokens + a.output_tokens for a in arrivals)
        self.service, self.outcome = Service(model, requests, continuous), Outcome(requests)
        self.load = load = Load([r.arrival_s for r in requests], cloud.rate_window_s, cloud.expected_rate)
        known = self.service, cloud, load, self.outcome, context, output
        self.migrate = None
        if policy == "spotserve":
            mover = Mover(model, cloud, context, output)
            self.migrate = Migrate(
                self.service, mover, load, self.outcome, np.random.default_rng(0), skills or Skills()
            )
        self.tokens = output, context
        self.baseline = Restart(*known) if policy == "reparallelize" else Reroute(*known, shape=shape)

    def run(self) -> Outcome:
        """Play the whole trace, then serve what is left on the last machines for up to one trace length more."""
        leases = lifetimes(self.availability)
        if self.rental is not None:
            leases = self._play_rented(self.rental)
        elif self.migrate is not None:
            self._play_migrating(self.migrate)
        else:
            self._play_baseline()
        last = max(self.availability.end_s, self.outcome.requests[-1].arrival_s) * 2 + 600
        self.service.serve_until(last)
        out, c = self.outcome, self.cloud
        if self.rental is None:
            for at, joining, leaving in self._changes():
                for node in leaving:
                    out.log(max(0.0, at - c.notice_s), "notice", f"{node} leaves at {at:.1f} s")
                    out.log(at, "left", node)
                for node in joining:
                    out.log(at, "joined", node)
        out.leases = leases
        out.node_seconds = sum(lease.seconds for lease in leases)
        out.cost_usd = bill(leases, c).total_usd
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

    def _play_rented(self, rental: Rental) -> list:
        """The market, the policy, and what it asks of the market; returns what was rented."""
        policy, cloud, out = self.migrate or self.baseline, self.cloud, self.outcome
        renter = Renter(self.availability, cloud, rental, out, self._need, self._used)
        step = cloud.rate_window_s / 2
        ticks = [Event(step * i, "tick") for i in range(1, int(self.availability.end_s / step))]
        order, number = ("release", "notice", "left", "offer", "joined", "tick"), itertools.count()
        events: list[tuple[float, int, int, Event]] = []

        def add(more) -> None:
            for e in more:
                if e.time_s <= self.availability.end_s:
                    heapq.heappush(events, (e.time_s, order.index(e.kind), next(number), e))

        add([*renter.comes, *ticks])
        while events and events[0][0] <= 0 and events[0][3].kind == "offer":
            there = heapq.heappop(events)[3]
            renter.free[there.node] = there.leave_s
        add(renter.review(0.0, first=True))
        while events or (self.migrate is not None and self.migrate.pending is not None):
            pending = None if self.migrate is None else self.migrate.pending
            if self.migrate is not None and pending is not None and (not events or pending.stop_s <= events[0][0]):
                self.service.serve_until(pending.stop_s, pending.sharp(self.service.layout))
                self.migrate.stop(pending.stop_s)
                continue
            event = heapq.heappop(events)[3]
            at, together = event.time_s, {event.node}
            while event.kind in ("release", "notice", "left", "joined") and events and self._same(event, events[0][3]):
                together.add(heapq.heappop(events)[3].node)
            self.service.serve_until(at)
            if event.kind == "offer":
                add(renter.offer(event))
            elif event.kind in ("release", "notice"):
                told = {n for n in together if event.kind == "release" or renter.notice(n, at, event.leave_s)}
                if told:
                    policy.notice(at, told, event.leave_s)
                add(Event(event.leave_s, "left", n) for n in sorted(told))
            elif event.kind == "left":
                gone = {n for n in together if renter.close(n, at)}
                if gone:
                    policy.left(at, gone)
            elif event.kind == "joined":
                came = {n for n in together if renter.join(n, at)}
                if came:
                    policy.joined(at, came)
            elif cloud.overload_factor and not (self.migrate is None and self.baseline.leaving):
                policy.tick(at)
            add(renter.review(at))
        return renter.finish()

    @staticmethod
    def _same(one: Event, other: Event) -> bool:
        return (one.time_s, one.kind, one.leave_s) == (other.time_s, other.kind, other.leave_s)

    def _need(self, at: float, machines: int) -> int | None:
        """Machines of the controller's layout, of at most so many; 0 when the model does not fit them, None while the load is unknown."""
        rate = self.load.rate(at)
        if rate == float("inf"):
            return None
        (output, context), c = self.tokens, self.cloud
        shape = self.baseline.shape if self.migrate is None and isinstance(self.baseline, Reroute) else None
        layout = controller.choose(
            self.service.model, machines * c.devices_per_node, rate, output, c.device_memory_bytes, context,
            self.service.continuous, c.min_gpus, shape,
        )  # fmt: skip
        return 0 if layout is None else -(-layout.devices // c.devices_per_node)

    def _used(self) -> set[str]:
        """Machines that hold a part of the layout; of an engine that restarts all count alike."""
        held = self.migrate.held if self.migrate is not None else getattr(self.baseline, "held", {})
        return {device.rsplit("/", 1)[0] for device in held}

    def _play_migrating(self, policy: Migrate) -> None:
        events = self._events()
        while events or policy.pending is not None:
            pending = policy.pending
            if pending is not None and (not events or pending.stop_s <= events[0].time_s):
                self.service.serve_until(pending.stop_s, pending.sharp(self.service.layout))
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
