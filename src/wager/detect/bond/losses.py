"""Row errors of graph reconstruction without an N x N matrix. Exact: the same value and gradient as the dense form.

Linear decoder, S' = H H^T or S' = H W^T:  sum_j (s_ij - h_i.w_j)^2 = sum_j s_ij^2 - 2 h_i.(S W)_i + h_i^T (W^T W) h_i, in O(E H + N H^2).
Sigmoid decoder: the part that treats every pair alike is summed in blocks of rows that backward computes again, O(b N) memory; the
entries of S correct it edge by edge. Sums run in float64, because the three terms of a good reconstruction cancel.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional as F

from wager.detect.bond.graph import Graph, Product
from wager.detect.bond.layers import GCN, MLP
from wager.detect.bond.masks import Mask, MaskedRows
from wager.native import build

TINY = 1e-24


class Structure:
    """What a loss needs of the adjacency S: products with it, squared row sums, its entries. Columns: the graph's own nodes, or with
    every_column those of the whole graph that it is a part of."""

    def __init__(self, graph: Graph, every_column: bool = False):
        s = graph.rows if every_column else graph.adjacency
        self.product = Product(s)
        self.square_N = torch.from_numpy(s.multiply(s).sum(1)).reshape(-1).double()
        coo = s.tocoo()
        self.row_E, self.column_E = torch.from_numpy(coo.row).long(), torch.from_numpy(coo.col).long()
        self.value_E = torch.from_numpy(coo.data)
        self.nodes = graph.nodes


class Entries:
    """The same of sparse attributes X."""

    def __init__(self, x: sparse.csr_matrix):
        self.product = Product(x)
        self.square_N = torch.from_numpy(x.multiply(x).sum(1)).reshape(-1).double()
        coo = x.tocoo()
        self.row_E, self.column_E = torch.from_numpy(coo.row).long(), torch.from_numpy(coo.col).long()
        self.value_E = torch.from_numpy(coo.data)


def linear_rows(
    structure: Structure | Entries, h_NH: Tensor, w_NH: Tensor | None = None, stretch: float = 1.0
) -> Tensor:
    """Squared error of each row of S against h w^T (w = h by default), float32; `stretch` multiplies the square of h w^T alone."""
    h = h_NH.double()
    w = h if w_NH is None else w_NH.double()
    cross = (h * structure.product(w)).sum(1)
    return (structure.square_N - 2 * cross + stretch * ((h @ (w.T @ w)) * h).sum(1)).clamp(min=TINY).float()


def sigmoid_rows(structure: Structure, z_NH: Tensor, positive: float = 0.5, block: int = 1024) -> Tensor:
    """Squared error of each row of S against sigmoid(z z^T). positive != 0.5 weighs entries of S by it and all others by 1 - it."""
    on, off = (1.0, 1.0) if positive == 0.5 else (positive, 1 - positive)
    at = torch.sigmoid((z_NH[structure.row_E] * z_NH[structure.column_E]).sum(1))
    fix = on * (structure.value_E - at) ** 2 - off * at**2
    rows = off * pair_sums(z_NH, "sigmoid squared", block)
    return rows.index_add(0, structure.row_E, fix).clamp(min=TINY)


def pair_sums(z_NH: Tensor, kind: str, block: int = 1024) -> Tensor:
    """sum_j f(z_i.z_j) for each i with f = sigmoid^2 ("sigmoid squared"), softplus ("softplus": -log(1 - sigmoid)) or
    softplus(-t) ("negative softplus": -log sigmoid)."""
    return _PairSums.apply(z_NH, kind, block)  # type: ignore[return-value]


KINDS = ("sigmoid squared", "softplus", "negative softplus")


@cache
def _library() -> ctypes.CDLL:
    return build.load("wager_pairs", [Path(__file__).parent / "cpp" / "pairs.cpp"])


def _native(name: str, kind: str, z: Tensor, *others: Tensor) -> None:
    """Call a loop over pairs on contiguous float32 tensors."""
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (z, *others)]
    *given, out = pointers
    sizes = (ctypes.c_int64(z.shape[0]), ctypes.c_int64(z.shape[1]), ctypes.c_int64(KINDS.index(kind)))
    getattr(_library(), name)(*given, *sizes, out, ctypes.c_int(torch.get_num_threads()))


class _PairSums(torch.autograd.Function):
    """On a CPU in float32 by a loop that keeps pairs in registers; elsewhere by blocks of rows. Both make pairs again in backward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, kind: str, block: int) -> Tensor:
        ctx.save_for_backward(z)
        ctx.kind, ctx.block = kind, block
        if z.device.type == "cpu" and z.dtype == torch.float32:
            out = torch.empty(len(z))
            _native("wager_pair_sums", kind, z.contiguous(), out)
            return out
        return torch.cat([_value(z[i : i + block] @ z.T, kind).sum(1) for i in range(0, len(z), block)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (z,), g = ctx.saved_tensors, grads[0]
        if z.device.type == "cpu" and z.dtype == torch.float32:
            out = torch.empty(z.shape)
            _native("wager_pair_slopes", ctx.kind, z.contiguous(), g.float().contiguous(), out)
            return out, None, None
        out = torch.zeros_like(z)
        for i in range(0, len(z), ctx.block):
            rows = slice(i, i + ctx.block)
            slope = _slope(z[rows] @ z.T, ctx.kind) * g[rows, None]
            out[rows] += slope @ z
            out += slope.T @ z[rows]
        return out, None, None


def _value(t: Tensor, kind: str) -> Tensor:
    if kind == "sigmoid squared":
        return torch.sigmoid(t) ** 2
    return F.softplus(t if kind == "softplus" else -t)


def _slope(t: Tensor, kind: str) -> Tensor:
    p = torch.sigmoid(t)
    if kind == "sigmoid squared":
        return 2 * p * p * (1 - p)
    return p if kind == "softplus" else p - 1


def attribute_rows(x_ND: Tensor, out_ND: Tensor, positive: float = 0.5) -> Tensor:
    """Squared error of each row of x; positive != 0.5 weighs entries > 0 by it and all others by 1 - it."""
    square = (x_ND - out_ND) ** 2
    if positive != 0.5:
        square = torch.where(x_ND > 0, square * positive, square * (1 - positive))
    return square.sum(1)


def sparse_attributes(graph: Graph) -> Entries | None:
    """Made once for each graph; None where attributes are dense."""
    if graph.sparse_x is None:
        return None
    if "entries" not in graph.made:
        graph.made["entries"] = Entries(graph.sparse_x)
    return graph.made["entries"]


def weighted_rows(entries: Entries, h_NH: Tensor, w_DH: Tensor, positive: float) -> Tensor:
    """`attribute_rows` of sparse x against h w^T, which is computed at the entries of x alone."""
    if positive == 0.5:
        return linear_rows(entries, h_NH, w_DH)
    at = (h_NH[entries.row_E] * w_DH[entries.column_E]).sum(1).double()
    square = (entries.value_E.double() - at) ** 2
    on = torch.where(entries.value_E > 0, positive, 1 - positive)
    h, w = h_NH.double(), w_DH.double()
    rows = (1 - positive) * ((h @ (w.T @ w)) * h).sum(1)
    return rows.index_add(0, entries.row_E, on * square - (1 - positive) * at**2).clamp(min=TINY).float()


def rebuilt_rows(
    graph: Graph, decoder: GCN | MLP, h: Tensor, spread: Product | None, generator: torch.Generator
) -> Tensor:
    """Squared error of each row of the attributes against the decoder's output, which is not formed where they are sparse."""
    entries = sparse_attributes(graph)
    if entries is None:
        return attribute_rows(graph.x, decoder(h, spread))  # type: ignore[arg-type]
    if isinstance(decoder, GCN):
        assert spread is not None
        return linear_rows(entries, *decoder.factors(h, spread))
    return dropped_rows(entries, *decoder.factors(h), decoder.share if decoder.training else 0.0, generator)


def double_error(attribute_N: Tensor, structure_N: Tensor, weight: float | str) -> Tensor:
    """w |x - x'| + (1 - w) |s - s'| per row. "auto" balances the two by their spread: w = std(s) / (std(x) + std(s)), as published in 2022."""
    a, s = attribute_N.clamp(min=TINY).sqrt(), structure_N.clamp(min=TINY).sqrt()
    if weight == "auto":
        spread_a, spread_s = a.detach().std(), s.detach().std()
        weight = float(spread_s / (spread_a + spread_s).clamp(min=1e-12))
    return float(weight) * a + (1 - float(weight)) * s


def dropped_rows(
    structure: Structure | Entries,
    h_NH: Tensor,
    w_NH: Tensor,
    share: float,
    generator: torch.Generator,
    drawn: bool = True,
) -> Tensor:
    """Squared error of each row of S against dropout(h w^T). Without dropout this is `linear_rows`.

    drawn: a mask for every pair, O(share N^2 H) time (`masks`). Otherwise the mean over all masks, which needs none:
    E (m o / (1 - p) - s)^2 = o^2 / (1 - p) - 2 o s + s^2, O(E H + N H^2).
    """
    if not drawn or share == 0:
        return linear_rows(structure, h_NH, w_NH, 1 / (1 - share))
    mask = Mask.drawn(len(h_NH), share, generator)
    rows = MaskedRows.apply(h_NH, w_NH, structure.product.matrix, structure.square_N, mask)
    return rows.clamp(min=TINY)  # type: ignore[union-attr]
