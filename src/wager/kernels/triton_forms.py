"""The Triton forms of the operators, for GPUs: activations in the weights' dtype, sums in float32. They serve CUDA tensors by themselves.

Each mirrors a function of `reference`, which judges it (under TRITON_INTERPRET=1 where there is no GPU). Linears are in `triton_linear`.

Shape legend: T tokens, D width, I/O linear input/output, H query heads, G key/value heads, K key width, V value width, S pool slots.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from wager.kernels.quantize import round_activations
from wager.kernels.triton_attention import paged_attention
from wager.kernels.triton_basics import (
    apply_rope,
    gate,
    gelu_tanh_mul,
    layer_norm,
    layer_norm_residual,
    rms_norm,
    rms_norm_residual,
    rope_write,
    silu_mul,
    write_kv,
)  # fmt: skip
from wager.kernels.triton_data import embedding, likely_weights, penalise, race, sample, segment_reduce, sort_by_key
from wager.kernels.triton_linear import TritonLinear, one_token_block
from wager.kernels.triton_tiles import MANY_TOKENS

__all__ = [
    "TritonLinear", "apply_rope", "embedding", "gelu_tanh_mul", "layer_norm", "layer_norm_residual", "likely_weights", "one_token_block", "pack_experts",
    "paged_attention", "penalise", "race", "rms_norm", "rms_norm_residual", "rope_write", "sample", "segment_reduce", "silu_mul",
    "sort_by_key", "write_kv",
]  # fmt: skip


class TritonExperts:
    """`experts(x_TD, weights_TC, chosen_TC, start_TD)`: grouped products over all experts, rows sorted by expert, one launch a projection."""

    def __init__(self, networks: Sequence[tuple[TritonLinear, TritonLinear]], activation: str):
        self.networks, self.activation = networks, activation

    def __call__(self, x_TD: Tensor, weights_TC: Tensor, chosen_TC: Tensor, start_TD: Tensor) -> Tensor:
        tokens, choices = chosen_TC.shape
        if tokens == 0:
            return start_TD.clone()
        order = sort_by_key(chosen_TC.flatten())
        counts = torch.bincount(chosen_TC.flatten(), minlength=len(self.networks)).tolist()
        gate_up = self._product([g for g, _ in self.networks], x_TD.contiguous(), order // choices, counts)
        inner = gate(gate_up, self.activation != "silu")
        made = self._product([d for _, d in self.networks], inner, torch.arange(len(order), device=x_TD.device), counts)
        made = made * weights_TC.flatten()[order].to(made.dtype)[:, None]
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        rows = place.view(tokens, choices).sort(dim=1).values.flatten()
        starts = torch.arange(0, tokens * choices + 1, choices, device=order.device)
        summed = segment_reduce(made, starts, "sum", rows)
        return start_TD + summed

    def _product(self, linears: list[TritonLinear], x: Tensor, picked: Tensor, counts: list[int]) -> Tensor:
        first, block_t, rows_of_tiles, start = linears[0], 16, [], 0
        for linear, count in zip(linears, counts, strict=True):
            bias = linear.weight if linear.bias is None else linear.bias
            pointers = (linear.weight.data_ptr(), linear.scales.data_ptr(), bias.data_ptr())
            rows_of_tiles += [(r, start + count, *pointers) for r in range(start, start + count, block_t)]
            start += count
        x = x if first.mode is None else round_activations(x, first.mode).to(x.dtype)
        x = torch.nn.functional.pad(x, (0, first.padding)).contiguous()
        tiles, y = torch.tensor(rows_of_tiles, dtype=torch.int64, device=x.device), x.new_empty(start, first.outputs)
        grid = (triton.cdiv(first.outputs, MANY_TOKENS.outputs), len(rows_of_tiles))
        first._launch(grid, x, y, start, picked, tiles, True, block_t, MANY_TOKENS)
        return y


def pack_experts(networks: Sequence[tuple[Any, Any]], activation: str) -> TritonExperts | None:
    """None where a linear is not packed for Triton."""
    fits = all(isinstance(n, TritonLinear) for pair in networks for n in pair)
    return TritonExperts(networks, activation) if fits else None
