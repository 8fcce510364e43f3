"""Triton forms of the operators around the network: gathering, stable sorting, reducing segments, sampling. See `reference_data`.

The sampler holds a row of logits in one program and finds the smallest set a filter keeps by halving an interval of float bits, not by
sorting; the same numbers as on a CPU decide, so the same token is drawn up to rounding at an edge.

Shape legend: N rows, M picked rows, S segments, D width, V vocabulary, L rows of logits, W vocabulary.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wager.kernels import reference_data
from wager.kernels.triton_basics import power

DIGIT_BITS, SORT_BLOCK = 4, 128


@triton.jit
def _embedding(ids, table, y, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(table + tl.load(ids + row) * width + at, mask=at < width, other=0.0)
    tl.store(y + row * width + at, value.to(y.dtype.element_ty), mask=at < width)


@triton.jit
def _count_digits(keys, counts, n, blocks, shift, DIGITS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    at, digit = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DIGITS)
    mine = (tl.load(keys + at, mask=at < n, other=0) >> shift) & (DIGITS - 1)
    hits = ((mine[:, None] == digit[None, :]) & (at < n)[:, None]).to(tl.int64)
    tl.store(counts + digit * blocks + block, tl.sum(hits, axis=0))


@triton.jit
def _place_digits(
    keys, order, starts, keys_out, order_out, n, blocks, shift, DIGITS: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    at, digit = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DIGITS)
    key = tl.load(keys + at, mask=at < n, other=0)
    hits = (((key >> shift) & (DIGITS - 1))[:, None] == digit[None, :]) & (at < n)[:, None]
    ones = hits.to(tl.int64)
    before = tl.cumsum(ones, axis=0) - ones + tl.load(starts + digit * blocks + block)[None, :]
    place = tl.sum(tl.where(hits, before, 0), axis=1)
    tl.store(keys_out + place, key, mask=at < n)
    tl.store(order_out + place, tl.load(order + at, mask=at < n, other=0), mask=at < n)


@triton.jit
def _segments(values, rows, starts, y, width, MODE: tl.constexpr, HAS_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    segment = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, last = tl.load(starts + segment), tl.load(starts + segment + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    if MODE == "max":
        total = total - float("inf")
    for i in range(first, last):
        row = i
        if HAS_ROWS:
            row = tl.load(rows + i)
        value = tl.load(values + row * width + at, mask=at < width, other=0.0).to(tl.float32)
        if MODE == "max":
            total = tl.where((value > total) | (value != value), value, total)
        else:
            total += value
    if MODE == "mean":
        total = total / tl.maximum(last - first, 1)
    tl.store(y + segment * width + at, total.to(y.dtype.element_ty), mask=at < width)


@triton.jit
def _keep(logits, temperatures, min_ps, top_ks, top_ps, kept, width, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(logits + row * width + at, mask=inside, other=-float("inf"))
    p = tl.where(inside, tl.exp((x - tl.max(x)) / tl.load(temperatures + row)), 0.0)
    p = tl.where(p >= tl.load(min_ps + row), p, 0.0)
    top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
    for stage in tl.static_range(2):
        mass = tl.sum(p.to(tl.float64))
        count, wanted = width.to(tl.int64), top_p.to(tl.float64) * mass
        on = top_p < 1.0
        if stage == 0:
            count, wanted = top_k, mass * 2.0 + 1.0
            on = (top_k > 0) & (top_k < width)
        if on:
            low, high = tl.full((), 0, tl.int32), tl.full((), 0x3F800000, tl.int32)  # bits of 0 and 1
            bits = p.to(tl.int32, bitcast=True)
            for _ in range(31):  # the highest threshold at which enough stays
                middle = low + (high - low + 1) // 2
                enough = (tl.sum((bits >= middle).to(tl.int64)) >= count) | (
                    tl.sum(tl.where(bits >= middle, p, 0.0).to(tl.float64)) >= wanted
                )
                low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
            ties = (bits == low) & inside
            level = low.to(tl.float32, bitcast=True).to(tl.float64)
            short = count - tl.sum((bits > low).to(tl.int64))
            missing = wanted - tl.sum(tl.where(bits > low, p, 0.0).to(tl.float64))
            rank = tl.cumsum(ties.to(tl.int64), axis=0) - 1
            stays = ties & (rank < short) & (rank.to(tl.float64) * level < missing)
            p = tl.where((bits > low) | stays | ((rank == 0) & ties), p, 0.0)
    tl.store(kept + row * width + at, p, mask=inside)


@triton.jit
def _invert(weights, uniforms, tokens, width, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    p = tl.load(weights + row * width + at, mask=at < width, other=0.0).to(tl.float64)
    edges = tl.cumsum(p, axis=0)
    below = edges <= tl.load(uniforms + row) * tl.sum(p)
    last = tl.max(tl.where(p > 0, at, 0))
    tl.store(tokens + row, tl.minimum(tl.sum((below & (at < width)).to(tl.int32)), last).to(tl.int64))


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _race(weights, bases, tokens, width, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    p = tl.load(weights + row * width + at, mask=at < width, other=0.0).to(tl.float64)
    base = tl.load(bases + row).to(tl.uint64, bitcast=True)
    bits = _mix(base + (at + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
    u = ((bits >> 11).to(tl.float64) + 1.0) * 1.1102230246251565e-16
    times = tl.where(p > 0, -tl.log(u) / tl.where(p > 0, p, 1.0), float("inf"))
    tl.store(tokens + row, tl.argmin(times, axis=0).to(tl.int64))


def embedding(ids_T: Tensor, table_VD: Tensor) -> Tensor:
    ids, width = ids_T.contiguous(), table_VD.shape[1]
    y = table_VD.new_empty(*ids.shape, width, dtype=table_VD.dtype if table_VD.device.type == "cuda" else torch.float32)
    if ids.numel():
        _embedding[(ids.numel(), triton.cdiv(width, 1024))](ids, table_VD.contiguous(), y, width, 1024)  # type: ignore
    return y


def sort_by_key(keys_N: Tensor) -> Tensor:
    """Radix sort from the least significant four bits; as many passes as the keys' range needs."""
    n, order = len(keys_N), torch.arange(len(keys_N), device=keys_N.device)
    if n < 2:
        return order
    low, high = (int(v) for v in keys_N.aminmax())
    keys, blocks = (keys_N.long() - low).contiguous(), triton.cdiv(n, SORT_BLOCK)
    digits = 1 << DIGIT_BITS
    for shift in range(0, (high - low).bit_length(), DIGIT_BITS):
        counts = torch.empty(digits, blocks, dtype=torch.int64, device=keys.device)
        _count_digits[(blocks,)](keys, counts, n, blocks, shift, digits, SORT_BLOCK)  # type: ignore
        starts = counts.flatten().cumsum(0) - counts.flatten()
        keys_out, order_out = torch.empty_like(keys), torch.empty_like(order)
        _place_digits[(blocks,)](keys, order, starts, keys_out, order_out, n, blocks, shift, digits, SORT_BLOCK)  # type: ignore
        keys, order = keys_out, order_out
    return order


