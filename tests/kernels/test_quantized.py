"""Quantized linears: the C++ forms against the definition in `quantize`, and what rounding may cost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wager.errors import UsageError
from wager.kernels import native_linear
from wager.kernels.quantize import ACTIVATION_GROUP, INT4, MODES, NF4, quantize, round_activations
from wager.kernels.registry import ReferenceLinear, choice, pack_linear

needs_native = pytest.mark.skipif(choice().form != "native", reason="native kernels cannot be built here")


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle(x, weight, bias, mode):
    """Float64 product of what the definition says is multiplied, and how far reordered float32 sums may lie from it."""
    w, a = quantize(weight, mode).dequantized().double(), round_activations(x, mode).double()
    size = a.abs() @ w.abs().T
    slack = (x.shape[1] + 8) * 2**-23 * size + 1e-6
    return a @ w.T + (0 if bias is None else bias.double()), slack


@needs_native
@settings(max_examples=90, deadline=None)
@given(
    rows=st.integers(0, 33),
    inputs=st.sampled_from([1, 31, 32, 64, 96, 100, 520, 700, 1100]),
    outputs=st.sampled_from([1, 15, 16, 48, 64, 161]),
    mode=st.sampled_from(MODES),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_its_definition(rows, inputs, outputs, mode, bias, seed):
    x, weight = randn(seed, rows, inputs) * 3, randn(seed + 1, outputs, inputs) * 0.2
    b = randn(seed + 2, outputs) if bias else None
    got = pack_linear(weight, b, mode)(x)
    want, slack = oracle(x, weight, b, mode)
    assert got.shape == (rows, outputs)
    assert ((got - want).abs() <= slack).all(), ((got - want).abs() / slack).max()


@needs_native
@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_row_does_not_depend_on_the_batch(mode):
    x, weight, residual = randn(0, 40, 1100), randn(1, 160, 1100), randn(2, 40, 160)
    packed = pack_linear(weight, None, mode)
    for call in (packed, lambda part: packed.gated(part, "silu")):
        whole = call(x)
        for size in (1, 2, 3, 4, 5, 7, 8, 11, 13):
            assert torch.equal(whole, torch.cat([call(part) for part in x.split(size)])), size
    torch.testing.assert_close(packed.add(x, residual), residual + packed(x), rtol=0, atol=0)


@needs_native
@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("width", [16, 24, 48, 80])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_epilogue(mode, width, activation):
    x, weight, bias = randn(0, 13, 96), randn(1, 2 * width, 96) * 0.3, randn(2, 2 * width)
    want = ReferenceLinear(weight, bias, mode).gated(x, activation)
    torch.testing.assert_close(pack_linear(weight, bias, mode).gated(x, activation), want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "mode,limit",
    [
        ("int8", 0.009),
        ("w8a8", 0.012),
        ("int4", 0.088),
        ("w4a8", 0.089),
        ("nf4", 0.086),
        ("w16a16", 0.004),
        ("int16", 0.0004),
    ],
)
def test_error_of_normal_weights_is_what_the_bits_allow(mode, limit):
    """Relative root-mean-square error of an output; ideal uniform rounding of normal weights in groups of 32 gives 0.08 with four bits."""
    x, weight = randn(0, 32, 2048), randn(1, 64, 2048)
    want = x.double() @ weight.double().T
    got = ReferenceLinear(weight, None, mode)(x)
    error = ((got - want).square().mean().sqrt() / want.square().mean().sqrt()).item()
    assert limit / 4 < error < limit, error


@settings(max_examples=40, deadline=None)
@given(mode=st.sampled_from(MODES), inputs=st.integers(1, 80), seed=st.integers(0, 99), zero=st.booleans())
def test_codes_stand_for_weights_within_half_a_step(mode, inputs, seed, zero):
    weight = randn(seed, 5, inputs)
    if zero:
        weight[:, : inputs // 2] = 0
    q = quantize(weight, mode)
    assert q.codes_ON.shape[1] % (32 if q.table else 1) == 0 and q.inputs == inputs
    if mode == "w16a16":
        assert torch.equal(q.dequantized(), weight.bfloat16().float())
        return
    steps = q.scales if q.scales.dim() == 2 else q.scales[:, None]
    widest = {"nf4": max(b - a for a, b in zip(NF4, NF4[1:], strict=False))}.get(mode, 1.0)
    grouped = q.scales.dim() == 2
    spread = steps.abs().repeat_interleave(q.codes_ON.shape[1] // steps.shape[1], 1)[:, :inputs] if grouped else steps
    error = (q.dequantized() - weight).abs()
    inside = error <= spread * widest / 2 * 1.01 + 1e-7
    clipped = (q.dequantized().abs() < weight.abs()) | ~torch.isfinite(weight)
    assert (inside | clipped).all()
    assert (q.dequantized()[weight == 0].abs() < 1e-9).all(), "zero stays zero"


def test_int16_keeps_bfloat16_weights_and_never_overflows():
    weight = randn(0, 50, 640).bfloat16().float()
    q = quantize(weight, "int16")
    large = (
        weight.abs() >= weight.abs().unflatten(1, (-1, 64)).amax(-1, keepdim=True).expand(-1, -1, 64).flatten(1) / 32
    )
    assert torch.equal(q.dequantized()[large], weight[large]) and large.float().mean() > 0.9
    assert torch.equal(q.scales, q.scales.bfloat16().float()), "the kernels hold scales in bfloat16"
    extreme, x = torch.full((16, 128), 2.0 - 2**-20), torch.full((3, 128), -7.0)
    assert quantize(extreme, "int16").codes_ON.max() == 8192, "the largest code there is"
    torch.testing.assert_close(pack_linear(extreme, None, "int16")(x), x @ extreme.T, rtol=1e-4, atol=0)


@needs_native
@pytest.mark.parametrize("shape", [(1, 3), (16, 64), (50, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int16_is_packed_at_once_as_through_its_codes(shape, dtype):
    weight = randn(0, *shape).to(dtype)
    weight[0] = 0
    codes = native_linear.pack_codes(quantize(weight, "int16"))
    assert torch.equal(pack_linear(weight, None, "int16").weight, codes)


@needs_native
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_shows(mode):
    weight, x = randn(0, 20, 64), randn(1, 3, 64)
    if mode != "w16a16":
        broken = weight.clone()
        broken[3, 5] = torch.inf
        with pytest.raises(UsageError, match="not finite"):
            pack_linear(broken, None, mode)
    x[1, 7] = torch.nan
    y = pack_linear(weight, None, mode)(x)
    assert y[1].isnan().all() and torch.isfinite(y[[0, 2]]).all()


def test_bad_requests_name_the_value():
    with pytest.raises(UsageError, match="int3.*int8"):
        pack_linear(torch.zeros(2, 2), None, "int3")
    with pytest.raises(UsageError, match=r"64 values.*\(2, 5\)"):
        pack_linear(torch.zeros(2, 64), None, "int8")(torch.zeros(2, 5))


@needs_native
def test_bytes_per_weight():
    weight = randn(0, 1024, 1024)
    bits = {mode: 8 * pack_linear(weight, None, mode).weight.nbytes / weight.numel() for mode in MODES}
    for mode, want in {
        "int8": 8,
        "w8a8": 8,
        "int4": 4.5,
        "nf4": 4.5,
        "w4a8": 4.5,
        "w16a16": 16,
        "int16": 16.25,
    }.items():
        assert want <= bits[mode] < want * 1.06, bits


def test_tables_and_groups_are_what_the_kernels_assume():
    assert len(INT4) == len(NF4) == 16 and INT4[8] == NF4[7] == 0
    assert set(ACTIVATION_GROUP.values()) == {32, 64} and ACTIVATION_GROUP["w8a8"] == 64 and native_linear.PANEL == 16
