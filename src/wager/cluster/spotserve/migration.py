"""What moves where and in which order when a layout changes: KV first, then layers in an order that keeps buffers small.

Every missing piece of a layer is fetched from a device that holds it (its holders take turns); what nobody holds comes from storage. A device
that receives before it sends needs room: the order takes the first layer that keeps every device below `most_buffer` (in layers), and when
there is none the one that exceeds it least.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from wager.cluster.spotserve.latency import Layout
from wager.cluster.spotserve.mapper import Heirs, Place, Sizes, shared_layers, stage_layers

STORAGE = "storage"
EPSILON = 1e-9


@dataclass(frozen=True)
class Transfer:
    """`kind` is kv or weights; the piece is the share [low, high) of a layer."""

    kind: str
    layer: int
    source: str
    target: str
    low: float
    high: float
    size_bytes: float


@dataclass(frozen=True)
class Migration:
    """Transfers in order; `peak_buffer` in layers, by device at most; bytes that did not have to move, and that did."""

    transfers: tuple[Transfer, ...]
    layer_order: tuple[int, ...]
    peak_buffer: float
    reused_bytes: float

    @property
    def moved_bytes(self) -> float:
        return sum(t.size_bytes for t in self.transfers)

    def seconds(
        self,
        instance: Mapping[str, str],
        network_bytes_per_s: float,
        local_bytes_per_s: float,
        storage_bytes_per_s: float,
    ) -> float:
        """The busiest network card, plus the busiest instance's inner traffic; storage is read by all at once, each at its own rate."""
        network: dict[str, float] = defaultdict(float)
        local: dict[str, float] = defaultdict(float)
        stored: dict[str, float] = defaultdict(float)
        for t in self.transfers:
            target = instance[t.target]
            if t.source == STORAGE:
                stored[target] += t.size_bytes
            elif instance[t.source] == target:
                local[target] += t.size_bytes
            else:
                network[target] += t.size_bytes
                network[instance[t.source]] += t.size_bytes
        return (
            max(network.values(), default=0.0) / network_bytes_per_s
            + max(local.values(), default=0.0) / local_bytes_per_s
            + max(stored.values(), default=0.0) / storage_bytes_per_s
        )


def plan(
    old: Layout | None, held: Mapping[str, Place], new: Layout, goal: Mapping[str, Place], sizes: Sizes,
    heirs: Heirs, most_buffer: float = 2.0,
) -> Migration:  # fmt: skip
    """From `held` (devices that can still send, also those about to leave) to `goal`."""
    holders = Holders(old, held, sizes.layers)
    cache: list[Transfer] = []
    weights: dict[int, list[Transfer]] = defaultdict(list)
    reused = 0.0
    for device, place in sorted(goal.items()):
        first, last = stage_layers(new, place.stage, sizes.layers)
        wanted = (place.shard / new.tensor, (place.shard + 1) / new.tensor)
        for layer in range(first, last):
            own = None if old is None or device not in held else holding(old, held[device], layer, sizes.layers)
            missing = subtract(wanted, own)
            reused += (wanted[1] - wanted[0] - sum(b - a for a, b in missing)) * sizes.layer_bytes
            for piece in missing:
                weights[layer] += fetch("weights", layer, piece, device, sizes.layer_bytes, None, holders)
            for source in heirs.get(place.data, ()):
                kv = sizes.kv_bytes.get(source, 0.0)
                if not kv or old is None:
                    continue
                mine = own if device in held and held[device].data == source else None
                kv_missing = subtract(wanted, mine)
                reused += (wanted[1] - wanted[0] - sum(b - a for a, b in kv_missing)) * kv
                for piece in kv_missing:
                    cache += fetch("kv", layer, piece, device, kv, source, holders)
    order, peak = layer_order(
        weights, {**dict.fromkeys(held, 0.0), **dict.fromkeys(goal, 0.0)}, sizes.layer_bytes, most_buffer
    )
    return Migration(tuple(cache + [t for layer in order for t in weights[layer]]), tuple(order), peak, reused)


def holding(old: Layout, place: Place, layer: int, layers: int) -> tuple[float, float] | None:
    """The share of `layer` that a device at `place` holds."""
    first, last = stage_layers(old, place.stage, layers)
    return (place.shard / old.tensor, (place.shard + 1) / old.tensor) if first <= layer < last else None


def subtract(wanted: tuple[float, float], own: tuple[float, float] | None) -> list[tuple[float, float]]:
    if own is None or own[1] <= wanted[0] + EPSILON or own[0] >= wanted[1] - EPSILON:
        return [wanted]
    pieces = [(wanted[0], own[0]), (own[1], wanted[1])]
    return [(a, b) for a, b in pieces if b - a > EPSILON]


