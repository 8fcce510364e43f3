"""Operators that work in low precision and return exactly what float64 returns. Two proofs, never mixed.

Order (topk, intersect, shared neighbours): rounding to nearest is monotone, so if the k-th and the (k+1)-th smallest rounded values of a row
differ, the rounded index set is the exact one. Rows where they are equal are done again in float64.
Value (neighbours within a range): a computed distance plus and minus its bound (`bounds`) decides most pairs; the rest are computed in
float64. Exact. Source: TOD (arXiv 2110.14007).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wager.detect.tod.torch_knn import DTYPE
from wager.errors import UsageError


@dataclass(frozen=True)
class Verified:
    """An exact answer and the share of the work that low precision could not decide."""

    value: Tensor
    verified_share: float


def smallest(values_RN: Tensor, k: int, precision: str = "fp16") -> Verified:
    """Indices of each row's k smallest float64 values, ordered by (value, index).

    Values are scaled to the range of the format first (a power of two, exact); rounding is monotone also where it overflows or underflows.
    """
    if not 1 <= k <= values_RN.shape[1]:
        raise UsageError(f"k is {k}; rows of {values_RN.shape[1]} values have 1 to {values_RN.shape[1]} smallest ones")
    if k == values_RN.shape[1]:
        return Verified(_ordered(values_RN, torch.arange(k).expand(len(values_RN), k)), 0.0)
    rounded = _rounded(values_RN, precision)
    found, index = rounded.topk(k + 1, largest=False, sorted=True)
    unsure = found[:, k - 1] == found[:, k]
    index = index[:, :k].clone()
    if unsure.any():
        exact = torch.sort(values_RN[unsure], dim=1, stable=True).indices
        index[unsure] = exact[:, :k]
    return Verified(_ordered(values_RN, index), float(unsure.float().mean()))


def _rounded(values: Tensor, precision: str) -> Tensor:
    dtype = DTYPE[precision]
    largest = values.abs().max()
    scale = torch.exp2(-torch.ceil(torch.log2(largest))) if largest > 0 else torch.tensor(1.0)
    return (values * scale).to(dtype).float()


def _ordered(values_RN: Tensor, index_RK: Tensor) -> Tensor:
    """Each row's indices by (value, index)."""
    index = index_RK.sort(1).values
    order = torch.sort(values_RN.gather(1, index), dim=1, stable=True).indices
    return index.gather(1, order)


def intersect(a_N: Tensor, b_M: Tensor, precision: str = "fp16") -> Verified:
    """The values of `a` that also occur in `b`, sorted, without repeats: equal values have equal roundings, so only survivors are compared."""
    low_a, low_b = a_N.to(DTYPE[precision]), b_M.to(DTYPE[precision])
    maybe_a, maybe_b = torch.isin(low_a.float(), low_b.float()), torch.isin(low_b.float(), low_a.float())
    survivors = a_N[maybe_a]
    share = float(maybe_a.float().mean()) if len(a_N) else 0.0
    return Verified(torch.unique(survivors[torch.isin(survivors, b_M[maybe_b])]), share)


def within(
    query_RD: np.ndarray, base_ND: np.ndarray, radius: float, precision: str = "fp32", tile: int = 2048
) -> tuple[list[np.ndarray], float]:
    """Base rows at distance <= radius of each query row, ascending, and the share of pairs that float64 decided."""
    from wager.detect.tod import native
    from wager.detect.tod.batching import Execution
    from wager.detect.tod.torch_knn import TorchScan

    query_RD, base_ND = (np.ascontiguousarray(x, dtype=np.float64) for x in (query_RD, base_ND))
    scan = TorchScan(base_ND, 1, Execution(precision=precision))
    a = scan.low(query_RD)
    limit = (radius * scan.scale) ** 2
    limit_low, limit_high = limit * (1 - 2.0**-50), limit * (1 + 2.0**-50)
    parts: list[list[np.ndarray]] = [[] for _ in query_RD]
    unsure_pairs = 0
    for c0 in range(0, len(base_ND), tile):
        c1 = min(len(base_ND), c0 + tile)
        computed, error = scan.tile(a, c0, c1)
        value, spread = computed.double(), error.double()
        inside, unsure = value + spread < limit_low, (value - spread <= limit_high) & (value + spread >= limit_low)
        rows, columns = (t.numpy() for t in unsure.nonzero(as_tuple=True))
        unsure_pairs += len(rows)
        squares = np.empty(len(rows))
        if len(rows):
            native.call(
                "wager_squared_distances", np.ascontiguousarray(query_RD[rows]), base_ND,
                np.ascontiguousarray(columns[:, None] + c0), len(rows), 1, base_ND.shape[1], squares,
            )  # fmt: skip
        inside[torch.as_tensor(rows), torch.as_tensor(columns)] = torch.as_tensor(np.sqrt(squares) <= radius)
        for r, hits in enumerate(inside.numpy()):
            parts[r].append(np.flatnonzero(hits) + c0)
    return [np.concatenate(p) for p in parts], unsure_pairs / (len(query_RD) * len(base_ND))
