"""Pipelines that serve requests under a virtual clock, a step per token.

Continuous (as the engine does): a request joins a pipeline with a free slot at the next step; what waits is spread evenly. A pipeline of one
stage stands still while the prompt is computed. One of several stages has stages that do nothing for a part of every step; the prefill fills
those, layer by layer, and whoever decodes goes first, delayed by the layer that has begun. In whole batches (as the paper's engine did): a free pipeline takes what waits, up to the layout's batch, and nobody
joins until all of it has ended. What moves machines and layouts is not here: see `transition`, `migrate` and `baselines`.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from wager.cluster.spotserve import arranger
from wager.cluster.spotserve.latency import Layout, ServedModel, StepTimes

GROUP = 2  # requests that join a full pipeline together when more wait


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
    """A pipeline's requests at work. `ready_s`: when its next step begins, or the prefill of those that joined last (`prefill_left_s` long).
    joining: whose prefill fills the gaps of the others' steps. arriving: who go on here once their KV has come, at `arrive_s`."""

    requests: list[Served]
    ready_s: float
    prefill_left_s: float
    joining: list[Served] = field(default_factory=list)
    arriving: list[Served] = field(default_factory=list)
    arrive_s: float = math.inf

    @property
    def everyone(self) -> list[Served]:
        return [*self.requests, *self.joining, *self.arriving]

    @property
    def started(self) -> list[Served]:
        """Requests that have KV: all but those whose prefill is under way."""
        if self.joining:
            return [*self.requests, *self.arriving]
        return [*(r for r in self.requests if r.done or self.prefill_left_s == 0), *self.arriving]

    def copy(self) -> Batch:
        lists = ([copy.copy(r) for r in x] for x in (self.requests, self.joining, self.arriving))
        requests, joining, arriving = lists
        return Batch(requests, self.ready_s, self.prefill_left_s, joining, arriving, self.arrive_s)

    def arrive(self) -> None:
        """Those whose KV has come by the next step take part in it."""
        if self.arriving and self.arrive_s <= self.ready_s and (self.joining or self.prefill_left_s == 0):
            self.requests += self.arriving
            self.arriving, self.arrive_s = [], math.inf


