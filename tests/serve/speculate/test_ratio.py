"""The accept rules are exact, and the test can tell: rules that are known to be wrong fail it.

A rule is a function of uniform numbers, and its law is computed from the function itself, so nothing of it is written down twice. The rule
runs on symbols instead of numbers: an acceptance `u * q < p` reports its probability min(1, p / q) and goes the way that is being explored;
the final draw reports the weights it was given. That symbols and numbers agree, and that `draw` follows its weights, is tested by
bisection over the number itself.
"""

import itertools
import math

import numpy as np
import pytest

from wager.serve.speculate import ratio
from wager.serve.speculate.ratio import draw, draw_without_replacement, independent, without_replacement

V = 4
BELOW_ONE = 1 - 2.0**-53


class Uniform:
    """A uniform number in [0, 1) whose comparisons with u * q < p come out as told; `chance` is the probability of yes."""

    def __init__(self, accept=False):
        self.accept, self.chance = accept, None

    def __mul__(self, q):
        return _Scaled(self, q)


class _Scaled:
    def __init__(self, number, q):
        self.number, self.q = number, q

    def __lt__(self, p):
        assert self.number.chance is None, "a number decides once"
        self.number.chance = 1.0 if self.q <= 0 < p else 0.0 if p <= 0 else min(1.0, p / self.q)
        return self.number.accept


class Weights:
    """What `draw` was asked to draw from."""

    def __init__(self, weights, uniform):
        assert isinstance(uniform, Uniform)
        self.law = np.where(np.asarray(weights) > 0, weights, 0.0) / np.sum(weights)


@pytest.fixture
def symbolic(monkeypatch):
    """Inside, rules hand their residuals out instead of drawing from them."""
    monkeypatch.setattr(ratio, "draw", Weights)


def residual_draw(weights, uniform):
    """For the wrong rules below: `draw`, or its symbol where a test has put one."""
    return ratio.draw(weights, uniform)


def threshold(holds):
    """Measure of [0, 1) where `holds` is true, for a predicate that is true first and false after."""
    if not holds(0.0):
        return 0.0
    if holds(BELOW_ONE):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def law_of_draw(sample):
    """P(sample(u) = token) of a function that steps upwards through the tokens."""
    edges = [0.0] + [threshold(lambda u, t=token: sample(u) <= t) for token in range(V)]
    return np.diff(edges)


def chance_and_rest(rule, target, draft, tokens):
    """([chance that candidate i is accepted once tried], law of the residual draw)."""
    numbers = [Uniform() for _ in range(len(tokens) + 1)]
    _, rest = rule(target, draft, tokens, numbers)
    for i, token in enumerate(tokens):  # the accepting way: which candidate, which token
        way = [Uniform(accept=j == i) for j in range(len(tokens) + 1)]
        assert rule(target, draft, tokens, way)[:2] == (i, token)
    return [number.chance for number in numbers[:-1]], rest.law


def law_without_replacement(rule, target, draft, tokens):
    """The law of the committed token given the drawn tokens."""
    law, mass = np.zeros(V), 1.0
    chances, rest = chance_and_rest(rule, target, draft, tokens)
    for token, chance in zip(tokens, chances, strict=True):
        law[token] += mass * chance
        mass *= 1 - chance
    return law if mass < 1e-14 else law + mass * rest


def sequences_without_replacement(draft, count):
    """Ordered tuples of sequential draws without replacement and their probabilities; uniform once the support is used up."""
    for tokens in itertools.permutations(range(V), count):
        p, left = 1.0, draft.copy()
        for token in tokens:
            if left.sum() <= 0:
                left = np.array([float(t not in tokens[: tokens.index(token)]) for t in range(V)])
            p *= left[token] / left.sum()
            left[token] = 0.0
        if p > 0:
            yield list(tokens), p


