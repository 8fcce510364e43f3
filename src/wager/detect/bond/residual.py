"""Radar and ANOMALOUS: what neither the other nodes' attributes nor the neighbourhood explain is an outlier.

Neither needs a dense adjacency or Laplacian. The reference's Radar trains an N x N matrix by Adam: rows are stepped in blocks whose gradient never
leaves the cache, and sparse attributes multiply as a sparse matrix. The paper's Radar has a closed form in which W stays a product of
two N x D matrices. Sources: BOND (arXiv 2206.10071) and the papers named at each class.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import diags, identity
from torch import Tensor

from wager.detect.bond.base import GraphDetector, descend, random_source
from wager.detect.bond.graph import Graph, Product
from wager.errors import CapacityError, UsageError, WagerError
from wager.native import build

BLOCK_BYTES = 2**20  # of a gradient that stays in cache
FORMS = ("reference", "paper")


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


class Radar(GraphDetector):
    """Residual analysis (Li et al. 2017): attributes X are explained by those of other nodes; the residual R is smooth along edges.

    form "reference" is pygod's: min |X - W X - R|_F + gamma tr(R^T L R) by Adam, W (N, N) from the identity, R from ((1 + wd) I + gamma L)^-1 X,
    score |R_i|^2. "paper" is the published |X - W^T X - R|_F^2 + alpha |W|_21 + beta |R|_21 + gamma tr(R^T L R) by alternating
    closed forms, O(N D^2) and no N x N matrix; weight_decay, lr and seed are not part of it, epoch bounds its rounds.
    """

    def __init__(
        self,
        gamma: float = 1.0,
        weight_decay: float = 0.0,
        lr: float = 0.004,
        epoch: int = 100,
        form: str = "reference",
        alpha: float = 1.0,
        beta: float = 1.0,
        contamination: float = 0.1,
        symmetrize: bool = False,
        seed: int | None = None,
    ):
        if form not in FORMS:
            raise UsageError(f"form is {form!r}; choose {' or '.join(FORMS)}")
        self.gamma, self.weight_decay, self.lr, self.epoch, self.form = gamma, weight_decay, lr, epoch, form
        self.alpha, self.beta = alpha, beta
        self.contamination, self.symmetrize, self.seed = contamination, symmetrize, seed

    def scores(self, graph: Graph) -> Tensor:
        if self.epoch < 1:
            raise UsageError(f"epoch is {self.epoch}; it must be at least 1")
        if self.form == "paper":
            return closed_form(graph, self.alpha, self.beta, self.gamma, self.epoch)[0]
        n, x, laplacian = graph.nodes, graph.x, Product(graph.laplacian())
        if n > 40_000:
            raise CapacityError(
                f"Radar's W for {n} nodes needs {12 * n * n / 1e9:.0f} GB with its optimizer; use form='paper'"
            )
        wide, explained = Wide(graph, self.lr, self.weight_decay), x
        residual = start(graph, self.gamma, self.weight_decay)
        optimizer = torch.optim.Adam([residual], lr=self.lr, weight_decay=self.weight_decay)
        for _ in range(self.epoch):
            left = x - explained - residual
            left = left / torch.linalg.norm(left).clamp(min=1e-30)
            residual.grad = 2 * self.gamma * laplacian(residual) - left
            optimizer.step()
            explained = wide.step(left)
        return residual.square().sum(1)


def start(graph: Graph, gamma: float, weight_decay: float) -> Tensor:
    """((1 + wd) I + gamma L)^-1 X, a sparse positive definite system, by conjugate gradients: no fill-in, whatever the graph."""
    system = (1 + weight_decay) * identity(graph.nodes) + gamma * graph.laplacian()
    return torch.from_numpy(solve(system.tocsr().astype(np.float64), graph.x.double().numpy())).float()


@cache
def _library() -> ctypes.CDLL:
    return build.load("wager_adam", [Path(__file__).parent / "cpp" / "adam.cpp"])


class Wide:
    """W (N, N) with its two Adam moments; the gradient -left X^T is made and used up block by block."""

    def __init__(self, graph: Graph, lr: float, weight_decay: float):
        n = graph.nodes
        self.parts = [torch.eye(n), torch.zeros(n, n), torch.zeros(n, n)]
        self.x, self.lr, self.weight_decay, self.time = graph.x, lr, weight_decay, 0
        self.dense, self.into, self.back = graph.sparse_x is None, graph.attributes, graph.attributes_T
        self.block = max(1, BLOCK_BYTES // (4 * n))

    def step(self, left_ND: Tensor) -> Tensor:
        """Descend along -left X^T; returns W X."""
        self.time += 1
        n, out, threads = len(self.x), torch.empty_like(self.x), torch.get_num_threads()
        for i in range(0, n, self.block):
            rows = slice(i, i + self.block)
            slope = self.slope(left_ND[rows])
            parts = [part[rows] for part in self.parts]
            _library().wager_adam(
                *(ctypes.c_void_p(t.data_ptr()) for t in (*parts, slope)), ctypes.c_int64(slope.numel()),
                ctypes.c_int64(self.time), ctypes.c_double(self.lr), ctypes.c_double(self.weight_decay), ctypes.c_int(threads),
            )  # fmt: skip
            out[rows] = parts[0] @ self.x if self.dense else self.back(parts[0].T).T
        return out

    def slope(self, left_BD: Tensor) -> Tensor:
        """-left X^T of some rows."""
        return (-left_BD) @ self.x.T if self.dense else self.into(-left_BD.T).T.contiguous()


def closed_form(
    graph: Graph, alpha: float, beta: float, gamma: float, rounds: int, tolerance: float = 1e-6
) -> tuple[Tensor, list[float]]:
    """(norms of the residuals, the objective after each round) of the paper's Radar.

    With D the diagonal of 1 / (2 |W_i|): W = (X X^T + alpha D)^-1 X (X - R)^T = P (X - R)^T, where P = D^-1 X (alpha I + X^T D^-1 X)^-1 by Woodbury's
    identity; then (I + beta D_R + gamma L) R = X - W^T X, sparse and positive definite. The objective never rises.
    """
    if min(alpha, beta) <= 0 or gamma < 0:
        raise UsageError(f"alpha is {alpha}, beta {beta}, gamma {gamma}; Radar's weights are positive")
    x, laplacian = graph.x.double().numpy(), graph.laplacian().astype(np.float64)
    n, d = x.shape
    own_N, residual_N = np.ones(n), np.ones(n)
    residual = solve(((1 + beta) * identity(n) + gamma * laplacian).tocsr(), x)
    objective: list[float] = []
    for _ in range(rounds):
        scaled = x / own_N[:, None]
        p = np.linalg.solve(alpha * np.eye(d) + x.T @ scaled, scaled.T).T
        away = x - residual
        norm_N = np.sqrt(np.maximum(((p @ (away.T @ away)) * p).sum(1), 0))
        own_N = 0.5 / np.maximum(norm_N, 1e-12)
        explained = away @ (p.T @ x)
        system = (identity(n) + beta * diags(residual_N) + gamma * laplacian).tocsr()
        residual = solve(system, x - explained)
        length_N = np.linalg.norm(residual, axis=1)
        residual_N = 0.5 / np.maximum(length_N, 1e-12)
        fit = np.square(x - explained - residual).sum() + gamma * (residual * (laplacian @ residual)).sum()
        objective.append(float(fit + alpha * norm_N.sum() + beta * length_N.sum()))
        if len(objective) > 1 and objective[-2] - objective[-1] <= tolerance * objective[-1]:
            break
    return torch.from_numpy(np.linalg.norm(residual, axis=1)).float(), objective


class ANOMALOUS(GraphDetector):
    """Joint attribute selection and residuals (Peng et al. 2018): as Radar, X is explained as X W X with W (D, N) drawn at random."""

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

    def scores(self, graph: Graph) -> Tensor:
        x, laplacian = graph.x, Product(graph.laplacian())
        generator = random_source(self.seed)
        w = torch.randn(x.shape[1], len(x), generator=generator).requires_grad_()
        residual = start(graph, self.gamma, self.weight_decay).requires_grad_()

        def passes() -> Iterator[Tensor]:
            smooth = (residual * laplacian(residual)).sum()
            explained = graph.attributes(graph.attributes_T(w.T).T)
            yield torch.linalg.norm(x - explained - residual) + self.gamma * smooth

        descend([w, residual], self.lr, self.weight_decay, self.epoch, passes)
        return residual.detach().square().sum(1)
