"""How long a batch takes under a layout: a pipeline of stages with micro-batches, from measured one-layer times."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from wager.errors import UsageError


@dataclass(frozen=True, order=True)
class Layout:
    """`data` pipelines of `pipeline` stages of `tensor` devices, each pipeline serving `batch` requests at a time."""

    data: int
    pipeline: int
    tensor: int
    batch: int

    def __post_init__(self):
        if min(self.data, self.pipeline, self.tensor, self.batch) < 1:
            raise UsageError(
                f"layout ({self.data}, {self.pipeline}, {self.tensor}, {self.batch}): every degree is at least 1"
            )

    @property
    def devices(self) -> int:
        return self.data * self.pipeline * self.tensor

    def __str__(self) -> str:
        return f"({self.data}, {self.pipeline}, {self.tensor}) x {self.batch}"


@dataclass(frozen=True)
class StepTimes:
    """Seconds: `prefill` of the batch, `step` per token after it. A stage works for `busy` of a step and has nothing to do in the rest, and for
    `prefill_layer` on a layer of one micro-batch of the prefill."""

    prefill: float
    step: float
    busy: float
    prefill_layer: float

    def total(self, tokens: int) -> float:
        return self.prefill + tokens * self.step

    def beside(self, joining: StepTimes) -> tuple[float, float]:
        """(seconds of a step, seconds of the prefill done in it) while a prefill of `joining` fills what steps leave of the stages. Whoever
        decodes goes first, but a layer that has begun ends: a stage does whole layers of the prefill between its work on two steps, and the
        second waits for the rest of the last one."""
        progress = math.ceil((self.step - self.busy) / joining.prefill_layer - 1e-9) * joining.prefill_layer
        return self.busy + progress, progress


@dataclass(frozen=True)
class ServedModel:
    """A profile: one-layer milliseconds by (tensor degree, batch), and what a hop and the embedding cost."""

    name: str
    layers: int
    hidden: int
    prefill_ms: Mapping[tuple[int, int], float]
    decode_ms: Mapping[tuple[int, int], float]
    hop_prefill_ms: float
    hop_step_ms: float
    embed_ms: tuple[float, ...]
    fix: float
    bytes_per_parameter: int = 4

    @cached_property
    def tensor_degrees(self) -> list[int]:
        return sorted({tp for tp, _ in self.prefill_ms})

    @cached_property
    def batches(self) -> list[int]:
        return sorted({b for _, b in self.prefill_ms})

    @cached_property
    def _known_times(self) -> dict[tuple[int, int, int], StepTimes]:
        return {}

    @cached_property
    def memo(self) -> dict[tuple[int, int, int], Any]:
        """What the controller derives from the tables, by pipeline and tensor degree and batch."""
        return {}

    @property
    def layer_bytes(self) -> float:
        return 12 * self.hidden**2 * self.bytes_per_parameter

    def kv_bytes(self, tokens: int) -> float:
        """Of one request and layer."""
        return 2 * self.hidden * tokens * self.bytes_per_parameter

    def times(self, layout: Layout) -> StepTimes:
        """Per batch, with the micro-batch counts that are best for prefill and for decode. Raises UsageError for an unmeasured degree."""
        key = layout.pipeline, layout.tensor, layout.batch
        if key not in self._known_times:
            self._known_times[key] = self._times(layout)
        return self._known_times[key]

    def _times(self, layout: Layout) -> StepTimes:
        if layout.tensor not in self.tensor_degrees or layout.batch not in self.batches:
            raise UsageError(
                f"{self.name} was not measured with tensor degree {layout.tensor} and batch {layout.batch}"
            )
        stage = math.ceil(self.layers / layout.pipeline)
        splits = [
            m for m in self.batches if m <= layout.batch and (layout.tensor, layout.batch // m) in self.prefill_ms
        ]
        embed = 2 * self.embed_ms[min(self.batches.index(layout.batch), len(self.embed_ms) - 1)]
        hops = layout.pipeline - 1
        prefill, parts = min(
            (self.prefill_ms[layout.tensor, layout.batch // m] * stage * (hops + m) + self.hop_prefill_ms / m * hops, m)
            for m in splits
        )
        step, micro_batches = min(
            (self.decode_ms[layout.tensor, layout.batch // m] * stage * (hops + m) + self.hop_step_ms * hops, m)
            for m in splits
        )
        busy = self.decode_ms[layout.tensor, layout.batch // micro_batches] * stage * micro_batches + embed
        ms = self.fix / 1e3
        layer = self.prefill_ms[layout.tensor, layout.batch // parts]
        return StepTimes(ms * prefill, ms * (step + embed), ms * busy, ms * layer)


def read_model(folder: str | Path, name: str) -> ServedModel:
    """A profile such as "T4-4x/megatron_6.7B_profile" from spotserve-*.csv and .json. Raises UsageError."""
    constants = json.loads((Path(folder) / "spotserve-profile-constants.json").read_text())
    if name not in constants:
        raise UsageError(f"profile {name!r} is unknown; there are {', '.join(constants)}")
    fixed = constants[name]
    prefill, decode = {}, {}
    with open(Path(folder) / "spotserve-t4x4-layer-latency.csv", newline="") as handle:
        for row in csv.DictReader(handle):
            if row["profile"] == name:
                key = int(row["tp"]), int(row["batch"])
                prefill[key], decode[key] = (
                    float(row["prefill_512_one_layer_ms"]),
                    float(row["decode_step_one_layer_ms"]),
                )
    if not prefill or "hidden_size" not in fixed:
        raise UsageError(f"profile {name!r} has no one-layer times or no hidden size, so it cannot be served")
    return ServedModel(
        name, fixed["layer_num"], fixed["hidden_size"], prefill, decode, fixed["pp_init_comm"], fixed["pp_incr_comm"],
        tuple(fixed["embed"]), fixed["final_fix_factor"],
    )  # fmt: skip
