"""Growing trees by the draft's confidence: what pays gets a row, and what a row takes is learned from the steps themselves."""

import numpy as np
import pytest

from wager.serve.speculate.acceptance import ConfidenceCounter
from wager.serve.speculate.hardware_profile import HardwareProfile
from wager.serve.speculate.ratio import _minus, _without
from wager.serve.speculate.step_price import StepPrice
from wager.serve.speculate.tree_choice import TreeChoice
from wager.serve.speculate.tree_plan import GrowMap

SIZES = (1, 2, 4, 8, 16, 32)


def profile(per_row=0.5, draft=0.4):
    times = tuple(tuple(5.0 + per_row * batch * np.array(SIZES)) for batch in (1, 16))
    return HardwareProfile(SIZES, (1, 16), times, ((draft,) * 6,) * 2, 0.3)


def grow(choice, confidences, batch=1, greedy=True, room=31, depth=12):
    """Trees of a batch; confidences[i]: what the draft says at every node of request i. Returns (shapes, step)."""
    shapes = [choice.shape(greedy, f"r{i}", room, depth) for i in range(batch)]
    sure = {id(s): c for s, c in zip(shapes, confidences, strict=True)}
    step, level = choice.step(batch), [(s, -1) for s in shapes]
    while level:
        fresh = step.widen(level, [sure[id(s)] for s, _ in level])
        level = step.deepen([(s, nodes) for (s, _), nodes in zip(level, fresh, strict=True)])
    choice.grown(step, shapes)
    return shapes, step


def teach(choice, rng, kept, steps=300):
    """Serve requests whose draft is right in the share kept[confidence] of the cases, second choices in half of the rest."""
    for _ in range(steps):
        for confidence, right in kept.items():
            (shape,), _ = grow(choice, [confidence])
            path, node = [], -1
            while children := shape.children.get(node):
                draw = rng.random()
                index = 0 if draw < right else 1 if draw < right + (1 - right) / 2 else None
                if index is None or index >= len(children):
                    break
                node = children[index]
                path.append(node)
            choice.decided(shape, path)
            choice.forget(shape.name)


def test_a_sure_draft_grows_a_chain_and_an_unsure_one_tries_second_choices_and_stops():
    choice, rng = TreeChoice(None, profile(0.2), 32, 12, 8), np.random.default_rng(0)
    teach(choice, rng, {0.99: 0.98, 0.15: 0.5})
    (sure, unsure), step = grow(choice, [0.99, 0.15], batch=2)
    assert max(sure.depths) >= max(unsure.depths) + 3
    assert len(unsure.children[-1]) > len(sure.children[-1]) == 1
    assert step.rows == 2 + len(sure.parents) + len(unsure.parents)
    assert step.passes == max(sure.depths)
    assert choice.by_confidence[True].chances(3)[0][ConfidenceCounter.bin(0.99)][0] == pytest.approx(0.98, abs=0.04)


@pytest.mark.parametrize("dear", ["rows", "passes", "batch"])
def test_what_costs_more_is_used_less(dear):
    cheap, costly = TreeChoice(None, profile(), 32, 12, 8), TreeChoice(None, profile(), 32, 12, 8)
    if dear != "batch":
        costly = TreeChoice(None, profile(3.0) if dear == "rows" else profile(draft=4.0), 32, 12, 8)
    sizes = []
    for choice, batch in ((cheap, 1), (costly, 16 if dear == "batch" else 1)):
        for _ in range(40):
            shapes, step = grow(choice, [0.8] * batch, batch)
        sizes.append((np.mean([len(s.parents) for s in shapes]), step.passes))
    assert sizes[1][0] < sizes[0][0] and sizes[1][1] < sizes[0][1]


def test_a_profile_that_promises_too_much_gives_way_to_real_steps():
    """Tokens per millisecond come near those of the best length of chain, though the profile says that rows are free."""
    choice, rng = TreeChoice(None, profile(0.0, 0.2), 32, 8, 8), np.random.default_rng(1)
    real, right, tokens, ms, sizes = 2.0, 0.8, 0.0, 0.0, []
    for n in range(600):
        (shape,), step = grow(choice, [0.8], depth=8)
        took = 5.0 + real * step.rows + 0.2 * step.passes
        choice.timed(1, took * rng.uniform(0.95, 1.1) * (5.0 if rng.random() < 0.03 else 1.0))
        path, node = [], -1
        while shape.children.get(node) and rng.random() < right:
            node = shape.children[node][0]
            path.append(node)
        choice.decided(shape, path)
        sizes.append(len(shape.parents))
        if n >= 300:
            tokens, ms = tokens + len(path) + 1, ms + took
    assert np.mean(sizes[:3]) > 2 * np.mean(sizes[300:])
    best = max((1 - right ** (k + 1)) / (1 - right) / (5 + real * (k + 1) + 0.2 * k) for k in range(1, 9))
    assert tokens / ms > 0.88 * best


