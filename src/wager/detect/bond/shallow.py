"""Detectors that do not learn: LOF and IF on attributes, SCAN on structure. Sources: BOND (arXiv 2206.10071) and the papers named at each class."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wager.detect.bond.base import GraphDetector
from wager.detect.bond.graph import Graph
from wager.detect.tod.marginals import IForest
from wager.detect.tod.neighbors import LOF as TabularLOF
from wager.errors import UsageError


class LOF(GraphDetector):
    """Local outlier factor of the attributes (Breunig et al. 2000); edges are not used."""

    transductive = False

    def __init__(self, n_neighbors: int = 20, contamination: float = 0.1):
        self.n_neighbors, self.contamination = n_neighbors, contamination

    def scores(self, graph: Graph) -> Tensor:
        self.detector_ = TabularLOF(n_neighbors=self.n_neighbors).fit(graph.x.numpy())
        return torch.from_numpy(self.detector_.decision_scores_)

    def score_new(self, graph: Graph) -> Tensor:
        return torch.from_numpy(self.detector_.decision_function(graph.x.numpy()))


class IF(GraphDetector):
    """Isolation forest of the attributes (Liu et al. 2008); edges are not used."""

    transductive = False

    def __init__(
        self,
        n_estimators: int = 100,
        max_samples: str | int = "auto",
        contamination: float = 0.1,
        seed: int | None = None,
    ):
        self.n_estimators, self.max_samples, self.contamination, self.seed = (
            n_estimators,
            max_samples,
            contamination,
            seed,
        )

    def scores(self, graph: Graph) -> Tensor:
        seed = None if self.seed is None else self.seed % 2**32
        self.detector_ = IForest(self.n_estimators, self.max_samples, random_state=seed).fit(graph.x.numpy())
        return torch.from_numpy(self.detector_.decision_scores_)

    def score_new(self, graph: Graph) -> Tensor:
        return torch.from_numpy(self.detector_.decision_function(graph.x.numpy()))


class SCAN(GraphDetector):
    """Structural clustering (Xu et al. 2007): members of a cluster score 1, others 0 - dense groups are the suspects. hubs_, scattered_.

    Two nodes are similar when (common + 2) / sqrt((|N(u)| + 1)(|N(v)| + 1)) exceeds eps; a node with more than mu similar neighbours is a
    core. expand="once" takes a core's similar neighbours and theirs (what pygod does), "full" grows through every core (the paper). pygod 1.1.0
    cuts all similarities of a node to whole numbers when its first neighbour shares nobody with it; that is not reproduced.
    """

    def __init__(
        self, eps: float = 0.5, mu: int = 2, expand: str = "once", contamination: float = 0.1, symmetrize: bool = False
    ):
        self.eps, self.mu, self.expand, self.contamination, self.symmetrize = eps, mu, expand, contamination, symmetrize

    def scores(self, graph: Graph) -> Tensor:
        if self.expand not in ("once", "full"):
            raise UsageError(f"expand is {self.expand!r}; choose once or full")
        pattern = graph.adjacency.copy()
        multiplicity = pattern.data.copy()
        pattern.data[:] = 1
        size_N = np.asarray(pattern.sum(1)).ravel()
        common = (pattern @ pattern.T).multiply(pattern).tocsr()  # |N(u) & N(v)| on the edges
        kept = pattern.copy()
        kept.data = multiplicity
        near: list[np.ndarray] = []
        core_N = np.zeros(graph.nodes, bool)
        for v in range(graph.nodes):
            row = slice(pattern.indptr[v], pattern.indptr[v + 1])
            neighbors = pattern.indices[row]
            shared = np.asarray(common[v, neighbors].todense()).ravel() if len(neighbors) else np.zeros(0)
            similar = (shared > 0) & ((shared + 2) / np.sqrt((size_N[v] + 1) * (size_N[neighbors] + 1)) > self.eps)
            near.append(neighbors[similar])
            core_N[v] = kept.data[row][similar].sum() > self.mu
        member_N = self._clusters(near, core_N)
        self.hubs_ = torch.from_numpy(~member_N & (size_N > 1))
        self.scattered_ = torch.from_numpy(~member_N & (size_N <= 1))
        return torch.from_numpy(member_N.astype(np.float32))

    def _clusters(self, near: list[np.ndarray], core_N: np.ndarray) -> np.ndarray:
        member_N = np.zeros(len(near), bool)
        for v in range(len(near)):
            if member_N[v] or not core_N[v]:
                continue
            member_N[v] = True
            queue = list(near[v])
            for w in queue:
                fresh = [s for s in near[w] if not member_N[s]] if self.expand == "once" or core_N[w] else []
                member_N[w] = True
                member_N[fresh] = True
                if self.expand == "full":
                    queue.extend(fresh)
        return member_N
