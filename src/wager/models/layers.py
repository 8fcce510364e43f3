"""Pieces that the families share. Each family's file reads as its mathematics; here are the parts below that.

A module that holds weights lists in `parts` where they stand in a checkpoint: (path without ".weight", rows), stacked in order.
Activations are float32 on a CPU, whatever the weights' dtype (the kernels widen weights in registers), and the weights' dtype on a GPU.

Shape legend: T tokens, D hidden, I/O linear input/output, H query heads, G key/value heads, K head width, R rotated pairs, F MLP width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wager import kernels
from wager.errors import CheckpointError
from wager.kernels.quantize import QuantizedWeight
from wager.models.base import Adapters


class Linear(nn.Module):
    """x W^T + b over one or several checkpoint linears stacked along the output.

    Adapters address the stacked linears by their path in `parts`.
    After `prepack` the weight lives in the kernel's layout and the module cannot be trained any more.
    """

    def __init__(
        self, in_features: int, parts: list[tuple[str, int]], bias: bool = False, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.parts, self.in_features = parts, in_features
        self.weight = nn.Parameter(torch.empty(sum(width for _, width in parts), in_features, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(self.weight.shape[0], dtype=dtype)) if bias else None
        self.packed = None

    def forward(self, x_TI: Tensor, adapters: Adapters | None = None) -> Tensor:
        if self.packed is not None:
            y_TO = self.packed(x_TI)
        else:
            y_TO = F.linear(x_TI, self.weight.to(x_TI.dtype), None if self.bias is None else self.bias.to(x_TI.dtype))
        if adapters is not None:
            start = 0
            for name, width in self.parts:
                adapters(name, x_TI, y_TO[:, start : start + width])
                start += width
        return y_TO

    def prepack(self, quantization: str | None = None) -> None:
        """Hand the weight to the kernels and drop our copy: at most one tensor exists twice. Nothing to do when that has happened."""
        if self.packed is None:
            self.pack(self.weight.data, quantization)

    def pack(self, weight_OI: Tensor | QuantizedWeight, quantization: str | None = None) -> None:
        """Take a weight for the kernels, in place of our own parameter."""
        bias = None if self.bias is None else self.bias.data
        self.packed = kernels.pack_linear(weight_OI, bias, quantization)
        del self.weight
        self.register_parameter("weight", None)


class Embedding(nn.Module):
    """Rows of a table, gathered in the activation dtype."""

    def __init__(self, name: str, num_rows: int, width: int, dtype: torch.dtype | None = None):
        super().__init__()
        self.parts = [(name, num_rows)]
        self.weight = nn.Parameter(torch.empty(num_rows, width, dtype=dtype))

    def forward(self, tokens_T: Tensor) -> Tensor:
        return kernels.embedding(tokens_T, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm; Gemma stores its weight as an offset from one."""

    def __init__(self, name: str, width: int, eps: float, offset: float = 0.0, dtype: torch.dtype | None = None):
        super().__init__()
        self.parts = [(name, width)]
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset, dtype=dtype))
        self.eps, self.offset = eps, offset

    def forward(self, x_TD: Tensor) -> Tensor:
        return kernels.rms_norm(x_TD, self.weight, self.eps, self.offset)

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(residual + x), residual + x)."""
        return kernels.rms_norm_residual(x_TD, residual_TD, self.weight, self.eps, self.offset)


class LayerNorm(nn.Module):
    """Mean-and-variance norm with weight and optional bias, in the activation dtype."""

    def __init__(self, name: str, width: int, eps: float, bias: bool = True, dtype: torch.dtype | None = None):
        super().__init__()
        self.parts = [(name, width)]
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(width, dtype=dtype)) if bias else None
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return kernels.layer_norm(x_TD, self.weight, self.bias, self.eps)


class MLP(nn.Module):
    """down(act(up(x))), the two-matrix form of GPT-2 and GPT-NeoX."""

    def __init__(self, up: str, down: str, hidden: int, width: int, activation: str, dtype: torch.dtype | None = None):
        super().__init__()
        self.up, self.down = Linear(hidden, [(up, width)], True, dtype), Linear(width, [(down, hidden)], True, dtype)
        self.approximate = _known(
            activation, {"gelu": "none", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_pytorch_tanh": "tanh"}
        )

    def forward(self, x_TD: Tensor, adapters: Adapters | None = None) -> Tensor:
        return self.down(F.gelu(self.up(x_TD, adapters), approximate=self.approximate), adapters)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up in one product. `activation` is silu or the tanh form of gelu."""

    def __init__(
        self,
        prefix: str,
        hidden: int,
        width: int,
        activation: str,
        dtype: torch.dtype | None = None,
        bias: bool = False,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ):
        super().__init__()
        gate, up, down = (f"{prefix}.{name}" for name in names)
        self.gate_up = Linear(hidden, [(gate, width), (up, width)], bias, dtype)
        self.down = Linear(width, [(down, hidden)], bias, dtype)
        tanh_forms = dict.fromkeys(("gelu_tanh", "gelu_new", "gelu_pytorch_tanh"), "gelu_tanh")
        self.activation = _known(activation, {"silu": "silu", **tanh_forms})
        self.combine = kernels.silu_mul if self.activation == "silu" else kernels.gelu_tanh_mul

    def forward(self, x_TD: Tensor, adapters: Adapters | None = None) -> Tensor:
        if adapters is None and self.gate_up.packed is not None:
            return self.down(self.gate_up.packed.gated(x_TD, self.activation))
        return self.down(self.combine(self.gate_up(x_TD, adapters)), adapters)


def _known(activation: str, supported: dict[str, Any]) -> Any:
    """Raises CheckpointError naming the activation and those that this layer has."""
    if activation not in supported:
        raise CheckpointError(f"activation {activation!r} is not supported; supported: {', '.join(supported)}")
    return supported[activation]


def activation_dtype(weight: Tensor) -> torch.dtype:
    return weight.dtype if weight.device.type == "cuda" else torch.float32


def split_heads(qkv_TO: Tensor, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views q_THK, k_TGK, v_TGK of a fused projection."""
    heads = qkv_TO.view(qkv_TO.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    return q, k, v


def init_weights(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """Normal(0, std) for every matrix, in module order; norms and biases keep their neutral values."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                noise = torch.randn(parameter.shape, generator=generator, device=generator.device, dtype=torch.float32)
                parameter.copy_(noise * std)
