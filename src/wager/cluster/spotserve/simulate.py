"""Replays availability and requests under a policy: how long requests take, what is generated twice, what it costs.

Pipelines serve batches to completion, a step per token. Policies: `spotserve` re-plans on every notice, stops just in time, moves weights and
KV, and goes on at the next token; `reparallelize` has the same controller but restarts the engines, loads weights from storage and computes
interrupted requests again; `reroute` keeps the shape of its pipelines and drops or adds whole ones.

Clocks: a machine's removal is known `notice_s` before; a machine that joins is ready at its time in the trace.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from wager.cluster.spotserve import arranger, controller, migration
from wager.cluster.spotserve.latency import Layout, ServedModel
from wager.cluster.spotserve.mapper import Place, Sizes, assign, inherit
from wager.errors import UsageError, WagerError
from wager.hardware.availability import Availability
from wager.simulate.trace import Arrival

POLICIES = ("spotserve", "reparallelize", "reroute")


CALM_WINDOWS = 4  # a calm layout is expected to last for this many rate windows


@dataclass(frozen=True)
class Cloud:
    """What the machines are like. Of a T4's 16 GB about 9 are left for weights and KV beside buffers: with them the fewest devices that hold
    each published model are the published ones. `rate_window_s`: the arrival rate is measured over this long, and taken to be at least
    `expected_rate`. A layout that cannot keep up with the load (arrivals, and the queue to be worked off in one window) is given up between
    notices too, for one with `overload_factor` times its throughput, but only where that saves more than the move costs."""

    devices_per_node: int = 4
    device_memory_bytes: float = 9e9
    network_bytes_per_s: float = 50e9 / 8
    local_bytes_per_s: float = 10e9
    storage_bytes_per_s: float = 1e9
    engine_start_s: float = 10.0
    notice_s: float = 30.0
    spot_usd_per_h: float = 1.9
    on_demand_usd_per_h: float = 3.9
    rate_window_s: float = 30.0
    expected_rate: float = 0.0
    overload_factor: float = 1.25


@dataclass(eq=False)
class Served:
    """A request on its way. `done` tokens are generated and kept; `generated` counts every token computed, also those lost."""

    index: int
    arrival_s: float
    tokens: int
    done: int = 0
    generated: int = 0
    finished_s: float | None = None


@dataclass(eq=False)
class Batch:
    """A pipeline's requests at work. `ready_s`: when its next step begins; `progress`: tokens of this batch."""

    requests: list[Served]
    ready_s: float
    prefill_left_s: float


@dataclass
class Outcome:
    """Latencies of the finished in order of arrival, and what happened."""

    requests: list[Served]
    layouts: list[tuple[float, Layout | None]] = field(default_factory=list)
    moves: list[tuple[float, float]] = field(default_factory=list)  # (began, ready) of each migration
    stalls_s: float = 0.0
    moved_bytes: float = 0.0
    node_seconds: float = 0.0
    cost_usd: float = 0.0
    on_demand_usd: float = 0.0

    @property
    def latencies_s(self) -> np.ndarray:
        return np.array([r.finished_s - r.arrival_s for r in self.requests if r.finished_s is not None])

    @property
    def recomputed_tokens(self) -> int:
        return sum(r.generated - r.done for r in self.requests)

    def quantile(self, q: float) -> float:
        if not len(self.latencies_s):
            raise WagerError("no request finished; the machines of this trace never hold the model")
        return float(np.quantile(self.latencies_s, q))


