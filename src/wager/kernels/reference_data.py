"""Torch references of the operators around the network: gathering, sorting and reducing by key, experts, sampling.

Shape legend: N rows, M picked rows, S segments, D width, V vocabulary, T tokens, C experts chosen per token, L rows of logits, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def embedding(ids_T: Tensor, table_VD: Tensor) -> Tensor:
    """Rows of a table: float32 on a CPU, the table's dtype on a GPU."""
    rows = F.embedding(ids_T, table_VD)
    return rows if table_VD.device.type == "cuda" else rows.float()


def sort_by_key(keys_N: Tensor) -> Tensor:
    """The order (int64) that sorts integer keys upwards; equal keys keep their order."""
    return keys_N.argsort(stable=True)


def segment_starts(sorted_keys_N: Tensor, segments: int) -> Tensor:
    """int64 [S + 1]: where each key 0 .. segments - 1 begins in keys that ascend."""
    edges = torch.arange(segments + 1, device=sorted_keys_N.device, dtype=sorted_keys_N.dtype)
    return torch.searchsorted(sorted_keys_N.contiguous(), edges)


def segment_reduce(values_ND: Tensor, starts_S1: Tensor, mode: str = "sum", rows_M: Tensor | None = None) -> Tensor:
    """[S, D]: sum, mean or max of rows starts[s] .. starts[s + 1] - 1 of `values`, or of the row numbers `rows` into it, added in order.

    Empty segments are 0, for max -inf.
    """
    picked_MD = values_ND if rows_M is None else values_ND[rows_M]
    counts_S = starts_S1.diff()
    segment_M = torch.repeat_interleave(counts_S)
    first, last = int(starts_S1[0]), int(starts_S1[-1])
    empty = -torch.inf if mode == "max" else 0.0
    out_SD = picked_MD.new_full((len(counts_S), picked_MD.shape[1]), empty)
    if mode == "max":
        index = segment_M[:, None].expand(-1, picked_MD.shape[1])
        return out_SD.scatter_reduce(0, index, picked_MD[first:last], "amax")
    out_SD = out_SD.index_add(0, segment_M, picked_MD[first:last])
    return out_SD / counts_S.clamp(min=1)[:, None] if mode == "mean" else out_SD


def experts(
    x_TD: Tensor,
    weights_TC: Tensor,
    chosen_TC: Tensor,
    start_TD: Tensor,
    networks: Sequence[Callable[[Tensor], Tensor]],
) -> Tensor:
    """start + sum over a token's chosen experts of weight * expert(x), added in the order of the experts' numbers."""
    order = sort_by_key(chosen_TC.flatten())
    counts = torch.bincount(chosen_TC.flatten(), minlength=len(networks)).tolist()
    rows, weights = order // chosen_TC.shape[1], weights_TC.flatten()[order].to(x_TD.dtype)
    out_TD, start = start_TD, 0
    for network, count in zip(networks, counts, strict=True):
        if count:
            chosen = slice(start, start + count)
            out_TD = out_TD.index_add(0, rows[chosen], network(x_TD[rows[chosen]]) * weights[chosen, None])
            start += count
    return out_TD


def penalise(
    logits_LW: Tensor,
    counts_LW: Tensor,
    prompt_LW: Tensor,
    repetition_L: Tensor,
    frequency_L: Tensor,
    presence_L: Tensor,
) -> Tensor:
    """Repetition penalty on tokens of the prompt or the output (bool, counts), then frequency and presence penalties on the output's."""
    repetition = repetition_L[:, None]
    scaled = torch.where(logits_LW > 0, logits_LW / repetition, logits_LW * repetition)
    penalised = torch.where((counts_LW > 0) | prompt_LW, scaled, logits_LW)
    return penalised - frequency_L[:, None] * counts_LW - presence_L[:, None] * (counts_LW > 0)


def likely_weights(
    logits_LW: Tensor, temperature_L: Tensor, min_p_L: Tensor, top_k_L: Tensor, top_p_L: Tensor
) -> Tensor:
    """float32 [L, W]: exp((logit - largest) / temperature) of the tokens that min-p, then top-k, then top-p leave, else 0.

    min_p 0, top_k <= 0 and top_p 1 are off. Top-p keeps the smallest set whose mass reaches p of what the filters before it left; of equal
    tokens the lower numbers stay; the likeliest always stays.
    """
    weights_LW = ((logits_LW - logits_LW.amax(-1, keepdim=True)) / temperature_L[:, None]).exp()
    sorted_LW, order_LW = weights_LW.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits_LW.shape[1], device=logits_LW.device)
    keep = sorted_LW >= min_p_L[:, None] * sorted_LW[:, :1]
    keep &= (top_k_L <= 0)[:, None] | (rank < top_k_L[:, None])
    mass_LW = torch.where(keep, sorted_LW, 0.0).double().cumsum(-1)
    before = mass_LW - torch.where(keep, sorted_LW, 0.0)
    keep &= (top_p_L >= 1)[:, None] | (before < top_p_L.double()[:, None] * mass_LW[:, -1:])
    keep[:, 0] = True
    return torch.zeros_like(weights_LW).scatter(1, order_LW, torch.where(keep, sorted_LW, 0.0))


def sample(
    logits_LW: Tensor, temperature_L: Tensor, min_p_L: Tensor, top_k_L: Tensor, top_p_L: Tensor, uniforms_L: Tensor
) -> Tensor:
    """int64 [L]: the token at which the distribution function of `likely_weights` passes the row's uniform number (float64)."""
    weights_LW = likely_weights(logits_LW, temperature_L, min_p_L, top_k_L, top_p_L).double()
    edges_LW = weights_LW.cumsum(-1)
    index = (edges_LW <= (uniforms_L * edges_LW[:, -1])[:, None]).sum(-1)
    last = torch.where(weights_LW > 0, torch.arange(weights_LW.shape[1], device=weights_LW.device), 0).amax(-1)
    return index.minimum(last)


def race(
    logits_LW: Tensor, temperature_L: Tensor, min_p_L: Tensor, top_k_L: Tensor, top_p_L: Tensor, seeds_L: Tensor, positions_L: Tensor
) -> Tensor:  # fmt: skip
    """int64 [L]: the first of exponential clocks that run at the rates `likely_weights`; token i wins with probability w_i / sum w.

    The clock of token i reads -log(u) / w_i, u a number in (0, 1] of (seed, position, i) alone (seeds, positions: int64 bit patterns).
    """
    weights_LW = likely_weights(logits_LW, temperature_L, min_p_L, top_k_L, top_p_L).double()
    uniforms = race_uniforms(seeds_L.cpu().numpy(), positions_L.cpu().numpy(), logits_LW.shape[1])
    times = -torch.from_numpy(uniforms).to(weights_LW.device).log() / weights_LW
    return times.argmin(-1)


def race_uniforms(seeds_L: np.ndarray, positions_L: np.ndarray, width: int) -> np.ndarray:
    """float64 [L, W] in (0, 1]."""
    with np.errstate(over="ignore"):
        bits = _mix(race_bases(seeds_L, positions_L)[:, None] + np.arange(1, width + 1, dtype=np.uint64) * GOLDEN)
    return ((bits >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53


def race_bases(seeds_L: np.ndarray, positions_L: np.ndarray) -> np.ndarray:
    """uint64 [L]: where the numbers of (seed, position) begin."""
    with np.errstate(over="ignore"):
        return _mix(_mix(seeds_L.view(np.uint64) + GOLDEN) + positions_L.view(np.uint64) * GOLDEN + GOLDEN)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
