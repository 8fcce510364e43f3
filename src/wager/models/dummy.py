"""Models with random weights, made where they will be used: for measuring a model's speed without its checkpoint.

Only config.json is read. Matrices are Normal(0, 0.02), norms are neutral, biases and other vectors zero; every number depends on a fixed seed,
the device's kind and the order of the model's parameters. The text such a model writes means nothing; what a step costs is the same.

vLLM has the same under the same name (`load_format="dummy"`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from wager import kernels
from wager.errors import CheckpointError, UsageError
from wager.models.base import Model
from wager.models.config import read_json
from wager.models.layers import LayerNorm, Linear, RMSNorm
from wager.models.loader import LoadedModel, asked_dtype, checkpoint_dtype, owners_of
from wager.models.registry import family_of
from wager.native.memory import give_back_freed_memory

STD, SEED = 0.02, 0


def dummy_model(
    path: Path, dtype: torch.dtype | str, device: torch.device, packed: bool, quantization: str | None
) -> LoadedModel:
    """A model of path/config.json; the other arguments as `load_model` has them. At most one linear exists twice at a time.

    Raises CheckpointError without a config.json, UsageError for one that describes quantized weights.
    """
    if path.is_file():
        raise CheckpointError(f'load_format "dummy" reads a config.json, and {path} is one file; name a directory')
    raw = read_json(path / "config.json")
    if raw.get("quantization_config") is not None:
        raise UsageError(
            f'load_format "dummy" makes float weights, and {path / "config.json"} asks for quantized ones: remove its '
            "quantization_config and give quantization=",
            param="load_format",
        )
    with torch.device("meta"):
        model = family_of(raw).from_checkpoint(raw, asked_dtype(dtype) or checkpoint_dtype(raw))
    fill_randomly(model, device, packed, quantization)
    generation = read_json(path / "generation_config.json", required=False)
    return LoadedModel(model.eval(), raw, generation, path)


@torch.no_grad()
def fill_randomly(model: Model, device: torch.device, packed: bool, quantization: str | None) -> None:
    """Give every parameter of a model on the meta device memory and values, a tied one once; pack the linears if asked."""
    generator = torch.Generator(device).manual_seed(SEED)
    owners, _held = owners_of(model)
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                made = nn.Parameter(_values(module, name, parameter, device, generator), parameter.requires_grad)
                for owner, own_name in owners[id(parameter)]:
                    setattr(owner, own_name, made)
        if packed and isinstance(module, Linear):
            module.prepack(quantization or kernels.usual_mode(module.weight.dtype, device))
            give_back_freed_memory()
        rebuild = getattr(module, "rebuild", None)
        if rebuild is not None:
            rebuild(device)


def _values(
    module: nn.Module, name: str, parameter: Tensor, device: torch.device, generator: torch.Generator
) -> Tensor:
    made = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    if parameter.dim() >= 2:
        return made.normal_(0.0, STD, generator=generator)
    if name == "weight" and isinstance(module, (RMSNorm, LayerNorm)):
        return made.fill_(1.0 - getattr(module, "offset", 0.0))
    return made.zero_()