class SpotSimulation:
    """One run. `run` may be called once."""

    def __init__(
        self, model: ServedModel, availability: Availability, arrivals: Sequence[Arrival], policy: str, cloud: Cloud,
        shape: Layout | None = None,
    ):  # fmt: skip
        """shape: pipeline and tensor degree and batch that `reroute` keeps; chosen for the first machines when left out."""
        if policy not in POLICIES:
            raise UsageError(f"policy {policy!r} is unknown; use one of {', '.join(POLICIES)}")
        self.model, self.availability, self.policy, self.cloud, self.shape = model, availability, policy, cloud, shape
        arrivals = sorted(arrivals, key=lambda a: a.arrival_s)
        self.requests = [Served(i, a.arrival_s, a.output_tokens) for i, a in enumerate(arrivals)]
        self.tokens = max(a.output_tokens for a in arrivals)
        self.context = max(a.prompt_tokens + a.output_tokens for a in arrivals)
        self.queue: deque[Served] = deque()
        self.batches: dict[int, Batch] = {}
        self.layout: Layout | None = None
        self.held: dict[str, Place] = {}
        self.members: set[str] = set()
        self.blocked_until = 0.0
        self.outcome = Outcome(self.requests)
        self._coming = deque(self.requests)
        self._arrival_s = [r.arrival_s for r in self.requests]

    def run(self) -> Outcome:
        """Play the whole trace, then serve what is left on the last machines for up to one trace length more."""
        times = sorted({e.time_s for e in self.availability.events if e.node})
        for at, until in zip(times, [*times[1:], self.availability.end_s], strict=True):
            joining = {e.node for e in self.availability.events if e.time_s == at and e.node and e.joins}
            leaving = {e.node for e in self.availability.events if e.time_s == at and e.node and not e.joins}
            self._change(at, joining, leaving)
            self._watch(at, until)
        last = max(self.availability.end_s, self.requests[-1].arrival_s) * 2 + 600
        self._serve_until(last)
        self.outcome.node_seconds = self.availability.node_seconds()
        self.outcome.cost_usd = self.outcome.node_seconds / 3600 * self.cloud.spot_usd_per_h
        self.outcome.on_demand_usd = self.outcome.node_seconds / 3600 * self.cloud.on_demand_usd_per_h
        return self.outcome

    # -- serving -----------------------------------------------------------------------------------------------------------------

    def _serve_until(self, end_s: float, sharp: bool = False) -> None:
        """Run batches to `end_s`, whole steps only. sharp: no step or prefill that would end later is begun; otherwise one may."""
        while True:
            start = self._earliest()
            if start is None or start[0] >= end_s:
                self._collect_arrivals(end_s)
                return
            at, pipeline = start
            self._collect_arrivals(at)
            if pipeline in self.batches:
                self._advance(pipeline, end_s, sharp)
            elif self.queue:
                self._begin(pipeline, at)

    def _earliest(self) -> tuple[float, int] | None:
        """When something can happen next, on which pipeline."""
        if self.layout is None:
            return None
        upcoming = self.queue[0].arrival_s if self.queue else (self._coming[0].arrival_s if self._coming else None)
        best: tuple[float, int] | None = None
        for pipeline in range(self.layout.data):
            batch = self.batches.get(pipeline)
            if batch is not None:
                at = max(batch.ready_s, self.blocked_until)
            elif upcoming is not None:
                at = max(upcoming, self.blocked_until, self._idle_since.get(pipeline, 0.0))
            else:
                continue
            if best is None or at < best[0]:
                best = at, pipeline
        return best

    @property
    def _idle_since(self) -> dict[int, float]:
        return self.__dict__.setdefault("_idle", {})

    def _collect_arrivals(self, until_s: float) -> None:
        while self._coming and self._coming[0].arrival_s <= until_s:
            self.queue.append(self._coming.popleft())

    def _begin(self, pipeline: int, at: float) -> None:
        assert self.layout is not None
        chosen = [self.queue.popleft() for _ in range(min(self.layout.batch, len(self.queue)))]
        self.batches[pipeline] = Batch(chosen, at, self._times(len(chosen)).prefill)

    def _times(self, size: int):
        assert self.layout is not None
        batch = next(b for b in self.model.batches if b >= size)
        return self.model.times(Layout(1, self.layout.pipeline, self.layout.tensor, batch))

    def _advance(self, pipeline: int, end_s: float, sharp: bool) -> None:
        """Prefill, then steps up to the batch's end or `end_s`."""
        batch = self.batches[pipeline]
        at = max(batch.ready_s, self.blocked_until)
        if batch.prefill_left_s > 0:
            if sharp and at + batch.prefill_left_s > end_s:
                batch.ready_s = end_s
                return
            batch.ready_s, batch.prefill_left_s = at + batch.prefill_left_s, 0.0
            return
        step = self._times(len(batch.requests)).step
        left = min(r.tokens - r.done for r in batch.requests)
        if sharp:
            steps = arranger.steps_before_leaving(end_s - at, 0.0, step, left)
            if not steps:
                batch.ready_s = end_s
                return
        else:
            steps = min(left, max(1, math.floor((end_s - at) / step)))
        for r in batch.requests:
            r.done += steps
            r.generated += steps
        batch.ready_s = at + steps * step
        finished = [r for r in batch.requests if r.done >= r.tokens]
        for r in finished:
            r.finished_s = batch.ready_s
        batch.requests = [r for r in batch.requests if r.done < r.tokens]
        if not batch.requests:
            del self.batches[pipeline]
            self._idle_since[pipeline] = batch.ready_s

    # -- machines come and go ----------------------------------------------------------------------------------------------------

    def _change(self, at: float, joining: set[str], leaving: set[str]) -> None:
        after = (self.members | joining) - leaving
        if self.policy == "reroute":
            self._serve_until(at)
            self._reroute(at, after)
            return
        target = self._target(at, after)
        if self.policy == "reparallelize":
            self._serve_until(at)
            self._restart(at, after, target)
        else:
            self._migrate(at, after, target, bool(leaving))

    def _watch(self, begun_s: float, until_s: float) -> None:
        """Between two changes of machines: leave a layout that the load has outgrown. Rerouting never changes its layout."""
        step = self.cloud.rate_window_s / 2
        if self.policy == "reroute" or not self.cloud.overload_factor:
            return
        at = begun_s + step
        while at < until_s - self.cloud.notice_s - step:
            if self.layout is not None and at >= self.blocked_until:
                self._serve_until(at)
                self._mismatch(at)
            at += step

    def _mismatch(self, at: float) -> None:
        """Move to a layout with more throughput when a queue builds up, and back to one with less latency when it is gone."""
        assert self.layout is not None
        c, model, tokens = self.cloud, self.model, self.tokens
        now, rate = controller.throughput(model, self.layout, tokens), self._rate(at)
        if rate == math.inf:
            return
        load = rate + len(self.queue) / c.rate_window_s
        devices = len(self.members) * c.devices_per_node
        target = controller.choose(model, devices, load, tokens, c.device_memory_bytes, self.context)
        if target is None or target == self.layout:
            return
        faster = controller.throughput(model, target, tokens)
        move_s = (
            self._load_s(target)
            if self.policy == "reparallelize"
            else self._seconds(self._plan(target, self.members)[0])
        )
        if load > now:  # outgrown: how much sooner will the queue be worked off?
            worth = faster >= c.overload_factor * now and len(self.queue) * (1 / now - 1 / faster) > move_s
        else:  # calm: what the requests of the next window save, against waiting for the move
            saved = controller.request_s(model, self.layout, tokens, rate) - controller.request_s(
                model, target, tokens, rate
            )
            worth = not self.queue and saved * max(1.0, rate * CALM_WINDOWS * c.rate_window_s) > move_s * (
                1 + rate * move_s
            )
        if worth and self.policy == "reparallelize":
            self._restart(at, self.members, target)
        elif worth:
            self._migrate(at, self.members, target, leaving=False)

    def _rate(self, at: float) -> float:
        """Arrivals per second lately, not below what came in the long run or is expected; infinite before anything is known."""
        window = self.cloud.rate_window_s
        came = bisect_right(self._arrival_s, at)
        recent = (came - bisect_right(self._arrival_s, at - window)) / window
        known = at >= window or self.cloud.expected_rate > 0
        overall = came / at if at >= window else 0.0
        return max(recent, overall, self.cloud.expected_rate) if known else math.inf

    def _target(self, at: float, after: set[str]) -> Layout | None:
        """The controller's choice, made when the notice comes."""
        decided = max(0.0, at - self.cloud.notice_s) if self.layout else at
        devices = len(after) * self.cloud.devices_per_node
        c = self.cloud
        rate = self._rate(decided)
        return controller.choose(self.model, devices, rate, self.tokens, c.device_memory_bytes, self.context)

    def _devices(self, nodes: set[str]) -> list[str]:
        return [f"{n}/{i}" for n in sorted(nodes) for i in range(self.cloud.devices_per_node)]

    def _drop_batches(self, pipelines: Sequence[int]) -> None:
        """Interrupted requests go back to the head of the queue and lose their tokens."""
        lost = [r for p in pipelines if p in self.batches for r in self.batches.pop(p).requests]
        for r in sorted(lost, key=lambda r: -r.arrival_s):
            r.done = 0
            self.queue.appendleft(r)

    def _adopt(self, at: float, after: set[str], target: Layout | None, ready_s: float) -> None:
        self.members, self.layout = set(after), target
        self.blocked_until = max(self.blocked_until, ready_s)
        self.outcome.layouts.append((at, target))
        self.outcome.stalls_s += max(0.0, ready_s - at)
        self._idle_since.clear()

    def _restart(self, at: float, after: set[str], target: Layout | None) -> None:
        if target == self.layout and after >= self.members:
            self.members = set(after)  # the same layout and nobody left: leave the engines alone
            return
        self._drop_batches(list(self.batches))
        self._adopt(at, after, target, at + self._load_s(target))

    def _load_s(self, target: Layout | None) -> float:
        """Engine start, and every machine reads its share of the weights from storage. The first machines have done so before the trace."""
        if target is None or not self.outcome.layouts:
            return 0.0
        share = (
            self.model.layers * self.model.layer_bytes / (target.pipeline * target.tensor) * self.cloud.devices_per_node
        )
        return self.cloud.engine_start_s + share / self.cloud.storage_bytes_per_s

    def _reroute(self, at: float, after: set[str]) -> None:
        c = self.cloud
        if self.shape is None:
            devices = len(after) * c.devices_per_node
            self.shape = controller.choose(
                self.model, devices, self._rate(at), self.tokens, c.device_memory_bytes, self.context
            )
            if self.shape is None:
                self.members = set(after)
                return
        shape = self.shape
        per = shape.pipeline * shape.tensor
        devices = self._devices(after)
        pipelines = {
            d
            for d in {p.data for p in self.held.values()}
            if all(x in devices for x, p in self.held.items() if p.data == d)
        }
        self._drop_batches([d for d in self.batches if d not in pipelines])
        kept = {x: p for x, p in self.held.items() if p.data in pipelines}
        free = [x for x in devices if x not in kept]
        new = []
        while len(free) >= per:
            d = next(i for i in range(10**6) if i not in pipelines)
            pipelines.add(d)
            new.append(d)
            for i in range(per):
                kept[free.pop(0)] = Place(d, i // shape.tensor, i % shape.tensor)
        self.held, self.members = kept, set(after)
        numbering = {d: i for i, d in enumerate(sorted(pipelines))}
        self.held = {x: Place(numbering[p.data], p.stage, p.shard) for x, p in kept.items()}
        self.batches = {numbering[d]: b for d, b in self.batches.items()}
        self.layout = Layout(len(pipelines), shape.pipeline, shape.tensor, shape.batch) if pipelines else None
        self._idle_since.clear()
        for d in new:
            self._idle_since[numbering[d]] = at + self._load_s(self.layout)
        self.outcome.layouts.append((at, self.layout))

    def _migrate(self, at: float, after: set[str], target: Layout | None, leaving: bool) -> None:
        """Serve until just before the machines leave, then move; requests go on with their tokens where KV was inherited."""
        if target is None:
            self._serve_until(at)
            self._drop_batches(list(self.batches))
            self.held = {}
            self._adopt(at, after, None, at)
            return
        if target == self.layout and set(self._devices(after)) >= set(self.held):
            self.members = set(after)  # the layout stays and every device that serves stays
            self._serve_until(at)
            return
        urgent = (
            leaving and self.layout is not None
        )  # only a migration that must end before a machine leaves begins early
        began = at
        if urgent:
            self._serve_until(max(at - self.cloud.notice_s, 0.0))
            expected, _, _ = self._plan(target, after, full=True)
            began = max(at - self._seconds(expected), at - self.cloud.notice_s, 0.0)
        self._serve_until(began, sharp=urgent)
        moved, heir_of, goal = self._plan(target, after)
        seconds = self._seconds(moved)
        if urgent and began + seconds > at + 1e-6:
            # the notice is too short for all of it: KV is given up, and what the leaving machines held comes from elsewhere
            self._drop_batches(list(self.batches))
            self.held = {x: p for x, p in self.held.items() if x in set(self._devices(after))}
            moved, heir_of, goal = self._plan(target, after)
            seconds = self._seconds(moved)
        ready = began + (self._load_s(target) if self.layout is None else seconds)
        touched = {goal[t.target].data for t in moved.transfers}
        if self.layout is None or (target.pipeline, target.tensor) != (self.layout.pipeline, self.layout.tensor):
            touched = set(range(target.data))
        inherited: dict[int, Batch] = {}
        for new_d, old_d in heir_of.items():
            batch = self.batches.pop(old_d)
            if new_d not in touched or (
                batch.prefill_left_s == 0 and arranger.worth_moving(seconds, self._done_s(batch))
            ):
                inherited[new_d] = batch
            else:
                self.batches[old_d] = batch
        self._drop_batches(list(self.batches))
        for new_d, batch in inherited.items():
            if new_d in touched:
                batch.ready_s = max(batch.ready_s, ready)
        self.batches = {}
        for new_d, batch in inherited.items():
            self.batches[new_d] = Batch(batch.requests[: target.batch], batch.ready_s, batch.prefill_left_s)
            for r in batch.requests[target.batch :]:
                r.done = 0
                self.queue.appendleft(r)
        self.held = goal
        self.outcome.moved_bytes += moved.moved_bytes
        self.outcome.moves.append((began, ready))
        # a pipeline that keeps its devices, layers and shards goes on: only those that wait for bytes stand still
        self._adopt(began, after, target, ready if len(touched) == target.data else began)
        for d in range(target.data):
            if d not in inherited:
                self._idle_since[d] = ready if d in touched else began

    def _done_s(self, batch: Batch) -> float:
        """What computing the batch's tokens again would take."""
        times = self._times(len(batch.requests))
        return times.prefill + max(r.done for r in batch.requests) * times.step

    def _plan(
        self, target: Layout, after: set[str], full: bool = False
    ) -> tuple[migration.Migration, dict[int, int], dict[str, Place]]:
        """The migration to `target`. full: as if every pipeline had a full batch with all its tokens, which bounds what may be later."""
        if full and self.layout is not None:
            pipelines = range(self.layout.data)
            heir_of = inherit({d: [1] for d in pipelines}, target)
            kv = dict.fromkeys(pipelines, self.layout.batch * self.model.kv_bytes(self.context))
        else:
            heir_of = inherit({d: [r.done + 1 for r in b.requests] for d, b in self.batches.items()}, target)
            kv = {
                d: sum(self.model.kv_bytes(self.context - self.tokens + r.done) for r in b.requests)
                for d, b in self.batches.items()
            }
        sizes = Sizes(self.model.layers, self.model.layer_bytes, kv)
        devices = self._devices(after)
        goal = assign(
            self.layout, {x: p for x, p in self.held.items() if x in devices}, devices, target, sizes, heir_of
        )
        return migration.plan(self.layout, self.held, target, goal, sizes, heir_of), heir_of, goal

    def _seconds(self, moved: migration.Migration) -> float:
        everyone = {t.target for t in moved.transfers} | {t.source for t in moved.transfers}
        instance = {x: x.rsplit("/", 1)[0] for x in everyone}
        c = self.cloud
        return moved.seconds(instance, c.network_bytes_per_s, c.local_bytes_per_s, c.storage_bytes_per_s)
