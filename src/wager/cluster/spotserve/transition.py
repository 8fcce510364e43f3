"""From one layout to the next without forgetting: which bytes move ahead while serving goes on, which after the stop, and when each stage is ready.

Weights of the next layout move ahead into whatever memory the present one leaves free, on a share of the networks. After the stop come
the KV, then the other weights; a pipeline goes on as soon as its stages have what is theirs, later stages while earlier ones work already.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from wager.cluster.spotserve import arranger, migration
from wager.cluster.spotserve.cloud import Cloud
from wager.cluster.spotserve.latency import Layout, ServedModel
from wager.cluster.spotserve.mapper import Heirs, Place, Sizes, assign, inherit, stage_layers
from wager.cluster.spotserve.migration import STORAGE, Transfer
from wager.cluster.spotserve.service import Batch, Served, Service

Stage = tuple[int, int]  # pipeline, stage


@dataclass(frozen=True)
class Transition:
    """`goal`: device -> place. ahead: moved before the stop, in `ahead_s` seconds; after it, stage (d, p) has its bytes `ready_s` seconds after
    the stop. same: new pipelines that keep devices, layers and shards of an old one, and so need not stop."""

    target: Layout
    goal: dict[str, Place]
    heirs: Heirs
    ahead: tuple[Transfer, ...]
    ahead_s: float
    after: tuple[Transfer, ...]
    ready_s: Mapping[Stage, float]
    same: Mapping[int, int]

    @property
    def stop_s(self) -> float:
        """From the stop until every stage is ready."""
        return max(self.ready_s.values(), default=0.0)

    @property
    def moved_bytes(self) -> float:
        return sum(t.size_bytes for t in (*self.ahead, *self.after))


class Mover:
    """Plans transitions of one model in one cloud. `context`: tokens that a request has at most; `output`: how many of them are generated."""

    def __init__(self, model: ServedModel, cloud: Cloud, context: int, output: int):
        self.model, self.cloud, self.context, self.output = model, cloud, context, output

    def plan(
        self,
        layout: Layout | None,
        held: Mapping[str, Place],
        batches: Mapping[int, Batch],
        target: Layout,
        devices: Sequence[str],
        goal: Mapping[str, Place] | None = None,
        arrived: Iterable[Transfer] = (),
        most_kv: bool = False,
        ahead_for_s: float = float("inf"),
    ) -> Transition:
        """To `target` on `devices`; `held` may name others that can still send.

        goal: where devices go, decided earlier. arrived: what has moved ahead for it (then nothing more does). most_kv: as if every batch
        were full of finished requests and all of them found a place, which bounds what may have to move later. ahead_for_s: time until the stop must come.
        """
        model = self.model
        if most_kv and layout is not None:
            heirs = inherit({d: [1] for d in range(layout.data)}, target)
            kv = dict.fromkeys(range(layout.data), layout.batch * model.kv_bytes(self.context))
        else:
            heirs = inherit({d: [r.done + 1 for r in b.requests] for d, b in batches.items()}, target)
            prompt = self.context - self.output
            kv = {d: sum(model.kv_bytes(prompt + r.done) for r in b.requests) for d, b in batches.items()}
        sizes = Sizes(model.layers, model.layer_bytes, kv)
        decided = goal is not None
        if goal is None:
            here = set(devices)
            goal = assign(layout, {x: p for x, p in held.items() if x in here}, devices, target, sizes, heirs)
        moved = migration.plan(layout, held, target, goal, sizes, heirs)
        if decided:
            known = {_piece(t) for t in arrived}
            ahead, after = tuple(arrived), tuple(t for t in moved.transfers if _piece(t) not in known)
            ahead_s = 0.0
        else:
            ahead, ahead_s = self._ahead(layout, held, moved.transfers, ahead_for_s)
            taken = {_piece(t) for t in ahead}
            after = tuple(t for t in moved.transfers if _piece(t) not in taken)
        same = continuing(layout, held, target, goal)
        return Transition(target, dict(goal), heirs, ahead, ahead_s, after, self._ready(after, goal, same), same)

    def _ahead(
        self, layout: Layout | None, held: Mapping[str, Place], transfers: Sequence[Transfer], within_s: float
    ) -> tuple[tuple[Transfer, ...], float]:
        """Weights that fit beside what a device holds and arrive in time on the share of the networks that serving leaves."""
        share = self.cloud.background_share
        if layout is None or share <= 0:
            return (), 0.0
        room = {x: self.cloud.device_memory_bytes - self._in_use(layout, p) for x, p in held.items()}
        chosen, times, last = [], _Clock(self.cloud, share), 0.0
        for t in transfers:
            left = room.get(t.target, self.cloud.device_memory_bytes)
            if t.kind != "weights" or t.size_bytes > left:
                continue
            done = times.after(t)
            if done > within_s:
                continue
            times.take(t)
            room[t.target] = left - t.size_bytes
            last = max(last, done)
            chosen.append(t)
        return tuple(chosen), last

    def _in_use(self, layout: Layout, place: Place) -> float:
        """Weights and a full batch's KV of a device."""
        first, last = stage_layers(layout, place.stage, self.model.layers)
        kv = layout.batch * self.model.kv_bytes(self.context)
        return (last - first) * (self.model.layer_bytes + kv) / layout.tensor

    def _ready(
        self, after: Sequence[Transfer], goal: Mapping[str, Place], same: Mapping[int, int]
    ) -> dict[Stage, float]:
        """Every instance works through its transfers in order; a stage waits for the last of its own."""
        clock = _Clock(self.cloud, 1.0)
        ready = {(p.data, p.stage): 0.0 if p.data in same else self.cloud.regroup_s for p in goal.values()}
        for t in after:
            clock.take(t)
            place = goal[t.target]
            key = place.data, place.stage
            ready[key] = max(ready[key], self.cloud.regroup_s + clock.now(t))
        return ready


