"""Verification is exact: whatever is guessed, committed tokens have the target's distribution, and are those of plain decoding seed for seed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.serve.sampling import reference
from wager.serve.params import SamplingParams
from wager.serve.request import Request
from wager.serve.sampling.sampler import Row, Sampler
from wager.serve.speculate import verify as verification
from wager.serve.speculate.ratio import draw_without_replacement
from wager.serve.speculate.sequoia import WithoutReplacement
from wager.serve.speculate.verify import Verifying, sample_and_match
from wager.serve.token_tree import TokenTree

VOCAB, LENGTH = 5, 3
PARAMS = {
    "plain": SamplingParams(),
    "hot": SamplingParams(temperature=1.7),
    "filtered": SamplingParams(temperature=0.9, top_k=4, top_p=0.9),
    "penalised": SamplingParams(repetition_penalty=1.6, presence_penalty=0.5, frequency_penalty=0.2),
}


# A random language model of order two: its logits depend on the last two tokens.
TARGET = np.random.default_rng(1).normal(0, 1.5, (VOCAB + 1, VOCAB + 1, VOCAB)).astype(np.float32)
DRAFTS = {
    "perfect": TARGET,
    "poor": np.random.default_rng(2).normal(0, 1.5, TARGET.shape).astype(np.float32),
    "close": (TARGET + np.random.default_rng(3).normal(0, 0.7, TARGET.shape)).astype(np.float32),
}


def row_of(table, tokens):
    last = [VOCAB, VOCAB, *tokens]
    return table[last[-2], last[-1]]


def greedy_chain(draft, tokens, length):
    guesses = []
    for _ in range(length):
        guesses.append(int(row_of(draft, [*tokens, *guesses]).argmax()))
    return guesses


def generate(params, draft, depth, count, verify=sample_and_match):
    """[count, LENGTH] output tokens of requests that differ in their seed only, and how many guesses were accepted."""
    sampler, requests, accepted = Sampler(VOCAB, "cpu", np.random.default_rng(0)), [], 0
    for seed in range(count):
        requests.append(Request(f"r{seed}", [0], SamplingParams(**{**vars(params), "seed": seed}), 0.0, LENGTH + 1))
        sampler.add(requests[-1])
    while live := [r for r in requests if r.num_output_tokens < LENGTH]:
        chains = [greedy_chain(draft, r.output_token_ids, depth) if depth else [] for r in live]
        rows = [Row(r, tuple(chain[:i])) for r, chain in zip(live, chains, strict=True) for i in range(depth + 1)]
        logits = torch.from_numpy(
            np.stack([row_of(TARGET, [*row.request.output_token_ids, *row.guesses]) for row in rows])
        )
        sampled = sampler.sample(logits, rows).tokens_L.reshape(len(live), depth + 1)
        for request, chain, tokens_L in zip(live, chains, sampled, strict=True):
            path, tokens = verify(TokenTree.chain(chain) if chain else None, tokens_L)
            tokens = tokens[: LENGTH - request.num_output_tokens]
            accepted += len(path)
            request.token_ids += tokens
            sampler.committed(request, tokens)
    return np.array([r.output_token_ids for r in requests]), accepted


def exact(params):
    """Probability of every output of LENGTH tokens, in the order of their numbers in base VOCAB."""
    probs = np.ones(1)
    paths = [()]
    for _ in range(LENGTH):
        step = [reference.distribution(row_of(TARGET, path), params, prompt=[0], output=path) for path in paths]
        probs = np.concatenate([p * rows for p, rows in zip(probs, step, strict=True)])
        paths = [(*path, token) for path in paths for token in range(VOCAB)]
    return probs


def numbers(outputs):
    return outputs @ VOCAB ** np.arange(LENGTH - 1, -1, -1)


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("name", PARAMS)
def test_outputs_follow_the_targets_joint_distribution(name, draft):
    outputs, accepted = generate(PARAMS[name], DRAFTS[draft], 2, 1200)
    assert accepted > 0
    assert reference.fits(numbers(outputs), exact(PARAMS[name]))


def accept_the_first(tree, sampled):
    """Wrong: the first guess is always taken."""
    path, tokens = sample_and_match(tree, sampled)
    return (path, tokens) if path or tree is None else ([0], [int(tree.tokens[0]), int(sampled[1])])


def retry_after_rejection(tree, sampled):
    """Wrong: a rejected guess is replaced by the token that was drawn for another context."""
    path, tokens = sample_and_match(tree, sampled)
    return (path, tokens) if path or tree is None else ([], [int(sampled[-1])])


@pytest.mark.parametrize("wrong", [accept_the_first, retry_after_rejection])
def test_the_chi_square_notices_a_wrong_verifier(wrong):
    outputs, _ = generate(PARAMS["plain"], DRAFTS["close"], 2, 1200, wrong)
    assert not reference.fits(numbers(outputs), exact(PARAMS["plain"]), significance=1e-6)


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_seed_for_seed_the_tokens_are_those_of_plain_decoding(name, depth):
    plain, _ = generate(PARAMS[name], TARGET, 0, 100)
    for draft in DRAFTS.values():
        assert np.array_equal(generate(PARAMS[name], draft, depth, 100)[0], plain)


def test_greedy_decoding_is_identical_and_a_perfect_draft_is_always_accepted():
    greedy = SamplingParams(temperature=0.0)
    for draft in DRAFTS.values():
        outputs, accepted = generate(greedy, draft, 2, 3)
        assert outputs.tolist() == [greedy_chain(TARGET, [], LENGTH)] * 3
        if draft is TARGET:
            assert accepted == 3 * 2


@given(data=st.data(), size=st.integers(0, 12))
def test_on_any_tree_the_path_is_the_one_the_target_drew(data, size):
    """Against the sentence itself: follow the target's tokens from the root for as long as the tree has them."""
    parents = [data.draw(st.integers(-1, i - 1)) for i in range(size)]
    tokens = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    sampled = np.array(data.draw(st.lists(st.integers(0, 3), min_size=size + 1, max_size=size + 1)))
    tree = TokenTree(np.array(tokens, np.int64), np.array(parents, np.int32))
    path, committed = sample_and_match(tree, sampled)
    at, expected = -1, []
    while True:
        token = int(sampled[at + 1])
        expected.append(token)
        following = [i for i in range(size) if parents[i] == at and tokens[i] == token]
        if not following:
            break
        at = following[0]
    assert committed == expected and [tokens[i] for i in path] == expected[:-1]
    assert tree.path(path[-1] if path else -1) == path