def test_steps_tell_what_a_row_takes_and_a_new_batch_size_begins_with_that():
    price, rng = StepPrice(profile(0.1), 1), np.random.default_rng(0)
    for _ in range(200):
        rows = int(rng.integers(2, 14))
        price.timed(rows, 3, (6.0 + 0.9 * rows + 3 * 0.4) * (8.0 if rng.random() < 0.02 else rng.uniform(0.97, 1.05)))
    assert price.row_ms(8) == pytest.approx(0.9, rel=0.15)
    assert price.step_ms(10, 3) == pytest.approx(6 + 9 + 1.2, rel=0.06)
    assert StepPrice(profile(0.1), 2, price).row_ms(8) == pytest.approx(price.row_ms(8), rel=0.1)
    price.drafted(2, 1000.0)
    assert price.pass_ms < 0.45, "a hiccup of the draft says nothing"


def test_trees_stay_within_their_room_and_scarce_nodes_get_a_price():
    """Where rows cost nothing, the size is what is short: then depth is not given up for width."""
    choice = TreeChoice(None, profile(0.0, 0.01), 32, 8, 8)
    for _ in range(200):
        (shape,), _ = grow(choice, [0.3], room=31, depth=8)
        assert len(shape.parents) <= 31 and max(shape.depths) <= 8
    assert max(shape.depths) >= 4 and len(shape.parents) >= 8
    (small,), _ = grow(choice, [0.9], room=2)
    assert len(small.parents) <= 2
    assert choice.room(1) <= 31
    assert TreeChoice(GrowMap.chain(3), None, 32, 8, 8).room(9) == 3


def test_requests_that_are_easily_guessed_get_deeper_trees():
    """At the same confidence: a draft may be surer than it should be of some texts."""
    choice, rng = TreeChoice(None, profile(0.3), 32, 12, 8), np.random.default_rng(0)
    kept = {"code": 0.97, "prose": 0.4}
    for _ in range(400):
        for name, right in kept.items():
            (shape,), _ = grow_named(choice, name)
            path, node = [], -1
            while shape.children.get(node) and rng.random() < right:
                node = shape.children[node][0]
                path.append(node)
            choice.decided(shape, path)
    code, prose = (grow_named(choice, name)[0][0] for name in kept)
    assert max(code.depths) >= max(prose.depths) + 3
    choice.forget("code")
    assert "code" not in choice._ease


def grow_named(choice, name):
    shape = choice.shape(True, name, 31, 12)
    step, level = choice.step(1), [(shape, -1)]
    while level:
        fresh = step.widen(level, [0.6] * len(level))
        level = step.deepen([(s, nodes) for (s, _), nodes in zip(level, fresh, strict=True)])
    choice.grown(step, [shape])
    return [shape], step


# -- which ways of shaping a tree keep the law: exact, over all draws -------------------------------------------------------------------


def committed(target, draft, tokens):
    """Law of the committed token when these children, in this order, are tried by the rule without replacement."""
    law, reach, residual, left, seen = np.zeros(len(target)), 1.0, target, draft, []
    for token in tokens:
        accept = min(1.0, residual[token] / left[token])
        law[token] += reach * accept
        reach *= 1 - accept
        seen.append(token)
        residual, left = _minus(residual, left, seen, target), _without(left, seen)
    return law + reach * residual


def law_over_draws(target, draft, keep):
    """Over all ordered pairs of draws; keep(first, second) says which become children."""
    total = np.zeros(len(target))
    for a in range(len(target)):
        for b in set(range(len(target))) - {a}:
            total += draft[a] * draft[b] / (1 - draft[a]) * committed(target, draft, keep(a, b))
    return total


@pytest.mark.parametrize("seed", range(20))
def test_children_settled_before_their_draw_keep_the_law_and_children_dropped_after_it_do_not(seed):
    rng = np.random.default_rng(seed)
    target, draft = rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(4))
    count = 1 if draft.max() > 0.5 else 2  # by confidence
    assert np.abs(law_over_draws(target, draft, lambda a, b: [a, b][:count]) - target).max() < 1e-12
    # the second is drawn only where the first is unlikely: settled by what was drawn before it
    assert np.abs(law_over_draws(target, draft, lambda a, b: [a, b] if draft[a] < 0.3 else [a]) - target).max() < 1e-12
    # children that look unlikely once they are drawn are taken back
    middle = np.sort(draft)[1:3].mean()
    pruned = law_over_draws(target, draft, lambda a, b: [t for t in (a, b) if draft[t] > middle])
    assert np.abs(pruned - target).max() > 1e-4
