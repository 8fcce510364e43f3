"""What others do when machines come and go: restart everything in a new layout, or keep the shape of pipelines and drop or add whole ones."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from wager.cluster.spotserve import controller
from wager.cluster.spotserve.cloud import Cloud
from wager.cluster.spotserve.latency import Layout, ServedModel
from wager.cluster.spotserve.load import Load
from wager.cluster.spotserve.mapper import Place
from wager.cluster.spotserve.outcome import Outcome
from wager.cluster.spotserve.service import Service

CALM_WINDOWS = 4  # a calm layout is expected to last for this many rate windows


class Baseline(ABC):
    """What both know. `context`: tokens that a request has at most, `output`: how many of them are generated."""

    def __init__(self, service: Service, cloud: Cloud, load: Load, outcome: Outcome, context: int, output: int):
        self.service, self.cloud, self.load, self.outcome = service, cloud, load, outcome
        self.context, self.output = context, output
        self.members: set[str] = set()
        self.leaving: set[str] = set()

    def notice(self, at: float, nodes: set[str], leave_s: float) -> None:
        """Nothing moves; while machines are known to go soon the layout does not follow the load."""
        self.leaving |= nodes & self.members

    def joined(self, at: float, nodes: set[str]) -> None:
        self.changed(at, self.members | nodes)

    def left(self, at: float, nodes: set[str]) -> None:
        self.leaving -= nodes
        self.changed(at, self.members - nodes)

    @abstractmethod
    def changed(self, at: float, after: set[str]) -> None:
        """The machines are these from now on."""

    @abstractmethod
    def tick(self, at: float) -> None:
        """Time has passed between changes."""

    @property
    def model(self) -> ServedModel:
        return self.service.model

    def choose(self, nodes: set[str], rate: float) -> Layout | None:
        devices, memory = len(nodes) * self.cloud.devices_per_node, self.cloud.device_memory_bytes
        return controller.choose(
            self.model, devices, rate, self.output, memory, self.context, self.service.continuous, self.cloud.min_gpus
        )

    def load_s(self, target: Layout | None) -> float:
        """Engine start, and every machine reads its share of the weights from storage. The first machines have done so before the trace."""
        if target is None or not self.outcome.layouts:
            return 0.0
        model, c = self.model, self.cloud
        share = model.layers * model.layer_bytes / (target.pipeline * target.tensor) * c.devices_per_node
        return c.engine_start_s + share / c.storage_bytes_per_s


class Restart(Baseline):
    """The published controller; engines restart, weights come from storage, interrupted requests are computed again."""

    def changed(self, at: float, after: set[str]) -> None:
        decided = max(0.0, at - self.cloud.notice_s) if self.service.layout else at
        self._restart(at, after, self.choose(after, self.load.rate(decided)))

    def _restart(self, at: float, after: set[str], target: Layout | None) -> None:
        service = self.service
        if target == service.layout and after >= self.members:
            self.members = set(after)  # the same layout and nobody left: leave the engines alone
            return
        service.drop(list(service.batches))
        ready = max(at + self.load_s(target), *service.free_s.values(), 0.0)
        self.members, service.layout = set(after), target
        service.free_s = {} if target is None else dict.fromkeys(range(target.data), ready)
        self.outcome.adopted(at, target, ready)

    def tick(self, at: float) -> None:
        """A layout with more throughput when a queue builds up, one with less latency when it is gone, where it pays."""
        service, c = self.service, self.cloud
        rate = self.load.rate(at)
        if service.layout is None or rate == math.inf or min(service.free_s.values(), default=0.0) > at:
            return
        load = rate + len(service.queue) / c.rate_window_s
        now = controller.throughput(self.model, service.layout, self.output, service.continuous)
        target = self.choose(self.members, load)
        if target is None or target == service.layout:
            return
        faster, move_s = controller.throughput(self.model, target, self.output, service.continuous), self.load_s(target)
        if load > now:  # outgrown: how much sooner will the queue be worked off?
            worth = faster >= c.overload_factor * now and len(service.queue) * (1 / now - 1 / faster) > move_s
        else:  # calm: what the requests of the next windows save, against waiting for the move
            seconds = [
                controller.request_s(self.model, x, self.output, rate, service.continuous)
                for x in (service.layout, target)
            ]
            waits = move_s * (1 + rate * move_s)
            worth = (
                not service.queue
                and (seconds[0] - seconds[1]) * max(1.0, rate * CALM_WINDOWS * c.rate_window_s) > waits
            )
        if worth:
            self._restart(at, self.members, target)


class Reroute(Baseline):
    """Pipelines keep the shape that was best for the first machines; requests of a broken one are computed again elsewhere."""

    def __init__(self, *known, shape: Layout | None = None):
        super().__init__(*known)
        self.shape = shape
        self.held: dict[str, Place] = {}

    def changed(self, at: float, after: set[str]) -> None:
        if self.shape is None:
            self.shape = self.choose(after, self.load.rate(at))
        if self.shape is None:
            self.members = set(after)
            return
        shape, service = self.shape, self.service
        per = shape.pipeline * shape.tensor
        devices = self.cloud.devices(after)
        here = set(devices)
        whole = {
            d
            for d in {p.data for p in self.held.values()}
            if all(x in here for x, p in self.held.items() if p.data == d)
        }
        service.drop([d for d in service.batches if d not in whole])
        kept = {x: p for x, p in self.held.items() if p.data in whole}
        free = [x for x in devices if x not in kept]
        new = []
        while len(free) >= per:
            d = next(i for i in range(len(devices) + 1) if i not in whole)
            whole.add(d)
            new.append(d)
            for i in range(per):
                kept[free.pop(0)] = Place(d, i // shape.tensor, i % shape.tensor)
        number = {d: i for i, d in enumerate(sorted(whole))}
        self.held = {x: Place(number[p.data], p.stage, p.shard) for x, p in kept.items()}
        service.batches = {number[d]: b for d, b in service.batches.items()}
        layout = Layout(len(whole), shape.pipeline, shape.tensor, shape.batch) if whole else None
        ready = at + self.load_s(layout)
        service.free_s = {number[d]: ready if d in new else service.free_s.get(d, 0.0) for d in whole}
        service.layout, self.members = layout, set(after)
        self.outcome.adopted(at, layout, at)

    def tick(self, at: float) -> None:
        """The shape never changes."""
