"""Which tokens stay possible (min-p, top-k, top-p), and drawing one of them.

Shape legend: L rows, W vocabulary, N sorted prefix, B blocks of the vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SORTED_PREFIX = 256  # most sets are decided by this many leading probabilities; rows that need more are sorted whole
CDF_BLOCK = 256


def keep_likely(probs_LW: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Zero what min-p, then top-k, then top-p rule out; each acts on the renormalised rest of the one before.

    Per-row tensors [L]: min_p float (0 is off), top_k int (<= 0 is off), top_p float (1 is off). Top-p keeps the smallest set whose
    mass reaches p. At equal probability lower token ids stay. At least one token stays.
    """
    width = min(SORTED_PREFIX, probs_LW.shape[1])
    counts, decided = _counts(probs_LW, probs_LW.topk(width, dim=-1).values, min_p, top_k, top_p)
    if not bool(decided.all()):
        rest = ~decided
        part = probs_LW[rest]
        values = part.sort(dim=-1, descending=True).values
        counts[rest] = _counts(part, values, min_p[rest], top_k[rest], top_p[rest])[0]
    return _keep_largest(probs_LW, counts)


def _counts(probs_LW: Tensor, sorted_LN: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the largest probabilities stay, and whether the sorted prefix was long enough to know."""
    vocabulary, width = probs_LW.shape[1], sorted_LN.shape[1]
    floor = min_p * sorted_LN[:, 0]
    likely = probs_LW >= floor[:, None]
    count = likely.sum(-1)
    limited = torch.where(top_k > 0, top_k, vocabulary).minimum(count)
    running = sorted_LN.double().cumsum(-1)
    mass_likely = torch.where(likely, probs_LW, 0.0).sum(-1, dtype=torch.float64)
    inside = limited.clamp(max=width)
    mass = torch.where(limited < count, running.gather(1, inside[:, None] - 1)[:, 0], mass_likely)
    reached = running >= (top_p.double() * mass)[:, None]
    by_mass = torch.where(top_p < 1, (~reached).sum(-1) + 1, vocabulary)
    needs_more = ((limited > width) & (limited < count)) | ((top_p < 1) & (by_mass > width) & (limited > width))
    return by_mass.minimum(limited).clamp(min=1), ~needs_more | (width == vocabulary)


def _keep_largest(probs_LW: Tensor, counts: Tensor) -> Tensor:
    most = int(counts.max())
    if most >= probs_LW.shape[1]:
        threshold = torch.where(counts >= probs_LW.shape[1], -1.0, 0.0).to(probs_LW.dtype)
        limited = counts < probs_LW.shape[1]
        if bool(limited.any()):
            part = probs_LW[limited]
            ordered = part.sort(dim=-1, descending=True).values
            threshold[limited] = ordered.gather(1, counts[limited][:, None] - 1)[:, 0]
    else:
        threshold = probs_LW.topk(most, dim=-1).values.gather(1, counts[:, None] - 1)[:, 0]
    above = probs_LW > threshold[:, None]
    level = probs_LW == threshold[:, None]
    ties = level.cumsum(-1) <= (counts - above.sum(-1))[:, None]
    return torch.where(above | (level & ties), probs_LW, 0.0)


def draw(weights_LW: Tensor, uniforms_L: np.ndarray) -> Tensor:
    """One index per row by inverting the distribution function at the row's uniform number, in float64.

    Weights need not add up to one. Two levels: find the block of the vocabulary, then the token in it.
    """
    rows, vocabulary = weights_LW.shape
    blocks = -(-vocabulary // CDF_BLOCK)
    padded = torch.nn.functional.pad(weights_LW, (0, blocks * CDF_BLOCK - vocabulary)).view(rows, blocks, CDF_BLOCK)
    sums = padded.sum(-1, dtype=torch.float64)
    edges = sums.cumsum(-1)
    target = torch.from_numpy(uniforms_L).to(weights_LW.device) * edges[:, -1]
    block = _first_above(edges, sums, target)
    before = (edges - sums).gather(1, block[:, None])[:, 0]
    inner = padded[torch.arange(rows, device=block.device), block].double()
    return block * CDF_BLOCK + _first_above(inner.cumsum(-1), inner, (target - before).clamp(min=0))


def _first_above(edges: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """Index of the first edge above the target; if rounding leaves none, the last index that has weight."""
    index = (edges <= target[:, None]).sum(-1)
    positions = torch.arange(edges.shape[1], device=edges.device)
    last = torch.where(weights > 0, positions, 0).amax(-1)
    return index.minimum(last)


def most_likely(scores_LW: Tensor) -> Tensor:
    """Index of each row's highest score, the first of equals. On a CPU by numpy, whose search is several times faster than torch's."""
    if scores_LW.device.type == "cpu":
        return torch.from_numpy(scores_LW.numpy().argmax(-1))
    return scores_LW.argmax(-1)
