"""Reconstruction detectors: MLPAE, GCNAE, DOMINANT, CONAD, AnomalyDAE, GUIDE. What is rebuilt badly is an outlier.

The error of the adjacency is computed exactly without an N x N matrix (`losses`). Sources: BOND (arXiv 2206.10071) and the papers named at
each class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wager.detect.bond.base import DeepGraphDetector
from wager.detect.bond.graph import Graph, Product
from wager.detect.bond.layers import GAT, GCN, MLP, GNAStack, Linear, dropout, widths
from wager.detect.bond.losses import (
    Structure,
    attribute_rows,
    double_error,
    linear_rows,
    rebuilt_rows,
    sigmoid_rows,
    sparse_attributes,
    weighted_rows,
)
from wager.detect.bond.motifs import motif_counts
from wager.errors import UsageError


def halves(num_layers: int) -> tuple[int, int]:
    """Layers of encoder and decoder."""
    if num_layers < 2:
        raise UsageError(f"num_layers is {num_layers}; an autoencoder needs at least 2")
    return num_layers // 2, num_layers - num_layers // 2


@dataclass
class State:
    """What every epoch reads."""

    graph: Graph
    spread: Product
    structure: Structure | None = None
    extra: Any = None


class GAE(DeepGraphDetector):
    """Graph autoencoder (Kipf & Welling, arXiv 1611.07308). backbone "gcn" (GCNAE) or "mlp" (MLPAE); recon_s rebuilds S instead of x."""

    transductive = False

    def __init__(
        self,
        hid_dim: int = 64,
        num_layers: int = 4,
        dropout: float = 0.0,
        weight_decay: float = 0.0,
        backbone: str = "gcn",
        recon_s: bool = False,
        sigmoid_s: bool = False,
        contamination: float = 0.1,
        lr: float = 4e-3,
        epoch: int = 100,
        symmetrize: bool = False,
        batch_size: int = 0,
        num_neigh: int | Sequence[int] = -1,
        seed: int | None = None,
    ):
        if backbone not in ("gcn", "mlp"):
            raise UsageError(f"backbone is {backbone!r}; choose gcn or mlp")
        self.keep(locals())

    def build(self, graph: Graph, generator: torch.Generator) -> nn.Module:
        kind, (encode, decode) = {"gcn": GCN, "mlp": MLP}[self.backbone], halves(self.num_layers)
        d, h = graph.x.shape[1], self.hid_dim
        encoder = kind(widths(d, h, h, encode), self.dropout, generator)
        decoder = kind(widths(h, h, h if self.recon_s else d, decode), self.dropout, generator)
        return nn.ModuleDict({"encoder": encoder, "decoder": decoder})

    def state(self, graph: Graph) -> State:
        return State(graph, graph.gcn(), Structure(graph) if self.recon_s else None)

    def step(self, model: Any, state: State, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        h = model["encoder"](state.graph.input, state.spread)
        if state.structure is None:
            score = rebuilt_rows(state.graph, model["decoder"], h, state.spread, generator) / state.graph.x.shape[1]
        else:
            out = model["decoder"](h, state.spread)
            score = (sigmoid_rows if self.sigmoid_s else linear_rows)(state.structure, out) / state.graph.nodes
        score = state.graph.head(score)
        return score.mean(), score


class DOMINANT(DeepGraphDetector):
    """Deep anomaly detection on attributed networks (Ding et al. 2019): one GCN encoder, decoders of attributes and of structure."""

    transductive = False

    def __init__(
        self,
        hid_dim: int = 64,
        num_layers: int = 4,
        dropout: float = 0.0,
        weight_decay: float = 0.0,
        sigmoid_s: bool = False,
        weight: float | str = 0.5,
        contamination: float = 0.1,
        lr: float = 4e-3,
        epoch: int = 100,
        symmetrize: bool = False,
        batch_size: int = 0,
        num_neigh: int | Sequence[int] = -1,
        seed: int | None = None,
    ):
        self.keep(locals())

    def build(self, graph: Graph, generator: torch.Generator) -> nn.Module:
        encode, decode = halves(self.num_layers)
        d, h = graph.x.shape[1], self.hid_dim
        return nn.ModuleDict(
            {
                "encoder": GCN(widths(d, h, h, encode), self.dropout, generator),
                "attributes": GCN(widths(h, h, d, decode), self.dropout, generator),
                "structure": GCN(widths(h, h, h, max(1, decode - 1)), self.dropout, generator),
            }
        )

    def state(self, graph: Graph) -> State:
        return State(graph, graph.gcn(), Structure(graph))

    def rows(self, model: Any, state: State) -> tuple[Tensor, Tensor]:
        """(scores, embeddings) of the nodes that are scored."""
        assert state.structure is not None
        h = model["encoder"](state.graph.input, state.spread)
        error_a = rebuilt_rows(state.graph, model["attributes"], h, state.spread, model["encoder"].generator)
        z = model["structure"](h, state.spread)
        error_s = (sigmoid_rows if self.sigmoid_s else linear_rows)(state.structure, z)
        head = state.graph.head
        return double_error(head(error_a), head(error_s), self.weight), head(h)

    def step(self, model: Any, state: State, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        score, _ = self.rows(model, state)
        return score.mean(), score


class CONAD(DOMINANT):
    """Contrastive attributed network anomaly detection (Xu et al. 2022): DOMINANT's network, and a margin against augmented nodes.

    ranking="reference" ranks h against itself minus the augmented node, as pygod does (a constant wherever the margin is met and a pull where it
    is not); "distance" asks that an augmented node lies at least `margin` from its original.
    """

    def __init__(
        self,
        hid_dim: int = 64,
        num_layers: int = 4,
        dropout: float = 0.0,
        weight_decay: float = 0.0,
        sigmoid_s: bool = False,
        weight: float | str = 0.5,
        eta: float = 0.5,
        margin: float = 0.5,
        r: float = 0.2,
        m: int = 50,
        k: int = 50,
        f: float = 10,
        ranking: str = "reference",
        contamination: float = 0.1,
        lr: float = 4e-3,
        epoch: int = 100,
        symmetrize: bool = False,
        batch_size: int = 0,
        num_neigh: int | Sequence[int] = -1,
        seed: int | None = None,
    ):
        if ranking not in ("reference", "distance"):
            raise UsageError(f"ranking is {ranking!r}; choose reference or distance")
        self.keep(locals())

    def augmented(self, graph: Graph, generator: torch.Generator) -> tuple[Graph, Tensor]:
        """Four kinds of nodes in equal shares of r: many random edges, none, attributes from the farthest of k, attributes times or over f."""
        n = graph.nodes
        u = torch.rand(n, generator=generator)
        kind = torch.where(u < self.r, (u / self.r * 4).long(), -1)
        dense, bare = (kind == 0).nonzero().squeeze(1), kind == 1
        kept = graph.edge_index[:, (kind[graph.edge_index[0]] != 0) & ~bare[graph.edge_index[0]]]
        chance = min(1.0, self.m / n)
        count = torch.binomial(
            torch.full((len(dense),), float(n)), torch.full((len(dense),), chance), generator=generator
        ).long()
        source = dense.repeat_interleave(count)
        target = torch.randint(
            n, (len(source),), generator=generator
        )  # a repeated target stands for one edge, see unique
        added = torch.unique(torch.stack([source, target]), dim=1)
        x = graph.x.clone()
        pool = graph.x[torch.randperm(n, generator=generator)[: self.k]]
        far = kind == 2
        x[far] = pool[torch.cdist(x[far], pool).argmax(1)]
        half = u / self.r * 8
        x[(kind == 3) & (half < 7)] *= self.f
        x[(kind == 3) & (half >= 7)] /= self.f
        return Graph(x, torch.cat([kept, added], 1)), (kind >= 0).float()

    def step(self, model: Any, state: State, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if not model.training:
            return super().step(model, state, generator)
        changed, mark = self.augmented(state.graph, generator)
        h_changed, mark = (state.graph.head(v) for v in (model["encoder"](changed.x, changed.gcn()), mark))
        score, h = self.rows(model, state)
        if self.ranking == "reference":
            gap = F.triplet_margin_loss(h, h, h_changed, margin=self.margin, reduction="none")
        else:
            gap = (self.margin - torch.linalg.norm(h - h_changed, dim=1)).clamp(min=0)
        return self.eta * score.mean() + (1 - self.eta) * (gap * mark).mean(), score


class AnomalyDAE(DeepGraphDetector):
    """Dual autoencoder (Fan et al. 2020): attention embeds the structure, a network on X^T the attributes; X' = Z H^T. Tied to its N nodes."""

    num_layers = 1  # hops of a mini-batch

    def __init__(
        self,
        emb_dim: int = 64,
        hid_dim: int = 64,
        dropout: float = 0.0,
        weight_decay: float = 0.0,
        alpha: float | str = 0.5,
        theta: float = 1.0,
        eta: float = 1.0,
        contamination: float = 0.1,
        lr: float = 4e-3,
        epoch: int = 100,
        symmetrize: bool = False,
        batch_size: int = 0,
        num_neigh: int | Sequence[int] = -1,
        seed: int | None = None,
    ):
        self.keep(locals())

    def build(self, graph: Graph, generator: torch.Generator) -> nn.Module:
        n, d = graph.x.shape
        return nn.ModuleDict(
            {
                "input": Linear(d, self.emb_dim, generator),
                "attention": GAT(self.emb_dim, self.hid_dim, generator),
                "columns": Linear(n, self.emb_dim, generator),
                "columns_out": Linear(self.emb_dim, self.hid_dim, generator),
            }
        )

    def state(self, graph: Graph) -> State:
        return State(graph, Product(graph.adjacency), Structure(graph), graph.looped_edges())

    def step(self, model: Any, state: State, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        assert state.structure is not None
        h = dropout(F.relu(model["input"](state.graph.input)), self.dropout, generator)
        z = model["attention"](h, state.extra)
        weight = model["columns"].weight if state.graph.ids is None else model["columns"].weight[:, state.graph.ids]
        across = state.graph.attributes_T(weight.T) + model["columns"].bias
        columns = dropout(F.relu(across), self.dropout, generator)
        columns = dropout(model["columns_out"](columns), self.dropout, generator)
        positive, entries = self.eta / (1 + self.eta), sparse_attributes(state.graph)
        if entries is None:
            error_a = attribute_rows(state.graph.x, z @ columns.T, positive)
        else:
            error_a = weighted_rows(entries, z, columns, positive)
        error_s = sigmoid_rows(state.structure, z, self.theta / (1 + self.theta))
        head = state.graph.head
        score = double_error(head(error_a), head(error_s), "auto" if self.alpha == "auto" else 1 - float(self.alpha))
        return score.mean(), score


class GUIDE(DeepGraphDetector):
    """Higher-order structure (Yuan et al. 2021): a GCN autoencoder of attributes and an attention autoencoder of motif counts."""

    transductive = False

    def __init__(
        self,
        hid_a: int = 64,
        hid_s: int = 4,
        num_layers: int = 4,
        dropout: float = 0.0,
        weight_decay: float = 0.0,
        alpha: float | str = 0.5,
        contamination: float = 0.1,
        lr: float = 4e-3,
        epoch: int = 100,
        symmetrize: bool = False,
        batch_size: int = 0,
        num_neigh: int | Sequence[int] = -1,
        seed: int | None = None,
    ):
        self.keep(locals())

    def build(self, graph: Graph, generator: torch.Generator) -> nn.Module:
        encode, decode = halves(self.num_layers)
        d, a, s = graph.x.shape[1], self.hid_a, self.hid_s
        return nn.ModuleDict(
            {
                "encoder_a": GCN(widths(d, a, a, encode), self.dropout, generator),
                "decoder_a": GCN(widths(a, a, d, decode), self.dropout, generator),
                "encoder_s": GNAStack(widths(6, s, s, encode), self.dropout, generator),
                "decoder_s": GNAStack(widths(s, s, 6, decode), self.dropout, generator),
            }
        )

    def state(self, graph: Graph) -> State:
        loop = torch.arange(graph.nodes)
        edges = torch.cat([graph.edge_index, torch.stack([loop, loop])], 1)
        counts_N6 = motif_counts(graph if graph.whole is None else graph.whole)
        motifs_N6 = torch.from_numpy(counts_N6 if graph.ids is None else counts_N6[graph.ids.numpy()]).float()
        return State(graph, graph.gcn(), None, (motifs_N6, edges))

    def step(self, model: Any, state: State, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        motifs, edges = state.extra
        h = model["encoder_a"](state.graph.input, state.spread)
        error_a = rebuilt_rows(state.graph, model["decoder_a"], h, state.spread, generator)
        out_s = model["decoder_s"](model["encoder_s"](motifs, edges), edges)
        head = state.graph.head
        score = double_error(head(error_a), head(attribute_rows(motifs, out_s)), self.alpha)
        return score.mean(), score
