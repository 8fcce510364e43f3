"""Says what a change of layout would do: who goes where, what stays, what moves in which order, and how long that takes."""

from __future__ import annotations

from collections.abc import Sequence

from wager.cluster.spotserve import migration
from wager.cluster.spotserve.cloud import Cloud
from wager.cluster.spotserve.latency import Layout, ServedModel
from wager.cluster.spotserve.mapper import Sizes, places
from wager.cluster.spotserve.service import Batch, Served
from wager.cluster.spotserve.transition import Mover
from wager.errors import UsageError

GB = 1e9


def parse_layout(text: str) -> Layout:
    """ "2,2,8,4" is two pipelines of two stages of eight devices with batches of four. Raises UsageError."""
    try:
        data, pipeline, tensor, batch = (int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"layout {text!r} must be D,P,M,B, for example 2,2,8,4") from None
    return Layout(data, pipeline, tensor, batch)


def describe_move(
    model: ServedModel, cloud: Cloud, old: Layout, new: Layout, lost: Sequence[str], done: int, prompt: int, output: int
) -> list[str]:
    """Lines for a person. Machines node-0, node-1, ... hold `old` in order; those named in `lost` leave. Every request has `done` of its
    `output` tokens. Raises UsageError when the new layout needs more machines than stay."""
    held = {
        f"node-{i // cloud.devices_per_node}/{i % cloud.devices_per_node}": place for i, place in enumerate(places(old))
    }
    nodes = {x.rsplit("/", 1)[0] for x in held}
    unknown = sorted(set(lost) - nodes)
    if unknown:
        raise UsageError(f"{unknown[0]} holds nothing; the machines are node-0 to node-{len(nodes) - 1}")
    devices = cloud.devices(nodes - set(lost))
    if new.devices > len(devices):
        raise UsageError(f"layout {new} needs {new.devices} devices and {len(devices)} stay")
    batches = {d: Batch([Served(i, 0.0, output, done) for i in range(old.batch)], 0.0, 0.0) for d in range(old.data)}
    step = Mover(model, cloud, prompt + output, output).plan(old, held, batches, new, devices)
    goal, heirs = step.goal, step.heirs
    kv = {d: old.batch * model.kv_bytes(prompt + done) for d in batches}
    moved = migration.plan(old, held, new, goal, Sizes(model.layers, model.layer_bytes, kv), heirs)
    lines = [f"{old} to {new}" + (f", without {', '.join(lost)}" if lost else "")]
    for device, place in sorted(goal.items(), key=lambda item: item[1]):
        before = held.get(device)
        was = f"pipeline {before.data} stage {before.stage} shard {before.shard}" if before else "nothing"
        lines.append(f"  pipeline {place.data} stage {place.stage} shard {place.shard}: {device}, held {was}")
    gone = [d for d in batches if d not in {old_d for olds in heirs.values() for old_d in olds}]
    lines += [
        "requests go on: "
        + ", ".join(
            f"pipeline {new_d} takes those of {' and '.join(map(str, olds))}" for new_d, olds in sorted(heirs.items())
        )
        + (f"; computed again: those of {', '.join(map(str, gone))}" if gone else ""),
        "go on without a stop: "
        + (", ".join(f"pipeline {d} as {new_d}" for new_d, d in sorted(step.same.items())) or "none"),
        f"in place {moved.reused_bytes / GB:.2f} GB, moved {moved.moved_bytes / GB:.2f} GB "
        f"(KV {sum(t.size_bytes for t in moved.transfers if t.kind == 'kv') / GB:.2f}, "
        f"from storage {sum(t.size_bytes for t in moved.transfers if t.source == migration.STORAGE) / GB:.2f})",
        f"layers in this order: {', '.join(map(str, moved.layer_order)) or 'none'}; fullest buffer {moved.peak_buffer:.2f} layers",
        f"ahead of the stop {sum(t.size_bytes for t in step.ahead) / GB:.2f} GB in {step.ahead_s:.2f} s; "
        f"every stage ready {step.stop_s:.2f} s after it",
    ]
    return lines
