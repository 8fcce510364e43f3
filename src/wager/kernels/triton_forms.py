"""The Triton forms of the operators, for GPUs: activations in the weights' dtype, sums in float32. `WAGER_KERNELS=triton` selects them.

Each mirrors a function of `reference`, which judges it (under TRITON_INTERPRET=1 where there is no GPU). Linear weights stay as rows
[O, I]; quantized ones are int8 rows or two four-bit codes a byte, and are widened in registers on the way to the matrix units.

Shape legend: T tokens, D width, I/O linear input/output, H query heads, G key/value heads, K key width, V value width, S pool slots.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wager.kernels.quantize import GROUP, quantize, round_activations
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

__all__ = [
    "TritonLinear", "apply_rope", "embedding", "gelu_tanh_mul", "layer_norm", "layer_norm_residual", "likely_weights", "pack_experts",
    "paged_attention", "penalise", "race", "rms_norm", "rms_norm_residual", "rope_write", "sample", "segment_reduce", "silu_mul",
    "sort_by_key", "write_kv",
]  # fmt: skip


@triton.jit
def _linear(
    x, weight, scales, table, bias, y, rows, inputs, outputs, picked, tiles,
    GROUPED: tl.constexpr, BITS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, SCALE_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    place, source, here = t, t, t < rows
    if GROUPED:  # a tile's rows belong to one expert: (first row, row after the last, weight, scales and bias of the expert) by tile
        tile = tiles + tl.program_id(1) * 5
        place = tl.load(tile) + tl.arange(0, BLOCK_T)
        here = place < tl.load(tile + 1)
        source = tl.load(picked + place, mask=here, other=0)
        weight = tl.load(tile + 2).to(weight.dtype)
        scales = tl.load(tile + 3).to(scales.dtype)
        bias = tl.load(tile + 4).to(bias.dtype)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    for start in range(0, inputs, BLOCK_I):
        if BITS == 4:
            byte = start // 2 + tl.arange(0, BLOCK_I // 2)
            inside = (o[:, None] < outputs) & (byte[None, :] < inputs // 2)
            codes = tl.load(weight + o[:, None] * (inputs // 2) + byte[None, :], mask=inside, other=0)
            scale = tl.load(
                scales + o[:, None] * (inputs // SCALE_GROUP) + byte[None, :] // (SCALE_GROUP // 2),
                mask=inside,
                other=0.0,
            )
            even = tl.load(table + (codes & 15).to(tl.int32)) * scale
            odd = tl.load(table + (codes >> 4).to(tl.int32)) * scale
            seen = here[:, None] & (byte[None, :] < inputs // 2)
            x_even = tl.load(x + source[:, None] * inputs + 2 * byte[None, :], mask=seen, other=0.0)
            x_odd = tl.load(x + source[:, None] * inputs + 2 * byte[None, :] + 1, mask=seen, other=0.0)
            total += tl.dot(x_even, tl.trans(even).to(x_even.dtype), out_dtype=tl.float32)
            total += tl.dot(x_odd, tl.trans(odd).to(x_odd.dtype), out_dtype=tl.float32)
        else:
            i = start + tl.arange(0, BLOCK_I)
            inside = (o[:, None] < outputs) & (i[None, :] < inputs)
            w = tl.load(weight + o[:, None] * inputs + i[None, :], mask=inside, other=0)
            value = tl.load(
                x + source[:, None] * inputs + i[None, :], mask=here[:, None] & (i[None, :] < inputs), other=0.0
            )
            total += tl.dot(value, tl.trans(w).to(value.dtype), out_dtype=tl.float32)
    if HAS_SCALE:
        total = total * tl.load(scales + o, mask=o < outputs, other=0.0)[None, :]
    if HAS_BIAS:
        total = total + tl.load(bias + o, mask=o < outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + place[:, None] * outputs + o[None, :],
        total.to(y.dtype.element_ty),
        mask=here[:, None] & (o[None, :] < outputs),
    )


class TritonLinear:
    """A weight as rows, quantized if asked; `add` and `gated` as the other forms have them."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, quantization: str | None = None):
        self.mode, self.bias, (self.outputs, self.inputs) = quantization, bias_O, weight_OI.shape
        self.scales = self.table = weight_OI  # pointers that a kernel without them never reads
        self.bits, self.padding, self.weight = 16, 0, weight_OI.contiguous()
        if quantization is not None:
            quantized = quantize(weight_OI, quantization)
            self.weight, self.bits = quantized.codes_ON.contiguous(), 8 if quantized.table is None else 4
            self.padding = self.weight.shape[1] - self.inputs
            if quantized.scales is not None:
                self.scales = quantized.scales.contiguous()
            if quantized.table is not None:
                self.table = torch.tensor(quantized.table, device=weight_OI.device)
                self.weight = self.weight[:, 0::2] | self.weight[:, 1::2] << 4

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + sum(
            t.nbytes for t in (self.scales, self.table, self.bias) if t is not None and t is not self.weight
        )

    def __call__(self, x_TI: Tensor) -> Tensor:
        x = x_TI if self.mode is None else round_activations(x_TI, self.mode).to(x_TI.dtype)
        x = torch.nn.functional.pad(x, (0, self.padding)).contiguous()
        rows, inputs = x.shape
        y_TO = x.new_empty(rows, self.outputs)
        block_t = 16 if rows <= 16 else 64
        per_output = self.mode in ("int8", "w8a8")
        grid = (triton.cdiv(self.outputs, 64), triton.cdiv(rows, block_t))
        if rows:
            _linear[grid](
                x, self.weight, self.scales, self.table, self.scales if self.bias is None else self.bias, y_TO, rows, inputs, self.outputs,
                x, x, False, self.bits, per_output, self.bias is not None, GROUP, block_t, 64, 64,
            )  # type: ignore  # fmt: skip
        return y_TO

    def add(self, x_TI: Tensor, residual_TO: Tensor) -> Tensor:
        """residual + linear(x)."""
        return residual_TO + self(x_TI)

    def gated(self, x_TI: Tensor, activation: str) -> Tensor:
        """act(gate) * up of a stacked gate and up projection."""
        return gate(self(x_TI), activation != "silu")


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
            bias = linear.scales if linear.bias is None else linear.bias
            pointers = (linear.weight.data_ptr(), linear.scales.data_ptr(), bias.data_ptr())
            rows_of_tiles += [(r, start + count, *pointers) for r in range(start, start + count, block_t)]
            start += count
        x = x if first.mode is None else round_activations(x, first.mode).to(x.dtype)
        x = torch.nn.functional.pad(x, (0, first.padding)).contiguous()
        tiles, y = torch.tensor(rows_of_tiles, dtype=torch.int64, device=x.device), x.new_empty(start, first.outputs)
        _linear[(triton.cdiv(first.outputs, 64), len(rows_of_tiles))](
            x, first.weight, first.scales, first.table, first.scales if first.bias is None else first.bias, y, start, x.shape[1],
            first.outputs, picked, tiles, True, first.bits, first.mode in ("int8", "w8a8"), first.bias is not None, GROUP, block_t, 64, 64,
        )  # type: ignore  # fmt: skip
        return y


def pack_experts(networks: Sequence[tuple[Any, Any]], activation: str) -> TritonExperts | None:
    """None where a linear is not packed for Triton."""
    fits = all(isinstance(n, TritonLinear) for pair in networks for n in pair)
    return TritonExperts(networks, activation) if fits else None
