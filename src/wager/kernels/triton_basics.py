"""Triton forms of norms, gates, rotation and storing keys and values. See `reference`.

Shape legend: T tokens, D width, I half of a fused gate and up projection, H/G heads, K/V head widths, S pool slots, R rotated pairs.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


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
def _layer_norm(
    x, residual, weight, bias, y, total, x_stride, width, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        value = value + tl.load(residual + row * width + at, mask=inside, other=0.0)
        tl.store(total + row * width + at, value, mask=inside)
    wide = value.to(tl.float32)
    centred = tl.where(inside, wide - tl.sum(wide) / width, 0.0)
    made = centred / tl.sqrt(tl.sum(centred * centred) / width + eps)
    made = made * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        made = made + tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + at, made.to(y.dtype.element_ty), mask=inside)


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
def _turn(source, target, cos, sin, pairs, width, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """One head: the first 2 * pairs widths turned by the angles, the rest as it is."""
    at = tl.arange(0, BLOCK)
    turned, rest = at < pairs, (at >= 2 * pairs) & (at < width)
    first = 2 * at if INTERLEAVED else at
    second = first + 1 if INTERLEAVED else at + pairs
    a = tl.load(source + first, mask=turned, other=0.0).to(tl.float32)
    b = tl.load(source + second, mask=turned, other=0.0).to(tl.float32)
    c = tl.load(cos + at, mask=turned, other=0.0)
    s = tl.load(sin + at, mask=turned, other=0.0)
    tl.store(target + first, (a * c - b * s).to(target.dtype.element_ty), mask=turned)
    tl.store(target + second, (b * c + a * s).to(target.dtype.element_ty), mask=turned)
    tl.store(target + at, tl.load(source + at, mask=rest, other=0.0).to(target.dtype.element_ty), mask=rest)


@triton.jit
def _rope(
    x, cos, sin, y, token_stride, head_stride, heads, pairs, width, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    source, target = x + token * token_stride + head * head_stride, y + (token * heads + head) * width
    _turn(source, target, cos + token * pairs, sin + token * pairs, pairs, width, INTERLEAVED, BLOCK)


@triton.jit
def _rope_write(
    q, k, v, cos, sin, turned, k_pool, v_pool, slots, q_token, q_head, k_token, k_head, v_token, v_head,
    heads, kv_heads, pairs, width, value_width, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program holds one head of one token: of the queries, then of the keys, then of the values."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos, sin = cos + token * pairs, sin + token * pairs
    if head < heads:
        source, target = q + token * q_token + head * q_head, turned + (token * heads + head) * width
        _turn(source, target, cos, sin, pairs, width, INTERLEAVED, BLOCK)
    else:
        slot = tl.load(slots + token)
        if slot >= 0:
            own = head - heads
            if own < kv_heads:
                place = k_pool + (slot * kv_heads + own) * width
                _turn(k + token * k_token + own * k_head, place, cos, sin, pairs, width, INTERLEAVED, BLOCK)
            else:
                own -= kv_heads
                at = tl.arange(0, BLOCK)
                value = tl.load(v + token * v_token + own * v_head + at, mask=at < value_width, other=0.0)
                place = v_pool + (slot * kv_heads + own) * value_width
                tl.store(place + at, value.to(v_pool.dtype.element_ty), mask=at < value_width)


@triton.jit
def _write(new, pool, slots, token_stride, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    at = tl.arange(0, BLOCK)
    inside = at < tl.where(slot >= 0, width, 0)
    value = tl.load(new + token * token_stride + at, mask=inside, other=0.0)
    tl.store(pool + slot * width + at, value.to(pool.dtype.element_ty), mask=inside)


def power(n: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(n))


def warps(block: int) -> int:
    """Of a program that holds `block` values at once."""
    return min(16, max(1, block // 512))


def inner_dense(x_THK: Tensor) -> Tensor:
    """The same rows with their last dimension in one piece; other strides may be any."""
    return x_THK if x_THK.stride(-1) == 1 else x_THK.contiguous()


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if flat.shape[0]:
        _rms_norm[(flat.shape[0],)](
            flat, flat, weight_D, y, y, flat.stride(0), flat.shape[1], eps, offset, False, power(flat.shape[1]),
            num_warps=warps(power(flat.shape[1])),
        )  # type: ignore  # fmt: skip
    return y


def rms_norm_residual(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    x_TD = inner_dense(x_TD)
    y, total = x_TD.new_empty(x_TD.shape), x_TD.new_empty(x_TD.shape)
    rows, width = x_TD.shape
    if rows:
        _rms_norm[(rows,)](
            x_TD, residual_TD.contiguous(), weight_D, y, total, x_TD.stride(0), width, eps, offset, True, power(width),
            num_warps=warps(power(width)),
        )  # type: ignore  # fmt: skip
    return y, total


def gate(gate_up_TI: Tensor, gelu: bool) -> Tensor:
    rows, width = gate_up_TI.shape[0], gate_up_TI.shape[1] // 2
    y = gate_up_TI.new_empty(rows, width)
    if rows:
        _gated[(rows, triton.cdiv(width, 1024))](gate_up_TI.contiguous(), y, width, gelu, 1024)  # type: ignore
    return y


def silu_mul(gate_up_TI: Tensor) -> Tensor:
    return gate(gate_up_TI, False)


def gelu_tanh_mul(gate_up_TI: Tensor) -> Tensor:
    return gate(gate_up_TI, True)


def apply_rope(x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool = False) -> Tensor:
    tokens, heads, width = x_THK.shape
    x, y = inner_dense(x_THK), torch.empty(x_THK.shape, dtype=x_THK.dtype, device=x_THK.device)
    cos, sin = cos_TR.float().contiguous(), sin_TR.float().contiguous()
    if tokens:
        _rope[(tokens, heads)](
            x, cos, sin, y, x.stride(0), x.stride(1), heads, cos.shape[1], width, interleaved, power(width), num_warps=1
        )  # type: ignore
    return y


def write_kv(new_TGK: Tensor, pool_SGK: Tensor, slots_T: Tensor) -> None:
    new, width = new_TGK.contiguous(), pool_SGK.shape[1] * pool_SGK.shape[2]
    if len(slots_T):
        _write[(len(slots_T),)](new, pool_SGK, slots_T, width, width, power(width))  # type: ignore


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return _normalise(flat, None, weight_D, bias_D, eps)[0].view(x.shape)


def layer_norm_residual(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return _normalise(x_TD, residual_TD.contiguous(), weight_D, bias_D, eps)


def _normalise(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    y, total = x.new_empty(x.shape), x.new_empty(x.shape)
    rows, width = x.shape
    if rows:
        _layer_norm[(rows,)](
            x, x if residual is None else residual, weight, weight if bias is None else bias, y, total, x.stride(0), width, eps,
            residual is not None, bias is not None, power(width), num_warps=warps(power(width)),
        )  # type: ignore  # fmt: skip
    return y, total


def rope_write(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, cos_TR: Tensor, sin_TR: Tensor, k_pool_SGK: Tensor, v_pool_SGV: Tensor,
    slots_T: Tensor, interleaved: bool = False,
) -> Tensor:  # fmt: skip
    """Rotated queries; rotated keys and the values go into the pools, all in one launch."""
    (tokens, heads, width), (kv_heads, value_width) = q_THK.shape, v_TGV.shape[1:]
    turned = torch.empty(q_THK.shape, dtype=q_THK.dtype, device=q_THK.device)
    if tokens:
        cos, sin = cos_TR.float().contiguous(), sin_TR.float().contiguous()
        q, k, v = inner_dense(q_THK), inner_dense(k_TGK), inner_dense(v_TGV)
        _rope_write[(tokens, heads + 2 * kv_heads)](
            q, k, v, cos, sin, turned, k_pool_SGK, v_pool_SGV, slots_T, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0),
            v.stride(1), heads, kv_heads, cos.shape[1], width, value_width, interleaved, power(max(width, value_width)), num_warps=1,
        )  # type: ignore  # fmt: skip
    return turned
