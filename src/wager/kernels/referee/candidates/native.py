"""The house's own C++ kernels as candidates."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from wager.kernels import native
from wager.kernels.native_linear import NativeLinear


class Linear(nn.Module):
    """Packed at the first call; a change of the weights packs again."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features).uniform_(-1, 1) / math.sqrt(in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.packed, self.version = None, -1

    def forward(self, x: Tensor) -> Tensor:
        version = self.weight._version + (0 if self.bias is None else self.bias._version)
        if self.packed is None or self.version != version:
            self.packed, self.version = (
                NativeLinear(self.weight.detach(), None if self.bias is None else self.bias.detach()),
                version,
            )
        return self.packed(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return native.rms_norm(x, self.weight, self.eps)


class SiluAndMul(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return native.silu_mul(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


class GeluAndMul(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return native.gelu_tanh_mul(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


class RotaryEmbedding(nn.Module):
    def forward(self, x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        return native.apply_rope(x_THK, cos_TR, sin_TR)
