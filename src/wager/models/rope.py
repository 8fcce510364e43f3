"""Rotary position embeddings: how a checkpoint's `rope_scaling` turns into angles.

Shape legend: T tokens, R rotated pairs of a head.
Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071), LongRoPE (arXiv 2402.13753), Llama 3 and NTK-aware scaling as published
in the models' configurations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wager.errors import CheckpointError


@dataclass(frozen=True)
class RopeConfig:
    """What the angles depend on.

    rotary_dim: widths of a head that turn. scaling: the checkpoint's rope_scaling / rope_parameters dictionary, empty for plain rope.
    max_positions: longest position of the checkpoint; original_positions: of its pre-training, where the scaling needs it.
    """

    rotary_dim: int
    theta: float = 10000.0
    scaling: dict[str, Any] = field(default_factory=dict)
    max_positions: int = 4096

    @property
    def kind(self) -> str:
        return self.scaling.get("rope_type", self.scaling.get("type", "default")) or "default"

    @property
    def original_positions(self) -> int:
        return int(self.scaling.get("original_max_position_embeddings") or self.max_positions)


class Rope(nn.Module):
    """Angles of a batch: `cos_TR, sin_TR = rope(positions_T)`, float32, computed once per step and shared by the layers."""

    def __init__(self, config: RopeConfig):
        super().__init__()
        self.config = config
        self.rebuild()

    frequencies_R: Tensor
    short_frequencies_R: Tensor | None

    def rebuild(self, device: torch.device | str | None = None) -> None:
        """Compute the frequency tables, on `device` if given."""
        config = self.config
        frequencies, self.attention_factor = _KINDS.get(config.kind, _unknown)(config)
        self.register_buffer("frequencies_R", frequencies.to(device), persistent=False)
        short = _longrope_frequencies(config, "short_factor") if config.kind == "longrope" else None
        self.register_buffer("short_frequencies_R", None if short is None else short.to(device), persistent=False)

    def forward(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        angles_TR = positions_T[:, None].float() * self._frequencies(positions_T)
        return angles_TR.cos() * self.attention_factor, angles_TR.sin() * self.attention_factor

    def _frequencies(self, positions_T: Tensor) -> Tensor:
        # LongRoPE switches tables by length. A cache holds keys of both sides of the switch, so, as in other paged engines, the
        # choice is made once, by the longest sequence the engine admits.
        if self.short_frequencies_R is not None and self.config.max_positions <= self.config.original_positions:
            return self.short_frequencies_R
        return self.frequencies_R


def _inverse_frequencies(dim: int, theta: float) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _default(config: RopeConfig) -> tuple[Tensor, float]:
    return _inverse_frequencies(config.rotary_dim, config.theta).float(), 1.0


def _linear(config: RopeConfig) -> tuple[Tensor, float]:
    return (_inverse_frequencies(config.rotary_dim, config.theta) / config.scaling["factor"]).float(), 1.0


def _dynamic(config: RopeConfig) -> tuple[Tensor, float]:
    """Dynamic NTK: below the trained length the angles are the plain ones.

    A paged cache cannot rescale keys it already holds, so within the checkpoint's positions (the engine admits no longer requests)
    the plain angles apply, which is what a growing single sequence sees in `transformers` too.
    """
    return _default(config)


def _llama3(config: RopeConfig) -> tuple[Tensor, float]:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended."""
    s, plain = config.scaling, _inverse_frequencies(config.rotary_dim, config.theta)
    low, high, original = s["low_freq_factor"], s["high_freq_factor"], config.original_positions
    wavelength = 2 * math.pi / plain
    blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (plain * (blend + (1 - blend) / s["factor"])).float(), 1.0


def _yarn(config: RopeConfig) -> tuple[Tensor, float]:
    """YaRN: interpolate the dimensions that turn less than once over the original context, extrapolate the fast ones."""
    s, dim = config.scaling, config.rotary_dim
    plain = _inverse_frequencies(dim, config.theta)
    factor = s.get("factor") or config.max_positions / config.original_positions

    def dimension_of(rotations: float) -> float:
        return dim * math.log(config.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension_of(s.get("beta_fast") or 32), dimension_of(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return (plain * (1 - ramp) + plain / factor * ramp).float(), _yarn_attention_factor(s, factor)


def _yarn_attention_factor(scaling: dict[str, Any], factor: float) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all)
    return yarn_mscale(factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature correction, also applied to DeepSeek's softmax scale."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(config: RopeConfig) -> tuple[Tensor, float]:
    s = config.scaling
    ratio = s.get("factor") or config.max_positions / config.original_positions
    factor = s.get("attention_factor")
    if factor is None:
        factor = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(config.original_positions))
    return _longrope_frequencies(config, "long_factor"), float(factor)


def _longrope_frequencies(config: RopeConfig, which: str) -> Tensor:
    plain = _inverse_frequencies(config.rotary_dim, config.theta)
    return (plain / torch.tensor(config.scaling[which], dtype=torch.float64)).float()


def _unknown(config: RopeConfig) -> tuple[Tensor, float]:
    raise CheckpointError(f"rope type {config.kind!r} is not supported; supported: {', '.join(sorted(_KINDS))}")


_KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
