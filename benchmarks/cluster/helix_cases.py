"""Helix's five published placement instances, with the placements that their authors published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wager.hardware.cluster import Cluster, Link, uniform
from wager.hardware.layer_cost import MODELS, MachineProfile, ModelCard, read_profiles
from wager.simulate.trace import Arrival

INSTANCES = ("llama30b-8xL4", "llama30b-4xA100", "llama30b-12xT4", "llama30b-4xL4-6xT4", "llama70b-single24")
LINK = Link(1.25e9, 1e-3)  # 10 Gb/s and 1 ms between all machines of one site


@dataclass(frozen=True)
class Case:
    """`incumbent`: tokens/s of the published placement in its own model."""

    name: str
    card: ModelCard
    profiles: dict[str, MachineProfile]
    cluster: Cluster
    placement: dict[str, tuple[int, int]]
    incumbent: float

    @property
    def partial(self) -> bool:
        """Whether the authors solved it with partial inference."""
        return "70b" in self.name

    @staticmethod
    def online(arrivals: Sequence[Arrival], requests_per_s: float, seconds: float) -> list[Arrival]:
        """The trace's arrivals, stretched in time to a mean rate."""
        wanted = max(2, int(requests_per_s * seconds))
        part = list(arrivals[:wanted])
        stretch = len(part) / requests_per_s / max(part[-1].arrival_s - part[0].arrival_s, 1e-9)
        return [
            Arrival((a.arrival_s - part[0].arrival_s) * stretch, a.prompt_tokens, a.output_tokens, a.cached_tokens, a.model)
            for a in part
        ]  # fmt: skip


def published(data: Path, name: str) -> Case:
    reference = json.loads((data / "placement-milp" / "reference.json").read_text())[name]
    card = MODELS["llama1_30b" if "30b" in name else "llama2_70b"]
    cluster = uniform([kind.lower() for kind in reference["node_types"]], LINK)
    held = {f"n{i}": (start, end) for i, (start, end) in enumerate(reference["published_placement_start_end"])}
    profiles = read_profiles(data / "gpu-serving-profiles", card.name)
    return Case(name, card, profiles, cluster, held, reference["published_incumbent_tokens_per_s"])
