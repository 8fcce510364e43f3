"""Loads a checkpoint in Hugging Face layout into a model, tensor by tensor from memory-mapped safetensors.

Weights are never unpickled: a directory that only has .bin files is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wager import kernels
from wager.errors import CheckpointError, UsageError
from wager.kernels.quantize import FILE_MODES, QuantizedWeight, stack
from wager.models.base import Model
from wager.models.config import read_json
from wager.models.layers import Linear, init_weights
from wager.models.registry import family_of
from wager.native.memory import give_back_freed_memory

Pieces = list[tuple[str, int]]  # checkpoint tensors stacked in a parameter: (name, rows)
DESCRIPTIONS = ("*.json", "*.jinja")
WHOLE = (*DESCRIPTIONS, "*.safetensors")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, and the raw config.json and generation_config.json beside it."""

    model: Model
    config: dict[str, Any]
    generation_config: dict[str, Any]
    path: Path


def load_model(
    name: str | Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    packed: bool = False,
    quantization: str | None = None,
    load_format: str = "auto",
) -> LoadedModel:
    """Load a directory in Hugging Face layout (float, GPTQ or AWQ), a GGUF file or a directory with one, or a hub id.

    dtype is "auto" (the checkpoint's), "float32", "bfloat16", "float16" or torch's own. With `packed` every linear goes to the kernels as
    soon as it is read, in the mode `quantization` (None: as `usual_mode` says, codes of quantized files as they are), so that at most one
    linear exists in another form beside its packed one. load_format "dummy" reads config.json only and fills the model with random weights
    on the device (`dummy.py`). Raises CheckpointError naming the architecture, tensor, shape or file that is wrong.
    """
    if load_format == "dummy":
        from wager.models.dummy import dummy_model

        return dummy_model(resolve(name, DESCRIPTIONS), dtype, torch.device(device), packed, quantization)
    path = resolve(name)
    raw, generation, checkpoint = open_checkpoint(path)
    with checkpoint:
        asked = asked_dtype(dtype)
        target = asked or checkpoint_dtype(raw)
        with torch.device("meta"):
            model = family_of(raw).from_checkpoint(raw, target)
        as_stored = asked is None and path.is_file()  # a GGUF file says per tensor what it is
        packing = Packing(quantization, as_stored) if packed else None
        load_tensors(model, checkpoint, torch.device(device), packing)
    return LoadedModel(model.eval(), raw, generation, path)


def open_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """(config.json, generation_config.json, tensors) of a model directory or GGUF file."""
    if path.is_file():
        from wager.models.formats.gguf import GGUFCheckpoint

        file = GGUFCheckpoint(path)
        return file.config(), file.generation_config(), file
    raw = read_json(path / "config.json")
    generation = read_json(path / "generation_config.json", required=False)
    if raw.get("quantization_config") is None:
        return raw, generation, Checkpoint(path)
    from wager.models.formats.packed_ints import PackedCheckpoint

    return raw, generation, PackedCheckpoint(path, raw, lambda: Checkpoint(path))


def build_model(
    raw: dict[str, Any], dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None, std: float = 0.02
) -> Model:
    """A model of the given config.json with random weights; for cost measurements and tests."""
    model = family_of(raw).from_checkpoint(raw, dtype)
    init_weights(model, std, generator or torch.Generator().manual_seed(0))
    return model.eval()


def resolve(name: str | Path, patterns: tuple[str, ...] = WHOLE) -> Path:
    """The local directory or GGUF file of a model: the path itself, or the hub's snapshot (its cache when offline) of the files that match."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.is_dir():
        files = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise CheckpointError(f"{path} holds {len(files)} GGUF files; name one of them, e.g. {files[0]}")
        return files[0] if files else path
    if path.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") != 1:
        raise CheckpointError(f"{name} is neither a directory nor a hub id of the form owner/name, nor a .gguf file")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{name} cannot be fetched from the hub ({reason}); pass a local directory") from None


def asked_dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """None for "auto"."""
    return dtype if isinstance(dtype, torch.dtype) else None if dtype == "auto" else checkpoint_dtype({"dtype": dtype})


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


@dataclass(frozen=True)
class Packing:
    """How linears are packed while they are read. as_stored: float tensors keep the file's own type."""

    quantization: str | None
    as_stored: bool = False

    def of_codes(self, weight: QuantizedWeight, path: Path) -> QuantizedWeight:
        """A file's codes, with int8 activations where the mode has them. Raises UsageError for a mode that would round them again."""
        if self.quantization is None:
            return weight
        if not self.quantization.endswith("a8"):
            raise UsageError(
                f"{path} is quantized already, quantization={self.quantization!r} would round it twice; leave it out, or use w8a8 or w4a8 "
                "to keep its weights and round activations to int8",
                param="quantization",
            )
        return replace(weight, mode=FILE_MODES[weight.mode])


