"""Pipelines that serve requests under a virtual clock: batches to completion, a step per token.

A free pipeline takes what waits, up to the layout's batch. Taken at once, batches of several pipelines tend to begin together, and who just
missed them waits for nearly a whole batch; a paced service keeps the beginnings apart. What moves machines and layouts is not here: see
`transition`, `migrate` and `baselines`.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from wager.cluster.spotserve import arranger
from wager.cluster.spotserve.latency import Layout, ServedModel, StepTimes


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
    """A pipeline's requests at work. `ready_s`: when its next step begins."""

    requests: list[Served]
    ready_s: float
    prefill_left_s: float


class Service:
    """The queue, and the layout's pipelines with their batches. `free_s[d]`: when pipeline d, if idle, may begin a batch.

    paced: unless enough waits for a full batch, one begins only a D-th of its own duration after the latest of another pipeline."""

    def __init__(self, model: ServedModel, coming: Sequence[Served]):
        self.model = model
        self.queue: deque[Served] = deque()
        self.coming: deque[Served] = deque(coming)
        self.layout: Layout | None = None
        self.batches: dict[int, Batch] = {}
        self.free_s: dict[int, float] = {}
        self.paced = False
        self._latest_begin_s = -math.inf

    def fork(self, coming: Sequence[Served]) -> Service:
        """A copy that serves `coming` next; the original is not touched."""
        other = Service(self.model, coming)
        other.queue = deque(copy.copy(r) for r in self.queue)
        other.layout, other.free_s = self.layout, dict(self.free_s)
        other.paced, other._latest_begin_s = self.paced, self._latest_begin_s
        other.batches = {
            d: Batch([copy.copy(r) for r in b.requests], b.ready_s, b.prefill_left_s) for d, b in self.batches.items()
        }
        return other

    def unfinished(self) -> list[Served]:
        """Requests that wait or are at work."""
        return [*self.queue, *(r for b in self.batches.values() for r in b.requests)]

    def serve_until(self, end_s: float, sharp: bool = False) -> None:
        """Run batches to `end_s`, whole steps only. sharp: no step or prefill that would end later is begun; otherwise one may."""
        while True:
            start = self._earliest()
            if start is None or start[0] >= end_s:
                self._collect_arrivals(end_s)
                return
            at, pipeline = start
            if self.coming and self.coming[0].arrival_s <= at:
                self._collect_arrivals(self.coming[0].arrival_s)  # it may fill a batch that was held back
            elif pipeline in self.batches:
                self._advance(pipeline, end_s, sharp)
            else:
                self._begin(pipeline, at)

    def _earliest(self) -> tuple[float, int] | None:
        """When something can happen next, on which pipeline; -1 is an arrival."""
        if self.layout is None:
            return None
        best: tuple[float, int] | None = None
        if self.coming:
            best = self.coming[0].arrival_s, -1
        soonest = self._pace_s() if self.queue else math.inf
        for pipeline in range(self.layout.data):
            batch = self.batches.get(pipeline)
            if batch is not None:
                at = batch.ready_s
            elif self.queue:
                at = max(self.queue[0].arrival_s, soonest, self.free_s.get(pipeline, 0.0))
            else:
                continue
            if best is None or at < best[0]:
                best = at, pipeline
        return best

    def _pace_s(self) -> float:
        """When the next batch may begin."""
        assert self.layout is not None
        waiting = len(self.queue)
        if not self.paced or self.layout.data == 1 or waiting >= self.layout.batch:
            return 0.0
        duration = self.times(waiting).total(self.queue[0].tokens)
        return self._latest_begin_s + duration / self.layout.data

    def _collect_arrivals(self, until_s: float) -> None:
        while self.coming and self.coming[0].arrival_s <= until_s:
            self.queue.append(self.coming.popleft())

    def _begin(self, pipeline: int, at: float) -> None:
        assert self.layout is not None
        self._latest_begin_s = at
        chosen = [self.queue.popleft() for _ in range(min(self.layout.batch, len(self.queue)))]
        self.batches[pipeline] = Batch(chosen, at, self.times(len(chosen)).prefill)

    def times(self, size: int) -> StepTimes:
        """Of a batch of that size, at the next measured size."""
        assert self.layout is not None
        batch = next(b for b in self.model.batches if b >= size)
        return self.model.times(Layout(1, self.layout.pipeline, self.layout.tensor, batch))

    def _advance(self, pipeline: int, end_s: float, sharp: bool) -> None:
        """Prefill, then steps up to the batch's end or `end_s`."""
        batch = self.batches[pipeline]
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
        for r in batch.requests:
            if r.done >= r.tokens:
                r.finished_s = batch.ready_s
        batch.requests = [r for r in batch.requests if r.done < r.tokens]
        if not batch.requests:
            del self.batches[pipeline]
            self.free_s[pipeline] = batch.ready_s

    def drop(self, pipelines: Sequence[int]) -> None:
        """The requests of these pipelines go back to the head of the queue and lose their tokens."""
        self.put_back([r for p in pipelines if p in self.batches for r in self.batches.pop(p).requests])

    def put_back(self, lost: Sequence[Served]) -> None:
        for r in lost:
            r.done = 0
        ahead = sorted([*lost, *self.queue], key=lambda r: r.arrival_s)
        self.queue = deque(ahead)

    def done_s(self, batch: Batch) -> float:
        """What computing the batch's tokens again would take."""
        times = self.times(len(batch.requests))
        return times.prefill + max(r.done for r in batch.requests) * times.step
