"""What one machine serves as one stage: tokens/s with j layers when a stage may take a share of the latency objective.

Prefill takes the largest batch of whole prompts that ends in time; decode the largest batch whose step ends in time and whose KV fits beside
the weights. A stage may take its share of the objective, less the hop to the next stage where there is one; while it works on a batch, the
others of 1 / share are elsewhere in the pipeline, and their KV lies here too. Throughput never rises with the number of layers, nor falls with the share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wager.errors import UsageError
from wager.hardware.cluster import Device, Link
from wager.hardware.layer_cost import ModelCard, Roofline

PHASES = ("prefill", "decode")
USABLE_MEMORY = 0.9
BATCHES = tuple(dict.fromkeys(int(round(b)) for b in np.geomspace(1, 1024, 41)))


@dataclass(frozen=True)
class Configuration:
    """An instance shape: `count` equal devices that compute one layer together."""

    device: Device
    count: int

    @property
    def name(self) -> str:
        return f"{self.count}x{self.device.name}"

    @property
    def memory_bytes(self) -> float:
        return self.device.memory_bytes * self.count


@dataclass(frozen=True)
class Demand:
    """A model in one phase: tokens/s wanted, each stage batch within `objective_s` over all stages. `prompt_tokens` is a request's mean
    prompt, `context_tokens` what a decoding sequence looks back on."""

    model: ModelCard
    phase: str
    objective_s: float
    tokens_per_s: float
    prompt_tokens: int = 1000
    context_tokens: int = 1200

    def __post_init__(self):
        if self.phase not in PHASES or self.objective_s <= 0 or self.tokens_per_s < 0:
            raise UsageError(
                f"demand {self.name}: phase must be {' or '.join(PHASES)}, the objective positive, the rate not negative"
            )

    @property
    def name(self) -> str:
        return f"{self.model.name}/{self.phase}"


def stage_throughput(
    demand: Demand, configuration: Configuration, share: float, roofline: Roofline, link: Link
) -> np.ndarray:
    """[L + 1] tokens/s by layers held (index 0 is 0) within `share` of the objective; 0 where the layers do not fit or cannot be in time."""
    best_L = _rates(demand, configuration, share, roofline, link)[0].max(1)
    # a machine with room for j layers may also use fewer: never more throughput with more layers
    return np.concatenate([[0.0], np.maximum.accumulate(best_L[::-1])[::-1]])


def stage_batch(
    demand: Demand, configuration: Configuration, layers: int, share: float, roofline: Roofline, link: Link
) -> int:
    """Requests in the batch that gives `stage_throughput` with that many layers; 0 where none is in time."""
    rate_LB, requests_B = _rates(demand, configuration, share, roofline, link)
    rate_B = rate_LB[layers - 1]
    return int(requests_B[int(rate_B.argmax())]) if rate_B.max() > 0 else 0


def kv_tokens(model: ModelCard, configuration: Configuration, layers: int) -> int:
    """Tokens per layer whose KV fits beside `layers` layers."""
    room = configuration.memory_bytes * USABLE_MEMORY - layers * model.layer_bytes
    return max(0, int(room / (layers * model.kv_bytes)))


def _rates(
    demand: Demand, configuration: Configuration, share: float, roofline: Roofline, link: Link
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens/s [L, B] of each batch with each number of layers, 0 where it does not fit or is late; requests of each batch)."""
    model = demand.model
    layers = np.arange(1, model.layers + 1)
    sizes, seconds, batches_B = _batches(demand, configuration, roofline)
    hop_B = np.zeros(len(sizes)) if share == 1 else link.latency_s + sizes * model.activation_bytes / link.bytes_per_s
    time_LB = layers[:, None] * seconds[None, :]
    in_time_LB = time_LB + hop_B[None, :] <= demand.objective_s * share
    room_L = configuration.memory_bytes * USABLE_MEMORY - layers * model.layer_bytes
    held = batches_B * (demand.context_tokens if demand.phase == "decode" else demand.prompt_tokens) / share
    fits_LB = layers[:, None] * held[None, :] * model.kv_bytes <= room_L[:, None]
    return np.where(in_time_LB & fits_LB, sizes[None, :] / time_LB, 0.0), batches_B


def _batches(
    demand: Demand, configuration: Configuration, roofline: Roofline
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens of a batch, seconds of one layer, requests in the batch) for each batch size."""
    requests = np.array(BATCHES, float)
    device, count, model = configuration.device, configuration.count, demand.model
    if demand.phase == "prefill":
        tokens = requests * demand.prompt_tokens
        seconds = np.array([roofline.prompt_s(t, model, device, count) for t in tokens])
        return tokens, seconds, requests
    seconds = np.array([roofline.decode_s(b, demand.context_tokens, model, device, count) for b in requests])
    return requests, seconds, requests


def throughput_table(
    demand: Demand, configurations: Sequence[Configuration], share: float, roofline: Roofline, link: Link
) -> np.ndarray:
    """[C, L + 1] of `stage_throughput`."""
    return np.stack([stage_throughput(demand, c, share, roofline, link) for c in configurations])