def cases(count, seed=0):
    """Random pairs with sparse, disjoint and one-hot supports among them."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        pair = rng.dirichlet(np.full(V, 0.7), 2)
        if i % 3 == 1:
            pair[rng.random((2, V)) < 0.5] = 0.0
        if i % 7 == 3:
            pair[rng.integers(2)] = np.eye(V)[rng.integers(V)]
        for row in pair:
            if row.sum() == 0:
                row[rng.integers(V)] = 1.0
        target, draft = pair / pair.sum(1, keepdims=True)
        yield target, draft, int(rng.integers(1, V + 1))


def law(rule, target, draft, count, tuples=sequences_without_replacement):
    return sum(p * law_without_replacement(rule, target, draft, tokens) for tokens, p in tuples(draft, count))


def test_symbols_and_numbers_agree(monkeypatch):
    """The law found with symbols is the law found by bisection over the numbers themselves."""
    for target, draft, count in cases(8, seed=9):
        for tokens, _ in itertools.islice(sequences_without_replacement(draft, min(count, 3)), 4):
            with monkeypatch.context() as patched:
                patched.setattr(ratio, "draw", Weights)
                chances, rest = chance_and_rest(without_replacement, target, draft, tokens)
            numbers = np.full(len(tokens) + 1, BELOW_ONE)
            for i, chance in enumerate(chances):

                def accepts(u, i=i, numbers=numbers):
                    numbers[i] = u
                    return without_replacement(target, draft, tokens, numbers)[0] == i  # noqa: B023

                assert threshold(accepts) == pytest.approx(chance, abs=1e-12)
                numbers[i] = BELOW_ONE
                if chance >= 1:
                    break
            else:

                def last(u, numbers=numbers):
                    numbers[-1] = u
                    return without_replacement(target, draft, tokens, numbers)[1]  # noqa: B023

                np.testing.assert_allclose(law_of_draw(last), rest, atol=1e-12)


def test_draw_follows_its_weights():
    for target, _, _ in cases(10, seed=8):
        np.testing.assert_allclose(law_of_draw(lambda u, w=target: draw(3 * w, u)), target, atol=1e-12)


@pytest.mark.usefixtures("symbolic")
def test_without_replacement_commits_the_target_law():
    for target, draft, count in cases(60):
        np.testing.assert_allclose(law(without_replacement, target, draft, count), target, atol=1e-12)


def most_likely(draft, count):
    yield np.argsort(-draft, kind="stable")[:count].tolist(), 1.0


def sorted_draws(draft, count):
    for tokens, p in sequences_without_replacement(draft, count):
        yield sorted(tokens, key=lambda t: -draft[t]), p


def keeps_the_rejected(target, draft, tokens, uniforms):
    """Forgets to take rejected tokens out of the draft."""
    residual = target
    for i, token in enumerate(tokens):
        if uniforms[i] * draft[token] < residual[token]:
            return i, token
        rest = np.maximum(residual - draft, 0)
        residual = rest / rest.sum() if rest.sum() > 0 else target
    return None, residual_draw(residual, uniforms[-1])


def subtracts_the_candidate_only(target, draft, tokens, uniforms):
    """Removes only the rejected token's own mass from the target."""
    residual = target.copy()
    for i, token in enumerate(tokens):
        if uniforms[i] * draft[token] < residual[token]:
            return i, token
        residual[token] = 0.0
        residual = residual / residual.sum() if residual.sum() > 0 else target
    return None, residual_draw(residual, uniforms[-1])


def unnormalised(target, draft, tokens, uniforms):
    """Leaves the residual's sum below one before the next comparison."""
    residual = target
    for i, token in enumerate(tokens):
        if uniforms[i] * draft[token] < residual[token]:
            return i, token
        residual = np.maximum(residual - draft, 0)
        draft = np.where(np.isin(np.arange(V), tokens[: i + 1]), 0, draft)
        draft = draft / draft.sum() if draft.sum() > 0 else np.full(V, 1 / V)
    return None, residual_draw(residual if residual.sum() > 0 else target, uniforms[-1])