class Service:
    """The queue, and the layout's pipelines with their batches. `free_s[d]`: when pipeline d, if idle, may begin a batch."""

    def __init__(self, model: ServedModel, coming: Sequence[Served], continuous: bool = False):
        self.model, self.continuous = model, continuous
        self.queue: deque[Served] = deque()
        self.coming: deque[Served] = deque(coming)
        self.layout: Layout | None = None
        self.batches: dict[int, Batch] = {}
        self.free_s: dict[int, float] = {}
        self._times: dict[tuple[int, int, int], StepTimes] = {}

    def fork(self, coming: Sequence[Served]) -> Service:
        """A copy that serves `coming` next; the original is not touched."""
        other = Service(self.model, coming, self.continuous)
        other.queue = deque(copy.copy(r) for r in self.queue)
        other.layout, other.free_s, other._times = self.layout, dict(self.free_s), self._times
        other.batches = {d: b.copy() for d, b in self.batches.items()}
        return other

    def unfinished(self) -> list[Served]:
        """Requests that wait or are at work."""
        return [*self.queue, *(r for b in self.batches.values() for r in b.everyone)]

    def serve_until(self, end_s: float, sharp: Container[int] = ()) -> None:
        """Run batches to `end_s`, whole steps only. sharp: pipelines that begin no step or prefill that would end later; others may."""
        while True:
            start = self._earliest()
            if start is None or start[0] >= end_s:
                self._collect_arrivals(end_s)
                return
            at, pipeline = start
            if self.coming and self.coming[0].arrival_s <= at:
                self._collect_arrivals(self.coming[0].arrival_s)
            elif pipeline in self.batches:
                self._advance(pipeline, end_s, pipeline in sharp)
            else:
                self._begin(pipeline, at)

    def _earliest(self) -> tuple[float, int] | None:
        """When something can happen next, on which pipeline; -1 is an arrival."""
        if self.layout is None:
            return None
        best: tuple[float, int] | None = None
        if self.coming:
            best = self.coming[0].arrival_s, -1
        for pipeline in range(self.layout.data):
            batch = self.batches.get(pipeline)
            if batch is not None:
                at = batch.ready_s
            elif self.queue:
                at = max(self.queue[0].arrival_s, self.free_s.get(pipeline, 0.0))
            else:
                continue
            if best is None or at < best[0]:
                best = at, pipeline
        return best

    def _collect_arrivals(self, until_s: float) -> None:
        while self.coming and self.coming[0].arrival_s <= until_s:
            self.queue.append(self.coming.popleft())

    def _begin(self, pipeline: int, at: float) -> None:
        """An idle pipeline takes what waits."""
        assert self.layout is not None
        size = self._share(pipeline, at) if self.continuous else min(self.layout.batch, len(self.queue))
        chosen = [self.queue.popleft() for _ in range(size)]
        self.batches[pipeline] = Batch(chosen, at, self.times(size).prefill)

    def _share(self, pipeline: int, at: float) -> int:
        """How many waiting requests a pipeline with free slots takes when those that are ready too, or within a step, shall have equally many."""
        assert self.layout is not None
        mine, slots = self._size(pipeline), self.layout.batch
        if not self.queue or mine >= slots:
            return 0
        if mine and slots - mine < min(GROUP, len(self.queue)):
            return 0  # a prefill of several keeps the stages busier than one after another
        soon = at + self.times(max(1, mine)).step
        ready = [d for d in range(self.layout.data) if d == pipeline or self._ready_s(d) <= soon]
        even = -(-(len(self.queue) + sum(map(self._size, ready))) // len(ready))
        return max(0, min(min(even, slots) - mine, len(self.queue)))

    def _size(self, pipeline: int) -> int:
        batch = self.batches.get(pipeline)
        return 0 if batch is None else len(batch.everyone)

    def _ready_s(self, pipeline: int) -> float:
        batch = self.batches.get(pipeline)
        if batch is None:
            return self.free_s.get(pipeline, 0.0)
        if batch.joining:
            step, progress = self._beside(batch)
            return batch.ready_s + math.ceil(batch.prefill_left_s / progress) * step
        return batch.ready_s + batch.prefill_left_s

    def times(self, size: int) -> StepTimes:
        """Of a batch of that size, at the next measured size."""
        assert self.layout is not None
        key = self.layout.pipeline, self.layout.tensor, size
        if key not in self._times:
            batch = next(b for b in self.model.batches if b >= size)
            self._times[key] = self.model.times(Layout(1, self.layout.pipeline, self.layout.tensor, batch))
        return self._times[key]

    def _advance(self, pipeline: int, end_s: float, sharp: bool) -> None:
        """Prefill of who joined, or steps up to the next end, arrival, or `end_s`."""
        batch = self.batches[pipeline]
        batch.arrive()
        if batch.joining:
            self._advance_both(pipeline, batch, end_s, sharp)
            return
        if self.continuous and batch.prefill_left_s == 0:
            self._join(pipeline, batch, end_s if sharp else math.inf)
            if batch.joining:
                self._advance_both(pipeline, batch, end_s, sharp)
                return
        at = batch.ready_s
        if batch.prefill_left_s > 0:
            if sharp and at + batch.prefill_left_s > end_s:
                batch.ready_s = end_s
                return
            batch.ready_s, batch.prefill_left_s = at + batch.prefill_left_s, 0.0
            return
        step = self.times(len(batch.requests)).step
        left = min(r.tokens - r.done for r in batch.requests)
        if sharp:
            steps = min(self._undisturbed(batch, step), arranger.steps_before_leaving(end_s - at, 0.0, step, left))
            if not steps:
                batch.ready_s = end_s
                return
        else:
            steps = min(left, self._undisturbed(batch, step), max(1, math.floor((end_s - at) / step)))
        self._step(pipeline, batch, steps, at + steps * step)

    def _join(self, pipeline: int, batch: Batch, end_s: float) -> None:
        """Waiting requests take free slots, if their prefill ends in time."""
        assert self.layout is not None
        size = self._share(pipeline, batch.ready_s)
        if not size:
            return
        prefill = seconds = self.times(size).prefill
        beside = self.layout.pipeline > 1
        if beside:
            step, progress = self.times(len(batch.requests)).beside(self.times(size))
            seconds = math.ceil(prefill / progress) * step
        if batch.ready_s + seconds <= end_s:
            (batch.joining if beside else batch.requests).extend(self.queue.popleft() for _ in range(size))
            batch.prefill_left_s = prefill

    def _beside(self, batch: Batch) -> tuple[float, float]:
        return self.times(len(batch.requests)).beside(self.times(len(batch.joining)))

    def _advance_both(self, pipeline: int, batch: Batch, end_s: float, sharp: bool) -> None:
        """Steps with a prefill in their gaps, up to the next end, the prefill's end, or `end_s`."""
        at = batch.ready_s
        step, progress = self._beside(batch)
        steps = min(min(r.tokens - r.done for r in batch.requests), math.ceil(batch.prefill_left_s / progress))
        steps = min(steps, self._until_arrival(batch, step))
        if sharp:
            steps = min(steps, arranger.steps_before_leaving(end_s - at, 0.0, step, steps))
            if not steps:
                batch.ready_s = end_s
                return
        else:
            steps = min(steps, max(1, math.floor((end_s - at) / step)))
        batch.prefill_left_s -= steps * progress
        if batch.prefill_left_s <= 1e-9:
            batch.prefill_left_s, joined = 0.0, batch.joining
            batch.joining = []
        else:
            joined = []
        self._step(pipeline, batch, steps, at + steps * step, joined)

    def _undisturbed(self, batch: Batch, step: float) -> int:
        """Steps until somebody may want to join: at the first step that begins after the next arrival."""
        assert self.layout is not None
        steps = min(max(r.tokens for r in batch.requests), self._until_arrival(batch, step))
        if not self.continuous or len(batch.everyone) >= self.layout.batch:
            return steps
        if self.queue or not self.coming:
            return 1 if self.queue else steps
        return min(steps, max(1, math.ceil((self.coming[0].arrival_s - batch.ready_s) / step)))

    def _until_arrival(self, batch: Batch, step: float) -> int:
        """Steps until the KV of those that arrive is there; without such more than any request has."""
        if not batch.arriving:
            return max(r.tokens for r in batch.requests)
        return max(1, math.ceil((batch.arrive_s - batch.ready_s) / step))

    def _step(self, pipeline: int, batch: Batch, steps: int, end_s: float, joined: Sequence[Served] = ()) -> None:
        """`steps` tokens for each request, the last at `end_s`; then those that joined take part."""
        batch.ready_s = end_s
        for r in batch.requests:
            r.done += steps
            r.generated += steps
            if r.done >= r.tokens:
                r.finished_s = end_s
        batch.requests = [*(r for r in batch.requests if r.done < r.tokens), *joined]
        if not batch.requests and batch.joining:  # the rest of the prefill has the stages to itself
            batch.requests, batch.joining = batch.joining, []
        elif not batch.requests and batch.arriving:
            batch.ready_s = max(end_s, batch.arrive_s)
            batch.arrive()
        if not batch.requests:
            del self.batches[pipeline]
            self.free_s[pipeline] = end_s

    def drop(self, pipelines: Sequence[int]) -> None:
        """The requests of these pipelines go back to the head of the queue and lose their tokens."""
        self.put_back([r for p in pipelines if p in self.batches for r in self.batches.pop(p).everyone])

    def put_back(self, lost: Sequence[Served]) -> None:
        for r in lost:
            r.done = 0
        ahead = sorted([*lost, *self.queue], key=lambda r: r.arrival_s)
        self.queue = deque(ahead)

    def done_s(self, batch: Batch) -> float:
        """What computing the batch's tokens again would take."""
        times = self.times(len(batch.requests))
        return times.prefill + max(r.done for r in batch.requests) * times.step
