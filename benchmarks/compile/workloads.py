"""Workloads of the compiler benchmarks: the programs of the Mirage sheet and the networks of the OLLIE sheet, as plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class RmsNormMatmul(nn.Module):
    def __init__(self, hidden: int, out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden, out) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) @ self.weight


class GatedMlp(nn.Module):
    def __init__(self, hidden: int, out: int):
        super().__init__()
        self.gate, self.up = nn.Linear(hidden, out, bias=False), nn.Linear(hidden, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.gate(x)) * self.up(x)


class Lora(nn.Module):
    def __init__(self, hidden: int, rank: int, out: int):
        super().__init__()
        self.w, self.a, self.b = (
            nn.Parameter(torch.randn(s) / s[0] ** 0.5) for s in ((hidden, out), (hidden, rank), (rank, out))
        )

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + (x @ self.a) @ self.b


class Attention(nn.Module):
    """As written: no maximum subtracted, keys already transposed."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.exp(q @ k)
        return (weights / weights.sum(-1, keepdim=True)) @ v


def programs(quick: bool) -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """Name -> (module, example inputs)."""
    s = 4 if quick else 1
    heads, queries, keys, width = 2, 256 // s, 4096 // s, 64
    return {
        "attention 2x256x4096x64": (
            Attention(),
            [
                torch.randn(heads, queries, width) * 0.1,
                torch.randn(heads, width, keys),
                torch.randn(heads, keys, width),
            ],
        ),
        "LoRA 16x256x4096 rank 16": (Lora(256 // s, 16, 4096 // s), [torch.randn(16, 256 // s)]),
        "gated MLP 8x512x2048": (GatedMlp(512 // s, 2048 // s), [torch.randn(8, 512 // s)]),
        "RMSNorm+matmul 16x1024x4096": (RmsNormMatmul(1024 // s, 4096 // s), [torch.randn(16, 1024 // s)]),
    }


def generator(channels: list[int], first: tuple[int, int, int]) -> nn.Module:
    """A chain of transposed convolutions with batch norm and ReLU, tanh at the end (InfoGAN and DCGAN differ in channels)."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip(channels, channels[1:], strict=False)):
        kernel, stride, padding = first if i == 0 else (4, 2, 1)
        layers.append(nn.ConvTranspose2d(a, b, kernel, stride, padding, bias=False))
        layers += [nn.Tanh()] if i == len(channels) - 2 else [nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers)


def fsrcnn() -> nn.Module:
    """Feature extraction, shrinking, four mappings, expanding, and a 9x9 transposed convolution of stride 3."""
    layers: list[nn.Module] = [nn.Conv2d(1, 56, 5, padding=2), nn.PReLU(56), nn.Conv2d(56, 12, 1), nn.PReLU(12)]
    for _ in range(4):
        layers += [nn.Conv2d(12, 12, 3, padding=1), nn.PReLU(12)]
    return nn.Sequential(*layers, nn.Conv2d(12, 56, 1), nn.PReLU(56), nn.ConvTranspose2d(56, 1, 9, 3, 4))


def csrnet() -> nn.Module:
    """The dilated back end of a crowd counter."""
    layers: list[nn.Module] = []
    for a, b in ((512, 512), (512, 256), (256, 128), (128, 64)):
        layers += [nn.Conv2d(a, b, 3, padding=2, dilation=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(64, 1, 1))


def networks(quick: bool) -> dict[str, tuple[nn.Module, list[Tensor]]]:
    found: dict[str, tuple[nn.Module, list[Tensor]]] = {
        "InfoGAN generator b1": (generator([228, 448, 256, 128, 64, 3], (2, 1, 0)), [torch.randn(1, 228, 1, 1)]),
        "DCGAN generator b1": (generator([100, 512, 256, 128, 64, 3], (4, 1, 0)), [torch.randn(1, 100, 1, 1)]),
        "FSRCNN 32x32": (fsrcnn(), [torch.randn(1, 1, 32, 32)]),
    }
    if not quick:
        found["CSRNet back end 28x28"] = (csrnet(), [torch.randn(1, 512, 28, 28)])
        found["DCGAN generator b16"] = (generator([100, 512, 256, 128, 64, 3], (4, 1, 0)), [torch.randn(16, 100, 1, 1)])
    return {name: (module.eval(), inputs) for name, (module, inputs) in found.items()}


class DilatedBand(nn.Module):
    """Scores of every row with its neighbours in steps of `dilation`, `width` to each side, in the gather form."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.reach, self.dilation = width * dilation, dilation

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        padded = nn.functional.pad(k, (0, 0, self.reach, self.reach))
        windows = padded.unfold(1, 2 * self.reach + 1, 1)[..., :: self.dilation]
        return (q.unsqueeze(-1) * windows).sum(2)


def single_operators(quick: bool) -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """The operator cases of the OLLIE sheet."""
    found: dict[str, tuple[nn.Module, list[Tensor]]] = {
        "transposed 4x4 s2 448->256 2x2 b1": (
            nn.ConvTranspose2d(448, 256, 4, 2, 1, bias=False),
            [torch.randn(1, 448, 2, 2)],
        ),
        "transposed 4x4 s2 448->256 2x2 b16": (
            nn.ConvTranspose2d(448, 256, 4, 2, 1, bias=False),
            [torch.randn(16, 448, 2, 2)],
        ),
        "conv 3x3 512->512 7x7": (nn.Conv2d(512, 512, 3, padding=1, bias=False), [torch.randn(1, 512, 7, 7)]),
        "conv 1x7 2048->128 7x7": (
            nn.Conv2d(2048, 128, (1, 7), padding=(0, 3), bias=False),
            [torch.randn(1, 2048, 7, 7)],
        ),
    }
    if not quick:
        found["conv 5x5 32->1 224x224 b16"] = (
            nn.Conv2d(32, 1, 5, padding=2, bias=False),
            [torch.randn(16, 32, 224, 224)],
        )
        found["dilated band 8x1000x64 width 32 d4"] = (
            DilatedBand(32, 4),
            [torch.randn(8, 1000, 64), torch.randn(8, 1000, 64)],
        )
        found["dilated conv 3x3 d2 512->512 14x14"] = (
            nn.Conv2d(512, 512, 3, padding=2, dilation=2, bias=False),
            [torch.randn(1, 512, 14, 14)],
        )
    return found


def inductor(module: nn.Module, inputs: list[Tensor]) -> Callable[[], Any]:
    """torch.compile max-autotune with frozen weights, warmed up."""
    import torch._inductor.config as config

    config.freezing = True
    torch._dynamo.reset()
    compiled = torch.compile(module, mode="max-autotune")
    with torch.no_grad():
        compiled(*inputs)

    def run() -> None:
        with torch.no_grad():
            compiled(*inputs)

    return run
