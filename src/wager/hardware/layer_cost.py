"""What one transformer layer costs on a machine: from measured tables where there are any, from a roofline where there are none.

A machine runs a batch that mixes prompt tokens and decoding sequences; its time per layer is prompt time plus decode time, each read from
its table with linear interpolation (and the last slope beyond the table). The roofline says: a prompt is limited by arithmetic or, when
short, by reading the weights once; a decode step by reading weights and KV. Its two efficiencies and its fixed time per layer are fitted on
measured machines, and `Roofline.leave_one_out` reports the error on a machine that the fit has not seen.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wager.errors import UsageError
from wager.hardware.cluster import Device

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class ModelCard:
    """What planners need to know of a model. Bytes and operations are per layer; kv_bytes per token and layer.

    active_layer_bytes: what one token meets in a mixture of experts (0: everything). weight_bytes: of one weight as stored; the
    arithmetic is in half precision whatever that is.
    """

    name: str
    layers: int
    hidden: int
    layer_bytes: float
    kv_bytes: float
    active_layer_bytes: float = 0.0
    activation_width_bytes: int = 2
    weight_bytes: float = 2.0

    @property
    def activation_bytes(self) -> int:
        """What a token is when it travels between two layers."""
        return self.hidden * self.activation_width_bytes

    @property
    def layer_flops(self) -> float:
        """Operations of one token in one layer: a multiply and an add per weight it meets."""
        return 2 * (self.active_layer_bytes or self.layer_bytes) / self.weight_bytes

    def touched_bytes(self, tokens: float) -> float:
        """Weights of a layer that a batch reads: few tokens of a mixture meet few experts, many meet all of them."""
        if not self.active_layer_bytes:
            return self.layer_bytes
        return self.layer_bytes * (1 - (1 - self.active_layer_bytes / self.layer_bytes) ** max(tokens, 1.0))

    @property
    def total_bytes(self) -> float:
        return self.layers * self.layer_bytes


LLAMA_30B = ModelCard("llama1_30b", 60, 6656, 12 * 6656**2 * 2.0, 2 * 6656 * 2)
LLAMA_70B = ModelCard("llama2_70b", 80, 8192, 1.53e9, 2 * 1024 * 2)
MODELS = {card.name: card for card in (LLAMA_30B, LLAMA_70B)}


@dataclass(frozen=True)
class Table:
    """Seconds at measured batch sizes; between them a straight line, beyond the last one its slope."""

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self):
        if len(self.sizes) < 2 or list(self.sizes) != sorted(set(self.sizes)):
            raise UsageError("a latency table needs two or more different batch sizes in ascending order")

    def __call__(self, size: float) -> float:
        if size <= self.sizes[-1]:
            return float(np.interp(size, self.sizes, self.seconds))
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.sizes[-1] - self.sizes[-2])
        return self.seconds[-1] + slope * (size - self.sizes[-1])

    def upto(self, largest: int) -> np.ndarray:
        """Seconds at 0, 1, ..., largest: for a simulator that looks up millions of times."""
        sizes = np.arange(largest + 1)
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.sizes[-1] - self.sizes[-2])
        beyond = self.seconds[-1] + slope * (sizes - self.sizes[-1])
        return np.where(sizes <= self.sizes[-1], np.interp(sizes, self.sizes, self.seconds), beyond)


@dataclass(frozen=True)
class MachineProfile:
    """A measured machine for one model. `kv_blocks[k]`: blocks of 16 tokens per layer when it holds k layers; `prompt_requests` and
    `decode_tokens` [k]: the most of each in one batch."""

    machine: str
    prompt: Table
    decode: Table
    kv_blocks: Mapping[int, int]
    prompt_requests: Mapping[int, int]
    decode_tokens: Mapping[int, int]

    @property
    def max_layers(self) -> int:
        return max(self.kv_blocks)

    def prompt_s(self, tokens: float) -> float:
        return self.prompt(tokens)

    def decode_s(self, sequences: float) -> float:
        return self.decode(sequences)

    def kv_tokens(self, layers: int) -> int:
        """Tokens whose KV fits per layer when `layers` are held."""
        return self.kv_blocks[layers] * BLOCK_TOKENS


def read_profiles(folder: str | Path, model: str) -> dict[str, MachineProfile]:
    """Measured machines for `model` from helix-layer-latency.csv and helix-machine-capacity.csv in `folder`. Raises UsageError."""
    latency, capacity = (Path(folder) / f"helix-{name}.csv" for name in ("layer-latency", "machine-capacity"))
    tables: dict[tuple[str, str], list[tuple[float, float]]] = {}
    limits: dict[str, dict[int, tuple[int, int, int]]] = {}
    try:
        for row in _rows(latency):
            if row["model"] == model:
                point = (float(row["batch_tokens"]), float(row["one_layer_latency_ms"]) / 1e3)
                tables.setdefault((row["machine"], row["phase"]), []).append(point)
        for row in _rows(capacity):
            if row["model"] == model:
                limits.setdefault(row["machine"], {})[int(row["layers_held"])] = (
                    int(row["kv_blocks_of_16_tokens"]), int(row["prompt_max_requests_per_batch"]),
                    int(row["decode_max_tokens_per_batch"]),
                )  # fmt: skip
    except (OSError, KeyError, ValueError) as error:
        raise UsageError(f"the profiles in {folder} cannot be read: {error!r}") from None
    if not limits:
        raise UsageError(f"{folder} has no profile of model {model!r}")
    return {
        machine: MachineProfile(
            machine, _table(tables[machine, "prompt"]), _table(tables[machine, "decode"]),
            *({k: limit[field] for k, limit in by_k.items()} for field in range(3)),
        )
        for machine, by_k in limits.items()
    }  # fmt: skip


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def _table(points: Sequence[tuple[float, float]]) -> Table:
    unique = dict(sorted(points))
    return Table(tuple(unique), tuple(unique.values()))


@dataclass(frozen=True)
class Roofline:
    """Efficiencies are shares of the data sheet's peaks; `fixed_s` is paid per layer and batch whatever its size. Devices that compute a layer
    together add up its activations twice (ring all-reduce) at `peer_efficiency` of their links: on PCIe this is what limits them."""

    flops_efficiency: float
    read_efficiency: float
    fixed_s: float
    peer_efficiency: float = 1.0

    def all_reduce_s(self, tokens: float, model: ModelCard, device: Device, count: int) -> float:
        """Both sums of a layer: every device sends and receives 2 (n - 1) / n of the activations for each."""
        if count == 1:
            return 0.0
        moved = 2 * tokens * model.activation_bytes * 2 * 2 * (count - 1) / count
        return moved / (device.peer_bytes_per_s * self.peer_efficiency)

    def prompt_s(self, tokens: float, model: ModelCard, device: Device, count: int = 1) -> float:
        compute = tokens * model.layer_flops / (count * device.half_flops * self.flops_efficiency)
        read = model.touched_bytes(tokens) / (count * device.read_bytes_per_s * self.read_efficiency)
        return self.fixed_s + max(compute, read) + self.all_reduce_s(tokens, model, device, count)

    def decode_s(
        self, sequences: float, context_tokens: float, model: ModelCard, device: Device, count: int = 1
    ) -> float:
        """One token for each of `sequences` that look back on `context_tokens` each."""
        size = model.touched_bytes(sequences) + sequences * context_tokens * model.kv_bytes
        read = size / (count * device.read_bytes_per_s * self.read_efficiency)
        compute = sequences * model.layer_flops / (count * device.half_flops * self.flops_efficiency)
        return self.fixed_s + max(read, compute) + self.all_reduce_s(sequences, model, device, count)

    def on(self, model: ModelCard, device: Device, count: int, context_tokens: float) -> RooflineCost:
        return RooflineCost(self, model, device, count, context_tokens)


@dataclass(frozen=True)
class RooflineCost:
    """Seconds of one layer on a machine nobody has measured."""

    roofline: Roofline
    model: ModelCard
    device: Device
    count: int
    context_tokens: float

    def prompt_s(self, tokens: float) -> float:
        return self.roofline.prompt_s(tokens, self.model, self.device, self.count)

    def decode_s(self, sequences: float) -> float:
        return self.roofline.decode_s(sequences, self.context_tokens, self.model, self.device, self.count)


@dataclass(frozen=True)
class Sample:
    """A measured machine beside its data sheet."""

    profile: MachineProfile
    model: ModelCard
    device: Device
    count: int


def fit_roofline(samples: Sequence[Sample], context_tokens: float = 870.0) -> Roofline:
    """Efficiencies and fixed time that minimise the squared logarithm of predicted over measured time. Deterministic."""
    from scipy.optimize import least_squares

    def residuals(theta: np.ndarray) -> np.ndarray:
        return np.concatenate([log_errors(_roofline(theta), s, context_tokens) for s in samples])

    shared = any(s.count > 1 and np.isfinite(s.device.peer_bytes_per_s) for s in samples)
    start, low, high = [0.5, 0.6, 3e-4, 0.3], [1e-3, 1e-3, 1e-7, 1e-3], [1.5, 1.5, 1.0, 1.5]
    used = 4 if shared else 3  # nothing tells the links' efficiency where every machine is one device
    found = least_squares(residuals, np.log(start[:used]), bounds=(np.log(low[:used]), np.log(high[:used])))
    return _roofline(found.x)


def _roofline(theta: np.ndarray) -> Roofline:
    return Roofline(*(float(v) for v in np.exp(theta)))


def log_errors(roofline: Roofline, sample: Sample, context_tokens: float) -> np.ndarray:
    """ln(predicted / measured) at prompts of 250 to 2000 tokens and at 8 to 300 decoding sequences."""
    cost, profile = roofline.on(sample.model, sample.device, sample.count, context_tokens), sample.profile
    prompt = [np.log(cost.prompt_s(t) / profile.prompt_s(t)) for t in (250, 500, 1000, 2000)]
    decode = [np.log(cost.decode_s(s) / profile.decode_s(s)) for s in (8, 30, 60, 120, 240, 300)]
    return np.array(prompt + decode)


def leave_one_out(samples: Sequence[Sample], context_tokens: float = 870.0) -> dict[str, float]:
    """Per machine: the median relative error of a roofline fitted on all the others."""
    if len({s.profile.machine for s in samples}) < 2:
        raise UsageError("leave-one-out needs two or more measured machines")
    errors = {}
    for left in samples:
        others = [s for s in samples if s.profile.machine != left.profile.machine]
        logs = log_errors(fit_roofline(others, context_tokens), left, context_tokens)
        errors[f"{left.model.name}/{left.profile.machine}"] = float(np.median(np.abs(np.expm1(logs))))
    return errors
