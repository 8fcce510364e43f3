"""Dropout of a rebuilt adjacency, a mask for every pair of nodes, in a share p of the pairs' time and without an N x N matrix.

With o = h w^T, a mask m of 0 and 1/(1-p), and the sparse S, a row's squared error splits into

    sum_j (m_ij o_ij - s_ij)^2  =  h_i . u_i - 2 h_i . c_i + sum_j s_ij^2,
    u_i = (1-p)^-2 (W^T W h_i - sum over dropped j of o_ij w_j),        c_i = (1-p)^-1 sum over kept neighbours j of s_ij w_j.

u and c give the value and, times the row's own weight, the gradient of h; the same sums from the columns' side, weighted by the rows' gradients,
give that of w. The mask is a hash of (the row's two keys, the column), so nothing of it is stored. Exact: the mask of the reference up to
its random numbers; sums over all pairs in float64. Rows R, columns N, features H.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from wager.native import build


@cache
def _library() -> ctypes.CDLL:
    return build.load("wager_masks", [Path(__file__).parent / "cpp" / "masks.cpp"])


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@dataclass(frozen=True)
class Mask:
    """Which pairs are dropped, each with probability `share` by itself: a function of two 32-bit keys of the row and the column's number."""

    multiplier_R: np.ndarray
    offset_R: np.ndarray
    share: float

    @staticmethod
    def drawn(rows: int, share: float, generator: torch.Generator) -> Mask:
        keys = torch.randint(2**32, (2, rows), generator=generator).numpy().astype(np.uint32)
        return Mask(keys[0] | np.uint32(1), keys[1], share)

    @property
    def limit(self) -> int:
        """A pair is dropped when its mixed number, read as a signed one, lies below this."""
        return min(int(round(self.share * 2**32)), 2**32 - 1) - 2**31

    def kept(self, row_E: np.ndarray, column_E: np.ndarray) -> np.ndarray:
        """Whether each pair is kept."""
        row_E, column_E = (np.ascontiguousarray(a, dtype=np.int64) for a in (row_E, column_E))
        out = np.empty(len(row_E), np.uint8)
        _library().wager_mask_kept(
            _pointer(row_E), _pointer(column_E), ctypes.c_int64(len(row_E)), _pointer(self.multiplier_R),
            _pointer(self.offset_R), ctypes.c_int32(self.limit), _pointer(out),
        )  # fmt: skip
        return out.astype(bool)

    def dropped(self, a: Tensor, b: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
        """sum over the dropped j of weight_j (a_i . b_j) b_j for each row i of `a`, float64. transposed: rows of `a` are the mask's columns."""
        a, b, weight = (t.detach().float().contiguous() for t in (a, b, weight))
        out = torch.empty(a.shape, dtype=torch.float64)
        sizes = (ctypes.c_int64(n) for n in (len(a), len(b), a.shape[1]))
        _library().wager_mask_dropped(
            *(ctypes.c_void_p(t.data_ptr()) for t in (a, b, weight)), *sizes, _pointer(self.multiplier_R),
            _pointer(self.offset_R), ctypes.c_int32(self.limit), ctypes.c_int(transposed),
            ctypes.c_void_p(out.data_ptr()), ctypes.c_int(torch.get_num_threads()),
        )  # fmt: skip
        return out


class MaskedRows(torch.autograd.Function):
    """Squared error of each row of the sparse matrix S (R, N) against the masked h w^T; its squared row sums are given."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, s: sparse.csr_matrix, square_R: Tensor, mask: Mask) -> Tensor:
        scale = 1 / (1 - mask.share)
        h64, w64 = h.detach().double(), w.detach().double()
        u = scale**2 * (h64 @ (w64.T @ w64) - mask.dropped(h, w, torch.ones(len(w))))
        kept = s.copy()
        row_E = np.repeat(np.arange(len(square_R)), np.diff(s.indptr))
        kept.data = s.data * mask.kept(row_E, s.indices) * scale
        c = torch.from_numpy(kept @ w64.numpy())
        ctx.save_for_backward(h, w, u - c)
        ctx.settings = kept, mask, scale
        return ((h64 * (u - 2 * c)).sum(1) + square_R).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (h, w, pull), (kept, mask, scale) = ctx.saved_tensors, ctx.settings
        g = grads[0].double()
        h64, w64 = h.double(), w.double()
        weighted = h64 * g[:, None]
        v = scale**2 * (w64 @ (h64.T @ weighted) - mask.dropped(w, h, g, transposed=True))
        d = torch.from_numpy(kept.T @ weighted.numpy())
        return (2 * g[:, None] * pull).float(), (2 * (v - d)).float(), None, None, None
