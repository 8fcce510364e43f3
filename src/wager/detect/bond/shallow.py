"""Detectors without a deep network: LOF and IF on attributes, SCAN on structure, Radar and ANOMALOUS on residuals.

SCAN, Radar and ANOMALOUS need no dense N x N adjacency or Laplacian. Radar's W is N x N by definition; `low_rank=True` learns W = I + A X^T instead,
O(N D), another parametrisation with its own scores (approximate). Sources: BOND (arXiv 2206.10071) and the papers named at each class.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.sparse import identity
from torch import Tensor

from wager.detect.bond.base import GraphDetector, descend, random_source
from wager.detect.bond.graph import Graph, Product
from wager.detect.tod.marginals import IForest
from wager.detect.tod.neighbors import LOF as TabularLOF
from wager.errors import CapacityError, UsageError, WagerError


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
    core. expand="once" takes a core's similar neighbours and theirs (what pygod does), "full" grows through every core (the paper).
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


def solve(system: Any, right_ND: np.ndarray, tolerance: float = 1e-10) -> np.ndarray:
    """The solution of a symmetric positive definite system, all columns at once, to a relative residual of `tolerance`."""
    inverse_N1 = 1 / system.diagonal()[:, None]
    x = right_ND * inverse_N1
    residual = right_ND - system @ x
    goal_D = tolerance * np.linalg.norm(right_ND, axis=0)
    direction = z = inverse_N1 * residual
    power_D = (residual * z).sum(0)
    for _ in range(10 * len(x)):
        if (np.linalg.norm(residual, axis=0) <= goal_D).all():
            return x
        image = system @ direction
        curve_D = (direction * image).sum(0)
        step_D = np.divide(power_D, curve_D, out=np.zeros_like(power_D), where=curve_D > 0)
        x = x + step_D * direction
        residual = residual - step_D * image
        z = inverse_N1 * residual
        before_D, power_D = power_D, (residual * z).sum(0)
        direction = z + np.divide(power_D, before_D, out=np.zeros_like(power_D), where=before_D > 0) * direction
    raise WagerError(f"conjugate gradients did not converge on {len(x)} nodes; lower gamma")


class _Residual(GraphDetector):
    """min ||X - model(X) - R||_F + gamma tr(R^T L R) by Adam, score ||R_i||^2; R starts at ((1 + wd) I + gamma L)^-1 X."""

    gamma: float
    weight_decay: float
    lr: float
    epoch: int
    seed: int | None

    def start(self, graph: Graph) -> Tensor:
        """The sparse positive definite system, solved by conjugate gradients: no fill-in, whatever the graph."""
        system = (1 + self.weight_decay) * identity(graph.nodes) + self.gamma * graph.laplacian()
        return torch.from_numpy(solve(system.tocsr().astype(np.float64), graph.x.double().numpy())).float()

    def parameters(self, x_ND: Tensor, generator: torch.Generator) -> list[Tensor]:
        raise NotImplementedError

    def explained(self, x_ND: Tensor, parameters: list[Tensor]) -> Tensor:
        raise NotImplementedError

    def scores(self, graph: Graph) -> Tensor:
        x, laplacian = graph.x, Product(graph.laplacian())
        free = [p.requires_grad_() for p in self.parameters(x, random_source(self.seed))]
        residual = self.start(graph).requires_grad_()

        def passes() -> Iterator[Tensor]:
            smooth = (residual * laplacian(residual)).sum()
            yield torch.linalg.norm(x - self.explained(x, free) - residual) + self.gamma * smooth

        descend([*free, residual], self.lr, self.weight_decay, self.epoch, passes)
        return residual.detach().square().sum(1)


class Radar(_Residual):
    """Residual analysis (Li et al. 2017): X is explained as W X with W starting at the identity."""

    def __init__(
        self,
        gamma: float = 1.0,
        weight_decay: float = 0.0,
        lr: float = 0.004,
        epoch: int = 100,
        low_rank: bool = False,
        contamination: float = 0.1,
        symmetrize: bool = False,
        seed: int | None = None,
    ):
        self.gamma, self.weight_decay, self.lr, self.epoch, self.low_rank = gamma, weight_decay, lr, epoch, low_rank
        self.contamination, self.symmetrize, self.seed = contamination, symmetrize, seed

    def parameters(self, x_ND: Tensor, generator: torch.Generator) -> list[Tensor]:
        if self.low_rank:
            return [torch.zeros_like(x_ND)]
        n = len(x_ND)
        if n > 40_000:
            raise CapacityError(
                f"Radar's W for {n} nodes needs {16 * n * n / 1e9:.0f} GB with its optimizer; use low_rank=True"
            )
        return [torch.eye(n)]

    def explained(self, x_ND: Tensor, parameters: list[Tensor]) -> Tensor:
        if self.low_rank:
            return x_ND + parameters[0] @ (x_ND.T @ x_ND) / len(x_ND)
        return parameters[0] @ x_ND


class ANOMALOUS(_Residual):
    """Joint attribute selection and residuals (Peng et al. 2018): X is explained as X W X with W (D, N) drawn at random."""

    def __init__(
        self,
        gamma: float = 1.0,
        weight_decay: float = 0.0,
        lr: float = 0.004,
        epoch: int = 100,
        contamination: float = 0.1,
        symmetrize: bool = False,
        seed: int | None = None,
    ):
        self.gamma, self.weight_decay, self.lr, self.epoch = gamma, weight_decay, lr, epoch
        self.contamination, self.symmetrize, self.seed = contamination, symmetrize, seed

    def parameters(self, x_ND: Tensor, generator: torch.Generator) -> list[Tensor]:
        return [torch.randn(x_ND.shape[1], len(x_ND), generator=generator)]

    def explained(self, x_ND: Tensor, parameters: list[Tensor]) -> Tensor:
        return x_ND @ (parameters[0] @ x_ND)