@torch.no_grad()
def load_tensors(model: Model, checkpoint: Any, device: torch.device, packing: Packing | None = None) -> None:
    """Give every parameter of a model on the meta device its memory and values, module by module, a tied one once."""
    owners, _held = owners_of(model)
    first: dict[int, Pieces] = {}
    for module in model.modules():
        for parameter, pieces in pieces_of(module):
            first.setdefault(id(parameter), pieces)
    pieces_of_linear = {m: first[id(m.weight)] for m in model.modules() if isinstance(m, Linear)}
    for module in list(model.modules()):
        packs = packing is not None and isinstance(module, Linear)
        for parameter, pieces in list(pieces_of(module)):
            if not parameter.is_meta or (packs and parameter is module.weight):
                continue
            made = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
            _copy(made, _read(model, checkpoint, pieces, made.shape))
            for owner, name in owners[id(parameter)]:
                setattr(owner, name, made)
        if packs:
            assert isinstance(module, Linear) and packing is not None
            _pack(
                module,
                _read(model, checkpoint, pieces_of_linear[module], module.weight.shape),
                checkpoint.path,
                device,
                packing,
            )
            give_back_freed_memory()
        rebuild = getattr(module, "rebuild", None)
        if rebuild is not None:
            rebuild(device)


def owners_of(model: Model) -> tuple[dict[int, list[tuple[nn.Module, str]]], list[nn.Parameter]]:
    """Where each parameter stands, by its identity; and the parameters, whose identities are not used again while they are held."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    held = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            held.append(parameter)
            owners.setdefault(id(parameter), []).append((module, name))
    return owners, held


@torch.no_grad()
def fill(model: Model, checkpoint: Any) -> None:
    """Copy the checkpoint's values into parameters that have memory already, each once."""
    filled: set[int] = set()
    for module in model.modules():
        for parameter, pieces in pieces_of(module):
            if id(parameter) not in filled:
                filled.add(id(parameter))
                _copy(parameter, _read(model, checkpoint, pieces, parameter.shape))


def open_plain(path: Path, what: str) -> tuple[dict[str, Any], Checkpoint]:
    """config.json and tensors of a directory of float tensors. Raises UsageError that names `what` cannot take anything else."""
    raw, _, checkpoint = open_checkpoint(path)
    if not isinstance(checkpoint, Checkpoint):
        with checkpoint:
            raise UsageError(f"{what} reads safetensors of float weights only, and {path} is GGUF, GPTQ or AWQ")
    return raw, checkpoint


def _read(model: Model, checkpoint: Any, pieces: Pieces, shape: torch.Size) -> list[Tensor | QuantizedWeight]:
    """The checkpoint's tensors that are stacked in a parameter. A family may translate names and layouts in `checkpoint_tensor`."""
    found = []
    for name, rows in pieces:
        tensor = model.checkpoint_tensor(name, checkpoint)
        expected = (rows, *shape[1:])
        if tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"tensor {name!r} of {checkpoint.path} has shape {tuple(tensor.shape)}, expected {expected}"
            )
        if isinstance(tensor, Tensor) and tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"tensor {name!r} of {checkpoint.path} is {str(tensor.dtype).removeprefix('torch.')}, a quantized weight without "
                "its scales; use a float32, bfloat16 or float16 checkpoint"
            )
        found.append(tensor)
    return found


def _copy(target: Tensor, parts: list[Tensor | QuantizedWeight]) -> None:
    start = 0
    for part in parts:
        values = part if isinstance(part, Tensor) else part.dequantized()
        target[start : start + len(values)].copy_(values)
        start += len(values)


def _pack(
    linear: Linear, parts: list[Tensor | QuantizedWeight], path: Path, device: torch.device, packing: Packing
) -> None:
    codes = [part for part in parts if isinstance(part, QuantizedWeight)]
    if len(codes) == len(parts):
        return linear.pack(packing.of_codes(codes[0] if len(codes) == 1 else stack(codes), path).to(device))
    stored = {part.dtype for part in parts if isinstance(part, Tensor)}
    same = packing.as_stored and not codes and len(stored) == 1
    dtype = stored.pop() if same else linear.weight.dtype
    weight = torch.empty(linear.weight.shape, dtype=dtype, device=device)
    _copy(weight, parts)
    linear.pack(weight, packing.quantization or kernels.usual_mode(dtype, device))


def pieces_of(module: nn.Module) -> Iterator[tuple[Tensor, Pieces]]:
    """The module's own parameters, each with the checkpoint tensors that are stacked in it: (name, rows)."""
    parts = getattr(module, "parts", None)
    if parts is None:
        return
    for kind, parameter in module.named_parameters(recurse=False):
        yield parameter, [(f"{path}.{kind}", rows) for path, rows in parts]
