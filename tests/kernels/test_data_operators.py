"""Gathering, sorting, reducing, experts and sampling: the C++ forms against the torch reference, and the laws they must keep."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wager import kernels
from wager.errors import UsageError
from wager.kernels import native, native_data, reference
from wager.kernels.registry import ReferenceLinear, choice, pack_linear

pytestmark = pytest.mark.skipif(choice().form != "native", reason="native kernels cannot be built here")


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding(dtype):
    for width in (1, 16, 37):
        table, ids = randn(0, 50, width).to(dtype), torch.tensor([0, 49, 3, 3])
        got = kernels.embedding(ids, table)
        assert got.dtype == torch.float32 and torch.equal(got, table[ids].float())
    with pytest.raises(IndexError, match="50.*50"):
        native.embedding(torch.tensor([50]), table)
    assert native.embedding(torch.zeros(0, dtype=torch.int64), table).shape == (0, 37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm(dtype):
    for rows, width in ((0, 8), (3, 8), (5, 37)):
        x, residual, weight, bias = randn(1, rows, width) + 50, randn(2, rows, width), randn(3, width), randn(4, width)
        for b in (None, bias.to(dtype)):
            got, want = (form.layer_norm(x, weight.to(dtype), b, 1e-5) for form in (native, reference))
            torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
            before = residual.clone()
            got, want = (
                form.layer_norm_residual(x, residual, weight.to(dtype), b, 1e-5) for form in (native, reference)
            )
            torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
            assert torch.equal(residual, before) and torch.equal(got[1], residual + x)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_write(interleaved, dtype):
    q, k, v = randn(5, 7, 10 * 24).view(7, 10, 24).split((6, 2, 2), dim=1)
    angles, slots, made = randn(6, 7, 8), torch.tensor([3, -1, 0, 9, 5, -1, 7]), []
    for form in (native, reference):
        pools = [torch.zeros(12, 2, 24, dtype=dtype) for _ in range(2)]
        made.append((form.rope_write(q, k, v, angles.cos(), angles.sin(), *pools, slots, interleaved), *pools))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for got, want in zip(*made, strict=True):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([-(2**63), -5, 0, 1, 2, 3, 2047, 2048, 5000, 2**40, 2**63 - 1]), max_size=60))
def test_sort_is_stable(keys):
    keys = torch.tensor(keys, dtype=torch.int64)
    assert torch.equal(kernels.sort_by_key(keys), keys.argsort(stable=True))


@pytest.mark.parametrize("highest", [0, 1, 500, 2**20, 2**32 - 1, 2**32, 2**62])
def test_sort_is_stable_when_threads_share_the_rows(highest):
    keys = torch.randint(-3, highest - 2, (200_000,), generator=torch.Generator().manual_seed(0))
    threads, made = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            made.append(native.sort_by_key(keys))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(order, keys.argsort(stable=True)) for order in made)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-3, 9), max_size=60), st.integers(0, 7))
def test_group_by_key(keys, num_keys):
    """Also with keys that no group has."""
    order, starts = kernels.group_by_key(torch.tensor(keys, dtype=torch.int64), num_keys)
    for k in range(num_keys):
        assert order[starts[k] : starts[k + 1]].tolist() == [i for i, key in enumerate(keys) if key == k]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 50), segments=st.integers(1, 9), width=st.sampled_from([1, 8, 19]), seed=st.integers(0, 99))
def test_reduce_by_key(n, segments, width, seed):
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randint(segments, (n,), generator=generator), torch.randn(n, width, generator=generator)
    for mode in ("sum", "mean", "max"):
        got = kernels.reduce_by_key(values, keys, segments, mode)
        for s in range(segments):
            mine = values[keys == s]
            if len(mine) == 0:
                want = torch.full((width,), -torch.inf if mode == "max" else 0.0)
            else:
                want = {"sum": mine.sum(0), "mean": mine.mean(0), "max": mine.amax(0)}[mode]
            torch.testing.assert_close(got[s], want, atol=2e-6, rtol=2e-6)
        order = keys.argsort(stable=True)
        starts = reference.segment_starts(keys[order], segments)
        torch.testing.assert_close(got, reference.segment_reduce(values, starts, mode, order), atol=2e-6, rtol=2e-6)


def test_reductions_have_the_same_bits_on_any_number_of_threads():
    keys, values = torch.randint(40, (3000,), generator=torch.Generator().manual_seed(0)), randn(1, 3000, 64)
    threads, made = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            made.append(kernels.reduce_by_key(values, keys, 40))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*made)
    with pytest.raises(UsageError, match="median"):
        kernels.reduce_by_key(values, keys, 40, "median")


@pytest.mark.parametrize("mode", [None, "int8", "int4", "w8a8"])
@pytest.mark.parametrize("tokens", [0, 1, 3, 40])
def test_experts_have_the_bits_of_one_by_one(mode, tokens):
    width, inner, count, choices = 64, 64, 6, 2
    pairs = [
        (
            pack_linear(randn(2 * e, 2 * inner, width), None, mode),
            pack_linear(randn(2 * e + 1, width, inner), None, mode),
        )
        for e in range(count)
    ]
    x, start = randn(90, tokens, width), randn(91, tokens, width)
    weights, chosen = randn(92, tokens, count).softmax(-1).topk(choices)
    networks = [lambda y, p=p: p[1](p[0].gated(y, "silu")) for p in pairs]
    want = reference.experts(x, weights, chosen, start, networks)
    threads, before = torch.get_num_threads(), start.clone()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert torch.equal(kernels.pack_experts(pairs, "silu")(x, weights, chosen, start), want)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(start, before)


def test_experts_that_do_not_fit_run_one_by_one():
    odd = [(pack_linear(randn(0, 2 * 20, 64)), pack_linear(randn(1, 64, 20)))]
    assert kernels.pack_experts(odd, "silu") is None
    assert kernels.pack_experts([(ReferenceLinear(randn(0, 64, 64), None),) * 2], "silu") is None


ROWS = [  # temperature, min_p, top_k, top_p
    (1.0, 0.0, 0, 1.0), (0.7, 0.0, 5, 1.0), (1.3, 0.0, 0, 0.8), (1.0, 0.1, 0, 1.0), (0.9, 0.02, 20, 0.6), (2.0, 0.0, 1, 1.0),
    (1.0, 0.0, 0, 1e-9), (1e-5, 0.0, 0, 1.0), (1.0, 1.0, 0, 1.0), (5.0, 0.0, 300, 0.999),
    (1.0, 0.3, 8, 1.0), (1.3, 0.2, 40, 0.85), (3.0, 0.4, 600, 0.9),
]  # fmt: skip


def columns(rows=ROWS):
    return [torch.tensor(c) for c in zip(*rows, strict=True)]


@pytest.mark.parametrize("seed", range(6))
def test_filters_equal_the_reference(seed):
    logits = 3 * randn(seed, len(ROWS), 700)
    if seed % 2:
        logits = logits.round()  # many ties
    got, want = (form.likely_weights(logits, *columns()) for form in (native, reference))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    assert torch.equal(got > 0, want > 0)


def test_draws_equal_the_reference_and_do_not_depend_on_the_batch():
    logits = 3 * randn(0, len(ROWS), 700)
    generator = np.random.default_rng(0)
    for _ in range(50):
        u = torch.from_numpy(generator.random(len(ROWS)))
        got = native.sample(logits, *columns(), u)
        assert torch.equal(got, reference.sample(logits, *columns(), u))
        seeds, positions = (torch.from_numpy(generator.integers(-(2**62), 2**62, len(ROWS))) for _ in range(2))
        raced = native.race(logits, *columns(), seeds, positions)
        assert torch.equal(raced, reference.race(logits, *columns(), seeds, positions))
        for i in (0, 4):
            one = [c[i : i + 1] for c in columns()]
            assert native.sample(logits[i : i + 1], *one, u[i : i + 1])[0] == got[i]
            assert native.race(logits[i : i + 1], *one, seeds[i : i + 1], positions[i : i + 1])[0] == raced[i]


@pytest.mark.parametrize("how", ["inversion", "race"])
@pytest.mark.parametrize("row", [0, 2, 4])
def test_the_law_is_exact(how, row):
    """Chi-square against the softmax of what the filters keep."""
    scipy = pytest.importorskip("scipy.stats")
    draws, logits = 40_000, 1.5 * randn(7, 1, 40)
    one = [c[row : row + 1] for c in columns()]
    law = reference.likely_weights(logits, *one)[0].double()
    law /= law.sum()
    wide, many = logits.expand(draws, -1), [c.expand(draws) for c in one]
    if how == "inversion":
        tokens = native.sample(wide, *many, torch.from_numpy(np.random.default_rng(1).random(draws)))
    else:
        tokens = native.race(wide, *many, torch.full((draws,), 1234), torch.arange(draws))
    seen = torch.bincount(tokens, minlength=40)
    assert (seen[law == 0] == 0).all()
    common = law * draws >= 5
    expected = torch.cat((law[common], law[~common].sum()[None])) * draws
    observed = torch.cat((seen[common], seen[~common].sum()[None]))
    keep = expected > 0
    assert scipy.chisquare(observed[keep].numpy(), expected[keep].numpy()).pvalue > 1e-4


def test_penalties():
    logits = randn(0, 3, 50)
    counts, prompt = torch.zeros(3, 50), torch.zeros(3, 50, dtype=torch.bool)
    counts[0, 3], counts[1, 4], counts[2, 5], prompt[2, 7] = 1, 2, 3, True
    penalties = [torch.tensor(v) for v in ([1.0, 1.3, 2.0], [0.5, 0.0, -0.1], [0.2, -0.3, 0.0])]
    got, want = (form.penalise(logits, counts, prompt, *penalties) for form in (native, reference))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_a_prepacked_mixture_runs_as_one_kernel_with_the_same_result():
    from wager.models.experts import Router, SparseMLP, softmax_route
    from wager.models.layers import GatedMLP, init_weights

    experts = [GatedMLP(f"e{e}", 64, 32, "silu") for e in range(5)]
    mixture = SparseMLP(Router("gate", 64, 5, None), experts, softmax_route(2, True)).requires_grad_(False)
    init_weights(mixture, 0.1, torch.Generator().manual_seed(0))
    x = randn(1, 9, 64)
    want = mixture(x)
    for expert in experts:
        expert.gate_up.prepack()
        expert.down.prepack()
    assert isinstance(mixture.fused(x), native_data.Experts)
    torch.testing.assert_close(mixture(x), want, atol=1e-6, rtol=1e-5)
