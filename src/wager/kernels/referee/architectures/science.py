"""Scenes: Instant-NGP, 3-D Gaussian splatting (the projection), Point Transformer V3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wager.kernels.referee import operators as op
from wager.kernels.referee import recurrent
from wager.kernels.referee.architectures.parts import MLP, Attention, Block


class InstantNGP(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.density = recurrent.HashEncoding(4, 2, 1024, 8), MLP(8, 32, op.ReLU())
        self.widen, self.act, self.colour, self.sigmoid = op.Linear(8, 32), op.ReLU(), op.Linear(32, 3), op.Sigmoid()

    def forward(self, points: Tensor) -> Tensor:
        hidden = self.density(self.encode(points))
        return torch.cat((torch.exp(hidden[:, :1]), self.sigmoid(self.colour(self.act(self.widen(hidden))))), -1)


class Splatting(nn.Module):
    """Gaussians to the screen, and their opacity."""

    def __init__(self):
        super().__init__()
        self.project, self.opacity = recurrent.GaussianProjection(200.0), op.Sigmoid()

    def forward(self, mean: Tensor, scale: Tensor, quaternion: Tensor, opacity: Tensor) -> Tensor:
        covariance = self.project(mean, scale, quaternion)
        return covariance.flatten(1) * self.opacity(opacity)[:, None]


class PointTransformer(nn.Module):
    """Points sorted along a curve, attention in patches of them, pooled by grid cell."""

    def __init__(self, width: int = 48, patch: int = 16):
        super().__init__()
        self.patch, self.enter = patch, op.Linear(6, width, True)
        self.block = Block(
            width, Attention(width, 4, 4, "full", False, bias=True), MLP(width, 4 * width, op.GELU()), op.LayerNorm
        )
        self.pool, self.norm, self.act = recurrent.SegmentMean(), op.LayerNorm(width), op.GELU()

    def forward(self, points: Tensor, cell: Tensor) -> Tensor:
        order = cell.argsort(stable=True)
        x = self.enter(points[order]).unflatten(0, (-1, self.patch))
        x = self.block(x).flatten(0, 1)
        return self.act(self.norm(self.pool(x, torch.bincount(cell).cumsum(0))))


def _points(g: torch.Generator, held: bool) -> tuple[Tensor, ...]:
    return (torch.rand(150 if held else 400, 3, generator=g),)


def _gaussians(g: torch.Generator, held: bool) -> tuple[Tensor, ...]:
    n = 130 if held else 300
    mean = torch.randn(n, 3, generator=g) + torch.tensor([0.0, 0.0, 6.0])
    return (
        mean.clamp_min(-5),
        torch.rand(n, 3, generator=g) + 0.1,
        torch.randn(n, 4, generator=g),
        torch.randn(n, generator=g),
    )


def _cloud(g: torch.Generator, held: bool) -> tuple[Tensor, ...]:
    n = 96 if held else 256
    return torch.randn(n, 6, generator=g), torch.randint(20, (n,), generator=g)


ENTRIES = {
    "instant_ngp": (InstantNGP, _points),
    "gaussian_splatting": (Splatting, _gaussians),
    "pointtransformerv3": (PointTransformer, _cloud),
}
