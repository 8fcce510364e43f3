"""Recommendation and retrieval, and a diffusion language model: DLRM, LightGCN, BGE-M3, ColBERTv2, LLaDA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wager.kernels.referee import operators as op
from wager.kernels.referee import recurrent
from wager.kernels.referee.architectures.parts import MLP, Attention, Block, GatedMLP, LanguageModel, tokens


class Dlrm(nn.Module):
    """Dense features through an MLP, sparse ones through bags, pairwise products, an MLP on top."""

    def __init__(self, tables: int = 4, width: int = 32):
        super().__init__()
        self.bottom, self.act = nn.ModuleList((op.Linear(13, 64, True), op.Linear(64, width, True))), op.ReLU()
        self.bags, self.interact = (
            nn.ModuleList(op.EmbeddingBag(200, width) for _ in range(tables)),
            recurrent.DotInteraction(),
        )
        pairs = (tables + 1) * tables // 2
        self.top, self.sigmoid = (
            nn.ModuleList((op.Linear(width + pairs, 64, True), op.Linear(64, 1, True))),
            op.Sigmoid(),
        )

    def forward(self, dense: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        for layer in self.bottom:
            dense = self.act(layer(dense))
        features = torch.stack([dense, *(bag(ids, offsets) for bag in self.bags)], 1)
        x = torch.cat((dense, self.interact(features)), -1)
        return self.sigmoid(self.top[1](self.act(self.top[0](x))))


def _dlrm_inputs(g: torch.Generator, held: bool) -> tuple[Tensor, ...]:
    n = 20 if held else 64
    return torch.randn(n, 13, generator=g), torch.randint(200, (3 * n,), generator=g), torch.arange(0, 3 * n, 3)


class LightGCN(nn.Module):
    def __init__(self, nodes: int = 120, width: int = 32):
        super().__init__()
        self.embed, self.spread = op.Embedding(nodes, width), recurrent.SparseMM()

    def forward(self, nodes: Tensor, source: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        x = total = self.embed(nodes)
        for _ in range(3):
            x = self.spread(source, target, weight, x)
            total = total + x
        return total / 4


def _graph(g: torch.Generator, held: bool) -> tuple[Tensor, ...]:
    edges = 250 if held else 600
    source, target = torch.randint(120, (2, edges), generator=g)
    return torch.arange(120), source, target, torch.rand(edges, generator=g)


class Encoder(nn.Module):
    """BERT's layout: the norm stands after the sum."""

    def __init__(self, width: int = 96, vocabulary: int = 512, layers: int = 2):
        super().__init__()
        self.embed, self.position, self.norm = (
            op.Embedding(vocabulary, width),
            op.Embedding(64, width),
            op.LayerNorm(width),
        )
        self.mix = nn.ModuleList(Attention(width, 4, 4, "full", False, bias=True) for _ in range(layers))
        self.mlps = nn.ModuleList(MLP(width, 4 * width, op.GELU()) for _ in range(layers))
        self.norms = nn.ModuleList(op.LayerNorm(width) for _ in range(2 * layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids) + self.position(torch.arange(ids.shape[1])))
        for i, (mix, mlp) in enumerate(zip(self.mix, self.mlps, strict=True)):
            x = self.norms[2 * i](x + mix(x))
            x = self.norms[2 * i + 1](x + mlp(x))
        return x


class BgeM3(nn.Module):
    """Dense vector of the first token, and one lexical weight per token."""

    def __init__(self):
        super().__init__()
        self.encoder, self.unit, self.lexical, self.act = Encoder(), op.L2Norm(), op.Linear(96, 1, True), op.ReLU()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.encoder(ids)
        return torch.cat((self.unit(x[:, 0]), self.act(self.lexical(x))[..., 0]), -1)


class Colbert(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.project, self.unit, self.score = (
            Encoder(),
            op.Linear(96, 32),
            op.L2Norm(),
            recurrent.MaxSim(),
        )

    def forward(self, query: Tensor, documents: Tensor) -> Tensor:
        q, d = (self.unit(self.project(self.encoder(ids))) for ids in (query, documents))
        return self.score(q[0], d)


def _colbert_inputs(g: torch.Generator, held: bool) -> tuple[Tensor, ...]:
    p, t = (3, 15) if held else (6, 24)
    return torch.randint(512, (1, 8), generator=g), torch.randint(512, (p, t), generator=g)


ENTRIES = {
    "dlrmv2": (Dlrm, _dlrm_inputs),
    "lightgcn": (LightGCN, _graph),
    "bge_m3": (BgeM3, tokens(512, (2, 24), (3, 17))),
    "colbertv2": (Colbert, _colbert_inputs),
    "llada": (
        lambda: LanguageModel(512, 128, [Block(128, Attention(128, 4, 4, "full"), GatedMLP(128, 352)) for _ in range(2)]),
        tokens(512, (2, 32), (1, 19)),
    ),
}  # fmt: skip
