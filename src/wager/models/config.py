"""Reads config.json and generation_config.json; small helpers that the families use to interpret them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wager.errors import CheckpointError


def read_json(path: Path, required: bool = True) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise CheckpointError(f"{path} is missing: is this a model directory in Hugging Face layout?") from None
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def rope_scaling(raw: dict[str, Any]) -> dict[str, Any]:
    """The scaling dictionary, under its old name (rope_scaling) or its new one (rope_parameters)."""
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    if raw.get("original_max_position_embeddings"):
        scaling.setdefault("original_max_position_embeddings", raw["original_max_position_embeddings"])
    return scaling


def rope_theta(raw: dict[str, Any], default: float = 10000.0) -> float:
    return float(rope_scaling(raw).get("rope_theta") or raw.get("rope_theta") or default)


def rotary_dim(raw: dict[str, Any], head_dim: int) -> int:
    """Widths of a head that turn, where only a part does."""
    factor = (
        rope_scaling(raw).get("partial_rotary_factor")
        or raw.get("partial_rotary_factor")
        or raw.get("rotary_pct")
        or 1.0
    )
    return int(head_dim * factor)


def need(raw: dict[str, Any], key: str) -> Any:
    """A field that every checkpoint of the family has. Raises CheckpointError naming it."""
    if raw.get(key) is None:
        raise CheckpointError(
            f"config.json lacks {key!r}, which {raw.get('architectures', ['this architecture'])[0]} needs"
        )
    return raw[key]


def layer_windows(raw: dict[str, Any], window: int | None) -> tuple[int | None, ...]:
    """One window per layer, from `layer_types` where the configuration lists them, else the same for all."""
    layers = need(raw, "num_hidden_layers")
    kinds = raw.get("layer_types")
    if kinds is None:
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
