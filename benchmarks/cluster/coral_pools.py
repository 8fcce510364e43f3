"""The pools and demands of Coral's comparison: models, objectives and shapes of the paper (arXiv 2605.04357), costs fitted on measured machines.

Prices are relative list prices times an L4's, equal per device whatever the shape; regions differ by a few percent. Machines of one shape are
scarce or plenty as the pool says. Nothing here is today's price.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wager.cluster.coral.rent import tables_of
from wager.cluster.coral.stage import Configuration, Demand
from wager.cluster.coral.templates import Library, build
from wager.hardware import catalog
from wager.hardware.cluster import Link
from wager.hardware.layer_cost import MODELS, ModelCard, Roofline, Sample, fit_roofline, leave_one_out, read_profiles
from wager.simulate.trace import read_trace

MEASURED = {
    "a100": ("A100-40GB", 1), "v100": ("V100", 1), "l4": ("L4", 1), "l4x2": ("L4", 2), "t4": ("T4", 1), "t4x2": ("T4", 2),
    "t4x4": ("T4", 4),
}  # fmt: skip
QUARTER = 0.63  # bytes a weight of the gpt-oss checkpoints: experts in 4 bits with scales, the rest in 16
# name: card (layers, hidden, bytes of a layer, KV bytes per token and layer, bytes a token touches in a mixture), prefill and decode objective in ms
SERVED = {
    "phi-4": (ModelCard("phi-4", 40, 5120, 29.3e9 / 40, 5120), 1200, 60),
    "gpt-oss-20b": (ModelCard("gpt-oss-20b", 24, 2880, 13.0e9 / 24, 2048, 2.3e9 / 24, weight_bytes=QUARTER), 900, 30),
    "qwen3-32b": (ModelCard("qwen3-32b", 64, 5120, 65.5e9 / 64, 4096), 1600, 100),
    "llama3-70b": (ModelCard("llama3-70b", 80, 8192, 141e9 / 80, 4096), 1500, 80),
    "gpt-oss-120b": (ModelCard("gpt-oss-120b", 36, 2880, 63e9 / 36, 2048, 3.2e9 / 36, weight_bytes=QUARTER), 1000, 40),
    "qwen3-235b": (ModelCard("qwen3-235b", 94, 4096, 470e9 / 94, 2048, 44e9 / 94), 1800, 120),
}
SMALL, LARGE = ("phi-4", "gpt-oss-20b", "qwen3-32b"), ("llama3-70b", "gpt-oss-120b", "qwen3-235b")
REGION_PRICE = (1.0, 1.07, 0.97)
COUNTS = (1, 2, 4, 8)
LINK = Link(1.25e9, 1e-3)  # 10 Gb/s between machines of one region


@dataclass(frozen=True)
class Pool:
    """What can be rented and what is asked for. `rates`: requests/s of each model; `units` of the latency budget, None for equal parts."""

    name: str
    devices: tuple[str, ...]
    regions: int
    rates: dict[str, float]
    max_nodes: int
    trace: str = "azure_llm_2023_conv"
    units: int | None = None


def core(max_nodes: int = 4, trace: str = "azure_llm_2023_conv", rate: float = 10.0) -> Pool:
    return Pool(f"core, {trace[15:]}", ("L40S", "L4", "A10G"), 2, dict.fromkeys(SMALL, rate), max_nodes, trace)


def extended(max_nodes: int = 3, trace: str = "azure_llm_2023_conv", rate: float = 25.0, share: str = "even") -> Pool:
    """share: even, or large (80 % of the requests for the largest third of the models) or small."""
    names = (*SMALL, *LARGE)
    heavy = {
        "even": {},
        "large": dict.fromkeys(("llama3-70b", "qwen3-235b"), 0.4),
        "small": dict.fromkeys(SMALL[:2], 0.4),
    }[share]
    rest = (1 - sum(heavy.values())) / (len(names) - len(heavy))
    rates = {n: rate * len(names) * heavy.get(n, rest) for n in names}
    return Pool(f"extended {share}, {trace[15:]}", ("L40S", "L4", "A10G", "A100", "H100"), 3, rates, max_nodes, trace)


def fitted(data: Path) -> tuple[Roofline, dict[str, float]]:
    """Efficiencies on the measured machines, and the error of each when it is left out."""
    devices = catalog.load()
    samples = [
        Sample(profile, card, devices.device(MEASURED[machine][0]), MEASURED[machine][1])
        for name, card in MODELS.items()
        for machine, profile in read_profiles(data / "gpu-serving-profiles", name).items()
    ]
    return fit_roofline(samples), leave_one_out(samples)


def configurations(pool: Pool, free_nvlink: bool = True) -> tuple[Configuration, ...]:
    """free_nvlink: no NVLink machine was measured, so its all-reduce costs nothing, which favours equal machines."""
    shapes = []
    for name in pool.devices:
        device = catalog.load().device(name)
        if free_nvlink and name in ("A100", "H100"):
            device = dataclasses.replace(device, peer_bytes_per_s=float("inf"))
        shapes += [Configuration(device, n) for n in COUNTS]
    return tuple(shapes)


def demands(pool: Pool, data: Path) -> list[Demand]:
    lengths = read_trace(data / "serving-traces" / f"{pool.trace}.csv", max_prompt=8192)
    prompt = int(np.mean([a.prompt_tokens for a in lengths]))
    output = float(np.mean([a.output_tokens for a in lengths]))
    found = []
    for name, rate in pool.rates.items():
        card, prefill_ms, decode_ms = SERVED[name]
        found.append(Demand(card, "prefill", prefill_ms / 1e3, rate * prompt, prompt, int(prompt + output / 2)))
        found.append(Demand(card, "decode", decode_ms / 1e3, rate * output, prompt, int(prompt + output / 2)))
    return found


def prices(pool: Pool) -> np.ndarray:
    """USD per hour [R, C]."""
    shelf = catalog.load()
    each = np.array([shelf.usd_per_h(name, n) for name in pool.devices for n in COUNTS])
    return np.array(REGION_PRICE[: pool.regions])[:, None] * each[None, :]


def rated(libraries: Sequence[Library], pool: Pool, data: Path) -> list[Library]:
    """The same templates under another pool's rates."""
    return [lib.for_demand(demand) for lib, demand in zip(libraries, demands(pool, data), strict=True)]


def libraries(pool: Pool, data: Path, roofline: Roofline) -> list[Library]:
    """Without what smaller templates replace."""
    shapes = configurations(pool)
    found = [
        build(d, shapes, tables_of(d, shapes, roofline, LINK), pool.max_nodes, units=pool.units, dominated=False)
        for d in demands(pool, data)
    ]
    for lib in found:  # once for every market, like the templates
        assert len(lib.equal) and len(lib.useful_machines)
    return found