@pytest.mark.usefixtures("symbolic")
@pytest.mark.parametrize(
    ("rule", "tuples"),
    [
        (without_replacement, most_likely),
        (without_replacement, sorted_draws),
        (keeps_the_rejected, sequences_without_replacement),
        (subtracts_the_candidate_only, sequences_without_replacement),
        (unnormalised, sequences_without_replacement),
    ],
)
def test_wrong_rules_without_replacement_are_found_out(rule, tuples):
    wrong = sum(
        np.abs(law(rule, target, draft, min(count, 3), tuples) - target).max() > 1e-6
        for target, draft, count in cases(60)
    )
    assert wrong >= 15


@pytest.mark.usefixtures("symbolic")
def test_one_child_is_accepted_as_often_as_possible_and_all_children_always():
    for target, draft, _ in cases(60, seed=1):
        accepted = sum(p * _accepted(target, draft, tokens) for tokens, p in sequences_without_replacement(draft, 1))
        assert accepted == pytest.approx(1 - np.abs(target - draft).sum() / 2, abs=1e-12)
        for tokens, _ in sequences_without_replacement(draft, V):
            assert _accepted(target, draft, tokens) == pytest.approx(1.0, abs=1e-12)


def _accepted(target, draft, tokens):
    """P(some child is accepted)."""
    chances, _ = chance_and_rest(without_replacement, target, draft, tokens)
    return 1 - np.prod([1 - chance for chance in chances])


def test_the_sampler_draws_without_replacement():
    """Each next token given the earlier ones, from the sampling function itself."""
    for _, draft, count in cases(8, seed=2):
        for tokens, p in sequences_without_replacement(draft, count):
            product, numbers = 1.0, np.zeros(count)
            for i, token in enumerate(tokens):

                def sample(u, i=i, numbers=numbers, draft=draft):
                    numbers[i] = u
                    return draw_without_replacement(draft, i + 1, numbers)[i]

                chance = law_of_draw(sample)
                product *= chance[token]
                low = chance[:token].sum()
                numbers[i] = low + chance[token] / 2
            assert product == pytest.approx(p, abs=1e-12)


# -- independent draws (SpecInfer) -----------------------------------------------------------------------------------------------


def orders_of(rule, target, drafts, tokens):
    """For each order of trying the candidates: (probability of the order, order, chances of acceptance, law of the residual draw)."""
    for order in itertools.permutations(range(len(tokens))):
        left = list(range(len(tokens)))
        numbers = []
        for index in order:
            numbers += [(left.index(index) + 0.5) / len(left), Uniform()]
            left.remove(index)
        _, rest = rule(target, drafts, tokens, [*numbers, Uniform()])
        for step, index in enumerate(order):
            way = [n if i % 2 == 0 else Uniform(accept=i == 2 * step + 1) for i, n in enumerate(numbers)]
            assert rule(target, drafts, tokens, [*way, Uniform()]) == (index, tokens[index])
        yield 1 / math.factorial(len(tokens)), order, [n.chance for n in numbers[1::2]], rest.law


def law_independent(rule, target, drafts, tokens):
    """The law given the candidates, over all orders of trying them."""
    law = np.zeros(V)
    for p, order, chances, rest in orders_of(rule, target, drafts, tokens):
        mass = p
        for index, chance in zip(order, chances, strict=True):
            law[tokens[index]] += mass * chance
            mass *= 1 - chance
        law += mass * rest
    return law


def several(count, seed=3):
    rng = np.random.default_rng(seed)
    for target, draft, k in cases(count, seed):
        models = [draft, *rng.dirichlet(np.full(V, 0.7), 2)][: rng.integers(1, 4)]
        owners = [models[rng.integers(len(models))] for _ in range(min(k, 3))]
        yield target, owners


def total_law(rule, target, owners, candidates=lambda tokens, owners: (tokens, owners)):
    law = np.zeros(V)
    for tokens in itertools.product(range(V), repeat=len(owners)):
        p = np.prod([q[t] for q, t in zip(owners, tokens, strict=True)])
        if p > 0:
            tried, drafts = candidates(list(tokens), owners)
            law += p * law_independent(rule, target, drafts, tried)
    return law


