"""An attributed graph and the matrices that detectors multiply with. Legend: N nodes, E edges, D attributes, H hidden width."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from wager.errors import UsageError

SPARSE_SHARE = 0.05  # of attributes that are not zero: below it a sparse product is the quicker one


@dataclass(frozen=True)
class Graph:
    """x (N, D) float32; edge_index (2, E) int64, source above target, as stored; y (N,) bit 0 contextual, bit 1 structural, or None.

    A part of another graph (`sampling`) also knows the whole, its nodes' numbers there, how many of them lead as the batch, and whether every
    neighbour was taken.
    """

    x: Tensor
    edge_index: Tensor
    y: Tensor | None = field(default=None, compare=False)
    whole: Graph | None = field(default=None, compare=False)
    ids: Tensor | None = field(default=None, compare=False)
    leading: int | None = field(default=None, compare=False)
    complete: bool = True
    made: dict[str, Any] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )  # what others derive from it, once

    @staticmethod
    def of(data: Any) -> Graph:
        """From a Graph, a PyTorch Geometric `Data` (anything with x and edge_index), a mapping, or an .npz file. Raises UsageError."""
        if isinstance(data, Graph):
            return data
        if isinstance(data, str | Path):
            if not Path(data).is_file():
                raise UsageError(f"{data} does not exist; give an .npz file with x, edge_index and (optionally) y")
            with np.load(data) as stored:
                return Graph.of({name: stored[name] for name in stored.files})
        get = data.get if isinstance(data, dict) else lambda name, default=None: getattr(data, name, default)
        x, edges, y = get("x"), get("edge_index"), get("y")
        if x is None or edges is None:
            raise UsageError("a graph needs node attributes x and edge_index")
        x, edges = torch.as_tensor(x), torch.as_tensor(edges)
        if x.ndim != 2 or edges.ndim != 2 or edges.shape[0] != 2:
            raise UsageError(
                f"x has shape {tuple(x.shape)} and edge_index {tuple(edges.shape)}; expected (N, D) and (2, E)"
            )
        x, edges = x.to(torch.float32), edges.to(torch.int64)
        if not torch.isfinite(x).all():
            raise UsageError("x contains NaN or infinity; impute or drop such attributes")
        if len(edges[0]) and (int(edges.min()) < 0 or int(edges.max()) >= len(x)):
            raise UsageError(f"edge_index names node {int(edges.max())}, but there are {len(x)} nodes")
        return Graph(x, edges, None if y is None else torch.as_tensor(y).to(torch.int64).reshape(-1))

    @property
    def nodes(self) -> int:
        return len(self.x)

    @cached_property
    def attributes(self) -> Callable[[Tensor], Tensor]:
        """x times a dense matrix; as a sparse product where few attributes are set."""
        return Product(self.sparse_x) if self.sparse_x is not None else lambda dense_DH: self.x @ dense_DH

    @cached_property
    def attributes_T(self) -> Callable[[Tensor], Tensor]:
        """x^T times a dense matrix."""
        return Product(self.sparse_x.T) if self.sparse_x is not None else lambda dense_NH: self.x.T @ dense_NH

    @cached_property
    def input(self) -> Tensor | Product:
        """x as the first layer of a network takes it."""
        return self.x if self.sparse_x is None else Product(self.sparse_x)

    @cached_property
    def sparse_x(self) -> sparse.csr_matrix | None:
        """x where few attributes are set, else None."""
        few = int(torch.count_nonzero(self.x)) < SPARSE_SHARE * self.x.numel()
        return sparse.csr_matrix(self.x.numpy()) if few else None

    def both_directions(self) -> Graph:
        """The same graph with every edge in both directions once."""
        edges = torch.cat([self.edge_index, self.edge_index.flip(0)], 1)
        return replace(self, edge_index=torch.unique(edges, dim=1))

    def head(self, value_N: Tensor) -> Tensor:
        """The values of the nodes that are scored: all, or the batch of a part."""
        return value_N if self.leading is None else value_N[: self.leading]

    @cached_property
    def adjacency(self) -> sparse.csr_matrix:
        """S: entry (i, j) counts the edges from i to j, as a dense adjacency of the reference would; in a part, all edges among its nodes."""
        return self.messages if self.whole is None else self.rows[:, self.ids.numpy()].tocsr()  # type: ignore[union-attr]

    @cached_property
    def rows(self) -> sparse.csr_matrix:
        """The rows of S of these nodes, with a column for every node of the whole graph."""
        return self.adjacency if self.whole is None else self.whole.adjacency[self.ids.numpy()]  # type: ignore[union-attr]

    @cached_property
    def messages(self) -> sparse.csr_matrix:
        """Entry (i, j) counts the edges from i to j along which a network passes messages."""
        s, t = self.edge_index.numpy()
        matrix = sparse.csr_matrix((np.ones(len(s), np.float32), (s, t)), shape=(self.nodes, self.nodes))
        matrix.sum_duplicates()
        return matrix

    @cached_property
    def simple(self) -> sparse.csr_matrix:
        """Undirected, without loops and repeats: entries 0 or 1."""
        matrix = self.adjacency.maximum(self.adjacency.T).tocsr()
        matrix.setdiag(0)
        matrix.eliminate_zeros()
        matrix.data[:] = 1
        matrix.sort_indices()
        return matrix

    @cached_property
    def looped(self) -> sparse.csr_matrix:
        """A + I from targets to sources; a loop that is there already is not added again."""
        into = self.messages.T.tocsr()
        return sparse.csr_matrix(into + sparse.diags(np.where(into.diagonal() > 0, 0, 1).astype(np.float32)))

    @cached_property
    def degree_N(self) -> np.ndarray:
        """Row sums of `looped`; those of the whole graph where a part took every neighbour."""
        if self.whole is not None and self.complete:
            return self.whole.degree_N[self.ids.numpy()]  # type: ignore[union-attr]
        return np.asarray(self.looped.sum(1)).ravel()

    def gcn(self) -> Product:
        """D^-1/2 (A + I) D^-1/2 acting from sources on targets."""
        root = sparse.diags(1 / np.sqrt(self.degree_N))
        return Product(root @ self.looped @ root)

    def mean_in(self) -> Product:
        """Mean over a node's incoming edges; 0 without any."""
        into = self.messages.T.tocsr()
        degree = np.asarray(into.sum(1)).ravel()
        return Product(sparse.diags(1 / np.maximum(degree, 1)) @ into)

    def laplacian(self) -> Any:
        """diag(row sums) - max(S, S^T)."""
        s = self.adjacency.maximum(self.adjacency.T)
        return sparse.csr_matrix(sparse.diags(np.asarray(s.sum(1)).ravel()) - s)

    def looped_edges(self) -> Tensor:
        """Edges with one loop at every node, for attention."""
        kept = self.edge_index[:, self.edge_index[0] != self.edge_index[1]]
        loop = torch.arange(self.nodes)
        return torch.cat([kept, torch.stack([loop, loop])], 1)


def csr(matrix: Any, dtype: torch.dtype) -> Tensor:
    m = sparse.csr_matrix(matrix)
    m.sum_duplicates()
    start, column = (torch.from_numpy(a.astype(np.int64)) for a in (m.indptr, m.indices))
    values = torch.from_numpy(m.data).to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(start, column, values, size=m.shape, check_invariants=True)


class Product:
    """A constant sparse matrix that multiplies dense ones; the gradient multiplies with its transpose. O(E H), no N x N."""

    def __init__(self, matrix: Any):
        self.matrix = sparse.csr_matrix(matrix)
        self._by_dtype: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if dtype not in self._by_dtype:
            self._by_dtype[dtype] = (csr(self.matrix, dtype), csr(self.matrix.T, dtype))
        return self._by_dtype[dtype]

    def __call__(self, dense_NH: Tensor) -> Tensor:
        return _Multiply.apply(dense_NH, *self.pair(dense_NH.dtype))  # type: ignore[return-value]


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dense: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        return matrix @ dense

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transposed @ grads[0].contiguous(), None, None
