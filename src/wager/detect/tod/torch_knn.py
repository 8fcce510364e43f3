"""The neighbour search on any torch device and in fp16, bf16 or fp32: matrix products propose, float64 decides.

One pass over column tiles keeps, per row, the `kept` smallest lower bounds. The k-th smallest upper bound among them limits the candidates
from above; if the largest kept lower bound lies below that limit, the list may be cut and the row is searched in float64. On a CPU low
precision means storage in that precision and products in float32 (that is what tensor cores do). Exact, see `bounds`.
Source: TOD (arXiv 2110.14007).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from wager.detect.tod import bounds
from wager.detect.tod.batching import Execution
from wager.detect.tod.scan import centre_and_scale
from wager.errors import UsageError

KEPT_PER_NEIGHBOR = 8
DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class TorchScan:
    """Neighbours by tiles of matrix products on `execution.device`."""

    def __init__(self, base_ND: np.ndarray, k: int, execution: Execution):
        self.base_ND, self.k, self.execution, self.facts = base_ND, k, execution, {}
        if execution.device.startswith("cuda") and not torch.cuda.is_available():
            raise UsageError(f"device {execution.device!r} was asked for, but torch sees no GPU; use device='cpu'")
        self.precision = "fp32" if execution.precision == "auto" else execution.precision
        self.name = f"torch {self.precision} on {execution.device}"
        self.kept = min(len(base_ND), KEPT_PER_NEIGHBOR * k + 32)
        self.block_rows = execution.batch_rows or self.tile_rows()
        self.centre_D, self.scale = centre_and_scale(base_ND)
        self._low: tuple[Tensor, Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_low": None}

    def tile_rows(self) -> int:
        """Square tiles of about seven float32 values a pair under the budget (of the device's free memory on a GPU)."""
        free = self.execution.budget_bytes
        if self.execution.device.startswith("cuda") and self.execution.memory_bytes is None:
            free = int(0.8 * torch.cuda.mem_get_info(self.execution.device)[0])
        return int(max(64, min(16384 if self.execution.device != "cpu" else 2048, (free / 28) ** 0.5)))

    def low(self, points_RD: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Rounded points (stored low), squared norms and norms of the rounded points, on the device."""
        scaled = torch.as_tensor((points_RD - self.centre_D) * self.scale).to(self.execution.device)
        rounded = scaled.to(DTYPE[self.precision])
        squares = rounded.double().square().sum(1)
        reach = torch.nextafter(squares.sqrt().float(), torch.tensor(torch.inf, device=squares.device))
        return rounded, squares.float(), reach

    def base(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._low is None:
            self._low = self.low(self.base_ND)
        return self._low

    def block(self, query_RD: np.ndarray | None, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, dict]:
        points = (self.base_ND if query_RD is None else query_RD)[start:stop]
        own = torch.arange(start, stop) if query_RD is None else torch.full((stop - start,), -1)
        index, unsure = self.propose(points, own.to(self.execution.device))
        return self.decide(points, own.numpy(), index, unsure)

    def tile(self, a: tuple[Tensor, Tensor, Tensor], c0: int, c1: int) -> tuple[Tensor, Tensor]:
        """Computed squared distances and their bounds for rows `a` and base columns c0..c1."""
        b, b2, reach = (t[c0:c1] for t in self.base())
        computed = (a[1][:, None] + b2) - 2 * product(a[0], b)
        return computed, bounds.bound(computed, a[2][:, None] + reach, self.base_ND.shape[1], self.precision)

    def propose(self, points_RD: np.ndarray, own_R: Tensor) -> tuple[Tensor, Tensor]:
        """Candidate indices (-1: none) and the rows whose list may be cut."""
        a = self.low(points_RD)
        rows, n, step = len(points_RD), len(self.base_ND), max(self.kept, self.block_rows)
        lows = torch.full((rows, 0), torch.inf, device=own_R.device)
        highs, index = lows.clone(), torch.zeros((rows, 0), dtype=torch.long, device=own_R.device)
        for c0 in range(0, n, step):
            c1 = min(n, c0 + step)
            computed, error = self.tile(a, c0, c1)
            inside = (own_R >= c0) & (own_R < c1)
            computed[inside.nonzero().squeeze(1), (own_R - c0)[inside]] = torch.inf
            low, at = (computed - error).topk(min(self.kept, c1 - c0), largest=False)
            high = (computed + error).gather(1, at)
            lows, highs, index = (torch.cat(pair, 1) for pair in ((lows, low), (highs, high), (index, at + c0)))
            if lows.shape[1] > self.kept:
                lows, at = lows.topk(self.kept, largest=False)
                highs, index = highs.gather(1, at), index.gather(1, at)
        limit = highs.kthvalue(self.k, dim=1).values
        full = lows.shape[1] < n
        unsure = (lows.max(1).values <= limit) & full | ~torch.isfinite(limit)
        return torch.where((lows <= limit[:, None]) & torch.isfinite(lows), index, -1), unsure

    def decide(
        self, points_RD: np.ndarray, own_R: np.ndarray, index_RC: Tensor, unsure_R: Tensor
    ) -> tuple[np.ndarray, np.ndarray, dict]:
        """float64 distances of the candidates, the k smallest by (distance, index)."""
        from wager.detect.tod import native

        index, unsure = index_RC.cpu().numpy(), unsure_R.cpu().numpy()
        query = np.ascontiguousarray(points_RD)
        valid = index >= 0
        squares = np.empty(index.shape)
        native.call(
            "wager_squared_distances", query, self.base_ND, np.ascontiguousarray(np.where(valid, index, 0)), len(query),
            index.shape[1], query.shape[1], squares,
        )  # fmt: skip
        squares[~valid] = np.inf
        order = np.lexsort((index, squares), axis=1)[:, : self.k]
        distance = np.sqrt(np.take_along_axis(squares, order, 1))
        found = np.take_along_axis(index, order, 1)
        for r in np.flatnonzero(unsure):
            distance[r], found[r] = self.exact_row(query[r], int(own_R[r]))
        return distance, found, {"verified_pairs": int(valid.sum()), "fp64_rows": int(unsure.sum())}

    def exact_row(self, point_D: np.ndarray, own: int) -> tuple[np.ndarray, np.ndarray]:
        """One row over the whole base in float64; its own index is left out by asking for one neighbour more."""
        from wager.detect.tod.knn import exact_neighbors

        found = exact_neighbors(point_D[None], self.base_ND, self.k + (own >= 0), -1)
        keep = np.flatnonzero(found.index_RK[0] != own)[: self.k]
        return found.distance_RK[0, keep], found.index_RK[0, keep]


def product(a_RD: Tensor, b_CD: Tensor) -> Tensor:
    """a b^T with a float32 result, the inputs in their own precision and TF32 off."""
    if a_RD.device.type == "cpu" or a_RD.dtype == torch.float32:
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            return a_RD.float() @ b_CD.float().T
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed
    return torch.mm(a_RD, b_CD.T, out_dtype=torch.float32)
