"""Torch references of the operators: the oracle every faster form is judged against. Clear first, vectorised where it costs no clarity.

Shape legend: T tokens, D width, I/O linear input/output width, H query heads, G key/value heads, K key width, V value width, S pool slots,
R spans, B blocks of a table row, P mask words.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wager.kernels.reference_data import (
    embedding,
    experts,
    likely_weights,
    penalise,
    race,
    sample,
    segment_reduce,
    segment_starts,
    sort_by_key,
)  # fmt: skip

__all__ = [
    "apply_rope", "embedding", "experts", "gelu_tanh_mul", "layer_norm", "layer_norm_residual", "likely_weights", "linear", "masked_keys",
    "paged_attention", "penalise", "race", "rms_norm", "rms_norm_residual", "rope_write", "sample", "segment_reduce", "segment_starts",
    "silu_mul", "sort_by_key", "write_kv",
]  # fmt: skip


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b in the activation's dtype; a lower-precision weight is widened to it."""
    bias = None if bias_O is None else bias_O.to(x_TI.dtype)
    return F.linear(x_TI, weight_OI.to(x_TI.dtype), bias)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x²) + eps) * (offset + weight), computed in float32, returned in x's dtype. Gemma uses offset 1."""
    x32 = x_TD.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normed * (offset + weight_D.float())).to(x_TD.dtype)


def rms_norm_residual(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(rms_norm(residual + x), residual + x)."""
    total_TD = residual_TD + x_TD
    return rms_norm(total_TD, weight_D, eps, offset), total_TD


def layer_norm(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias in x's dtype."""
    bias = None if bias_D is None else bias_D.to(x_TD.dtype)
    return F.layer_norm(x_TD, (x_TD.shape[-1],), weight_D.to(x_TD.dtype), bias, eps)


def layer_norm_residual(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(layer_norm(residual + x), residual + x)."""
    total_TD = residual_TD + x_TD
    return layer_norm(total_TD, weight_D, bias_D, eps), total_TD


def silu_mul(gate_up_TI: Tensor) -> Tensor:
    """silu(gate) * up of a fused [T, 2 I] projection, gate first."""
    gate, up = gate_up_TI.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_tanh_mul(gate_up_TI: Tensor) -> Tensor:
    """gelu(gate) * up with the tanh form of gelu, gate first."""
    gate, up = gate_up_TI.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def apply_rope(x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first 2 R widths of every head by the token's angles [T, R]; the rest passes through.

    Half layout pairs (i, i + R), interleaved pairs (2 i, 2 i + 1).
    """
    rotary = 2 * cos_TR.shape[-1]
    cos, sin = cos_TR[:, None, :], sin_TR[:, None, :]
    head, rest = x_THK[..., :rotary].float(), x_THK[..., rotary:]
    a, b = (head[..., 0::2], head[..., 1::2]) if interleaved else head.chunk(2, dim=-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    out = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((out.to(x_THK.dtype), rest), dim=-1)


def write_kv(new_TGK: Tensor, pool_SGK: Tensor, slots_T: Tensor) -> None:
    """Store each token's row in its pool slot; slot -1 stores nothing. A float8 pool takes what is too large as its largest number."""
    keep = slots_T >= 0
    new = new_TGK[keep]
    if pool_SGK.dtype.itemsize == 1:
        most = torch.finfo(pool_SGK.dtype).max
        new = new.clamp(-most, most)
    pool_SGK[slots_T[keep]] = new.to(pool_SGK.dtype)


def rope_write(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, cos_TR: Tensor, sin_TR: Tensor, k_pool_SGK: Tensor, v_pool_SGV: Tensor,
    slots_T: Tensor, interleaved: bool = False,
) -> Tensor:  # fmt: skip
    """The rotated queries; rotated keys and the values are in the pools afterwards."""
    write_kv(apply_rope(k_TGK, cos_TR, sin_TR, interleaved), k_pool_SGK, slots_T)
    write_kv(v_TGV, v_pool_SGV, slots_T)
    return apply_rope(q_THK, cos_TR, sin_TR, interleaved)


def masked_keys(mask_TP: Tensor) -> int:
    """One more than the highest bit that is set in any row."""
    rows = mask_TP.tolist()
    return max(
        (64 * i + (word & (2**64 - 1)).bit_length() for row in rows for i, word in enumerate(row) if word), default=0
    )


def own_span(rows: Tensor, mask_TP: Tensor | None) -> Tensor:
    """bool [T, keys]: which rows of its own span each query sees, those before it or those whose bits are set."""
    if mask_TP is None:
        return rows[None, :] <= rows[:, None]
    return (mask_TP[:, rows // 64] >> (rows % 64)) & 1 == 1


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
    """Attention of ragged spans over paged keys and values, [T, H, V] in q's dtype, softmax in float32.

    Row i of span r sees cache indices 0 .. contexts[r] - 1 of its request and, of its own span (cache indices contexts[r] + j), rows j <= i,
    or, with `mask_TP`, the cache indices contexts[r] + j whose bit is set (bit j % 64 of word j // 64; a tree that is grown level by level
    has older rows cached before those of the span). A window hides keys whose position is at most the query's
    position - window; cached keys have position = cache index, span keys the position of their row. The span's own keys must already be
    in the pool, unless `new` = (k_TGK, v_TGV or None, slots_T) brings them. A head's sink is a score that takes part in its softmax without
    a value (gpt-oss). Latent attention passes a view of the key pool as the value pool.
    """
    if new is not None:
        write_kv(new[0], k_pool_SGK, new[2])
        if new[1] is not None:
            write_kv(new[1], v_pool_SGV, new[2])
    T, H, _ = q_THK.shape
    G, V = v_pool_SGV.shape[1], v_pool_SGV.shape[2]
    out_THV = q_THK.new_zeros(T, H, V)
    for r in range(tables_RB.shape[0]):
        start, stop, context = int(span_starts[r]), int(span_starts[r + 1]), int(contexts_R[r])
        length = stop - start
        if length == 0:
            continue
        keys = length if mask_TP is None else masked_keys(mask_TP[start:stop])
        index = torch.arange(context + keys, device=q_THK.device)
        slots = tables_RB[r].long()[index // block_size] * block_size + index % block_size
        k, v = k_pool_SGK[slots].float(), v_pool_SGV[slots].float()
        k, v = k.repeat_interleave(H // G, dim=1), v.repeat_interleave(H // G, dim=1)
        rows = torch.arange(keys, device=q_THK.device)
        own = own_span(rows, None if mask_TP is None else mask_TP[start:stop])
        seen = torch.cat((torch.ones(length, context, dtype=torch.bool, device=own.device), own), dim=1)
        if window is not None:
            key_positions = torch.cat((index[:context], positions_T[start + rows.clamp(max=length - 1)]))
            seen &= key_positions[None, :] > positions_T[start:stop, None] - window
        scores = torch.einsum("thk,shk->hts", q_THK[start:stop].float(), k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks_H is not None:
            scores = torch.cat((scores, sinks_H.float()[:, None, None].expand(-1, length, 1)), dim=-1)
        weights = scores.softmax(-1)[..., : len(index)]
        out_THV[start:stop] = torch.einsum("hts,shv->thv", weights, v).to(out_THV.dtype)
    return out_THV
