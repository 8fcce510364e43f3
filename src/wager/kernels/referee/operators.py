"""The operators that are judged: single kernels (level 1) as modules, with the constructor and forward of the module a model would hold.

These are the baselines, in plain torch. A candidate is a file with a class of the same name, constructor, parameters and forward.
Inputs and outputs are tensors; nothing is changed in place.

Shape legend: B batch, T tokens, D width, H heads, K key width, V value width, N state width, E experts, C channels, Y/X image sides.
"""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Operator(nn.Module):
    """Base of every judged operator. Remembers its constructor's arguments as `recipe`, so that capture can write them down."""

    recipe: dict[str, Any]

    def __init_subclass__(cls) -> None:
        original = cls.__init__

        @functools.wraps(original)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if type(self) is cls:
                bound = inspect.signature(original).bind(self, *args, **kwargs)
                bound.apply_defaults()
                self.recipe = {k: v for k, v in bound.arguments.items() if k not in ("self", "args", "kwargs")}

        cls.__init__ = init


class Linear(Operator):
    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / math.sqrt(in_features))
        self.bias = nn.Parameter(torch.randn(out_features) * 0.1) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Embedding(Operator):
    def __init__(self, num_rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class EmbeddingBag(Operator):
    """Sum of each bag's rows; bags end where the next offset begins."""

    def __init__(self, num_rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_rows, width))

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return F.embedding_bag(ids, self.weight, offsets, mode="sum")


class RMSNorm(Operator):
    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(1 + 0.1 * torch.randn(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class LayerNorm(Operator):
    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.bias, self.eps = (
            nn.Parameter(1 + 0.1 * torch.randn(width)),
            nn.Parameter(0.1 * torch.randn(width)),
            eps,
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class GroupNorm(Operator):
    def __init__(self, groups: int, channels: int, eps: float = 1e-5):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight, self.bias = (
            nn.Parameter(1 + 0.1 * torch.randn(channels)),
            nn.Parameter(0.1 * torch.randn(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)


class BatchNorm2d(Operator):
    """With the running statistics, as in inference."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = (
            nn.Parameter(1 + 0.1 * torch.randn(channels)),
            nn.Parameter(0.1 * torch.randn(channels)),
        )
        self.mean, self.variance = nn.Parameter(0.1 * torch.randn(channels)), nn.Parameter(0.5 + torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance, self.weight, self.bias, False, 0.0, self.eps)


class GlobalResponseNorm(Operator):
    """ConvNeXt V2's (arXiv 2301.00808), channels last."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(channels)), nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=(1, 2), keepdim=True)
        return self.weight * (x * size / (size.mean(-1, keepdim=True) + 1e-6)) + self.bias + x


class L2Norm(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


class GELU(Operator):
    def __init__(self, approximate: str = "none"):
        super().__init__()
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate=self.approximate)


class QuickGELU(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SiLU(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class ReLU(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class Sigmoid(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


class SiluAndMul(Operator):
    """silu(first half) * second half."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up


class GeluAndMul(Operator):
    """gelu(first half, tanh form) * second half."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.gelu(gate, approximate="tanh") * up


class SquaredReluAndMul(Operator):
    """relu(first half)² * second half (BitNet b1.58)."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.relu(gate).square() * up


class Softmax(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


class RotaryEmbedding(Operator):
    """Rotates the first 2 R widths of every head by the token's angles; pairs are (i, i + R)."""

    def forward(self, x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        rotated, rest = x_THK[..., : 2 * cos_TR.shape[-1]], x_THK[..., 2 * cos_TR.shape[-1] :]
        a, b = rotated.chunk(2, -1)
        cos, sin = cos_TR[:, None], sin_TR[:, None]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


class DenseAttention(Operator):
    """softmax(scale q kᵀ + bias) v over [B, H, T, K]; fewer key heads serve groups of query heads."""

    def __init__(self, scale: float, causal: bool = False):
        super().__init__()
        self.scale, self.causal = scale, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=self.causal, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )


class SinkAttention(Operator):
    """Causal attention whose softmax has one more score per head that carries no value (gpt-oss)."""

    def __init__(self, heads: int, scale: float):
        super().__init__()
        self.sinks, self.scale = nn.Parameter(torch.randn(heads)), scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * self.scale
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
        sinks = self.sinks[:, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1] @ v


class Conv1d(Operator):
    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.stride, self.padding = stride, padding
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel) / math.sqrt(in_channels * kernel))
        self.bias = nn.Parameter(0.1 * torch.randn(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, self.bias, self.stride, self.padding)


class Conv2d(Operator):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = True,
    ):
        super().__init__()
        self.stride, self.padding, self.groups = stride, padding, groups
        self.weight = nn.Parameter(
            torch.randn(out_channels, in_channels // groups, kernel, kernel)
            / (kernel * math.sqrt(in_channels // groups))
        )
        self.bias = nn.Parameter(0.1 * torch.randn(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)


class Conv3d(Operator):
    """Patches of a video: kernel equals stride."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(out_channels, in_channels, kernel, kernel, kernel) / math.sqrt(in_channels * kernel**3)
        )
        self.bias = nn.Parameter(0.1 * torch.randn(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv3d(x, self.weight, self.bias, self.weight.shape[-1])


class CausalConv1d(Operator):
    """Depthwise convolution over the past, with silu: [B, C, T]."""

    def __init__(self, channels: int, kernel: int = 4):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(channels, 1, kernel) / kernel),
            nn.Parameter(0.1 * torch.randn(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.shape[-1]
        return F.silu(F.conv1d(F.pad(x, (kernel - 1, 0)), self.weight, self.bias, groups=x.shape[1]))


class GlobalAvgPool2d(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-2, -1))


class MaxPool2d(Operator):
    def __init__(self, kernel: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, self.kernel, self.stride, self.padding)


class Upsample(Operator):
    """Nearest neighbour, twice the sides."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest")


class SinusoidalEmbedding(Operator):
    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=t.dtype, device=t.device) / half)
        return torch.cat((torch.cos(t[:, None] * rates), torch.sin(t[:, None] * rates)), -1)
