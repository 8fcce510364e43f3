"""LoRA adapters (arXiv 2106.09685) in PEFT's format, applied per request inside one batch.

Shape legend: T tokens, I linear input, O linear output, A adapter rank.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from wager.errors import CheckpointError
from wager.models.base import Model
from wager.models.config import read_json
from wager.models.layers import Linear, activation_dtype

REFUSED = {"use_dora": "DoRA", "modules_to_save": "fully trained modules", "lora_bias": "trained biases"}


@dataclass(frozen=True)
class LoraAdapter:
    """weights: linear's checkpoint path → (down [A, I], up [O, A] already scaled by alpha / rank).

    version: no other loading of an adapter has it, so that KV computed with one is never taken for that of its successor by name.
    """

    path: Path
    weights: dict[str, tuple[Tensor, Tensor]]
    version: int = field(default_factory=itertools.count(1).__next__)


def load_adapter(path: Path | str, model: Model) -> LoraAdapter:
    """Read adapter_config.json and adapter_model.safetensors. Raises CheckpointError naming what does not fit the model."""
    path = Path(path)
    config = read_json(path / "adapter_config.json")
    if config.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{path} is a {config['peft_type']} adapter; only LORA is supported")
    for key, what in REFUSED.items():
        if config.get(key):
            raise CheckpointError(f"{path} uses {what} ({key}), which is not supported")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path} trains biases (bias={config['bias']!r}), which is not supported")
    try:
        tensors = load_file(path / "adapter_model.safetensors")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / 'adapter_model.safetensors'} cannot be read: {error}") from None
    shapes = linear_shapes(model)
    weights = {}
    for name, down in tensors.items():
        if ".lora_B." in name and name.replace(".lora_B.", ".lora_A.") in tensors:
            continue
        if ".lora_A." not in name:
            raise CheckpointError(
                f"{path} holds {name!r}, which is no LoRA weight of a linear layer and would be ignored"
            )
        target = name.split(".lora_A.")[0].removeprefix("base_model.model.")
        up = tensors.get(name.replace(".lora_A.", ".lora_B."))
        weights[target] = _checked(path, target, down, up, shapes.get(target), config, model)
    if not weights:
        raise CheckpointError(f"{path} holds no LoRA weights")
    return LoraAdapter(path, weights)


def _checked(
    path: Path, target: str, down: Tensor, up: Tensor | None, shape: tuple[int, int] | None, config: dict, model: Model
) -> tuple[Tensor, Tensor]:
    if shape is None:
        raise CheckpointError(f"{path} adapts {target!r}, which this model does not have or does not adapt")
    if up is None or (up.shape[0], down.shape[1]) != shape or up.shape[1] != down.shape[0]:
        found = (None if up is None else tuple(up.shape), tuple(down.shape))
        raise CheckpointError(f"{path}: LoRA of {target!r} has shapes {found}, the model's linear is {shape}")
    rank = down.shape[0]
    patterns = config.get("alpha_pattern") or {}
    matching = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", target))
    alpha = next(matching, config.get("lora_alpha", rank))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    weight = next(iter(model.parameters()))
    dtype = activation_dtype(weight)
    return down.to(weight.device, dtype).contiguous(), (up.to(weight.device, dtype) * scale).contiguous()


def linear_shapes(model: Model) -> dict[str, tuple[int, int]]:
    """(output, input) of every linear that adapters reach, by its checkpoint path; they do not reach the output head."""
    shapes = {}
    for module in model.modules():
        if isinstance(module, Linear) and module is not getattr(model, "head", None):
            shapes |= {name: (width, module.in_features) for name, width in module.parts}
    return shapes


class AdapterBatch:
    """The adapters of one batch: rows of the same adapter are gathered, so each distinct adapter costs two matrix products a linear."""

    def __init__(self, adapters: Sequence[LoraAdapter | None], span_starts: Tensor):
        starts = span_starts.tolist()
        rows: dict[int, list[Tensor]] = {}
        self._adapters = {id(a): a for a in adapters if a is not None}
        for adapter, first, last in zip(adapters, starts, starts[1:], strict=False):
            if adapter is not None:
                rows.setdefault(id(adapter), []).append(torch.arange(first, last))
        self._rows = {key: torch.cat(parts) for key, parts in rows.items()}

    def __call__(self, name: str, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        for key, adapter in self._adapters.items():
            weights = adapter.weights.get(name)
            if weights is None:
                continue
            down_AI, up_OA = weights
            rows = self._rows[key].to(x_TI.device)
            y_TO.index_add_(0, rows, (x_TI.index_select(0, rows) @ down_AI.T @ up_OA.T).to(y_TO.dtype))
        return y_TO
