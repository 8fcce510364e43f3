"""The six workloads of the Mirage sheet: published shapes, weights as `nn.Linear` holds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wager.graph.operators import Shape


def norm(x: Tensor) -> Tensor:
    """RMSNorm without gain and epsilon, as in the published programs."""
    return F.rms_norm(x, (x.shape[-1],), eps=0.0)


def rmsnorm_matmul(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(norm(x), w)


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w) + F.linear(F.linear(x, a), b)


def ntrans(h: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    return norm(x + alpha * (norm(h) + x))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As published: no maximum is subtracted, and the scale is in the keys."""
    weights = torch.exp(q @ k.transpose(1, 2))
    return (weights / weights.sum(-1, keepdim=True)) @ v


def qk_norm_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(norm(q), k, v)


@dataclass(frozen=True)
class Workload:
    """`scales`: the standard deviation of each input. `max_block_ops`: the size that the search needs."""

    title: str
    group: str
    function: Callable[..., Tensor]
    shapes: tuple[Shape, ...]
    scales: tuple[float, ...]
    max_block_ops: int


def linear(out: int, hidden: int) -> tuple[Shape, float]:
    return (out, hidden), hidden**-0.5


def workloads(shrink: int = 1) -> dict[str, Workload]:
    """By name. `shrink` divides all sizes but the rows and the low rank (for tests)."""
    hidden, wide, thin, keys = 4096 // shrink, 6144 // shrink, 256 // shrink, 4096 // shrink
    queries, width = 256 // shrink, max(16, 64 // shrink)

    def projected(
        title: str, group: str, function: Any, rows: int, *weights: tuple[Shape, float], ops: int
    ) -> Workload:
        shapes, scales = zip(((rows, weights[0][0][1]), 1.0), *weights, strict=True)
        return Workload(title, group, function, shapes, scales, ops)

    def attended(title: str, group: str, function: Any, heads: int, rows: int, ops: int) -> Workload:
        shapes = ((heads, rows, width), (heads, keys, width), (heads, keys, width))
        return Workload(title, group, function, shapes, (1.0, width**-0.5, 1.0), ops)

    weight, square = linear(wide, hidden), linear(hidden, hidden)
    return {
        "rms-2": projected(f"RMSNorm+MatMul 2x{hidden}x{wide}", "RMSNorm", rmsnorm_matmul, 2, weight, ops=7),
        "rms-16": projected(f"RMSNorm+MatMul 16x{hidden}x{wide}", "RMSNorm", rmsnorm_matmul, 16, weight, ops=7),
        "gated-8": projected(f"GatedMLP 8x{hidden}x{hidden}", "GatedMLP", gated_mlp, 8, square, square, ops=10),
        "lora-16": projected(
            f"LoRA 16x{thin}x{hidden} rank 16", "LoRA", lora, 16,
            linear(hidden, thin), linear(16, thin), linear(hidden, 16), ops=10,
        ),
        "ntrans-8": Workload(f"nTrans 8x{hidden}", "nTrans", ntrans, ((8, hidden),) * 3, (1.0, 1.0, 0.5), 11),
        "gqa-16": attended(f"GQA 16x{queries}x{keys}x{width}", "GQA", attention, 16, queries, 10),
        "mqa-1": attended(f"GQA 1x{4 * queries}x{keys}x{width}", "GQA", attention, 1, 4 * queries, 10),
        "qknorm-16": attended(f"QKNorm 16x{queries}x{keys}x{width}", "QKNorm", qk_norm_attention, 16, queries, 11),
    }  # fmt: skip


BARRED = ("RMSNorm", "GatedMLP", "LoRA", "nTrans")
"""The four that the geometric mean is over."""


def draw(load: Workload, device: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [
        (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)
        for shape, scale in zip(load.shapes, load.scales, strict=True)
    ]
