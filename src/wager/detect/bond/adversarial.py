"""DONE, AdONE and GAAN. All are tied to the graph they were fitted on.

DONE and AdONE read adjacency rows through a sparse product and rebuild them without an N x N matrix (`losses`). Sources: BOND (arXiv 2206.10071)
and the papers named at each class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wager.detect.bond.autoencoders import halves
from wager.detect.bond.base import DeepGraphDetector
from wager.detect.bond.graph import Graph, Product
from wager.detect.bond.layers import MLP, widths
from wager.detect.bond.losses import (
    TINY,
    Structure,
    attribute_rows,
    double_error,
    dropped_rows,
    pair_sums,
    rebuilt_rows,
)
from wager.errors import UsageError


@dataclass
class State:
    graph: Graph
    structure: Structure
    mean_in: Product | None = None


class DONE(DeepGraphDetector):
    """Deep outlier-aware network embedding (Bandyopadhyay et al. 2020): autoencoders of attributes and of adjacency rows that must agree."""

    def __init__(
        self,
        hid_dim: int = 64,
        num_layers: int = 4,
        dropout: float = 0.0,
        weight_decay: float = 0.0,
        w1: float = 0.2,
        w2: float = 0.2,
        w3: float = 0.2,
        w4: float = 0.2,
        w5: float = 0.2,
        masks: str = "drawn",
        contamination: float = 0.1,
        lr: float = 4e-3,
        epoch: int = 100,
        symmetrize: bool = False,
        batch_size: int = 0,
        num_neigh: int | Sequence[int] = -1,
        seed: int | None = None,
    ):
        """masks: dropout of the rebuilt adjacency "drawn" pair by pair, O(N^2) time, or "expected", integrated out, with the same mean."""
        if masks not in ("drawn", "expected"):
            raise UsageError(f"masks is {masks!r}; choose drawn or expected")
        self.keep(locals())

    def build(self, graph: Graph, generator: torch.Generator) -> nn.Module:
        encode, decode = halves(self.num_layers)
        (n, d), h = graph.x.shape, self.hid_dim
        return nn.ModuleDict(
            {
                "encoder_a": MLP(widths(d, h, h, encode), self.dropout, generator),
                "decoder_a": MLP(widths(h, h, d, decode), self.dropout, generator),
                "encoder_s": MLP(widths(n, h, h, encode), self.dropout, generator),
                "decoder_s": MLP(widths(h, h, n, decode), self.dropout, generator),
            }
        )

    def state(self, graph: Graph) -> State:
        return State(graph, Structure(graph, every_column=True), graph.mean_in())

    def terms(self, model: Any, state: State, generator: torch.Generator) -> tuple[Tensor, ...]:
        """(dx, ds, dna, dns, h_a, h_s): errors, disagreement with neighbours, embeddings."""
        assert state.mean_in is not None
        h_a = model["encoder_a"](state.graph.input)
        dx = rebuilt_rows(state.graph, model["decoder_a"], h_a, None, generator)
        h_s = model["encoder_s"](state.structure.product)
        rows, columns = model["decoder_s"].factors(h_s)
        drawn = self.masks == "drawn"
        ds = dropped_rows(state.structure, rows, columns, self.dropout, generator, drawn=drawn)
        found = dx, ds, disagreement(h_a, state.mean_in), disagreement(h_s, state.mean_in), h_a, h_s
        return tuple(state.graph.head(value) for value in found)

    def step(self, model: Any, state: State, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        dx, ds, dna, dns, h_a, h_s = self.terms(model, state, generator)
        o_a, o_s = share(self.w3 * dx + self.w4 * dna), share(self.w1 * ds + self.w2 * dns)
        dc = (h_a - h_s).square().sum(1)
        o_c = share(dc)
        self.attribute_score_, self.structural_score_, self.combined_score_ = (o.detach() for o in (o_a, o_s, o_c))
        loss = self.w3 * surprise(o_a, dx) + self.w4 * surprise(o_a, dna)
        loss = loss + self.w1 * surprise(o_s, ds) + self.w2 * surprise(o_s, dns)
        return loss + self.w5 * self.agreement(model, o_c, dc, h_a, h_s), (o_a + o_s + o_c) / 3

    def agreement(self, model: Any, o_c: Tensor, dc: Tensor, h_a: Tensor, h_s: Tensor) -> Tensor:
        return surprise(o_c, dc)


def share(value_N: Tensor) -> Tensor:
    return value_N / value_N.sum()


def surprise(outlierness_N: Tensor, term_N: Tensor) -> Tensor:
    """mean of log(1/o) times the term: an outlier's errors count less."""
    return (-outlierness_N.clamp(min=TINY).log() * term_N).mean()


def disagreement(h_NH: Tensor, mean_in: Product) -> Tensor:
    """Mean over incoming edges of |h_i - h_j|^2, through two products; float64, because the terms cancel."""
    h = h_NH.double()
    square = h.square().sum(1)
    has = torch.from_numpy((mean_in.matrix.sum(1) > 0).astype(float)).reshape(-1)
    value = has * square + mean_in(square[:, None]).squeeze(1) - 2 * (h * mean_in(h)).sum(1)
    return value.clamp(min=0).float()


