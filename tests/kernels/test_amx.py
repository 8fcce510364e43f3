"""Linears by AMX tiles: emulated by the manual, and the true instructions caught and done one by one where the processor lacks them."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import test_quantized as definition
from wager.errors import BuildError
from wager.kernels import native
from wager.kernels.native_linear import NativeLinear
from wager.kernels.quantize import FILE_MODES, MODES, QuantizedWeight, quantize, to_q8, with_zeros
from wager.native import amx, build

SOURCES = [native.SOURCES[0].parent / name for name in ("linear.cpp", "pool.cpp")]
TILE_FLAGS = tuple(f"-m{feature.replace('_', '-')}" for feature in amx.FEATURES)
QUICKLY = "-O1"  # the compiler takes a quarter of the time
INTEGERS = ("w8a8", "w4a8", "q8a8", "q4za8")
SAMPLED = st.sampled_from

pytestmark = pytest.mark.skipif(
    not build.runs_here("avx2"), reason="the tile form is for x86 processors with AVX2 or more"
)


def load(name, sources, flags, march="native"):
    lib = build.load(name, sources, (*flags, QUICKLY), march)
    for function, arguments in native._SIGNATURES.items():
        if function.startswith(("wager_linear", "wager_pack")):
            getattr(lib, function).argtypes = arguments
    return lib


@pytest.fixture(scope="module")
def emulated():
    lib = load("wager_amx_emulated", SOURCES, ("-DWAGER_AMX_EMULATED=1",))
    assert lib.wager_use_tiles(native.TILE_ROWS) == native.TILE_ROWS, "tiles and vectors must give the same bits"
    return lib


@pytest.fixture()
def linear(emulated, monkeypatch):
    """Makes linears of the emulated library."""
    monkeypatch.setattr(native, "library", lambda flags=(): emulated)
    yield make
    emulated.wager_use_tiles(native.TILE_ROWS)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(weight, bias, mode):
    """A linear in any mode with int8 activations, or w16a16."""
    if mode in FILE_MODES.values():
        q = to_q8(weight) if mode == "q8a8" else quantize(weight, "int4")
        q = QuantizedWeight("q4", q.codes_ON, q.scales, q.inputs) if mode == "q4za8" else q
        q = with_zeros(q) if mode == "q4za8" else q
        zeros = None if q.zeros is None else q.zeros + 0.5
        return NativeLinear(QuantizedWeight(mode, q.codes_ON, q.scales, q.inputs, zeros), bias)
    return NativeLinear(weight, bias, mode)


def tile_sums(x_TI, weight_OI, bias_O):
    """What TDPBF16PS makes of rows, in numpy: 32 inputs at a time, even and odd ones apart; what is smaller than a normal number is zero."""
    flush = lambda v: np.where(np.abs(v) < np.float32(2**-126), np.float32(0), v)
    padded = lambda t: np.pad(t.bfloat16().float().numpy(), ((0, 0), (0, -t.shape[1] % 32)))
    x, w = flush(padded(x_TI)), flush(padded(weight_OI))
    total = np.broadcast_to(bias_O.numpy(), (len(x), len(w))).astype(np.float32)
    for k in range(0, x.shape[1], 32):
        chains = []
        for parity in (0, 1):
            chain = np.zeros_like(total)
            for i in range(
                k + parity, k + 32, 2
            ):  # float64 holds product and chain, but for sums of very different size
                chain = flush((x[:, i, None].astype(np.float64) * w[None, :, i] + chain).astype(np.float32))
            chains.append(chain)
        total = flush(flush(total) + flush(chains[0] + chains[1]))
    return torch.from_numpy(total)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    inputs=SAMPLED([1, 31, 64, 100, 544, 1100]),
    outputs=SAMPLED([1, 15, 16, 40, 161]),
    seed=st.integers(0, 99),
)
def test_w16a16_has_the_bits_of_the_manual(emulated, rows, inputs, outputs, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda flags=(): emulated)
        x, weight, bias = (
            randn(seed, rows, inputs) * 3,
            randn(seed + 1, outputs, inputs) * 0.2,
            randn(seed + 2, outputs),
        )
        assert torch.equal(make(weight, bias, "w16a16")(x), tile_sums(x, weight, bias))


@pytest.mark.parametrize("rows", [1, native.TILE_ROWS - 1, native.TILE_ROWS, 16, 33])
def test_numbers_below_the_normal_ones_count_as_zero(linear, rows):
    x, weight = randn(0, rows, 64) * 2.0**-64, randn(1, 32, 64) * 2.0**-62
    x[:, ::3] *= 2.0**-60  # bfloat16 has such numbers
    bias = randn(2, 32) * 2.0**-126
    got, want = linear(weight, bias, "w16a16")(x), tile_sums(x, weight, bias)
    assert torch.equal(got, want) and (got != 0).any() and (got == 0).any()
    assert not torch.equal(got, (x.double() @ weight.double().T + bias).float())


@pytest.mark.parametrize("mode", INTEGERS)
@pytest.mark.parametrize("rows", [native.TILE_ROWS, 15, 16, 17, 32, 33, 61, 100])
def test_integer_sums_have_the_bits_of_vectors(emulated, linear, mode, rows):
    for inputs, outputs in ((1, 1), (96, 16), (700, 15), (1100, 161)):
        x, packed = randn(rows, rows, inputs), linear(randn(1, outputs, inputs), randn(2, outputs), mode)
        by_tiles = packed(x)
        assert emulated.wager_use_tiles(0) == 0
        assert torch.equal(by_tiles, packed(x)), (inputs, outputs)
        assert emulated.wager_use_tiles(native.TILE_ROWS) == native.TILE_ROWS


@pytest.mark.parametrize("mode", ["w16a16", *INTEGERS])
def test_tiles_take_any_number_of_rows(emulated, linear, mode):
    """Also so few that they are one tile of vectors, whose weights are fetched far ahead."""
    packed = linear(randn(1, 161, 1100), None, mode)
    for rows in range(1, 13):
        x = randn(rows, rows, 1100)
        assert emulated.wager_use_tiles(1) == 1
        by_tiles = packed(x)
        emulated.wager_use_tiles(20)
        assert torch.equal(by_tiles, packed(x)), rows


@pytest.mark.parametrize("mode", ["w16a16", *INTEGERS])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_is_the_same_alone_and_in_any_batch(linear, mode, threads):
    x, residual = randn(0, 100, 1100), randn(2, 100, 160)
    packed, before = linear(randn(1, 160, 1100), randn(3, 160), mode), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for call in (packed, lambda part: packed.gated(part, "silu"), lambda part: packed.gated(part, "gelu_tanh")):
            whole = call(x)
            for size in (1, 7, 8, 9, 16, 17, 23, 32, 33, 49):
                assert torch.equal(whole, torch.cat([call(part) for part in x.split(size)])), size
        assert torch.equal(packed.add(x, residual), residual + packed(x))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", MODES)
def test_the_tests_of_quantized_linears(linear, mode):
    definition.test_what_is_not_finite_shows(mode)
    definition.test_a_row_does_not_depend_on_the_batch(mode)
    for width in (16, 80):
        definition.test_gate_epilogue(mode, width, "silu")


def test_linears_equal_their_definition(linear):
    definition.test_equals_its_definition()


def test_a_processor_that_sums_otherwise_is_found_out(emulated, linear):
    """Then vectors serve, with the bits that they have without tiles."""
    x, packed = randn(0, 40, 96), linear(randn(1, 64, 96), None, "w16a16")
    tiles = packed(x)
    emulated.wager_use_tiles(0)
    vectors = packed(x)
    try:
        emulated.wager_amx_other_order(1)
        assert emulated.wager_use_tiles(9) == -1
        assert torch.equal(packed(x), vectors)
    finally:
        emulated.wager_amx_other_order(0)
    assert emulated.wager_use_tiles(9) == 9 and torch.equal(packed(x), tiles) and not torch.equal(tiles, vectors)


def true_build(march, *sources):
    """The library with the true instructions, or a skip where the compiler lacks them."""
    try:
        return build.build("wager_amx", [*SOURCES, *sources], (*TILE_FLAGS, QUICKLY), march)
    except BuildError as error:
        if re.search(r"unrecognized|unknown|unsupported|bad value|-mamx", str(error)):
            pytest.skip(f"the compiler knows no AMX: {error}")
        raise


@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump is absent")
def test_the_build_for_amx_has_its_instructions():
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(true_build(build.LEVELS["amx"]))], capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    if "(bad)" in listing and "tdpbf16ps" not in listing:
        pytest.skip("objdump knows no AMX")
    for name in ("ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored", "tdpbf16ps", "tdpbsud"):
        assert re.search(rf"\b{name}\b", listing), name
    for sums, x, weights in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)):
        for product in ("tdpbf16ps", "tdpbsud"):
            assert re.search(rf"\b{product}\s+%tmm{weights},%tmm{x},%tmm{sums}", listing), (product, sums)


def test_the_true_instructions_give_the_same(emulated, monkeypatch):
    """On processors without AMX every tile instruction faults and is done by the emulation, decoded from its bytes."""
    path = true_build(build.LEVELS["avx2"], Path(__file__).parent / "amx_trap.cpp")
    lib = ctypes.CDLL(str(path))
    for function in ("wager_linear", "wager_pack_f32"):
        getattr(lib, function).argtypes = native._SIGNATURES[function]
    for mode in ("w16a16", "w8a8", "w4a8"):
        monkeypatch.setattr(native, "library", lambda flags=(): emulated)
        x, weight, bias = randn(0, 39, 160), randn(1, 40, 160), randn(2, 40)
        want = make(weight, bias, mode)(x)
        monkeypatch.setattr(native, "library", lambda flags=(): lib)
        packed = make(weight, bias, mode)
        lib.trap_on()
        try:
            assert lib.wager_use_tiles(9) == 9
            got = packed(x)
        finally:
            caught = lib.trap_off()
        lib.wager_use_tiles(0)
        assert caught > 100 or build.no_tiles() is None
        if mode == "w16a16":
            assert torch.equal(got, want)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)  # scales are fused or not, as the compiler likes
