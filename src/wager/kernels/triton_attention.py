"""The Triton form of paged ragged attention: prompt chunks, decode tokens and token trees in one kernel, long contexts in pieces.

A program holds one query token, the heads that share a key/value head, and one piece of the keys. Keys are cut only as far as it takes to
fill the device; one piece writes its result itself, several are combined in order by a second kernel. Rows loop up to their own last visible
key, so a tree's rows may see cached rows of earlier levels beyond the span's length.

Shape legend: T tokens, H query heads, G key/value heads, K key width, V value width, S pool slots, R spans, B blocks of a table row, P words.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wager.kernels.triton_basics import inner_dense, write_kv
from wager.kernels.triton_basics import power as _power
from wager.kernels.triton_tiles import multiprocessors

KEYS, PIECE = 64, 256  # keys of a block, and of the smallest piece worth a program of its own
PROGRAMS = 2  # wanted on each multiprocessor


@triton.jit
def _attention(
    q, k_pool, v_pool, tables, starts, contexts, positions, spans, mask, sinks, tops, totals, out,
    q_token, q_head, k_slot, k_head, v_slot, v_head, heads, table_width, words, window, scale, softcap, piece_keys, pieces,
    BLOCK_SIZE: tl.constexpr, GROUP_HEADS: tl.constexpr, ROWS: tl.constexpr, KEY_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, KEYS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, BITS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    token, kv_head, piece = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    span = tl.load(spans + token)
    first, last, context = tl.load(starts + span), tl.load(starts + span + 1), tl.load(contexts + span)
    own_row, position = token - first, tl.load(positions + token)
    row, kd, vd = tl.arange(0, ROWS), tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    head = kv_head * GROUP_HEADS + row
    query = tl.load(
        q + token * q_token + head[:, None] * q_head + kd[None, :],
        mask=(row[:, None] < GROUP_HEADS) & (kd[None, :] < KEY_DIM),
        other=0.0,
    )
    top = tl.full((ROWS,), -1e30, tl.float32)
    total, acc = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, VALUE_BLOCK), tl.float32)
    own_keys = own_row + 1
    if HAS_MASK:  # one more than the row's highest bit; cached rows of a tree that grows level by level may precede the span's own
        own_keys = 0
        bit = tl.arange(0, BITS)
        for number in range(0, words):
            word = tl.load(mask + token * words + number)
            own_keys = tl.maximum(own_keys, tl.max(tl.where((word >> bit) & 1 == 1, number * BITS + bit + 1, 0)))
    begin = piece * piece_keys
    if HAS_WINDOW:
        begin = tl.maximum(begin, tl.maximum(0, tl.minimum(position - window + 1, context)) // KEYS * KEYS)
    end = tl.minimum(context + own_keys, (piece + 1) * piece_keys)
    for start in range(begin, end, KEYS):
        j = start + tl.arange(0, KEYS)
        live, own = j < end, j - context
        if HAS_MASK:
            word = tl.load(mask + token * words + tl.maximum(own, 0) // 64, mask=live & (own >= 0), other=0)
            seen = live & ((own < 0) | (((word >> (tl.maximum(own, 0) % 64)) & 1) == 1))
        else:
            seen = live
        if HAS_WINDOW:
            row_of_key = tl.minimum(tl.maximum(own, 0), last - first - 1)
            at = tl.load(positions + first + row_of_key, mask=live & (own >= 0), other=0)
            seen = seen & (tl.where(own < 0, j, at) > position - window)
        block = tl.load(tables + span * table_width + j // BLOCK_SIZE, mask=live, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + j % BLOCK_SIZE
        keys = tl.load(
            k_pool + slot[:, None] * k_slot + kv_head * k_head + kd[None, :],
            mask=live[:, None] & (kd[None, :] < KEY_DIM),
            other=0.0,
        )
        scores = tl.dot(query, tl.trans(keys).to(query.dtype), input_precision="ieee") * scale
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
        acc = tl.dot(p.to(query.dtype), values.to(query.dtype), acc * shrink[:, None], input_precision="ieee")
        total, top = total * shrink + tl.sum(p, axis=1), highest
    inside = row < GROUP_HEADS
    place = (token * heads + head) * pieces + piece
    if WHOLE:
        if HAS_SINKS:
            total += tl.exp(tl.load(sinks + head, mask=inside, other=0.0) - top)
        acc = acc / tl.maximum(total, 1e-30)[:, None]
    else:
        tl.store(tops + place, top, mask=inside)
        tl.store(totals + place, total, mask=inside)
    wanted = inside[:, None] & (vd[None, :] < VALUE_DIM)
    tl.store(out + place[:, None] * VALUE_DIM + vd[None, :], acc.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def _combine(
    partial, tops, totals, sinks, out, heads, pieces,
    PIECES_BLOCK: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c, vd = tl.arange(0, PIECES_BLOCK), tl.arange(0, VALUE_BLOCK)
    top = tl.load(tops + row * pieces + c, mask=c < pieces, other=-1e30)
    highest = tl.max(top)
    factor = tl.exp(top - highest)
    total = tl.sum(tl.load(totals + row * pieces + c, mask=c < pieces, other=0.0) * factor)
    if HAS_SINKS:
        total += tl.exp(tl.load(sinks + row % heads) - highest)
    values = tl.load(
        partial + (row * pieces + c[:, None]) * VALUE_DIM + vd[None, :],
        mask=(c[:, None] < pieces) & (vd[None, :] < VALUE_DIM),
        other=0.0,
    )
    acc = tl.sum(values * factor[:, None], axis=0) / tl.maximum(total, 1e-30)
    tl.store(out + row * VALUE_DIM + vd, acc.to(out.dtype.element_ty), mask=vd < VALUE_DIM)


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
    spans_T: Tensor | None = None,
) -> Tensor:
    """As the reference's. spans_T: the span of each token, where the caller knows it."""
    if new is not None:
        write_kv(new[0], k_pool_SGK, new[2])
        if new[1] is not None:
            write_kv(new[1], v_pool_SGV, new[2])
    T, H, K = q_THK.shape
    G, V = v_pool_SGV.shape[1:]
    q, tables = inner_dense(q_THK), tables_RB.contiguous()
    if spans_T is None:
        spans_T = torch.searchsorted(
            span_starts[1:].contiguous(), torch.arange(T, device=q.device, dtype=span_starts.dtype), right=True
        )
    mask = positions_T if mask_TP is None else mask_TP.contiguous()
    out_THV = q.new_empty(T, H, V)
    if not T:
        return out_THV
    pieces, piece_keys = cut(T * G, tables.shape[1] * block_size, q.device)
    whole = pieces == 1
    partial = out_THV if whole else q.new_empty(T, H, pieces, V, dtype=torch.float32)
    tops, totals = (q, q) if whole else q.new_empty(2, T, H, pieces, dtype=torch.float32).unbind(0)
    sinks = q if sinks_H is None else sinks_H.float().contiguous()
    _attention[(T, G, pieces)](
        q, k_pool_SGK, v_pool_SGV, tables, span_starts, contexts_R, positions_T, spans_T, mask, sinks, tops, totals, partial,
        q.stride(0), q.stride(1), k_pool_SGK.stride(0), k_pool_SGK.stride(1), v_pool_SGV.stride(0), v_pool_SGV.stride(1),
        H, tables.shape[1], 0 if mask_TP is None else mask.shape[1], window or 0, scale, softcap or 1.0, piece_keys, pieces,
        block_size, H // G, _power(H // G), K, _power(K), V, _power(V), KEYS if K <= 128 else KEYS // 2,
        mask_TP is not None, window is not None, softcap is not None, sinks_H is not None, 64, whole,
        num_warps=4, num_stages=3 if K <= 128 else 2,
    )  # type: ignore  # fmt: skip
    if not whole:
        _combine[(T * H,)](
            partial, tops, totals, sinks, out_THV, H, pieces, _power(pieces, 2), V, _power(V), sinks_H is not None
        )  # type: ignore
    return out_THV


def cut(rows: int, most_keys: int, device: torch.device) -> tuple[int, int]:
    """(pieces, keys of each) for `rows` pairs of token and key/value head over tables that hold `most_keys` keys.

    By the tables' width, which is known without asking the device.
    """
    wanted = triton.cdiv(PROGRAMS * multiprocessors(device), rows)
    pieces = max(1, min(wanted, triton.cdiv(most_keys, PIECE)))
    return pieces, triton.cdiv(triton.cdiv(most_keys, pieces), KEYS) * KEYS
