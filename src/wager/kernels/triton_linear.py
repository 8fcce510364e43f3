"""Linear layers in Triton: one token, where reading the weight is all the work, and several tokens through the matrix units.

The one-token form reads each weight once in long pieces, sums in float32 and takes its neighbours along: the norm before it (the factor of
the root mean square is applied to the finished sums), the gate or the residual after it. So a block of a decode step writes nothing but
what the next product needs. Weights lie as rows [O, I]; int8 rows have a scale each; of four-bit codes a group of 32 inputs is 16 bytes, the
low halves its first 16 inputs, the high halves the others, with a float16 scale a group.

Shape legend: T tokens, I/O inputs and outputs, R rows of a program.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from wager.kernels.fused import Norm
from wager.kernels.quantize import ACTIVATION_GROUP, GROUP, quantize, round_activations
from wager.kernels.triton_basics import gate, rms_norm
from wager.kernels.triton_tiles import Tile, matrix_tile, vector_tile

HALF = GROUP // 2
NO_GATE, SILU, GELU = 0, 1, 2


@triton.jit
def _vector(
    x, norm, residual, weight, scales, table, bias, y, outputs, inputs, stride, eps, offset,
    BITS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, GATE: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK_O * 2 if GATE > 0 else BLOCK_O
    r = tl.arange(0, ROWS)
    o = tl.program_id(0) * BLOCK_O + r
    row = o
    if GATE > 0:  # a gate's row and its up projection's side by side
        o = tl.program_id(0) * BLOCK_O + r // 2
        row = o + (r % 2) * outputs
    inside = o < outputs
    row = tl.where(inside, row, 0).to(tl.int64)
    if BITS == 4:
        G: tl.constexpr = BLOCK_I // GROUP
        H: tl.constexpr = GROUP // 2
        sums = tl.zeros((ROWS, G), tl.float32)
        squares = tl.zeros((G, H), tl.float32)
        h = tl.arange(0, H)
        for start in tl.range(0, stride, BLOCK_I, num_stages=STAGES):
            g = start // GROUP + tl.arange(0, G)
            low_i = g[:, None] * GROUP + h[None, :]
            byte = row[:, None, None] * (stride // 2) + (g[:, None] * H + h[None, :])[None, :, :]
            scale_at = row[:, None] * (stride // GROUP) + g[None, :]
            if EVEN:
                codes = tl.load(weight + byte, eviction_policy="evict_first")
                scale = tl.load(scales + scale_at, eviction_policy="evict_first")
                low, high = tl.load(x + low_i).to(tl.float32), tl.load(x + low_i + H).to(tl.float32)
            else:
                codes = tl.load(weight + byte, mask=(g < stride // GROUP)[None, :, None], other=0)
                scale = tl.load(scales + scale_at, mask=(g < stride // GROUP)[None, :], other=0.0)
                low = tl.load(x + low_i, mask=low_i < inputs, other=0.0).to(tl.float32)
                high = tl.load(x + low_i + H, mask=low_i + H < inputs, other=0.0).to(tl.float32)
            if HAS_NORM:
                squares += low * low + high * high
                near, far = low_i < inputs, low_i + H < inputs
                low *= offset + tl.load(norm + low_i, mask=near, other=0.0).to(tl.float32)
                high *= offset + tl.load(norm + low_i + H, mask=far, other=0.0).to(tl.float32)
            if HAS_TABLE:
                first = tl.load(table + (codes & 15).to(tl.int32))
                second = tl.load(table + (codes >> 4).to(tl.int32))
                part = tl.sum(first * low[None, :, :] + second * high[None, :, :], axis=2)
            else:  # a code stands for itself less 8, which is taken off once a group
                first, second = (codes & 15).to(tl.float32), (codes >> 4).to(tl.float32)
                part = tl.sum(first * low[None, :, :] + second * high[None, :, :], axis=2)
                part -= 8.0 * tl.sum(low + high, axis=1)[None, :]
            sums += part * scale.to(tl.float32)
        total = tl.sum(sums, axis=1)
        square = tl.sum(tl.sum(squares, axis=1))
    else:
        wide = tl.zeros((ROWS, BLOCK_I), tl.float32)
        line = tl.zeros((BLOCK_I,), tl.float32)
        for start in tl.range(0, inputs, BLOCK_I, num_stages=STAGES):
            i = start + tl.arange(0, BLOCK_I)
            place = weight + row[:, None] * stride + i[None, :]
            if EVEN:
                w = tl.load(place, eviction_policy="evict_first")
                value = tl.load(x + i).to(tl.float32)
            else:
                w = tl.load(place, mask=(i < inputs)[None, :], other=0)
                value = tl.load(x + i, mask=i < inputs, other=0.0).to(tl.float32)
            if HAS_NORM:
                line += value * value
                value *= offset + tl.load(norm + i, mask=i < inputs, other=0.0).to(tl.float32)
            wide += w.to(tl.float32) * value[None, :]
        total = tl.sum(wide, axis=1)
        square = tl.sum(line)
    if HAS_SCALE:
        total = total * tl.load(scales + row).to(tl.float32)
    if HAS_NORM:
        total = total * (1.0 / tl.sqrt(square / inputs + eps))
    if HAS_BIAS:
        total = total + tl.load(bias + row).to(tl.float32)
    if GATE > 0:
        gates, ups = tl.split(tl.reshape(total, (BLOCK_O, 2)))
        if GATE == 1:
            total = gates * tl.sigmoid(gates) * ups
        else:
            inner = 0.7978845608028654 * (gates + 0.044715 * gates * gates * gates)
            total = gates * tl.sigmoid(2.0 * inner) * ups
        o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
        inside = o < outputs
    if HAS_RESIDUAL:
        total = total + tl.load(residual + o, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + o, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _matrix(
    x, weight, scales, table, bias, y, rows, inputs, outputs, picked, tiles,
    GROUPED: tl.constexpr, BITS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
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
    known = o < outputs
    row = tl.where(known, o, 0).to(tl.int64)
    at = x + source[:, None].to(tl.int64) * inputs
    total = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    for start in range(0, inputs, BLOCK_I):
        if BITS == 4:
            H: tl.constexpr = GROUP // 2
            G: tl.constexpr = BLOCK_I // GROUP
            g, h = start // GROUP + tl.arange(0, G), tl.arange(0, H)
            byte = row[:, None, None] * (inputs // 2) + (g[:, None] * H + h[None, :])[None, :, :]
            codes = tl.load(weight + byte, mask=(g < inputs // GROUP)[None, :, None], other=0)
            scale_at = row[:, None] * (inputs // GROUP) + g[None, :]
            scale = tl.load(scales + scale_at, mask=(g < inputs // GROUP)[None, :], other=0.0).to(tl.float32)
            if HAS_TABLE:
                first = tl.load(table + (codes & 15).to(tl.int32))
                second = tl.load(table + (codes >> 4).to(tl.int32))
            else:
                first, second = (codes & 15).to(tl.float32) - 8.0, (codes >> 4).to(tl.float32) - 8.0
            first = tl.reshape(first * scale[:, :, None], (BLOCK_O, G * H))
            second = tl.reshape(second * scale[:, :, None], (BLOCK_O, G * H))
            k = tl.arange(0, G * H)
            i = start + k // H * GROUP + k % H
            low = tl.load(at + i[None, :], mask=here[:, None] & (i[None, :] < inputs), other=0.0)
            high = tl.load(at + i[None, :] + H, mask=here[:, None] & (i[None, :] + H < inputs), other=0.0)
            total = tl.dot(low, tl.trans(first).to(low.dtype), total, input_precision="ieee")
            total = tl.dot(high, tl.trans(second).to(high.dtype), total, input_precision="ieee")
        else:
            i = start + tl.arange(0, BLOCK_I)
            w = tl.load(weight + row[:, None] * inputs + i[None, :], mask=(i < inputs)[None, :], other=0)
            value = tl.load(at + i[None, :], mask=here[:, None] & (i[None, :] < inputs), other=0.0)
            total = tl.dot(value, tl.trans(w).to(value.dtype), total, input_precision="ieee")
    if HAS_SCALE:
        total = total * tl.load(scales + row).to(tl.float32)[None, :]
    if HAS_BIAS:
        total = total + tl.load(bias + row).to(tl.float32)[None, :]
    tl.store(
        y + place[:, None].to(tl.int64) * outputs + o[None, :],
        total.to(y.dtype.element_ty),
        mask=here[:, None] & known[None, :],
    )


class TritonLinear:
    """A weight as rows, quantized if asked; `add`, `gated` and `normed` take along what stands beside it."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, quantization: str | None = None):
        self.mode, self.bias, (self.outputs, self.inputs) = quantization, bias_O, weight_OI.shape
        self.scales = self.table = weight_OI  # pointers that a kernel without them never reads
        self.bits, self.padding, self.has_scale, self.has_table = 16, 0, False, False
        self.weight = weight_OI.contiguous()
        if quantization is not None:
            self._quantize(weight_OI, quantization)
        self.rounds = quantization in ACTIVATION_GROUP or quantization == "w16a16"

    def _quantize(self, weight_OI: Tensor, mode: str) -> None:
        made = quantize(weight_OI, mode)
        codes = made.codes_ON
        self.padding = codes.shape[1] - self.inputs
        if made.table is not None:
            low, high = codes.unflatten(1, (-1, 2, HALF)).unbind(2)
            self.bits, self.has_table, self.weight = 4, mode == "nf4", (low | high << 4).flatten(1).contiguous()
            assert made.scales is not None
            self.table, self.scales = torch.tensor(made.table, device=codes.device), made.scales.half().contiguous()
        else:
            self.weight = self.scales = self.table = codes.contiguous()
            if made.scales is not None:
                self.bits, self.has_scale, self.scales = 8, True, made.scales.contiguous()

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + sum(
            t.nbytes for t in (self.scales, self.table, self.bias) if t is not None and t is not self.weight
        )

    def __call__(self, x_TI: Tensor) -> Tensor:
        return self._one(x_TI) if x_TI.shape[0] == 1 else self._many(x_TI)

    def add(self, x_TI: Tensor, residual_TO: Tensor) -> Tensor:
        """residual + linear(x)."""
        return self._one(x_TI, residual=residual_TO) if x_TI.shape[0] == 1 else residual_TO + self._many(x_TI)

    def gated(self, x_TI: Tensor, activation: str) -> Tensor:
        """act(gate) * up of a stacked gate and up projection."""
        if x_TI.shape[0] == 1:
            return self._one(x_TI, gates=SILU if activation == "silu" else GELU)
        return gate(self._many(x_TI), activation != "silu")

    def normed(self, x_TI: Tensor, norm: Norm, activation: str | None = None) -> Tensor:
        """linear(rms_norm(x)), and with an activation the gate of it."""
        if x_TI.shape[0] == 1 and not self.rounds:
            gates = NO_GATE if activation is None else SILU if activation == "silu" else GELU
            return self._one(x_TI, norm=norm, gates=gates)
        normed_TI = rms_norm(x_TI, norm.weight_D, norm.eps, norm.offset)
        return self(normed_TI) if activation is None else self.gated(normed_TI, activation)

    def _one(
        self,
        x_1I: Tensor,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        gates: int = NO_GATE,
        tile: Tile | None = None,
    ) -> Tensor:
        """One token. tile: in place of the table's, for a sweep."""
        x = round_activations(x_1I, self.mode).to(x_1I.dtype) if self.rounds and self.mode is not None else x_1I
        x, outputs, stride = x.contiguous(), self.outputs // 2 if gates else self.outputs, self.inputs + self.padding
        tile = tile or vector_tile(x.device, self.bits, outputs, stride, gates != NO_GATE)
        y = x.new_empty(1, outputs)
        even = self.inputs % tile.inputs == 0
        _vector[(triton.cdiv(outputs, tile.outputs),)](
            x, x if norm is None else norm.weight_D, x if residual is None else residual, self.weight, self.scales, self.table,
            x if self.bias is None else self.bias, y, outputs, self.inputs, stride, 0.0 if norm is None else norm.eps,
            0.0 if norm is None else norm.offset, self.bits, self.has_scale, self.has_table, self.bias is not None, norm is not None,
            residual is not None, gates, GROUP, even, tile.outputs, tile.inputs, tile.stages, num_warps=tile.warps,
        )  # type: ignore  # fmt: skip
        return y

    def _many(self, x_TI: Tensor, tile: Tile | None = None) -> Tensor:
        rows = x_TI.shape[0]
        if not rows:
            return x_TI.new_empty(0, self.outputs)
        x = round_activations(x_TI, self.mode).to(x_TI.dtype) if self.rounds and self.mode is not None else x_TI
        tile = tile or matrix_tile(x.device, self.bits, self.outputs, self.inputs, rows)
        if tile is None:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight[:, : self.inputs].to(x.dtype), bias)
        x = F.pad(x, (0, self.padding)).contiguous() if self.padding else x.contiguous()
        y_TO, block_t = x.new_empty(rows, self.outputs), 16 if rows <= 16 else 64
        grid = (triton.cdiv(self.outputs, tile.outputs), triton.cdiv(rows, block_t))
        self._launch(grid, x, y_TO, rows, x, x, False, block_t, tile)
        return y_TO

    def _launch(
        self, grid: tuple[int, int], x: Tensor, y: Tensor, rows: int, picked: Tensor, tiles: Tensor, grouped: bool, block_t: int, tile: Tile
    ) -> None:  # fmt: skip
        """The matrix kernel; with `grouped` over experts whose layout is this one's."""
        _matrix[grid](
            x, self.weight, self.scales, self.table, x if self.bias is None else self.bias, y, rows, x.shape[1], self.outputs, picked,
            tiles, grouped, self.bits, self.has_scale, self.has_table, self.bias is not None, GROUP, block_t, tile.outputs, tile.inputs,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # type: ignore  # fmt: skip


class TritonBlock:
    """A block of Llama's kind over one token: four products with their norms, gate and residuals, rotation with the cache write, attention."""

    def __init__(
        self,
        first_norm: Norm,
        qkv: TritonLinear,
        output: TritonLinear,
        second_norm: Norm,
        gate_up: TritonLinear,
        down: TritonLinear,
        activation: str,
    ):
        self.first_norm, self.qkv, self.output = first_norm, qkv, output
        self.second_norm, self.gate_up, self.down, self.activation = second_norm, gate_up, down, activation

    def inputs(self, x_1D: Tensor) -> Tensor:
        """Queries, keys and values of the normed stream, not yet rotated: [1, O]."""
        return self.qkv.normed(x_1D, self.first_norm)

    def outputs(self, attended_1X: Tensor, stream_1D: Tensor) -> Tensor:
        """The stream after the block."""
        stream_1D = self.output.add(attended_1X, stream_1D)
        inner_1F = self.gate_up.normed(stream_1D, self.second_norm, self.activation)
        return self.down.add(inner_1F, stream_1D)


def one_token_block(
    first_norm: Norm, qkv: Any, output: Any, second_norm: Norm, gate_up: Any, down: Any, activation: str
) -> TritonBlock | None:
    """None where a linear is not packed for Triton."""
    if not all(isinstance(linear, TritonLinear) for linear in (qkv, output, gate_up, down)):
        return None
    return TritonBlock(first_norm, qkv, output, second_norm, gate_up, down, activation)
