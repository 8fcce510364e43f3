"""The C++ forms against the torch reference, over odd shapes, and the guarantee that a row does not depend on its batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.ragged import ragged_starts
from wager import kernels
from wager.kernels import native, reference
from wager.kernels.registry import choice, pack_linear

pytestmark = pytest.mark.skipif(choice().form != "native", reason="native kernels cannot be built here")


def rng(seed):
    return torch.Generator().manual_seed(seed)


def randn(seed, *shape):
    return torch.randn(*shape, generator=rng(seed))


def bound(x, weight, outputs):
    """Largest error that reordering a sum of products can make: n eps sum |x w|."""
    n = x.shape[-1]
    return (n + 4) * 2**-24 * (x.abs() @ weight.float().abs().T) + 1e-6


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 70),
    inputs=st.sampled_from([1, 7, 64, 383, 384, 385, 900]),
    outputs=st.sampled_from([1, 15, 16, 17, 100, 161]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_linear_is_exact_to_rounding(rows, inputs, outputs, dtype, bias, seed):
    x, weight = randn(seed, rows, inputs), randn(seed + 1, outputs, inputs).to(dtype)
    b = randn(seed + 2, outputs).to(dtype) if bias else None
    got = pack_linear(weight, b)(x)
    want = x.double() @ weight.double().T + (0 if b is None else b.double())
    assert got.shape == (rows, outputs)
    assert ((got - want).abs() <= bound(x, weight, outputs) * 2 + (0 if b is None else b.float().abs() * 1e-6)).all()


def test_a_linear_row_does_not_depend_on_the_batch():
    x, weight = randn(0, 50, 900), randn(1, 130, 900).bfloat16()
    packed = pack_linear(weight)
    whole = packed(x)
    for size in (1, 2, 5, 7, 13, 31):
        parts = torch.cat([packed(part) for part in x.split(size)])
        assert torch.equal(whole, parts), size


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.sampled_from([1, 8, 13, 64, 100]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_norms_and_activations(rows, width, dtype):
    x, residual, weight = randn(1, rows, width), randn(2, rows, width), randn(3, width).to(dtype)
    torch.testing.assert_close(native.rms_norm(x, weight, 1e-5, 1.0), reference.rms_norm(x, weight, 1e-5, 1.0))
    before = residual.clone()
    got, want = (
        native.rms_norm_residual(x, residual, weight, 1e-6),
        reference.rms_norm_residual(x, residual, weight, 1e-6),
    )
    torch.testing.assert_close(got, want)
    assert torch.equal(residual, before)
    wide = 6 * randn(4, rows, 2 * width)
    for name in ("silu_mul", "gelu_tanh_mul"):
        torch.testing.assert_close(getattr(native, name)(wide), getattr(reference, name)(wide), atol=5e-6, rtol=5e-6)
    extreme = torch.tensor([[-200.0, 200.0, -90.0, 0.0, 1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(native.silu_mul(extreme), reference.silu_mul(extreme))
    torch.testing.assert_close(native.gelu_tanh_mul(extreme), reference.gelu_tanh_mul(extreme))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_on_strided_heads(interleaved):
    fused = randn(5, 7, 10 * 24).view(7, 10, 24)
    x = fused[:, 2:5]
    angles = randn(6, 7, 8)
    want = reference.apply_rope(x, angles.cos(), angles.sin(), interleaved)
    torch.testing.assert_close(native.apply_rope(x, angles.cos(), angles.sin(), interleaved), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_write_kv_rounds_like_torch_and_skips(dtype):
    fused = randn(7, 6, 8, 16)
    new, slots = fused[:, 4:6], torch.tensor([3, -1, 0, 9, 5, -1])
    pools = [torch.zeros(12, 2, 16, dtype=dtype) for _ in range(2)]
    native.write_kv(new, pools[0], slots)
    reference.write_kv(new, pools[1], slots)
    assert torch.equal(*(pool.float() for pool in pools))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(width=32, allow_infinity=True, allow_nan=True), min_size=1, max_size=40))
def test_float8_codes_are_those_of_torch(values):
    """Rounded as torch rounds (to nearest, ties to even), but what is too large for e4m3 becomes its largest number."""
    x = torch.tensor(values, dtype=torch.float32).view(1, 1, -1)
    pool = torch.zeros(1, 1, x.shape[2], dtype=torch.float8_e4m3fn)
    native.write_kv(x, pool, torch.zeros(1, dtype=torch.int64))
    want = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    nan = x.isnan()
    assert torch.equal(pool.view(torch.uint8)[~nan], want.view(torch.uint8)[~nan]) and pool.float()[nan].isnan().all()


def test_every_float8_value_and_every_tie_is_written_and_read():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = codes[~codes.isnan()].sort().values
    points = torch.cat((codes, (finite[1:] + finite[:-1]) / 2, finite * 0.999, finite * 1.001, finite * 1.04))
    pool = torch.zeros(1, 1, len(points), dtype=torch.float8_e4m3fn)
    native.write_kv(points.view(1, 1, -1), pool, torch.zeros(1, dtype=torch.int64))
    want = points.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(
        pool.flatten().view(torch.uint8) | points.isnan() * 128, want.view(torch.uint8) | points.isnan() * 128
    )
    # One key and one query of ones: the output is the value row as it was read.
    arguments = build_single(pool.view(1, 1, -1))
    torch.testing.assert_close(native.paged_attention(*arguments)[0, 0], want.float(), rtol=0, atol=0, equal_nan=True)


def build_single(values):
    """Arguments of attention in which one query sees one slot."""
    q, k = torch.ones(1, 1, 8), torch.ones(1, 1, 8).to(values.dtype)
    one = torch.zeros(1, dtype=torch.int32)
    return q, k, values, one.view(1, 1), ragged_starts([1]), one, torch.zeros(1, dtype=torch.int64), 1, 1.0


@st.composite
def attention_cases(draw):
    spans = draw(st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40)), min_size=1, max_size=4))
    heads_per_kv, kv_heads = draw(st.sampled_from([1, 3, 4])), draw(st.sampled_from([1, 2]))
    return dict(
        spans=spans,
        heads=heads_per_kv * kv_heads,
        kv_heads=kv_heads,
        key_dim=draw(st.sampled_from([8, 16, 20, 64])),
        value_dim=draw(st.sampled_from([8, 12, 64])),
        block_size=draw(st.sampled_from([1, 4, 16])),
        window=draw(st.sampled_from([None, None, 1, 7, 50])),
        softcap=draw(st.sampled_from([None, 5.0])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn])),
        latent=draw(st.booleans()),
        tree=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


def build(case):
    """Random pools, tables without order, and for trees a random ancestor mask."""
    generator = np.random.default_rng(case["seed"])
    lengths, contexts = [s[1] for s in case["spans"]], [s[0] for s in case["spans"]]
    size = case["block_size"]
    counts = [-(-(c + n) // size) for c, n in zip(contexts, lengths, strict=True)]
    order = generator.permutation(sum(counts) + 3)
    tables = np.full((len(counts), max(counts)), -1, np.int32)
    taken = 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[taken : taken + count]
        taken += count
    slots, G = (sum(counts) + 3) * size, case["kv_heads"]
    if case["latent"]:
        case["value_dim"] = min(case["value_dim"], case["key_dim"])
    k = randn(case["seed"], slots, G, case["key_dim"]).to(case["dtype"])
    v = (
        k[..., : case["value_dim"]]
        if case["latent"]
        else randn(case["seed"] + 1, slots, G, case["value_dim"]).to(case["dtype"])
    )
    positions, masks = [], []
    for context, length in zip(contexts, lengths, strict=True):
        parents = [-1] + [int(generator.integers(0, i)) for i in range(1, length)]
        depth = [0] * length
        bits = np.zeros((length, -(-max(lengths) // 64)), np.uint64)
        for i, parent in enumerate(parents):
            if i:
                depth[i] = depth[parent] + 1
                bits[i] = bits[parent]
            bits[i, i // 64] |= np.uint64(1 << (i % 64))
        positions += [context + (depth[i] if case["tree"] else i) for i in range(length)]
        masks.append(bits)
    mask = torch.from_numpy(np.concatenate(masks).view(np.int64)) if case["tree"] else None
    q = randn(case["seed"] + 2, sum(lengths), case["heads"], case["key_dim"])
    return (
        q, k, v, torch.from_numpy(tables), ragged_starts(lengths), torch.tensor(contexts, dtype=torch.int32),
        torch.tensor(positions), size, case["key_dim"] ** -0.5, case["window"], case["softcap"], mask,
    )  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(attention_cases())
def test_attention_equals_the_reference(case):
    arguments = build(case)
    torch.testing.assert_close(
        native.paged_attention(*arguments), reference.paged_attention(*arguments), atol=2e-5, rtol=2e-5
    )


def test_long_contexts_are_cut_and_combined():
    case = dict(
        spans=[(5000, 1), (2047, 3), (0, 40), (1020, 9)], heads=4, kv_heads=2, key_dim=16, value_dim=16, block_size=16,
        window=None, softcap=None, dtype=torch.bfloat16, latent=False, tree=False, seed=3,
    )  # fmt: skip
    for window in (None, 1500):
        arguments = build({**case, "window": window})
        torch.testing.assert_close(
            native.paged_attention(*arguments), reference.paged_attention(*arguments), atol=2e-5, rtol=2e-5
        )


@pytest.mark.parametrize("window", [None, 100])
def test_a_query_does_not_depend_on_its_chunk(window):
    """The same tokens as one prompt, as chunks, and one by one: equal bits."""
    length, size = 1100, 16
    q, k, v = randn(1, length, 4, 32), randn(2, length + size, 2, 32), randn(3, length + size, 2, 32)
    table = torch.arange(-(-length // size), dtype=torch.int32)[None]

    def run(start, stop):
        return native.paged_attention(
            q[start:stop], k, v, table, ragged_starts([stop - start]), torch.tensor([start], dtype=torch.int32),
            torch.arange(start, stop), size, 0.2, window,
        )  # fmt: skip

    whole = run(0, length)
    cuts = [0, 1, 2, 40, 333, 1000, 1023, 1024, 1025, 1100]
    chunks = torch.cat([run(a, b) for a, b in zip(cuts, cuts[1:], strict=False)])
    assert torch.equal(whole, chunks)


def test_reference_serves_gradients_and_unknown_dtypes():
    weight = torch.ones(8, requires_grad=True)
    kernels.rms_norm(randn(0, 2, 8), weight, 1e-5).sum().backward()
    assert weight.grad is not None
    assert kernels.silu_mul(randn(0, 2, 8).double()).dtype == torch.float64
