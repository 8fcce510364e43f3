"""Which device takes which place in the new layout, so that most of what it holds stays where it is.

A place (d, p, m) needs the layers of stage p and the share [m / M, (m + 1) / M) of each, and the KV of the requests that pipeline d inherits.
A device that held another place has some of that. The assignment with the most bytes in place is a maximum-weight matching (Kuhn-Munkres).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from wager.cluster.spotserve.latency import Layout

Heirs = Mapping[int, tuple[int, ...]]  # new pipeline -> old pipelines whose requests (and KV) it gets


@dataclass(frozen=True, order=True)
class Place:
    """Pipeline, stage, shard."""

    data: int
    stage: int
    shard: int


@dataclass(frozen=True)
class Sizes:
    """Bytes of one layer's weights, and of one layer's KV for the requests of old pipeline d (`kv_bytes[d]`)."""

    layers: int
    layer_bytes: float
    kv_bytes: Mapping[int, float]


def places(layout: Layout) -> list[Place]:
    return [Place(d, p, m) for d in range(layout.data) for p in range(layout.pipeline) for m in range(layout.tensor)]


def stage_layers(layout: Layout, stage: int, layers: int) -> tuple[int, int]:
    """[first, last) of a stage: as equal as whole layers allow."""
    return stage * layers // layout.pipeline, (stage + 1) * layers // layout.pipeline


def shared_layers(old: Layout, old_place: Place, new: Layout, new_place: Place, layers: int) -> range:
    (a, b), (c, d) = stage_layers(old, old_place.stage, layers), stage_layers(new, new_place.stage, layers)
    return range(max(a, c), max(min(b, d), max(a, c)))


def shared_shard(old: Layout, old_place: Place, new: Layout, new_place: Place) -> float:
    """The common share of a layer's tensors."""
    low = max(old_place.shard / old.tensor, new_place.shard / new.tensor)
    high = min((old_place.shard + 1) / old.tensor, (new_place.shard + 1) / new.tensor)
    return max(0.0, high - low)


def reusable_bytes(old: Layout, old_place: Place, new: Layout, new_place: Place, sizes: Sizes, heirs: Heirs) -> float:
    """What a device at `old_place` already has of what `new_place` needs."""
    common = len(shared_layers(old, old_place, new, new_place, sizes.layers)) * shared_shard(
        old, old_place, new, new_place
    )
    bytes_each = sizes.layer_bytes
    if old_place.data in heirs.get(new_place.data, ()):
        bytes_each += sizes.kv_bytes.get(old_place.data, 0.0)
    return common * bytes_each


def inherit(old_batches: Mapping[int, Sequence[int]], new: Layout, same: Mapping[int, int] | None = None) -> Heirs:
    """Which old pipelines' batches go on where. `old_batches[d]`: the tokens decoded so far of each request of pipeline d; same: new
    pipelines that an old one goes on as, with its batch.

    Of the others, the batches with most decoded tokens choose first: their own number if nobody has it, else an empty pipeline, else the
    emptiest with enough free slots. Batches that find none are left out.
    """
    heirs: dict[int, tuple[int, ...]] = {p: (d,) for p, d in (same or {}).items()}
    slots = {p: new.batch - sum(len(old_batches.get(d, ())) for d in heirs.get(p, ())) for p in range(new.data)}
    going_on = {d for old in heirs.values() for d in old}
    by_progress = sorted(
        (d for d, batch in old_batches.items() if batch and d not in going_on), key=lambda d: (-sum(old_batches[d]), d)
    )
    own = [d for d in by_progress[: new.data - len(heirs)] if d < new.data and d not in heirs]
    for d in own + [d for d in by_progress if d not in own]:
        size = len(old_batches[d])
        if d in own:
            place = d
        else:
            place = max(slots, key=lambda p: (p not in heirs, slots[p], -p))
            if place in heirs and size > slots[place]:
                continue
        heirs[place] = (*heirs.get(place, ()), d)
        slots[place] = max(0, slots[place] - size)
    return heirs


def surviving(
    old: Layout, held: Mapping[str, Place], devices: Iterable[str], new: Layout, progress: Mapping[int, int]
) -> dict[int, int]:
    """new pipeline -> old pipeline of the same shape, all of whose devices stay, so that it can go on as it is: those with most `progress`
    (tokens decoded, by old pipeline) where there are more than pipelines."""
    if (old.pipeline, old.tensor) != (new.pipeline, new.tensor):
        return {}
    here, whole = set(devices), Counter(p.data for p in held.values())
    gone = {p.data for x, p in held.items() if x not in here}
    stay = [d for d, n in whole.items() if n == old.pipeline * old.tensor and d not in gone]
    stay = sorted(stay, key=lambda d: (-progress.get(d, 0), d))[: new.data]
    numbers = {d: d for d in stay if d < new.data}
    free = (p for p in range(new.data) if p not in numbers)
    return numbers | {next(free): d for d in stay if d not in numbers}


def assign(
    old: Layout | None,
    held: Mapping[str, Place],
    devices: Sequence[str],
    new: Layout,
    sizes: Sizes,
    heirs: Heirs,
    same: Mapping[int, int] | None = None,
) -> dict[str, Place]:
    """Device -> place with the most reusable bytes in all. `held`: places of the devices that are still there; others are new or idle.
    same: new pipeline -> old pipeline whose devices keep their stages and shards."""
    number = {d: p for p, d in (same or {}).items()}
    kept = {x: Place(number[p.data], p.stage, p.shard) for x, p in held.items() if p.data in number}
    goals = [p for p in places(new) if p.data not in (same or {})]
    devices = [x for x in devices if x not in kept]
    weight = np.zeros((len(devices), len(goals)))
    if old is not None:
        for i, device in enumerate(devices):
            if device in held:
                weight[i] = [reusable_bytes(old, held[device], new, goal, sizes, heirs) for goal in goals]
    rows, columns = linear_sum_assignment(weight, maximize=True)
    return kept | {devices[int(i)]: goals[int(j)] for i, j in zip(rows, columns, strict=True)}
