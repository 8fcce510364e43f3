"""The float64 squared distance of a pair as `cpp/distance.h` computes it, for a GPU.

Eight running sums over the features, each step one fused multiply-add, folded in a fixed order: the bits of the C++ function on a
processor that has fused multiply-add. Legend: P pairs, R rows asked about, N base rows, D features.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS = 64  # of a program


@triton.jit
def squared_kernel(query, base, row, column, out, pairs, features, PAIRS: tl.constexpr):
    p = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    real = p < pairs
    r = tl.load(row + p, mask=real, other=0)
    c = tl.load(column + p, mask=real, other=0)
    lane = tl.arange(0, 8)
    total = tl.zeros([PAIRS, 8], tl.float64)
    for first in range(0, features, 8):
        f = first + lane
        inside = real[:, None] & (f < features)[None, :]
        a = tl.load(query + r[:, None] * features + f[None, :], mask=inside, other=0.0)
        b = tl.load(base + c[:, None] * features + f[None, :], mask=inside, other=0.0)
        e = a - b
        total = tl.fma(e, e, total)
    fours = tl.sum(tl.reshape(total, [PAIRS, 4, 2]), axis=2)
    twos = tl.sum(tl.reshape(fours, [PAIRS, 2, 2]), axis=2)
    tl.store(out + p, tl.sum(twos, axis=1), mask=real)


def squared(query_RD: Tensor, base_ND: Tensor, row_P: Tensor, column_P: Tensor, out_P: Tensor) -> None:
    """|query[row] - base[column]|^2 of every pair into out_P. All contiguous; rows float64, numbers of rows int64."""
    grid = (triton.cdiv(len(row_P), PAIRS),)
    with torch.cuda.device_of(query_RD):  # does nothing for tensors of a processor
        squared_kernel[grid](query_RD, base_ND, row_P, column_P, out_P, len(row_P), base_ND.shape[1], PAIRS=PAIRS)