class Holders:
    """Who can send what: devices by (layer, shard, pipeline or None for any), which take turns."""

    def __init__(self, old: Layout | None, held: Mapping[str, Place], layers: int):
        self.old = old
        self._of: dict[tuple[int, int, int | None], list[str]] = defaultdict(list)
        self._taken: dict[tuple, int] = defaultdict(int)
        if old is None:
            return
        for device, place in sorted(held.items()):
            for layer in range(*stage_layers(old, place.stage, layers)):
                self._of[layer, place.shard, None].append(device)
                self._of[layer, place.shard, place.data].append(device)

    def next(self, kind: str, layer: int, shard: int, pipeline: int | None) -> str:
        """A device that has it; STORAGE when nobody does."""
        devices = self._of.get((layer, shard, pipeline))
        if not devices:
            return STORAGE
        key = (kind, layer, shard, pipeline)
        self._taken[key] += 1
        return devices[(self._taken[key] - 1) % len(devices)]


def fetch(
    kind: str, layer: int, piece: tuple[float, float], target: str, layer_bytes: float, pipeline: int | None, holders: Holders
) -> list[Transfer]:  # fmt: skip
    """Transfers that bring `piece`, cut where the old shards are cut."""
    old = holders.old
    if old is None:
        return [Transfer(kind, layer, STORAGE, target, *piece, (piece[1] - piece[0]) * layer_bytes)]
    transfers, at = [], piece[0]
    while at < piece[1] - EPSILON:
        shard = int(at * old.tensor + 1e-6)
        cut = min(piece[1], (shard + 1) / old.tensor)
        source = holders.next(kind, layer, shard, pipeline)
        if not (kind == "kv" and source == STORAGE):  # KV that nobody holds is lost; it is not in storage
            transfers.append(Transfer(kind, layer, source, target, at, cut, (cut - at) * layer_bytes))
        at = cut
    return transfers


def layer_order(
    weights: Mapping[int, list[Transfer]], buffer: dict[str, float], layer_bytes: float, most: float
) -> tuple[list[int], float]:
    """(layers in the order in which they move, largest buffer on the way): see the module's docstring."""
    waiting, order, peak = sorted(weights), [], 0.0
    while waiting:
        chosen, buffer = _next_layer(waiting, weights, buffer, layer_bytes, most)
        peak = max(peak, max(buffer.values()))
        order.append(chosen)
        waiting.remove(chosen)
    return order, peak


def _next_layer(
    waiting: list[int], weights: Mapping[int, list[Transfer]], buffer: dict[str, float], layer_bytes: float, most: float
) -> tuple[int, dict[str, float]]:
    """The first layer that keeps every buffer below `most`, else the one that exceeds it least; and the buffers after it."""
    least: tuple[float, int, dict[str, float]] | None = None
    for layer in waiting:
        after = buffers_after(buffer, weights[layer], layer_bytes)
        fullest = max(after.values())
        if fullest <= most + EPSILON:
            return layer, after
        if least is None or fullest < least[0]:
            least = fullest, layer, after
    assert least is not None
    return least[1], least[2]


def buffers_after(buffer: Mapping[str, float], transfers: list[Transfer], layer_bytes: float) -> dict[str, float]:
    """What a device received and has not yet given up: a received share counts, a sent one frees its place."""
    after = dict(buffer)
    for t in transfers:
        after[t.target] = after.get(t.target, 0.0) + t.size_bytes / layer_bytes
        if t.source in after:
            after[t.source] -= t.size_bytes / layer_bytes
    return after


def verify(
    migration: Migration,
    old: Layout | None,
    held: Mapping[str, Place],
    new: Layout,
    goal: Mapping[str, Place],
    layers: int,
) -> list[str]:
    """What is wrong with a plan, independently of how it was made: every device ends with exactly the shares it needs."""
    wrong = []
    got: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for t in migration.transfers:
        if t.kind == "weights":
            got[t.target, t.layer].append((t.low, t.high))
            if t.source != STORAGE:
                share = None if old is None else holding(old, held[t.source], t.layer, layers)
                if share is None or t.low < share[0] - EPSILON or t.high > share[1] + EPSILON:
                    wrong.append(f"{t.source} sends a share of layer {t.layer} that it does not hold")
    for device, place in goal.items():
        first, last = stage_layers(new, place.stage, layers)
        for layer in range(first, last):
            own = None if old is None or device not in held else holding(old, held[device], layer, layers)
            pieces = sorted(got[device, layer])
            covered = sum(b - a for a, b in pieces)
            wanted = (place.shard / new.tensor, (place.shard + 1) / new.tensor)
            need = sum(b - a for a, b in subtract(wanted, own))
            if abs(covered - need) > 1e-6 or any(
                b[0] < a[1] - EPSILON for a, b in zip(pieces, pieces[1:], strict=False)
            ):
                wrong.append(f"{device} ends with {covered:.3f} of {need:.3f} missing shares of layer {layer}")
    return wrong


def overlap_layers(old: Layout, old_place: Place, new: Layout, new_place: Place, layers: int) -> int:
    return len(shared_layers(old, old_place, new, new_place, layers))
