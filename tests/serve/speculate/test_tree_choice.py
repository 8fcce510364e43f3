"""Choosing trees while serving: a profile that is wrong about this batch size is corrected by the steps themselves."""

import numpy as np
import pytest

from wager.serve.speculate.hardware_profile import HardwareProfile
from wager.serve.speculate.tree_choice import TreeChoice, bucket
from wager.serve.speculate.tree_plan import GrowMap

SIZES = (1, 2, 4, 8, 16, 32)


def flat_profile():
    """A machine that claims that 32 tokens take as long as one."""
    return HardwareProfile(SIZES, (1,), ((5.0,) * 6,), ((0.2,) * 6,), 0.3)


def real_ms(tree, per_token):
    return 5.0 + per_token * (len(tree) + 1) + 0.2 * tree.depth


def serve(choice, steps, per_token, batch=1, seed=0):
    """Steps as they really are, with scatter and hiccups; the trees of the second half."""
    rng = np.random.default_rng(seed)
    trees = []
    for _ in range(steps):
        tree = [choice.tree(batch, True) for _ in range(batch)][-1]
        hiccup = 5.0 if rng.random() < 0.03 else 1.0
        choice.timed(batch, real_ms(tree, per_token) * rng.uniform(0.95, 1.1) * hiccup)
        trees.append(tree)
    return trees[steps // 2 :]


def test_a_profile_that_promises_too_much_gives_way_to_real_steps():
    choice = TreeChoice(None, flat_profile(), 32, 8, 8)
    assert len(choice.tree(4, True)) >= 16, "large trees look free"
    trees = serve(choice, 600, per_token=2.0, batch=4)
    rates = {
        len(t): t.expected_tokens / real_ms(t, 2.0)
        for t in choice._planned(4, True, choice._class_of(True, None)).trees
    }
    assert np.mean([rates[len(t)] for t in trees]) > 0.9 * max(rates.values())
    assert len(choice.tree(1, True)) >= 16, "other batch sizes are judged by themselves"


def test_a_right_profile_is_not_disturbed_by_scatter():
    sizes = np.array(SIZES)
    profile = HardwareProfile(SIZES, (1,), (tuple(5.0 + 0.5 * sizes),), ((0.2,) * 6,), 0.0)
    choice = TreeChoice(None, profile, 32, 8, 8)
    rates = {
        len(t): t.expected_tokens / real_ms(t, 0.5)
        for t in choice._planned(1, True, choice._class_of(True, None)).trees
    }
    trees = serve(choice, 600, per_token=0.5)
    assert np.mean([rates[len(t)] for t in trees]) > 0.9 * max(rates.values())


def test_room_is_that_of_the_chosen_tree():
    choice = TreeChoice(None, flat_profile(), 32, 8, 8)
    assert choice.room(2) == len(choice.tree(2, True))
    assert TreeChoice(GrowMap.chain(3), None, 32, 8, 8).room(9) == 3


@pytest.mark.parametrize(("batch", "wanted"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (64, 64)])
def test_batch_sizes_share_plans_up_to_powers_of_two(batch, wanted):
    assert bucket(batch) == wanted


def decide(choice, request, rng, keep, steps, greedy=True):
    """Steps of a request whose guesses are each kept with chance `keep`, whatever their depth."""
    for _ in range(steps):
        tree, path, row = choice.tree(1, greedy, request), [], 0
        while tree.children[row] and rng.random() < keep:
            path.append(tree.children[row][0])
            row = path[-1] + 1
        choice.decided(tree, greedy, path, request)


def test_requests_that_are_easily_guessed_get_deeper_trees():
    sizes = np.array(SIZES)
    profile = HardwareProfile(SIZES, (1,), (tuple(5.0 + 0.3 * sizes),), ((0.4,) * 6,), 0.3)
    choice, rng = TreeChoice(None, profile, 32, 12, 8), np.random.default_rng(0)
    for _ in range(3):
        decide(choice, "code", rng, 0.95, 150)
        decide(choice, "prose", rng, 0.4, 150)
    code, prose = choice.tree(1, True, "code"), choice.tree(1, True, "prose")
    assert code.depth >= prose.depth + 4
    assert choice.room(1) >= len(code), "the largest tree of the requests that there are"
    assert choice.counters[True].decisions == sum(c.decisions for c in choice.classes.values())
    choice.forget("code")
    assert "code" not in choice._ease


def test_a_step_over_several_trees_teaches_what_their_mean_takes():
    choice = TreeChoice(None, flat_profile(), 32, 8, 8)
    sizes = [len(choice.tree(2, True)), 5]
    choice._given[2].append(sizes[1])
    choice.timed(2, 9.0)
    assert choice.times[2].of[round(sum(sizes) / 2)].value == 9.0
    choice.tree(2, True)
    choice.timed(2, 1.0)
    assert len(choice.times[2].of) == 1, "a step in which one of two requests had no tree says nothing"


def test_one_hiccup_does_not_move_what_a_step_takes():
    choice = TreeChoice(None, flat_profile(), 32, 8, 8)
    size = 0
    for ms in (10.0, 10.0, 500.0, 10.0, 10.0):
        size = len(choice.tree(1, True))
        choice.timed(1, ms)
    assert choice.times[1].of[size].value == 10.0