def _piece(t: Transfer) -> tuple:
    return t.kind, t.layer, t.target, round(t.low, 6), round(t.high, 6)


def continuing(
    layout: Layout | None, held: Mapping[str, Place], target: Layout, goal: Mapping[str, Place]
) -> dict[int, int]:
    """new pipeline -> old pipeline on the same devices with the same layers and shards."""
    if layout is None or (layout.pipeline, layout.tensor) != (target.pipeline, target.tensor):
        return {}
    old_of: dict[int, set[int | None]] = defaultdict(set)
    for device, place in goal.items():
        before = held.get(device)
        stays = before is not None and (before.stage, before.shard) == (place.stage, place.shard)
        old_of[place.data].add(before.data if stays and before is not None else None)
    return {d: old for d, olds in old_of.items() for old in olds if len(olds) == 1 and old is not None}


class _Clock:
    """How long each instance is busy with the transfers so far: its network card, its inner links, its disk, one after another."""

    def __init__(self, cloud: Cloud, share: float):
        self.cloud, self.share = cloud, share
        self.busy_s: dict[str, float] = defaultdict(float)

    def _cost(self, t: Transfer) -> tuple[float, list[str]]:
        target, source = t.target.rsplit("/", 1)[0], t.source.rsplit("/", 1)[0]
        if t.source == STORAGE:
            return t.size_bytes / self.cloud.storage_bytes_per_s, [target]
        if source == target:
            return t.size_bytes / self.cloud.local_bytes_per_s, [target]
        return t.size_bytes / (self.share * self.cloud.network_bytes_per_s), [target, source]

    def take(self, t: Transfer) -> None:
        seconds, ends = self._cost(t)
        for end in ends:
            self.busy_s[end] += seconds

    def now(self, t: Transfer) -> float:
        return max(self.busy_s[end] for end in self._cost(t)[1])

    def after(self, t: Transfer) -> float:
        seconds, ends = self._cost(t)
        return max(self.busy_s[end] for end in ends) + seconds


def perform(service: Service, step: Transition, stop_s: float) -> None:
    """At `stop_s`, the service has the new layout: batches whose KV is inherited go on, the others wait and are computed again."""
    target = step.target
    free: dict[int, float] = {}
    kept: dict[int, Batch] = {}
    olds = dict(service.batches)
    prefill = service.model.times(Layout(1, target.pipeline, target.tensor, min(service.model.batches))).prefill
    decode = service.model.times(Layout(1, target.pipeline, target.tensor, target.batch)).step
    for new in range(target.data):
        ready = [step.ready_s[new, p] for p in range(target.pipeline)]
        sources = step.heirs.get(new, ())
        if new in step.same and max(ready) == 0 and sources in ((), (step.same[new],)):
            before = step.same[new]
            free[new] = max(stop_s, service.free_s.get(before, 0.0))
            if before in olds:
                kept[new] = olds.pop(before)
            continue
        moved = []
        for old in sources:
            started = _started(olds[old])
            if started and arranger.worth_moving(max(ready), service.done_s(olds[old])):
                batch = olds.pop(old)
                service.put_back([r for r in batch.everyone if r not in started])
                moved.append(Batch(started, batch.ready_s, 0.0))
        free[new] = stop_s + _pipelined(ready, prefill)
        if moved:
            requests = sorted((r for b in moved for r in b.requests), key=lambda r: -r.done)
            ended_s = max(b.ready_s for b in moved)  # of the step that ran when the stop came
            kept[new] = Batch(requests[: target.batch], max(ended_s, stop_s + _pipelined(ready, decode)), 0.0)
            service.put_back(requests[target.batch :])
    service.batches = olds
    service.drop(list(olds))
    service.layout, service.batches, service.free_s = target, kept, free


def _started(batch: Batch) -> list[Served]:
    """Requests that have KV to move: all, unless a prefill is under way; then those that were there before it."""
    if batch.joining:
        return batch.requests
    return [r for r in batch.requests if r.done or batch.prefill_left_s == 0]


def _pipelined(ready: Sequence[float], work_s: float) -> float:
    """When work may begin that reaches stage p after p / P of its time, so that no stage is reached before it is ready."""
    return max(0.0, *(r - p * work_s / len(ready) for p, r in enumerate(ready)))
