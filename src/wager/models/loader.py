"""Loads a checkpoint in Hugging Face layout into a model, tensor by tensor from memory-mapped safetensors.

Weights are never unpickled: a directory that only has .bin files is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wager.errors import CheckpointError
from wager.models.base import Model
from wager.models.config import read_json
from wager.models.layers import init_weights
from wager.models.registry import family_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, and the raw config.json and generation_config.json beside it."""

    model: Model
    config: dict[str, Any]
    generation_config: dict[str, Any]
    path: Path


def load_model(name: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu") -> LoadedModel:
    """Load a directory or a hub id.

    dtype is "auto" (the checkpoint's), "float32", "bfloat16", "float16" or torch's own. Raises CheckpointError naming the architecture, tensor, shape or file that is wrong.
    """
    path = resolve(name)
    raw = read_json(path / "config.json")
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"{path} is quantized ({method}), which is not supported; use the float checkpoint it was made from"
        )
    target = dtype if isinstance(dtype, torch.dtype) else checkpoint_dtype(raw if dtype == "auto" else {"dtype": dtype})
    with torch.device("meta"):
        model = family_of(raw).from_checkpoint(raw, target)
    allocate(model, device)
    with Checkpoint(path) as checkpoint:
        fill(model, checkpoint)
    return LoadedModel(model.eval(), raw, read_json(path / "generation_config.json", required=False), path)


def build_model(
    raw: dict[str, Any], dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None, std: float = 0.02
) -> Model:
    """A model of the given config.json with random weights; for cost measurements and tests."""
    model = family_of(raw).from_checkpoint(raw, dtype)
    init_weights(model, std, generator or torch.Generator().manual_seed(0))
    return model.eval()


def resolve(name: str | Path) -> Path:
    """The local directory of a model: the path itself, or the hub's snapshot (its cache when offline)."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") != 1:
        raise CheckpointError(f"{name} is neither a directory nor a hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{name} cannot be fetched from the hub ({reason}); pass a local directory") from None


def checkpoint_dtype(raw: dict[str, Any]) -> torch.dtype:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(f"checkpoint dtype {name!r} is not supported; use float32, bfloat16 or float16")
    return dtype


class Checkpoint:
    """All tensors of a directory by name, memory-mapped."""

    def __init__(self, path: Path):
        self.path, self._stack = path, ExitStack()
        self._file_of: dict[str, Any] = {}
        for file in self._files():
            try:
                handle = self._stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} is damaged or truncated: {error}; download it again") from None
            self._file_of.update(dict.fromkeys(handle.keys(), handle))

    def _files(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
                raise CheckpointError(f"{index} has no weight_map of tensor names to file names; download it again")
            names = sorted(set(listed.values()))
        else:
            names = [p.name for p in sorted(self.path.glob("*.safetensors"))]
        if not names:
            pickled = any(self.path.glob("*.bin")) or any(self.path.glob("*.pt"))
            remedy = (
                "it only has pickled weights, which are never loaded: convert them to safetensors"
                if pickled
                else "none found"
            )
            raise CheckpointError(f"{self.path} has no *.safetensors: {remedy}")
        for name in names:
            if os.sep in name or not (self.path / name).is_file():
                raise CheckpointError(f"{self.path / name} is missing, though the index lists it; download it again")
        return [self.path / name for name in names]

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        return list(self._file_of)

    def tensor(self, name: str) -> Tensor:
        """Raises CheckpointError when it is missing or unreadable."""
        if name not in self._file_of:
            raise CheckpointError(f"tensor {name!r} is missing from {self.path}")
        try:
            return self._file_of[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor {name!r} of {self.path} cannot be read: {error}") from None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


@torch.no_grad()
def fill(model: Model, checkpoint: Checkpoint) -> None:
    """Copy every parameter from its tensors; a family may translate names and layouts in `checkpoint_tensor`."""
    done: set[int] = set()
    for module in model.modules():
        for parameter, pieces in pieces_of(module):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            start = 0
            for name, rows in pieces:
                tensor = model.checkpoint_tensor(name, checkpoint)
                target = parameter[start : start + rows]
                if tensor.shape != target.shape:
                    raise CheckpointError(
                        f"tensor {name!r} of {checkpoint.path} has shape {tuple(tensor.shape)}, expected {tuple(target.shape)}"
                    )
                if tensor.dtype not in FLOATS:
                    raise CheckpointError(
                        f"tensor {name!r} of {checkpoint.path} is {str(tensor.dtype).removeprefix('torch.')}, a quantized weight without "
                        "its scales; use a float32, bfloat16 or float16 checkpoint"
                    )
                target.copy_(tensor)
                start += rows


def pieces_of(module: nn.Module) -> Iterator[tuple[Tensor, list[tuple[str, int]]]]:
    """The module's own parameters, each with the checkpoint tensors that are stacked in it: (name, rows)."""
    parts = getattr(module, "parts", None)
    if parts is None:
        return
    for kind, parameter in module.named_parameters(recurse=False):
        yield parameter, [(f"{path}.{kind}", rows) for path, rows in parts]


def allocate(model: nn.Module, device: torch.device | str) -> None:
    """Give every meta parameter memory, a tied one once (`Module.to_empty` would untie it), and make the tables again."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
        rebuild = getattr(module, "rebuild", None)
        if rebuild is not None:
            rebuild(device)
