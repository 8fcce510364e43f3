"""The accept rules are exact, and the test can tell: rules that are known to be wrong fail it.

A rule is a function of uniform numbers. Its law is computed from the function itself: thresholds are found by bisection to 1e-15, one
number after the other, so nothing of the rule is written down twice.
"""

import itertools

import numpy as np
import pytest

from wager.serve.speculate.ratio import draw, draw_without_replacement, independent, without_replacement

V = 4
BELOW_ONE = 1 - 2.0**-53


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


def law_without_replacement(rule, target, draft, tokens):
    """The law of the committed token given the drawn tokens."""
    law, mass = np.zeros(V), 1.0
    for i in range(len(tokens)):
        numbers = np.full(len(tokens) + 1, BELOW_ONE)

        def accepts(u, i=i, numbers=numbers):
            numbers[i] = u
            return rule(target, draft, tokens, numbers)[0] == i

        accepted = threshold(accepts)
        law[tokens[i]] += mass * accepted
        mass *= 1 - accepted
    if mass < 1e-14:
        return law

    def residual(u):
        return rule(target, draft, tokens, np.array([*[BELOW_ONE] * len(tokens), u]))[1]

    return law + mass * law_of_draw(residual)


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
    return None, draw(residual, uniforms[-1])


def subtracts_the_candidate_only(target, draft, tokens, uniforms):
    """Removes only the rejected token's own mass from the target."""
    residual = target.copy()
    for i, token in enumerate(tokens):
        if uniforms[i] * draft[token] < residual[token]:
            return i, token
        residual[token] = 0.0
        residual = residual / residual.sum() if residual.sum() > 0 else target
    return None, draw(residual, uniforms[-1])


@pytest.mark.parametrize(
    ("rule", "tuples"),
    [
        (without_replacement, most_likely),
        (without_replacement, sorted_draws),
        (keeps_the_rejected, sequences_without_replacement),
        (subtracts_the_candidate_only, sequences_without_replacement),
    ],
)
def test_wrong_rules_without_replacement_are_found_out(rule, tuples):
    wrong = sum(
        np.abs(law(rule, target, draft, min(count, 3), tuples) - target).max() > 1e-6
        for target, draft, count in cases(60)
    )
    assert wrong >= 15


def test_one_child_is_accepted_as_often_as_possible_and_all_children_always():
    for target, draft, _ in cases(60, seed=1):
        accepted = sum(p * _accepted(target, draft, tokens) for tokens, p in sequences_without_replacement(draft, 1))
        assert accepted == pytest.approx(1 - np.abs(target - draft).sum() / 2, abs=1e-12)
        for tokens, _ in sequences_without_replacement(draft, V):
            assert _accepted(target, draft, tokens) == pytest.approx(1.0, abs=1e-12)


def _accepted(target, draft, tokens):
    """P(some child is accepted)."""
    mass = 1.0
    for i in range(len(tokens)):
        numbers = np.full(len(tokens) + 1, BELOW_ONE)

        def accepts(u, i=i, numbers=numbers):
            numbers[i] = u
            return without_replacement(target, draft, tokens, numbers)[0] == i

        mass *= 1 - threshold(accepts)
    return 1 - mass


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


def law_independent(rule, target, drafts, tokens):
    """The law given the candidates, over all orders of trying them."""
    law = np.zeros(V)

    def explore(order, mass):
        numbers = np.full(2 * len(tokens) + 1, BELOW_ONE)
        left = list(range(len(tokens)))
        for step, index in enumerate(order):
            numbers[2 * step] = (left.index(index) + 0.5) / len(left)
            left.remove(index)
        if len(order) == len(tokens):

            def residual(u):
                numbers[-1] = u
                return rule(target, drafts, tokens, numbers)[1]

            law[:] += mass * law_of_draw(residual)
            return
        for place, index in enumerate(left):
            numbers[2 * len(order)] = (place + 0.5) / len(left)

            def accepts(u):
                numbers[2 * len(order) + 1] = u
                return rule(target, drafts, tokens, numbers)[0] == index  # noqa: B023

            accepted = threshold(accepts)
            law[tokens[index]] += mass / len(left) * accepted
            numbers[2 * len(order) + 1] = BELOW_ONE
            if mass * (1 - accepted) > 1e-14:
                explore([*order, index], mass / len(left) * (1 - accepted))

    explore([], 1.0)
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


def test_independent_draws_commit_the_target_law():
    for target, owners in several(25):
        np.testing.assert_allclose(total_law(independent, target, owners), target, atol=1e-11)


def test_trying_equal_draws_once_is_found_out():
    def once(tokens, owners):
        first = [i for i, t in enumerate(tokens) if t not in tokens[:i]]
        return [tokens[i] for i in first], [owners[i] for i in first]

    wrong = 0
    for target, draft, _ in cases(40, seed=4):
        wrong += np.abs(total_law(independent, target, [draft, draft], once) - target).max() > 1e-6
    assert wrong >= 8


def test_most_likely_children_are_found_out():
    wrong = 0
    for target, draft, _ in cases(40, seed=5):
        tokens = np.argsort(-draft)[:2].tolist()
        wrong += np.abs(law_independent(independent, target, [draft, draft], tokens) - target).max() > 1e-6
    assert wrong >= 15


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
    total = 0.0
    orders = list(itertools.permutations(range(len(tokens))))
    for order in orders:
        mass, numbers, left = 1.0, np.full(2 * len(tokens) + 1, BELOW_ONE), list(range(len(tokens)))
        for step, index in enumerate(order):
            numbers[2 * step] = (left.index(index) + 0.5) / len(left)
            left.remove(index)
        for step in range(len(order)):

            def accepts(u, step=step, numbers=numbers):
                numbers[2 * step + 1] = u
                return independent(target, owners, tokens, numbers)[0] is not None

            mass *= 1 - threshold(accepts)
            numbers[2 * step + 1] = BELOW_ONE
        total += 1 - mass
    return total / len(orders)
