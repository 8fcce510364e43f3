"""The Triton forms of the operators, for GPUs: activations in the weights' dtype, sums in float32. `WAGER_KERNELS=triton` selects them.

Each mirrors a function of `reference`, which judges it (under TRITON_INTERPRET=1 where there is no GPU). Linear weights stay as rows
[O, I]; quantized ones are int8 rows or two four-bit codes a byte, and are widened in registers on the way to the matrix units.

Shape legend: T tokens, D width, I/O linear input/output, H query heads, G key/value heads, K key width, V value width, S pool slots.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wager.kernels.quantize import GROUP, quantize, round_activations


@triton.jit
def _rms_norm(
    x, residual, weight, y, total, x_stride, width, eps, offset, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        value = value + tl.load(residual + row * width + at, mask=inside, other=0.0)
        tl.store(total + row * width + at, value, mask=inside)
    wide = value.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(wide * wide) / width + eps)
    scale = offset + tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + at, (wide * factor * scale).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gated(gate_up, y, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gate = gate * tl.sigmoid(2.0 * inner)  # 0.5 x (1 + tanh(u)) = x sigmoid(2 u)
    else:
        gate = gate * tl.sigmoid(gate)
    tl.store(y + row * width + at, (gate * up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rope(
    x, cos, sin, y, token_stride, head_stride, heads, pairs, width, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr
):
    token, head = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    turned, rest = at < pairs, (at >= 2 * pairs) & (at < width)
    first = 2 * at if INTERLEAVED else at
    second = first + 1 if INTERLEAVED else at + pairs
    source, target = x + token * token_stride + head * head_stride, y + (token * heads + head) * width
    a = tl.load(source + first, mask=turned, other=0.0).to(tl.float32)
    b = tl.load(source + second, mask=turned, other=0.0).to(tl.float32)
    c = tl.load(cos + token * pairs + at, mask=turned, other=0.0)
    s = tl.load(sin + token * pairs + at, mask=turned, other=0.0)
    tl.store(target + first, (a * c - b * s).to(y.dtype.element_ty), mask=turned)
    tl.store(target + second, (b * c + a * s).to(y.dtype.element_ty), mask=turned)
    tl.store(target + at, tl.load(source + at, mask=rest, other=0.0), mask=rest)


@triton.jit
def _write(new, pool, slots, token_stride, width, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    at = tl.arange(0, BLOCK)
    inside = at < tl.where(slot >= 0, width, 0)
    value = tl.load(new + token * token_stride + at, mask=inside, other=0.0)
    tl.store(pool + slot * width + at, value.to(pool.dtype.element_ty), mask=inside)


@triton.jit
def _linear(
    x, weight, scales, table, bias, y, rows, inputs, outputs,
    BITS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, SCALE_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
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
            seen = (t[:, None] < rows) & (byte[None, :] < inputs // 2)
            x_even = tl.load(x + t[:, None] * inputs + 2 * byte[None, :], mask=seen, other=0.0)
            x_odd = tl.load(x + t[:, None] * inputs + 2 * byte[None, :] + 1, mask=seen, other=0.0)
            total += tl.dot(x_even, tl.trans(even).to(x_even.dtype), out_dtype=tl.float32)
            total += tl.dot(x_odd, tl.trans(odd).to(x_odd.dtype), out_dtype=tl.float32)
        else:
            i = start + tl.arange(0, BLOCK_I)
            inside = (o[:, None] < outputs) & (i[None, :] < inputs)
            w = tl.load(weight + o[:, None] * inputs + i[None, :], mask=inside, other=0)
            value = tl.load(
                x + t[:, None] * inputs + i[None, :], mask=(t[:, None] < rows) & (i[None, :] < inputs), other=0.0
            )
            total += tl.dot(value, tl.trans(w).to(value.dtype), out_dtype=tl.float32)
    if HAS_SCALE:
        total = total * tl.load(scales + o, mask=o < outputs, other=0.0)[None, :]
    if HAS_BIAS:
        total = total + tl.load(bias + o, mask=o < outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + t[:, None] * outputs + o[None, :],
        total.to(y.dtype.element_ty),
        mask=(t[:, None] < rows) & (o[None, :] < outputs),
    )


@triton.jit
def _attention(
    q, k_pool, v_pool, tables, starts, contexts, positions, spans, mask, sinks, out,
    q_token, k_slot, k_head, v_slot, v_head, heads, table_width, words, block_size, window, scale, softcap,
    GROUP_HEADS: tl.constexpr, ROWS: tl.constexpr, KEY_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, KEYS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    token, kv_head = tl.program_id(0), tl.program_id(1)
    span = tl.load(spans + token)
    first, last, context = tl.load(starts + span), tl.load(starts + span + 1), tl.load(contexts + span)
    own_row, position = token - first, tl.load(positions + token)
    row, kd, vd = tl.arange(0, ROWS), tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    head = kv_head * GROUP_HEADS + row
    query = tl.load(
        q + token * q_token + head[:, None] * KEY_DIM + kd[None, :],
        mask=(row[:, None] < GROUP_HEADS) & (kd[None, :] < KEY_DIM),
        other=0.0,
    )
    top = tl.full((ROWS,), -1e30, tl.float32)
    total, acc = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, VALUE_BLOCK), tl.float32)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(0, tl.minimum(position - window + 1, context)) // KEYS * KEYS
    for start in range(begin, context + (last - first), KEYS):
        j = start + tl.arange(0, KEYS)
        live, own = j < context + (last - first), j - context
        if HAS_MASK:
            word = tl.load(mask + token * words + tl.maximum(own, 0) // 64, mask=live & (own >= 0), other=0)
            seen = live & ((own < 0) | (((word >> (tl.maximum(own, 0) % 64)) & 1) == 1))
        else:
            seen = live & (own <= own_row)
        if HAS_WINDOW:
            at = tl.load(positions + first + tl.maximum(own, 0), mask=live & (own >= 0), other=0)
            seen = seen & (tl.where(own < 0, j, at) > position - window)
        block = tl.load(tables + span * table_width + j // block_size, mask=live, other=0)
        slot = block.to(tl.int64) * block_size + j % block_size
        keys = tl.load(
            k_pool + slot[:, None] * k_slot + kv_head * k_head + kd[None, :],
            mask=live[:, None] & (kd[None, :] < KEY_DIM),
            other=0.0,
        )
        scores = tl.dot(query, tl.trans(keys).to(query.dtype), out_dtype=tl.float32) * scale
        if HAS_CAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(seen[None, :], scores, -1e30)
        highest = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.where(seen[None, :], tl.exp(scores - highest[:, None]), 0.0)
        shrink = tl.exp(top - highest)
        values = tl.load(
            v_pool + slot[:, None] * v_slot + kv_head * v_head + vd[None, :],
            mask=live[:, None] & (vd[None, :] < VALUE_DIM),
            other=0.0,
        )
        acc = acc * shrink[:, None] + tl.dot(p.to(query.dtype), values.to(query.dtype), out_dtype=tl.float32)
        total, top = total * shrink + tl.sum(p, axis=1), highest
    if HAS_SINKS:
        total += tl.exp(tl.load(sinks + head, mask=row < GROUP_HEADS, other=0.0) - top)
    acc = acc / tl.maximum(total, 1e-30)[:, None]
    tl.store(
        out + (token * heads + head[:, None]) * VALUE_DIM + vd[None, :],
        acc.to(out.dtype.element_ty),
        mask=(row[:, None] < GROUP_HEADS) & (vd[None, :] < VALUE_DIM),
    )


def _power(n: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(n))


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if flat.shape[0]:
        _rms_norm[(flat.shape[0],)](
            flat, flat, weight_D, y, y, flat.stride(0), flat.shape[1], eps, offset, False, _power(flat.shape[1])
        )  # type: ignore
    return y


def rms_norm_residual(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    y, total = torch.empty_like(x_TD), torch.empty_like(x_TD)
    rows, width = x_TD.shape
    if rows:
        _rms_norm[(rows,)](
            x_TD, residual_TD.contiguous(), weight_D, y, total, x_TD.stride(0), width, eps, offset, True, _power(width)
        )  # type: ignore
    return y, total


def _gate(gate_up_TI: Tensor, gelu: bool) -> Tensor:
    rows, width = gate_up_TI.shape[0], gate_up_TI.shape[1] // 2
    y = gate_up_TI.new_empty(rows, width)
    if rows:
        _gated[(rows, triton.cdiv(width, 1024))](gate_up_TI.contiguous(), y, width, gelu, 1024)  # type: ignore
    return y


def silu_mul(gate_up_TI: Tensor) -> Tensor:
    return _gate(gate_up_TI, False)


def gelu_tanh_mul(gate_up_TI: Tensor) -> Tensor:
    return _gate(gate_up_TI, True)


def apply_rope(x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool = False) -> Tensor:
    tokens, heads, width = x_THK.shape
    x, y = (
        x_THK if x_THK.stride(2) == 1 else x_THK.contiguous(),
        torch.empty(x_THK.shape, dtype=x_THK.dtype, device=x_THK.device),
    )
    cos, sin = cos_TR.float().contiguous(), sin_TR.float().contiguous()
    if tokens:
        _rope[(tokens, heads)](
            x, cos, sin, y, x.stride(0), x.stride(1), heads, cos.shape[1], width, interleaved, _power(width)
        )  # type: ignore
    return y


def write_kv(new_TGK: Tensor, pool_SGK: Tensor, slots_T: Tensor) -> None:
    new, width = new_TGK.contiguous(), pool_SGK.shape[1] * pool_SGK.shape[2]
    if len(slots_T):
        _write[(len(slots_T),)](new, pool_SGK, slots_T, width, width, _power(width))  # type: ignore


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
                self.bits, per_output, self.bias is not None, GROUP, block_t, 64, 64,
            )  # type: ignore  # fmt: skip
        return y_TO

    def add(self, x_TI: Tensor, residual_TO: Tensor) -> Tensor:
        """residual + linear(x)."""
        return residual_TO + self(x_TI)

    def gated(self, x_TI: Tensor, activation: str) -> Tensor:
        """act(gate) * up of a stacked gate and up projection."""
        return _gate(self(x_TI), activation != "silu")


def paged_attention(
    q_THK: Tensor,
    k_pool_SGK: Tensor,
    v_pool_SGV: Tensor,
    tables_RB: Tensor,
    span_starts: Tensor,
    contexts_R: Tensor,
    positions_T: Tensor,
    block_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    mask_TP: Tensor | None = None,
    sinks_H: Tensor | None = None,
    new: tuple[Tensor, Tensor | None, Tensor] | None = None,
) -> Tensor:
    if new is not None:
        write_kv(new[0], k_pool_SGK, new[2])
        if new[1] is not None:
            write_kv(new[1], v_pool_SGV, new[2])
    T, H, K = q_THK.shape
    G, V = v_pool_SGV.shape[1:]
    q, tables = q_THK.contiguous(), tables_RB.contiguous()
    spans = torch.searchsorted(
        span_starts[1:].contiguous(), torch.arange(T, device=q.device, dtype=span_starts.dtype), right=True
    )
    mask = positions_T if mask_TP is None else mask_TP.contiguous()
    out_THV = q.new_empty(T, H, V)
    if T:
        _attention[(T, G)](
            q, k_pool_SGK, v_pool_SGV, tables, span_starts, contexts_R, positions_T, spans, mask,
            q if sinks_H is None else sinks_H.float().contiguous(), out_THV,
            q.stride(0), k_pool_SGK.stride(0), k_pool_SGK.stride(1), v_pool_SGV.stride(0), v_pool_SGV.stride(1),
            H, tables.shape[1], 0 if mask_TP is None else mask.shape[1], block_size, window or 0, scale, softcap or 1.0,
            H // G, _power(H // G), K, _power(K), V, _power(V), 32,
            mask_TP is not None, window is not None, softcap is not None, sinks_H is not None,
        )  # type: ignore  # fmt: skip
    return out_THV
