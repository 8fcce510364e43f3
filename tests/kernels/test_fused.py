"""Fused groups give the bits of their single operators; attention with sinks, stores and strided queries equals the reference."""

import pytest
import torch

from tests.kernels.ragged import ragged_starts
from wager import kernels
from wager.kernels import native, reference
from wager.kernels.quantize import MODES
from wager.kernels.registry import choice, pack_linear

pytestmark = pytest.mark.skipif(choice().form != "native", reason="native kernels cannot be built here")


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("head_norms", [False, True])
@pytest.mark.parametrize("mode", [None, "int8", "w8a8"])
@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
def test_block_input(tokens, mode, head_norms):
    heads, kv_heads, width, hidden = 6, 2, 16, 64
    norm = kernels.Norm(randn(0, hidden).bfloat16(), 1e-5, 1.0)
    q_norm, k_norm = (kernels.Norm(randn(s, width), 1e-6) if head_norms else None for s in (8, 9))
    qkv = pack_linear(randn(1, (heads + 2 * kv_heads) * width, hidden), randn(2, (heads + 2 * kv_heads) * width), mode)
    fused = kernels.block_input(norm, qkv, q_norm, k_norm, heads, kv_heads, width)
    x, residual, angles = randn(3, tokens, hidden), randn(4, tokens, hidden), randn(5, tokens, 6)
    for old in (None, residual):
        kept = None if old is None else old.clone()
        q, k, v, total = fused(x, old, angles.cos(), angles.sin())
        if old is None:
            normed, want_total = kernels.rms_norm(x, norm.weight_D, norm.eps, norm.offset), x
        else:
            normed, want_total = kernels.rms_norm_residual(x, old, norm.weight_D, norm.eps, norm.offset)
            assert torch.equal(old, kept)
        parts = qkv(normed).view(tokens, heads + 2 * kv_heads, width).split((heads, kv_heads, kv_heads), 1)
        for got, want, head_norm in zip((q, k), parts, (q_norm, k_norm), strict=False):
            want = want if head_norm is None else kernels.rms_norm(want, head_norm.weight_D, head_norm.eps)
            assert torch.equal(got, kernels.apply_rope(want, angles.cos(), angles.sin()))
        assert torch.equal(v, parts[2]) and torch.equal(total, want_total)


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_block_output(mode, activation):
    tokens, hidden, wide = 7, 64, 128
    output, gate_up, down = (
        pack_linear(randn(s, o, i) * 0.1, None, mode)
        for s, o, i in ((0, hidden, 96 + 32), (1, 2 * wide, hidden), (2, hidden, wide))
    )
    norm = kernels.Norm(randn(3, hidden), 1e-5)
    fused = kernels.block_output(output, norm, gate_up, down, activation)
    attended, residual = randn(4, tokens, 128), randn(5, tokens, hidden)
    branch, stream = fused(attended, residual)
    normed, want_stream = kernels.rms_norm_residual(output(attended), residual, norm.weight_D, norm.eps)
    combine = kernels.silu_mul if activation == "silu" else kernels.gelu_tanh_mul
    assert torch.equal(stream, want_stream) and torch.equal(branch, down(combine(gate_up(normed))))


def test_no_fusion_where_it_does_not_fit():
    norm = kernels.Norm(torch.ones(40), 1e-5)
    odd = pack_linear(randn(0, 48, 40), None, "int4")  # 40 inputs are padded to 64
    assert kernels.block_input(norm, odd, None, None, 1, 1, 16) is None
    narrow = pack_linear(randn(0, 24, 40))
    assert kernels.block_output(narrow, norm, narrow, narrow, "silu") is None


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("latent", [False, True])
def test_stores_sinks_and_strided_queries(sinks, latent):
    lengths, contexts, size = [3, 1, 40], [5, 1500, 0], 16
    tokens, heads, kv_heads, width, value = sum(lengths), 4, 2, 32, 16 if latent else 32
    fused = randn(0, tokens, heads + 2 * kv_heads, width)
    q, k, v = fused.split((heads, kv_heads, kv_heads), 1)
    counts = [-(-(c + n) // size) for c, n in zip(contexts, lengths, strict=True)]
    tables = torch.full((3, max(counts)), -1, dtype=torch.int32)
    first = 0
    for row, count in enumerate(counts):
        tables[row, :count] = torch.arange(first, first + count)
        first += count
    slots = torch.tensor(
        [
            int(tables[r, (contexts[r] + i) // size]) * size + (contexts[r] + i) % size
            for r in range(3)
            for i in range(lengths[r])
        ]
    )
    pools = [randn(1, first * size, kv_heads, width), randn(2, first * size, kv_heads, width)]
    sink = randn(3, heads) if sinks else None
    positions = torch.cat([torch.arange(c, c + n) for c, n in zip(contexts, lengths, strict=True)])
    results = []
    for form in (native, reference):
        k_pool, v_pool = (p.clone() for p in pools)
        out = form.paged_attention(
            q, k_pool, k_pool[..., :value] if latent else v_pool, tables, ragged_starts(lengths), torch.tensor(contexts, dtype=torch.int32),
            positions, size, 0.2, None, None, None, sink, (k, None if latent else v, slots),
        )  # fmt: skip
        results.append((out, k_pool, v_pool))
    torch.testing.assert_close(results[0][0], results[1][0], atol=2e-5, rtol=2e-5)
    assert torch.equal(results[0][1], results[1][1]) and torch.equal(results[0][2], results[1][2])
