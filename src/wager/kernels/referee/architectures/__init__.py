"""Small faithful definitions of the representative architectures, with random weights, for capturing what operators really see.

`build(name)` makes the network, `inputs(name, size)` its inputs at one of two sizes: "main" is captured and timed, "held_out" only checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from torch import Generator, Tensor, nn

from wager.errors import UsageError

FAMILIES = {
    "Dense & MoE LLMs": "language",
    "Linear Attention & New Archs": "sequence",
    "Vision / Video / Audio": "generative",
    "Multimodal & Encoders": "encoders",
    "Edge & Detection": "edge",
    "3D / Robotics / Science": "science",
    "Recommendation & Specialized": "specialised",
    "World Models": "world",
}


@dataclass(frozen=True)
class Architecture:
    """`inputs(generator, held_out)` are the network's positional inputs."""

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[Generator, bool], tuple[Tensor, ...]]


def architectures() -> dict[str, Architecture]:
    """All of them by name, in the order of the families."""
    found: dict[str, Architecture] = {}
    for family, module in FAMILIES.items():
        entries = import_module(f"wager.kernels.referee.architectures.{module}").ENTRIES
        found |= {name: Architecture(name, family, build, inputs) for name, (build, inputs) in entries.items()}
    return found


def architecture(name: str) -> Architecture:
    known = architectures()
    if name not in known:
        raise UsageError(f"architecture {name!r} is unknown; use one of {', '.join(known)}")
    return known[name]