def segment_reduce(values_ND: Tensor, starts_S1: Tensor, mode: str = "sum", rows_M: Tensor | None = None) -> Tensor:
    values, starts, width = values_ND.contiguous(), starts_S1.contiguous(), values_ND.shape[1]
    y_SD, block = values.new_empty(len(starts) - 1, width), min(1024, power(width))
    rows = starts if rows_M is None else rows_M.contiguous()
    if len(y_SD):
        grid = (len(y_SD), triton.cdiv(width, block))
        _segments[grid](values, rows, starts, y_SD, width, mode, rows_M is not None, block)  # type: ignore
    return y_SD


def penalise(
    logits_LW: Tensor,
    counts_LW: Tensor,
    prompt_LW: Tensor,
    repetition_L: Tensor,
    frequency_L: Tensor,
    presence_L: Tensor,
) -> Tensor:
    y_LW, (rows, width) = torch.empty_like(logits_LW, memory_format=torch.contiguous_format), logits_LW.shape
    if rows:
        _penalise[(rows, triton.cdiv(width, 1024))](
            logits_LW.contiguous(),
            counts_LW.contiguous(),
            prompt_LW.contiguous(),
            repetition_L,
            frequency_L,
            presence_L,
            y_LW,
            width,
            1024,
        )  # type: ignore
    return y_LW


@triton.jit
def _penalise(logits, counts, prompt, repetitions, frequencies, presences, y, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, place = at < width, row * width + at
    x, count = tl.load(logits + place, mask=inside, other=0.0), tl.load(counts + place, mask=inside, other=0.0)
    repetition = tl.load(repetitions + row)
    scaled = tl.where(x > 0, x / repetition, x * repetition)
    seen = (count > 0) | (tl.load(prompt + place, mask=inside, other=0) != 0)
    x = tl.where(seen, scaled, x) - tl.load(frequencies + row) * count
    tl.store(y + place, x - tl.where(count > 0, tl.load(presences + row), 0.0), mask=inside)


def likely_weights(
    logits_LW: Tensor, temperature_L: Tensor, min_p_L: Tensor, top_k_L: Tensor, top_p_L: Tensor
) -> Tensor:
    (rows, width), kept_LW = (
        logits_LW.shape,
        torch.empty_like(logits_LW, dtype=torch.float32, memory_format=torch.contiguous_format),
    )
    columns = (temperature_L.float(), min_p_L.float(), top_k_L.long(), top_p_L.float())
    if rows:
        _keep[(rows,)](logits_LW.float().contiguous(), *columns, kept_LW, width, power(width))  # type: ignore
    return kept_LW


def sample(
    logits_LW: Tensor, temperature_L: Tensor, min_p_L: Tensor, top_k_L: Tensor, top_p_L: Tensor, uniforms_L: Tensor
) -> Tensor:
    kept_LW = likely_weights(logits_LW, temperature_L, min_p_L, top_k_L, top_p_L)
    tokens_L, width = torch.empty(len(kept_LW), dtype=torch.int64, device=kept_LW.device), kept_LW.shape[1]
    if len(kept_LW):
        _invert[(len(kept_LW),)](kept_LW, uniforms_L.double(), tokens_L, width, power(width))  # type: ignore
    return tokens_L


def race(
    logits_LW: Tensor, temperature_L: Tensor, min_p_L: Tensor, top_k_L: Tensor, top_p_L: Tensor, seeds_L: Tensor, positions_L: Tensor
) -> Tensor:  # fmt: skip
    kept_LW = likely_weights(logits_LW, temperature_L, min_p_L, top_k_L, top_p_L)
    bases = reference_data.race_bases(seeds_L.cpu().numpy(), positions_L.cpu().numpy())
    bases_L = torch.from_numpy(bases.view("int64")).to(kept_LW.device)
    tokens_L, width = torch.empty(len(kept_LW), dtype=torch.int64, device=kept_LW.device), kept_LW.shape[1]
    if len(kept_LW):
        _race[(len(kept_LW),)](kept_LW, bases_L, tokens_L, width, power(width))  # type: ignore
    return tokens_L