def test_walks_alone_and_walks_together_decide_alike(monkeypatch):
    """The short way for plain requests commits the tokens of the general one."""
    rng, sampler, items, first = np.random.default_rng(5), Sampler(VOCAB, "cpu", np.random.default_rng(0)), [], 0
    for number in range(60):
        request = Request(f"r{number}", [0], SamplingParams(temperature=0.8, seed=number), 0.0, 9)
        sampler.add(request)
        laws = rng.dirichlet(np.ones(VOCAB), 3)
        above = draw_without_replacement(laws[0], 2, rng.random(2))
        below = draw_without_replacement(laws[1], 2, rng.random(2))
        draft = WithoutReplacement(laws, np.array([0, 1, -1, -1, -1]))
        items.append(
            Verifying(request, TokenTree(np.array([*above, *below]), np.array([-1, -1, 0, 0], np.int32), draft), first)
        )
        first += 5
    logits = torch.from_numpy(rng.normal(0, 1, (first, VOCAB)).astype(np.float32))
    alone = verification.verify(items, logits, sampler)
    monkeypatch.setattr(verification, "_plainly_by_ratio", lambda item, sampler: False)
    together = verification.verify(items, logits, sampler)
    assert [(v.path, v.tokens, v.logprobs) for v in alone] == [(v.path, v.tokens, v.logprobs) for v in together]
    assert {len(v.path) for v in alone} == {0, 1, 2}