@pytest.mark.usefixtures("symbolic")
def test_independent_draws_commit_the_target_law():
    for target, owners in several(25):
        np.testing.assert_allclose(total_law(independent, target, owners), target, atol=1e-11)


@pytest.mark.usefixtures("symbolic")
def test_trying_equal_draws_once_is_found_out():
    def once(tokens, owners):
        first = [i for i, t in enumerate(tokens) if t not in tokens[:i]]
        return [tokens[i] for i in first], [owners[i] for i in first]

    wrong = 0
    for target, draft, _ in cases(40, seed=4):
        wrong += np.abs(total_law(independent, target, [draft, draft], once) - target).max() > 1e-6
    assert wrong >= 8


@pytest.mark.usefixtures("symbolic")
def test_most_likely_children_are_found_out():
    wrong = 0
    for target, draft, _ in cases(40, seed=5):
        tokens = np.argsort(-draft)[:2].tolist()
        wrong += np.abs(law_independent(independent, target, [draft, draft], tokens) - target).max() > 1e-6
    assert wrong >= 15


@pytest.mark.usefixtures("symbolic")
def test_independent_draws_are_rejected_no_more_often_than_by_matching():
    for target, owners in several(12, seed=6):
        by_ratio = by_matching = 0.0
        for tokens in itertools.product(range(V), repeat=len(owners)):
            p = np.prod([q[t] for q, t in zip(owners, tokens, strict=True)])
            by_matching += p * (1 - sum(target[t] for t in set(tokens)))
            if p > 0:
                by_ratio += p * (1 - _accepts_any(target, owners, list(tokens)))
        assert by_ratio <= by_matching + 1e-9


def _accepts_any(target, owners, tokens):
    """P(some candidate is accepted), averaged over orders."""
    ways = orders_of(independent, target, owners, tokens)
    return sum(p * (1 - np.prod([1 - chance for chance in chances])) for p, _, chances, _ in ways)


# -- at the serving temperature and nucleus --------------------------------------------------------------------------------------

GRID = list(itertools.product((0.2, 0.6, 1.0), (0.9, 1.0)))


def shaped(logits, temperature, top_p):
    """What the sampler makes of logits: the engine's own filters."""
    import torch

    from wager.serve.sampling.filters import keep_likely

    one = torch.ones(1, dtype=torch.float64)
    probs = torch.softmax(torch.from_numpy(logits)[None] / temperature, -1)
    kept = keep_likely(probs, 0 * one, 0 * one.long(), top_p * one)[0].numpy()
    return kept / kept.sum()


@pytest.mark.usefixtures("symbolic")
@pytest.mark.parametrize(("temperature", "top_p"), GRID)
def test_both_rules_are_exact_at_every_temperature_and_nucleus(temperature, top_p):
    """The target is cut to its nucleus, the draft is not: candidates outside it must be refused with certainty."""
    rng = np.random.default_rng(7)
    for _ in range(6):
        logits = 2 * rng.normal(size=(3, V))
        target = shaped(logits[0], temperature, top_p)
        drafts = [shaped(row, temperature, 1.0) for row in logits[1:]]
        for count in (1, 2, 3):
            np.testing.assert_allclose(law(without_replacement, target, drafts[0], count), target, atol=1e-12)
        np.testing.assert_allclose(total_law(independent, target, [*drafts, drafts[0]]), target, atol=1e-11)


@pytest.mark.usefixtures("symbolic")
def test_a_draft_row_of_another_temperature_is_found_out():
    """Drawn at temperature 1, judged with the row at 0.6: biased."""
    rng = np.random.default_rng(8)
    wrong = 0
    for _ in range(10):
        logits = 2 * rng.normal(size=(2, V))
        target, drawn, judged = shaped(logits[0], 1.0, 1.0), shaped(logits[1], 1.0, 1.0), shaped(logits[1], 0.6, 1.0)
        made = sum(
            p * law_without_replacement(without_replacement, target, judged, tokens)
            for tokens, p in sequences_without_replacement(drawn, 2)
        )
        wrong += np.abs(made - target).max() > 1e-6
    assert wrong == 10
