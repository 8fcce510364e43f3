"""From one layout to the next without forgetting: which bytes move ahead while serving goes on, which after the stop, and when each stage is ready.

Weights of the next layout move ahead into whatever memory the present one leaves free, on a share of the networks. After the stop come
the KV, then the other weights; a pipeline goes on as soon as its stages have what is theirs, later stages while earlier ones work already.
A pipeline that keeps its shape and machines does not stop; requests of those that end take part in its steps once their KV is there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from wager.cluster.spotserve import arranger, migration
from wager.cluster.spotserve.cloud import Cloud
from wager.cluster.spotserve.latency import Layout, ServedModel
from wager.cluster.spotserve.mapper import Heirs, Place, Sizes, assign, inherit, stage_layers, surviving
from wager.cluster.spotserve.migration import STORAGE, Transfer
from wager.cluster.spotserve.service import Batch, Served, Service

Stage = tuple[int, int]  # pipeline, stage


@dataclass(frozen=True)
class Transition:
    """`goal`: device -> place. ahead: moved before the stop, in `ahead_s` seconds; after it, stage (d, p) has its bytes `ready_s` seconds after
    the stop. same: new pipelines that keep devices, layers and shards of an old one, and go on without a stop; ending: how many old ones do not."""

    target: Layout
    goal: dict[str, Place]
    heirs: Heirs
    ahead: tuple[Transfer, ...]
    ahead_s: float
    after: tuple[Transfer, ...]
    ready_s: Mapping[Stage, float]
    same: Mapping[int, int]
    ending: int

    @property
    def stop_s(self) -> float:
        """From the stop until every stage is ready."""
        return max(self.ready_s.values(), default=0.0)

    @property
    def stall_s(self) -> float:
        """How long those that replace pipelines are not there; 0 when all go on."""
        if not self.ending:
            return 0.0
        return max((s for (d, _), s in self.ready_s.items() if d not in self.same), default=0.0)

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
        decided, progress = goal is not None, decoded(batches)
        if goal is not None or layout is None:
            same = continuing(layout, held, target, goal or {})
        else:
            same = surviving(layout, held, devices, target, {d: sum(tokens) for d, tokens in progress.items()})
        if most_kv and layout is not None:
            heirs = inherit({d: [1] for d in range(layout.data)}, target, same)
            most = {d: max(layout.batch, len(batches[d].everyone) if d in batches else 0) for d in range(layout.data)}
            kv = {d: n * model.kv_bytes(self.context) for d, n in most.items()}
        else:
            heirs = inherit(progress, target, same)
            prompt = self.context - self.output
            kv = {d: sum(model.kv_bytes(prompt + r.done) for r in b.started) for d, b in batches.items()}
        sizes = Sizes(model.layers, model.layer_bytes, kv)
        if goal is None:
            here = set(devices)
            goal = assign(layout, {x: p for x, p in held.items() if x in here}, devices, target, sizes, heirs, same)
        moved = migration.plan(layout, held, target, goal, sizes, heirs)
        if decided:
            known = {_piece(t) for t in arrived}
            ahead, after = tuple(arrived), tuple(t for t in moved.transfers if _piece(t) not in known)
            ahead_s = 0.0
        else:
            ahead, ahead_s = self._ahead(layout, held, moved.transfers, ahead_for_s)
            taken = {_piece(t) for t in ahead}
            after = tuple(t for t in moved.transfers if _piece(t) not in taken)
        ready, ending = self._ready(after, goal, same), 0 if layout is None else layout.data - len(same)
        return Transition(target, dict(goal), heirs, ahead, ahead_s, after, ready, same, ending)

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


def decoded(batches: Mapping[int, Batch]) -> dict[int, list[int]]:
    """By pipeline: tokens that the requests with KV have decoded, and one for the prompt."""
    return {d: [r.done + 1 for r in b.started] for d, b in batches.items()}


def perform(service: Service, step: Transition, stop_s: float) -> None:
    """At `stop_s`, the service has the new layout: batches whose KV is inherited go on, the others wait and are computed again."""
    target = step.target
    free: dict[int, float] = {}
    kept: dict[int, Batch] = {}
    olds = dict(service.batches)
    going_on = {new: olds.pop(old) for new, old in step.same.items() if old in olds}
    prefill = service.model.times(Layout(1, target.pipeline, target.tensor, min(service.model.batches))).prefill
    decode = service.model.times(Layout(1, target.pipeline, target.tensor, target.batch)).step
    for new in range(target.data):
        ready = [step.ready_s[new, p] for p in range(target.pipeline)]
        arrive_s, moved = stop_s + _pipelined(ready, decode), []
        for old in step.heirs.get(new, ()):
            batch = olds.get(old)
            if batch is not None and batch.started and arranger.worth_moving(max(ready), service.done_s(batch)):
                started = batch.started
                service.put_back([r for r in batch.everyone if r not in started])
                moved += started
                arrive_s = max(arrive_s, batch.ready_s)  # the step that ran when the stop came
                del olds[old]
        if new in step.same:
            free[new] = max(stop_s, service.free_s.get(step.same[new], 0.0))
        else:
            free[new] = stop_s + _pipelined(ready, prefill)
        batch = going_on.get(new)
        slots = target.batch if batch is None else target.batch - len(batch.started)
        moved.sort(key=lambda r: -r.done)
        moved, late = moved[: max(0, slots)], moved[max(0, slots) :]
        service.put_back(late)
        if batch is not None:
            kept[new] = batch
            if moved:
                _receive(service, batch, moved, arrive_s, target.batch)
        elif moved:
            kept[new] = Batch(moved, max(arrive_s, free[new]) if new in step.same else arrive_s, 0.0)
    service.batches = olds
    service.drop(list(olds))
    service.layout, service.batches, service.free_s = target, kept, free


def _receive(service: Service, batch: Batch, moved: list[Served], arrive_s: float, slots: int) -> None:
    """`moved` take part in a batch that goes on, from `arrive_s`. Whose prefill is under way makes room for them."""
    started = batch.started
    begun = [r for r in batch.everyone if r not in started]
    back = begun[max(0, slots - len(started) - len(moved)) :]
    for r in back:
        (batch.joining if batch.joining else batch.requests).remove(r)
    service.put_back(back)
    if len(back) == len(begun):
        batch.prefill_left_s = 0.0
    batch.arrive_s = arrive_s if not batch.arriving else max(arrive_s, batch.arrive_s)
    batch.arriving += moved


def _pipelined(ready: Sequence[float], work_s: float) -> float:
    """When work may begin that reaches stage p after p / P of its time, so that no stage is reached before it is ready."""
    return max(0.0, *(r - p * work_s / len(ready) for p, r in enumerate(ready)))
