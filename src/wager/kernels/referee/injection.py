"""Puts a candidate's operators into the engine of this process: WAGER_CANDIDATES names the file, `registry` installs it when imported.

The fused block kernels step aside, so that the candidate is what runs; `active` says which operators were taken from it.
"""

from __future__ import annotations

import os
import types
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wager.errors import UsageError

VARIABLE = "WAGER_CANDIDATES"
INJECTABLE = ("Linear", "RMSNorm", "SiluAndMul", "GeluAndMul", "RotaryEmbedding")
active: list[str] = []


class UnfusedLinear:
    """A packed linear whose followers are operators of their own."""

    def __init__(self, linear: Any, registry: MutableMapping[str, Any]):
        self.linear, self.registry = linear, registry

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes

    def __call__(self, x_TI: Tensor) -> Tensor:
        return self.linear(x_TI)

    def add(self, x_TI: Tensor, residual_TO: Tensor) -> Tensor:
        return residual_TO + self.linear(x_TI)

    def gated(self, x_TI: Tensor, activation: str) -> Tensor:
        return self.registry["silu_mul" if activation == "silu" else "gelu_tanh_mul"](self.linear(x_TI))


class CandidateLinear:
    """The candidate's Linear over a checkpoint's weight, in float32."""

    def __init__(self, cls: type[nn.Module], weight_OI: Tensor, bias_O: Tensor | None):
        self.module = cls(weight_OI.shape[1], weight_OI.shape[0], bias_O is not None).eval().requires_grad_(False)
        state = {"weight": weight_OI.float()} | ({} if bias_O is None else {"bias": bias_O.float()})
        self.module.load_state_dict(state)
        self.nbytes = sum(t.nbytes for t in state.values())

    def __call__(self, x_TI: Tensor) -> Tensor:
        return self.module(x_TI)


def load_classes(path: Path) -> dict[str, type[nn.Module]]:
    """The injectable classes that a file defines. Raises UsageError when there is none."""
    module = types.ModuleType("candidate")
    try:
        exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    except OSError as error:
        raise UsageError(f"{VARIABLE}={path} cannot be read: {error}") from None
    found = {name: vars(module)[name] for name in INJECTABLE if name in vars(module)}
    if not found:
        raise UsageError(f"{path} defines none of {', '.join(INJECTABLE)}; only these can be put into the engine")
    return found


def install(registry: MutableMapping[str, Any]) -> None:
    """Replace functions of the registry by the candidate's operators."""
    classes = load_classes(Path(os.environ[VARIABLE]))
    active[:] = sorted(classes)
    pack = registry["pack_linear"]
    for name, stateless in (
        ("SiluAndMul", "silu_mul"),
        ("GeluAndMul", "gelu_tanh_mul"),
        ("RotaryEmbedding", "apply_rope"),
    ):
        if name in classes:
            registry[stateless] = _stateless(classes[name](), registry[stateless])
    if "RMSNorm" in classes:
        _install_norm(classes["RMSNorm"], registry)

    def pack_linear(weight_OI: Tensor, bias_O: Tensor | None = None, quantization: str | None = None) -> UnfusedLinear:
        ours = "Linear" in classes and quantization is None
        return UnfusedLinear(
            CandidateLinear(classes["Linear"], weight_OI, bias_O) if ours else pack(weight_OI, bias_O, quantization),
            registry,
        )

    registry["pack_linear"] = pack_linear
    registry["block_input"] = registry["block_output"] = lambda *args, **kwargs: None


def _stateless(module: nn.Module, fallback: Any) -> Any:
    """Arguments beyond the tensors (interleaved rotation) are not part of the operator and go to the house's own."""

    def operator(*args: Any, **kwargs: Any) -> Any:
        known = not kwargs and all(isinstance(a, Tensor) for a in args)
        return module(*args) if known else fallback(*args, **kwargs)

    return operator


def _install_norm(cls: type[nn.Module], registry: MutableMapping[str, Any]) -> None:
    modules: dict[tuple[int, float, float], nn.Module] = {}

    def rms_norm(x: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        key = (weight_D.data_ptr(), eps, offset)
        if key not in modules:
            modules[key] = cls(len(weight_D), eps).eval().requires_grad_(False)
            modules[key].load_state_dict({"weight": offset + weight_D.float()})
        return modules[key](x)

    def rms_norm_residual(
        x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        total_TD = torch.add(residual_TD, x_TD)
        return rms_norm(total_TD, weight_D, eps, offset), total_TD

    registry["rms_norm"], registry["rms_norm_residual"] = rms_norm, rms_norm_residual