class AdONE(DONE):
    """Adversarial DONE (Bandyopadhyay et al. 2020): a discriminator between the two embeddings replaces their distance in the loss."""

    def build(self, graph: Graph, generator: torch.Generator) -> nn.Module:
        parts = super().build(graph, generator)
        assert isinstance(parts, nn.ModuleDict)
        parts["discriminator"] = MLP(widths(self.hid_dim, self.hid_dim // 2, 1, 2), self.dropout, generator, torch.tanh)
        return parts

    def trained(self, model: Any) -> list[nn.Parameter]:
        return [p for name, p in model.named_parameters() if not name.startswith("discriminator")]

    def prepare_training(self, model: Any) -> None:
        self._adversary = torch.optim.Adam(
            model["discriminator"].parameters(), lr=self.lr, weight_decay=self.weight_decay
        )

    def terms(self, model: Any, state: State, generator: torch.Generator) -> tuple[Tensor, ...]:
        """As DONE's, after the discriminator's own step on the embeddings of this pass."""
        found = super().terms(model, state, generator)
        if model.training:
            h_a, h_s = found[4].detach(), found[5].detach()
            loss = (F.softplus(model["discriminator"](h_a)) + F.softplus(-model["discriminator"](h_s))).mean()
            self._adversary.zero_grad()
            loss.backward()
            self._adversary.step()
        return found

    def agreement(self, model: Any, o_c: Tensor, dc: Tensor, h_a: Tensor, h_s: Tensor) -> Tensor:
        fooled = -F.softplus(model["discriminator"](h_a)) - F.softplus(-model["discriminator"](h_s))
        if self.pairing == "all":
            return -o_c.clamp(min=TINY).log().mean() * fooled.mean()
        return (-o_c.clamp(min=TINY).log() * fooled.squeeze(1)).mean()

    def __init__(
        self,
        hid_dim: int = 64,
        num_layers: int = 4,
        dropout: float = 0.0,
        weight_decay: float = 0.0,
        w1: float = 0.2,
        w2: float = 0.2,
        w3: float = 0.2,
        w4: float = 0.2,
        w5: float = 0.2,
        masks: str = "drawn",
        pairing: str = "own",
        contamination: float = 0.1,
        lr: float = 4e-3,
        epoch: int = 100,
        symmetrize: bool = False,
        batch_size: int = 0,
        num_neigh: int | Sequence[int] = -1,
        seed: int | None = None,
    ):
        """pairing "own" weighs each node's adversarial term by its own outlierness (the paper); "all" by everybody's mean (pygod, which
        multiplies a row by a column). masks as in DONE."""
        if masks not in ("drawn", "expected"):
            raise UsageError(f"masks is {masks!r}; choose drawn or expected")
        if pairing not in ("own", "all"):
            raise UsageError(f"pairing is {pairing!r}; choose own or all")
        self.keep(locals())


class GAAN(DeepGraphDetector):
    """Generative adversarial attributed networks (Chen et al. 2020): a generator of attributes, a discriminator of edges.

    pairs="edges" judges the edges (the paper); "rows" all pairs of every edge's two ends (what pygod's indexing does).
    """

    def __init__(
        self,
        noise_dim: int = 16,
        hid_dim: int = 64,
        num_layers: int = 4,
        dropout: float = 0.0,
        weight_decay: float = 0.0,
        weight: float | str = 0.5,
        pairs: str = "edges",
        contamination: float = 0.1,
        lr: float = 4e-3,
        epoch: int = 100,
        symmetrize: bool = False,
        batch_size: int = 0,
        num_neigh: int | Sequence[int] = -1,
        seed: int | None = None,
    ):
        if pairs not in ("edges", "rows"):
            raise UsageError(f"pairs is {pairs!r}; choose edges or rows")
        self.keep(locals())

    def build(self, graph: Graph, generator: torch.Generator) -> nn.Module:
        encode, decode = halves(self.num_layers)
        d, h = graph.x.shape[1], self.hid_dim
        return nn.ModuleDict(
            {
                "generator": MLP(widths(self.noise_dim, h, d, encode), self.dropout, generator),
                "discriminator": MLP(widths(d, h, h, decode), self.dropout, generator),
            }
        )

    def state(self, graph: Graph) -> State:
        return State(graph, Structure(graph))

    def trained(self, model: Any) -> list[nn.Parameter]:
        return list(model["discriminator"].parameters())

    def prepare_training(self, model: Any) -> None:
        self._adversary = torch.optim.Adam(model["generator"].parameters(), lr=self.lr, weight_decay=self.weight_decay)

    def judged(self, state: State, z_NH: Tensor, real: bool) -> Tensor:
        """Mean cross-entropy of sigmoid(z z^T) against real (1) or fake (0)."""
        edges = state.graph.edge_index
        if self.pairs == "edges":
            t = (z_NH[edges[0]] * z_NH[edges[1]]).sum(1)
            return F.softplus(-t if real else t).mean()
        rows = pair_sums(z_NH, "negative softplus" if real else "softplus")
        ends = torch.bincount(edges.reshape(-1), minlength=len(z_NH)).float()
        return (rows * ends).sum() / (edges.numel() * len(z_NH))

    def step(self, model: Any, state: State, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = state.graph.x
        made = model["generator"](torch.randn(len(x), self.noise_dim, generator=generator))
        z, z_made = model["discriminator"](state.graph.input), model["discriminator"](made)
        self._adversary.zero_grad()
        self.judged(state, z_made, True).backward(retain_graph=True)
        self._adversary.step()
        loss = (self.judged(state, z, True) + self.judged(state, z_made.detach(), False)) / 2
        s = state.structure
        t = (z[s.row_E] * z[s.column_E]).sum(1)
        # BCE at the entries of S alone: s may count a repeated edge, as in the reference
        cross = s.value_E * F.softplus(-t) + (1 - s.value_E) * F.softplus(t)
        error_s = torch.zeros(len(x)).index_add(0, s.row_E, cross)
        head = state.graph.head
        return loss, double_error(head(attribute_rows(x, made)), head(error_s), self.weight).detach()
