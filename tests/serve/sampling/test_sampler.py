"""The sampler: masks and penalties equal the reference, samples follow its distribution, seeds belong to requests and not to batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.serve.sampling import reference
from wager.serve.params import SamplingParams
from wager.serve.request import Request
from wager.serve.sampling import sampler as sampler_module
from wager.serve.sampling.filters import CDF_BLOCK, SORTED_PREFIX, draw, keep_likely
from wager.serve.sampling.sampler import Row, Sampler

EOS = frozenset({0, 2})
PROMPT, OUTPUT = [1, 2, 3, 3, 7], [3, 4, 4, 9, 4]
BAD_WORDS = [[5], [4, 6], [9, 4, 8], [8, 4, 1]]
FAMILIES = {
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.6),
    "hot": SamplingParams(temperature=1.8),
    "min_p": SamplingParams(min_p=0.15),
    "top_k": SamplingParams(top_k=5),
    "top_p": SamplingParams(top_p=0.8),
    "filters": SamplingParams(temperature=1.3, min_p=0.1, top_k=8, top_p=0.85),
    "penalties": SamplingParams(repetition_penalty=1.4, frequency_penalty=0.5, presence_penalty=-0.6),
    "bias": SamplingParams(logit_bias={3: 2.0, 11: -100.0, 1: 0.7}),
    "allowed": SamplingParams(allowed_token_ids=[1, 4, 5, 9, 10], temperature=0.9),
    "length": SamplingParams(min_tokens=9, stop_token_ids=[7]),
    "everything": SamplingParams(
        temperature=0.8, min_p=0.01, top_k=9, top_p=0.95, repetition_penalty=0.8, frequency_penalty=-0.4, presence_penalty=0.3,
        logit_bias={4: 1.5}, min_tokens=6, allowed_token_ids=list(range(12)),
    ),
}  # fmt: skip


def make_request(params, name="r", prompt=PROMPT, output=OUTPUT, index=0):
    request = Request(name, list(prompt), params, 0.0, 100, eos_token_ids=EOS, index=index)
    request.token_ids += output
    return request


def make_sampler(vocab=16, seed=0):
    return Sampler(vocab, "cpu", np.random.default_rng(seed))


def random_logits(seed, rows=1, vocab=16, scale=2.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, (rows, vocab)).astype(np.float32))


def draws(params, logits_W, count=6000, bad_words=()):
    """Tokens of `count` requests that differ in their seed only."""
    sampler = make_sampler(len(logits_W))
    rows = []
    for i in range(count):
        request = make_request(replace(params, seed=i), f"r{i}")
        sampler.add(request, bad_words=bad_words)
        rows.append(Row(request))
    return sampler.sample(logits_W.expand(count, -1), rows).tokens_L


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_follow_the_reference_distribution(name):
    params, logits_W = FAMILIES[name], random_logits(4, scale=1.2)[0]
    bad_words = BAD_WORDS if name in ("plain", "everything") else ()
    tokens = draws(params, logits_W, bad_words=bad_words)
    probs = reference.distribution(logits_W, params, prompt=PROMPT, output=OUTPUT, eos=EOS, bad_words=bad_words)
    assert reference.fits(tokens, probs)


def _exclusive_top_p(probs_LW, min_p, top_k, top_p):
    """Off by one: leaves out the token with which the mass reaches p."""
    kept = keep_likely(probs_LW, min_p, top_k, top_p)
    least = torch.where(kept > 0, kept, 2.0).argmin(-1)
    kept[torch.arange(len(kept)), least] = 0.0
    return kept


def _biased_draw(weights_LW, uniforms_L):
    return draw(weights_LW, uniforms_L**1.1)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("filters", ("keep_likely", _exclusive_top_p)),
        ("top_k", ("keep_likely", lambda probs, min_p, top_k, top_p: keep_likely(probs, min_p, top_k + 1, top_p))),
        ("top_p", ("keep_likely", lambda probs, min_p, top_k, top_p: keep_likely(probs, min_p, top_k, top_p * 0.8))),
        ("min_p", ("keep_likely", lambda probs, min_p, top_k, top_p: probs)),
        ("plain", ("draw", _biased_draw)),
        ("penalties", ("penalise", lambda logits, states, guesses: logits)),
        ("cold", ("GREEDY_BELOW_TEMPERATURE", 0.8)),
    ],
)
def test_the_chi_square_notices_a_wrong_sampler(monkeypatch, name, wrong):
    monkeypatch.setattr(sampler_module, *wrong)
    monkeypatch.setattr(sampler_module.kernels, "has_fast_form", lambda *args: False)
    params, logits_W = FAMILIES[name], random_logits(4, scale=1.2)[0]
    probs = reference.distribution(logits_W, params, prompt=PROMPT, output=OUTPUT, eos=EOS)
    assert not reference.fits(draws(params, logits_W), probs, significance=1e-6)


@pytest.mark.parametrize(
    "name, column, change", [("top_k", 2, 1), ("top_p", 3, -0.3), ("min_p", 1, -0.15), ("plain", 0, 0.2)]
)
def test_the_chi_square_notices_a_wrong_kernel(monkeypatch, name, column, change):
    """The form that draws in one call, given other temperatures, min-p, top-k or top-p than were asked for."""
    if not sampler_module.kernels.has_fast_form("sample", torch.zeros(1, 1)):
        pytest.skip("no form but the reference serves here")
    right = sampler_module.kernels.sample

    def wrong(logits_LW, *columns):
        return right(logits_LW, *[c + change if i == column else c for i, c in enumerate(columns)])

    monkeypatch.setattr(sampler_module.kernels, "sample", wrong)
    params, logits_W = FAMILIES[name], random_logits(4, scale=1.2)[0]
    probs = reference.distribution(logits_W, params, prompt=PROMPT, output=OUTPUT, eos=EOS)
    assert not reference.fits(draws(params, logits_W), probs, significance=1e-6)


@pytest.mark.parametrize("order", ["temperature last", "top-p first"])
def test_the_chi_square_notices_a_wrong_order(order):
    """The same filters in another order are another distribution, and the samples do not follow it."""
    params, logits_W = FAMILIES["filters"], random_logits(4, scale=1.2)[0]
    x = reference.edited(logits_W, params, prompt=PROMPT, output=OUTPUT, eos=EOS)
    if order == "temperature last":
        probs = reference.top_k(reference.min_p(reference.softmax(x), params.min_p), params.top_k)
        probs = reference.normalised(reference.top_p(probs, params.top_p) ** (1 / params.temperature))
    else:
        probs = reference.top_p(reference.softmax(x / params.temperature), params.top_p)
        probs = reference.top_k(reference.min_p(probs, params.min_p), params.top_k)
    assert not reference.fits(draws(params, logits_W), probs, significance=1e-6)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.5]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    top_k=st.sampled_from([-1, 0, 1, 4, 40, 5000]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.7]),
    frequency_penalty=st.sampled_from([-1.0, 0.0, 0.8]),
    presence_penalty=st.sampled_from([-0.5, 0.0, 2.0]),
    min_tokens=st.sampled_from([0, 5, 6, 16]),
    stop_token_ids=st.sampled_from([(), (4, 8)]),
    logit_bias=st.sampled_from([None, {4: 5.0, 0: 100.0, 7: -100.0}]),
    allowed_token_ids=st.sampled_from([None, [3], list(range(0, 90, 2)) + [5, 5]]),
)


@given(
    params=st.lists(PARAMS, min_size=1, max_size=6),
    seed=st.integers(0, 10**6),
    vocab=st.sampled_from([90, SORTED_PREFIX, 700]),
    scale=st.sampled_from([0.1, 2.0, 8.0]),
    bad=st.booleans(),
)
def test_distributions_equal_the_reference_row_by_row(params, seed, vocab, scale, bad):
    """Rows of one batch have nothing in common but the batch."""
    logits_LW = random_logits(seed, len(params), vocab, scale)
    sampler, rows = make_sampler(vocab), []
    bad_words = BAD_WORDS if bad else []
    for i, one in enumerate(params):
        request = make_request(one, f"r{i}")
        sampler.add(request, bad_words=bad_words)
        rows.append(Row(request))
    before = logits_LW.clone()
    ours = sampler.probabilities(logits_LW, rows).numpy()
    assert torch.equal(logits_LW, before)
    tokens_L = sampler.sample(logits_LW, rows).tokens_L
    for i, one in enumerate(params):
        want = reference.distribution(logits_LW[i], one, prompt=PROMPT, output=OUTPUT, eos=EOS, bad_words=bad_words)
        disputed = np.flatnonzero((ours[i] > 0) != (want > 0))
        assert np.all(np.maximum(ours[i], want)[disputed] < 2e-6) or _borderline(
            logits_LW[i], one, bad_words, ours[i], want
        )
        if not len(disputed):
            np.testing.assert_allclose(ours[i], want, rtol=2e-3, atol=1e-6)
        assert ours[i][tokens_L[i]] > 0


def _borderline(logits_W, params, bad_words, ours, want):
    """float32 and float64 may disagree on one token whose mass ends within rounding of the threshold."""
    return (
        abs(int((ours > 0).sum()) - int((want > 0).sum())) <= 1
        and min(ours[ours > 0].min(), want[want > 0].min()) < 1e-4
    )


def test_ties_keep_the_lower_ids_and_exactly_k():
    probs = torch.tensor([[0.1, 0.2, 0.2, 0.2, 0.1, 0.2]])
    off = torch.tensor([0.0])
    kept = keep_likely(probs, off, torch.tensor([2]), torch.tensor([1.0]))
    assert kept.nonzero()[:, 1].tolist() == [1, 2]
    kept = keep_likely(probs, off, torch.tensor([0]), torch.tensor([0.5]))
    assert kept.nonzero()[:, 1].tolist() == [1, 2, 3]
    flat = torch.full((1, 1000), 1e-3)
    assert keep_likely(flat, off, torch.tensor([300]), torch.tensor([1.0])).nonzero()[:, 1].tolist() == list(range(300))


def test_one_token_always_stays():
    probs = torch.softmax(random_logits(1, 3, 50), -1)
    kept = keep_likely(probs, torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0, 1, 0]), torch.tensor([1.0, 1.0, 1e-9]))
    assert (kept > 0).sum(-1).tolist() == [1, 1, 1] and torch.equal(kept.argmax(-1), probs.argmax(-1))


@given(
    seed=st.integers(0, 10**6), vocab=st.sampled_from([1, 7, CDF_BLOCK, CDF_BLOCK + 1, 1000]), zeros=st.floats(0, 0.99)
)
def test_draw_inverts_the_distribution_function(seed, vocab, zeros):
    rng = np.random.default_rng(seed)
    weights = rng.random((4, vocab)).astype(np.float32) * (rng.random((4, vocab)) >= zeros)
    weights[:, rng.integers(vocab)] += 0.5
    uniforms = np.array([0.0, rng.random(), rng.random(), np.nextafter(1.0, 0.0)])
    tokens = draw(torch.from_numpy(weights), uniforms)
    for row in range(4):
        edges = np.cumsum(weights[row].astype(np.float64))
        target, token = uniforms[row] * edges[-1], int(tokens[row])
        assert weights[row, token] > 0
        assert edges[token] >= target - 1e-9 and (edges[token] - weights[row, token]) <= target + 1e-9


def test_draw_never_picks_weight_zero_at_a_block_border():
    weights = torch.zeros(1, 3 * CDF_BLOCK)
    weights[0, 5], weights[0, CDF_BLOCK + 9], weights[0, 2 * CDF_BLOCK + 1] = 0.1, 0.7, 0.2
    exact = weights[0].double()
    border = (exact[5] / exact.sum()).item()
    for u in (0.0, border, np.nextafter(border, 0), np.nextafter(border, 1), np.nextafter(1.0, 0)):
        assert weights[0, int(draw(weights, np.array([u]))[0])] > 0, u


# -- seeds ---------------------------------------------------------------------------------------------------------------------------


def test_a_seeded_request_draws_the_same_whatever_else_is_in_the_batch():
    logits_W = random_logits(3, vocab=60)[0]
    params = SamplingParams(seed=42, temperature=1.2, top_p=0.95)
    alone = make_sampler(60, seed=1)
    request = make_request(params)
    alone.add(request)
    expected = alone.sample(logits_W[None], [Row(request)]).tokens_L[0]
    others = [
        SamplingParams(),
        SamplingParams(temperature=0.0),
        SamplingParams(seed=42, top_k=2),
        SamplingParams(min_p=0.3, frequency_penalty=1.0),
    ]
    for place in range(5):
        sampler, rows = make_sampler(60, seed=place), []
        for i, one in enumerate(others):
            other = make_request(one, f"o{i}", prompt=[1] * i + [3])
            sampler.add(other)
            rows.append(Row(other))
        sampler.add(request)
        rows.insert(place, Row(request))
        logits_LW = random_logits(9 + place, 5, 60)
        logits_LW[place] = logits_W
        assert sampler.sample(logits_LW, rows).tokens_L[place] == expected


def test_a_guessed_position_draws_what_it_will_draw_once_committed():
    """Verification relies on it: token and guesses are interchangeable for penalties, bad words, minimum length and randomness."""
    params = SamplingParams(seed=7, repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.3, min_tokens=7)
    logits_LW = random_logits(2, 3, 16)
    for trial in range(30):
        sampler = make_sampler()
        request = make_request(replace(params, seed=trial))
        sampler.add(request, bad_words=BAD_WORDS)
        guessed = sampler.sample(logits_LW, [Row(request), Row(request, (8,)), Row(request, (8, 4))]).tokens_L
        for depth, token in enumerate([8, 4]):
            assert sampler.sample(logits_LW[depth][None], [Row(request)]).tokens_L[0] == guessed[depth]
            request.token_ids.append(token)
            sampler.committed(request, [token])
        assert sampler.sample(logits_LW[2][None], [Row(request)]).tokens_L[0] == guessed[2]


@pytest.mark.parametrize("seed", [-1, -(2**63), 0, 2**63, 2**64 - 1, 2**64 + 5, 10**30])
def test_any_integer_is_a_seed(seed):
    sampler = make_sampler()
    requests = [make_request(SamplingParams(seed=seed, n=2), f"r{i}", index=i) for i in range(2)]
    for request in requests:
        sampler.add(request)
    logits_LW = random_logits(0, 1, 16).expand(2, -1)
    first = sampler.sample(logits_LW, [Row(r) for r in requests]).tokens_L
    assert first.tolist() == sampler.sample(logits_LW, [Row(r) for r in requests]).tokens_L.tolist()


def test_unseeded_requests_and_siblings_differ():
    sampler, logits_LW = make_sampler(1000), torch.zeros(60, 1000)
    requests = [make_request(SamplingParams(), f"u{i}") for i in range(30)]
    requests += [make_request(SamplingParams(seed=5, n=30), f"s{i}", index=i) for i in range(30)]
    for request in requests:
        sampler.add(request)
    tokens = sampler.sample(logits_LW, [Row(r) for r in requests]).tokens_L
    assert len(set(tokens[:30])) > 25 and len(set(tokens[30:])) > 25


# -- masks and what is reported ------------------------------------------------------------------------------------------------------


def test_the_end_is_masked_until_min_tokens():
    logits_LW = torch.zeros(1, 16)
    logits_LW[0, [0, 2, 7]] = 50.0
    sampler = make_sampler()
    request = make_request(SamplingParams(min_tokens=6, stop_token_ids=[7], temperature=0.0))
    sampler.add(request)
    assert sampler.sample(logits_LW, [Row(request)]).tokens_L[0] not in (0, 2, 7)
    request.token_ids.append(1)
    sampler.committed(request, [1])
    assert sampler.sample(logits_LW, [Row(request)]).tokens_L[0] == 0


def test_no_possible_token_is_reported_not_invented():
    logits_LW = random_logits(1, 3)
    params = [SamplingParams(allowed_token_ids=[0, 2], min_tokens=9, temperature=t) for t in (0.0, 1.0)]
    sampler, rows = make_sampler(), []
    for i, one in enumerate([*params, SamplingParams(temperature=0.0)]):
        request = make_request(one, f"r{i}")
        sampler.add(request)
        rows.append(Row(request))
    assert sampler.sample(logits_LW, rows).tokens_L.tolist() == [-1, -1, int(logits_LW[2].argmax())]


@given(seed=st.integers(0, 10**6), params=PARAMS, count=st.sampled_from([0, 1, 5, -1]))
def test_logprobs_are_those_of_the_raw_logits(seed, params, count):
    """Taken before any parameter acts: what the model says, not what the filters leave of it."""
    logits_LW = random_logits(seed, 1, 90)
    sampler = make_sampler(90)
    request = make_request(replace(params, logprobs=count))
    sampler.add(request)
    done = sampler.sample(logits_LW, [Row(request)])
    token, entry = int(done.tokens_L[0]), done.logprobs[0]
    want = torch.log_softmax(logits_LW[0].double(), -1)
    top = want.argsort(descending=True).tolist()
    assert set(entry) == {token, *(top if count < 0 else top[:count])}
    for t, value in entry.items():
        assert value.logprob == pytest.approx(want[t].item(), abs=1e-5)
        assert value.rank == 1 + int((want > want[t]).sum())
    if count < 0:
        assert sum(np.exp(v.logprob) for v in entry.values()) == pytest.approx(1.0, abs=1e-5)


def test_logprobs_are_only_made_for_rows_that_ask():
    sampler, logits_LW = make_sampler(), random_logits(5, 3)
    rows = []
    for i, count in enumerate((None, 2, None)):
        request = make_request(SamplingParams(logprobs=count, temperature=0.0), f"r{i}")
        sampler.add(request)
        rows.append(Row(request))
    entries = sampler.sample(logits_LW, rows).logprobs
    assert entries[0] is None and entries[2] is None and len(entries[1]) == 2


def test_prompt_logprobs_are_teacher_forced():
    logits_LW = random_logits(6, 4, 30)
    entries = make_sampler(30).prompt_logprobs(logits_LW, [3, 9, 9, 29], 1)
    want = torch.log_softmax(logits_LW, -1)
    for row, token in enumerate([3, 9, 9, 29]):
        assert entries[row][token].logprob == pytest.approx(want[row, token].item(), abs=1e-5)
        assert int(want[row].argmax()) in entries[row]
