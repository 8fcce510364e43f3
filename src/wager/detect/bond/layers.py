"""Layers of the graph detectors, initialised and dropped out by an explicit generator. Legend: N nodes, E edges, H hidden width."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wager.detect.bond.graph import Product


def dropout(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    if share == 0:
        return x
    return x * (torch.rand(x.shape, generator=generator) >= share) / (1 - share)


Input = Tensor | Product  # a constant sparse input multiplies as a sparse matrix


class Linear(nn.Module):
    """x W^T + b; glorot with zero bias as graph convolutions start, or uniform in 1/sqrt(inputs)."""

    def __init__(
        self, inputs: int, outputs: int, generator: torch.Generator, *, glorot: bool = False, bias: bool = True
    ):
        super().__init__()
        limit = math.sqrt(6 / (inputs + outputs)) if glorot else 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(_uniform((outputs, inputs), limit, generator))
        self.bias = (
            nn.Parameter(torch.zeros(outputs) if glorot else _uniform((outputs,), limit, generator)) if bias else None
        )

    def forward(self, x: Input) -> Tensor:
        if isinstance(x, Tensor):
            return F.linear(x, self.weight, self.bias)
        return self.times(x) if self.bias is None else self.times(x) + self.bias

    def times(self, x: Input) -> Tensor:
        """x W^T without the bias."""
        return F.linear(x, self.weight) if isinstance(x, Tensor) else x(self.weight.T)


def _uniform(shape: tuple[int, ...], limit: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=generator) * 2 - 1) * limit


def widths(inputs: int, hidden: int, outputs: int, layers: int) -> list[int]:
    return [inputs, *[hidden] * (layers - 1), outputs]


def with_bias(x_NH: Tensor, layer: Linear) -> tuple[Tensor, Tensor]:
    """x with a column of ones, and the layer's weight with its bias as a column."""
    assert layer.bias is not None
    return torch.cat([x_NH, x_NH.new_ones(len(x_NH), 1)], 1), torch.cat([layer.weight, layer.bias[:, None]], 1)


class GCN(nn.Module):
    """Graph convolutions A (x W) + b with ReLU and dropout between them (none after the last). A meets the narrower of x and x W."""

    def __init__(self, sizes: Sequence[int], share: float, generator: torch.Generator):
        super().__init__()
        pairs = list(zip(sizes[:-1], sizes[1:], strict=True))
        self.layers = nn.ModuleList(Linear(a, b, generator, glorot=True) for a, b in pairs)
        self.share, self.generator = share, generator

    def forward(self, x: Input, spread: Product) -> Tensor:
        return self.convolve(self.last, self.hidden(x, spread), spread)

    @property
    def last(self) -> Linear:
        layer = self.layers[-1]
        assert isinstance(layer, Linear)
        return layer

    def hidden(self, x: Input, spread: Product) -> Input:
        """All but the last layer."""
        for layer in self.layers[:-1]:
            assert isinstance(layer, Linear)
            x = self.convolve(layer, x, spread)
            x = dropout(F.relu(x), self.share if self.training else 0, self.generator)
        return x

    @staticmethod
    def convolve(layer: Linear, x: Input, spread: Product) -> Tensor:
        wider = isinstance(x, Tensor) and layer.weight.shape[0] > layer.weight.shape[1]
        return layer(spread(x)) if wider else spread(layer.times(x)) + layer.bias  # type: ignore[operator]

    def factors(self, x: Input, spread: Product) -> tuple[Tensor, Tensor]:
        """(h, w) with the output h w^T, not multiplied."""
        hidden = self.hidden(x, spread)
        assert isinstance(hidden, Tensor)
        return with_bias(spread(hidden), self.last)


class MLP(nn.Module):
    """Linear, batch norm, activation, dropout; the last layer plain but for dropout. `spread` is ignored, so that it can stand for a GCN."""

    def __init__(self, sizes: Sequence[int], share: float, generator: torch.Generator, act=F.relu):
        super().__init__()
        self.layers = nn.ModuleList(Linear(a, b, generator) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.norms = nn.ModuleList(nn.BatchNorm1d(b) for b in sizes[1:-1])
        self.share, self.generator, self.act = share, generator, act

    def forward(self, x: Input, spread: Product | None = None) -> Tensor:
        return self.drop(self.layers[-1](self.hidden(x)))

    def hidden(self, x: Input) -> Input:
        """All but the last layer."""
        for i, norm in enumerate(self.norms):
            x = self.drop(self.act(norm(self.layers[i](x))))
        return x

    def factors(self, x: Input) -> tuple[Tensor, Tensor]:
        """(h, w) with the output h w^T before its dropout, not multiplied."""
        hidden, last = self.hidden(x), self.layers[-1]
        assert isinstance(hidden, Tensor) and isinstance(last, Linear)
        return with_bias(hidden, last)

    def drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.share if self.training else 0, self.generator)


def edge_softmax(value_E: Tensor, target_E: Tensor, nodes: int) -> Tensor:
    """Softmax over the edges into each node."""
    top = torch.full((nodes,), -torch.inf).scatter_reduce(0, target_E, value_E.detach(), "amax")
    weight = (value_E - top[target_E]).exp()
    return weight / (torch.zeros(nodes).index_add(0, target_E, weight)[target_E] + 1e-16)


class GAT(nn.Module):
    """One-headed graph attention with leaky ReLU 0.2 (arXiv 1710.10903)."""

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator):
        super().__init__()
        self.linear = Linear(inputs, outputs, generator, glorot=True, bias=False)
        limit = math.sqrt(6 / (1 + outputs))
        self.source, self.target = (nn.Parameter(_uniform((outputs,), limit, generator)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, edges_2E: Tensor) -> Tensor:
        h = self.linear(x)
        s, t = edges_2E
        score = F.leaky_relu((h @ self.source)[s] + (h @ self.target)[t], 0.2)
        weight = edge_softmax(score, t, len(x))
        return torch.zeros_like(h).index_add(0, t, weight[:, None] * h[s]) + self.bias


class GNA(nn.Module):
    """Graph node attention: weights from differences of transformed features (GUIDE). The target's own part cancels in the softmax."""

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator):
        super().__init__()
        self.own, self.other = Linear(inputs, outputs, generator), Linear(inputs, outputs, generator)
        self.a = nn.Parameter(torch.randn(outputs, generator=generator))

    def forward(self, s_NH: Tensor, edges_2E: Tensor) -> Tensor:
        h = self.other(s_NH)
        s, t = edges_2E
        weight = edge_softmax(-(h @ self.a)[s], t, len(h))
        return self.own(s_NH) + torch.zeros_like(h).index_add(0, t, weight[:, None] * h[s])


class GNAStack(nn.Module):
    def __init__(self, sizes: Sequence[int], share: float, generator: torch.Generator):
        super().__init__()
        self.layers = nn.ModuleList(GNA(a, b, generator) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.share, self.generator = share, generator

    def forward(self, x: Tensor, edges_2E: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x, edges_2E)
            if i + 1 < len(self.layers):
                x = dropout(F.relu(x), self.share if self.training else 0, self.generator)
        return x
