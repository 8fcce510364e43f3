"""The planner's dynamic program against brute force and published figures; its trees against a simulated verifier."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wager.errors import UsageError
from wager.serve.speculate.acceptance import AcceptanceCounter, AcceptanceVector
from wager.serve.speculate.hardware_profile import HardwareProfile
from wager.serve.speculate.tree_plan import GrowMap, TreeTables, expected_tokens, plan_tree, plan_trees

# A measured acceptance vector of 32 positions, published with Sequoia
PUBLISHED = (
    0.63418293, 0.10794602, 0.05697151, 0.02248876, 0.01949026, 0.0149925, 0.00449775, 0.0029985, 0.011994, 0.00449775,
    0.00749625, 0.00449775, 0.005997, 0.0029985, 0.00149925, 0.0029985, 0.00149925, 0.0029985, 0.0, 0.0029985, 0.0029985,
    0.0029985, 0.0, 0.00149925, 0.0, 0.00149925, 0.0, 0.0, 0.0, 0.00149925, 0.00149925, 0.00149925,
)  # fmt: skip
FIGURES = {8: (2.7322, 2.6980), 16: (3.1303, 3.0126), 32: (3.5007, 3.3047), 64: (3.8554, 3.5261), 128: (4.2021, 3.7358)}


@pytest.fixture(scope="module")
def published():
    return TreeTables(PUBLISHED, 129, 13)


def test_published_figures(published):
    shallow = TreeTables(PUBLISHED, 128, 5)
    for n, (deep, five) in FIGURES.items():
        assert published.expected_tokens(n, 13) == pytest.approx(deep, abs=1e-4)
        assert shallow.expected_tokens(n, 5) == pytest.approx(five, abs=1e-4)
    assert expected_tokens(GrowMap.chain(16), PUBLISHED) == pytest.approx(2.7324, abs=1e-4)
    assert expected_tokens(GrowMap.sequences(5, 8), PUBLISHED) == pytest.approx(3.2390, abs=1e-4)
    assert expected_tokens(GrowMap.sequences(16, 8), PUBLISHED) == pytest.approx(3.4106, abs=1e-4)
    assert published.expected_tokens(41, 13) == pytest.approx(3.6313, abs=1e-4)
    assert published.expected_tokens(129, 13) == pytest.approx(4.2059, abs=1e-4)


@cache
def all_trees(n):
    """Every ordered tree of n nodes as a nested tuple of subtrees."""
    if n == 1:
        return [()]
    trees = []
    for first in range(1, n):
        for head in all_trees(first):
            for rest in all_trees(n - first):
                trees.append((head, *rest))
    return trees


def value(tree, p, levels):
    if levels == 0:
        return -np.inf
    return 1 + sum(
        (p[k] if k < len(p) else -np.inf) * value(s, p, levels - 1) if k < len(p) else -np.inf
        for k, s in enumerate(tree)
    )


@given(st.lists(st.floats(0.01, 0.5), min_size=1, max_size=4), st.integers(1, 7), st.integers(1, 5))
def test_the_best_tree_is_the_best_of_all_trees(p, n, levels):
    tables = TreeTables(p, n, levels)
    best = max(value(tree, p, levels) for tree in all_trees(n))
    assert tables.expected_tokens(n, levels) == pytest.approx(best, abs=1e-12)
    if np.isfinite(best):
        tree = tables.tree(n, levels)
        assert len(tree) == n - 1 and tree.depth <= levels - 1
        assert expected_tokens(tree, p) == pytest.approx(best, abs=1e-12)
        assert 1 + sum(tree.scores) == pytest.approx(best, abs=1e-12)


def test_best_first_growth_is_optimal_for_falling_vectors(published):
    p = sorted(PUBLISHED, reverse=True)
    tables = TreeTables(p, 40, 8)
    leaves, total = [1.0], 0.0  # greedy: always take the likeliest next node
    frontier = [(1.0, 0, 1)]
    for _ in range(40):
        frontier.sort(reverse=True)
        score, k, level = frontier.pop(0)
        total += score
        above = leaves[0] if level == 1 else score / p[k]
        if level > 1 and k + 1 < len(p):
            frontier.append((above * p[k + 1], k + 1, level))
        if level < 8:
            frontier.append((score * p[0], 0, level + 1))
    assert tables.expected_tokens(40, 8) == pytest.approx(total, abs=1e-9)


def test_more_nodes_and_levels_never_hurt(published):
    best = published.best[1:, 1:]
    finite = np.where(np.isfinite(best), best, 0)
    assert (np.diff(finite, axis=0) >= -1e-12).all()
    assert (np.diff(best[-1]) >= -1e-12).all()


def test_a_matrix_uses_the_row_of_the_parents_depth():
    p = np.array([[0.9, 0.05], [0.1, 0.1], [0.1, 0.1]])
    tables = TreeTables(p, 5, 3)
    tree = tables.tree(5, 3)
    assert 1 + sum(tree.scores) == pytest.approx(tables.expected_tokens(5, 3))
    assert tree.scores[0] == 0.9 and tables.expected_tokens(5, 3) == pytest.approx(1 + 0.9 + 0.05 + 0.09 * 2)


def test_trees_yield_the_tokens_they_promise(published):
    """A verifier that obeys the positional assumption commits F(T) tokens per pass."""
    tree = published.tree(64, 13)
    rng = np.random.default_rng(0)
    edges = np.cumsum(PUBLISHED)
    total, passes = 0, 20000
    for _ in range(passes):
        row = 0
        while True:
            total += 1
            k = int(np.searchsorted(edges, rng.random()))
            if k >= len(tree.children[row]):
                break
            row = tree.children[row][k] + 1
    assert total / passes == pytest.approx(tree.expected_tokens, rel=0.03)


def profile_of(target, draft, sizes):
    return HardwareProfile(sizes, (1,), (target,), (draft,))


def test_the_plan_follows_the_machine():
    sizes = (1, 8, 16, 64)
    cheap = profile_of((1.0, 1.0, 1.0, 1.0), (0.01,) * 4, sizes)  # a pass costs the same whatever it holds
    dear = profile_of((1.0, 8.0, 16.0, 64.0), (0.5, 4.0, 8.0, 32.0), sizes)  # nothing is free
    step = profile_of((1.0, 1.05, 3.0, 8.0), (0.05,) * 4, sizes)  # a step after 8 tokens
    assert len(plan_tree(PUBLISHED, cheap, max_size=64)) == 63
    assert len(plan_tree(PUBLISHED, dear, max_size=64)) == 0
    assert 4 <= len(plan_tree(PUBLISHED, step, max_size=64)) + 1 <= 8
    slow_draft = profile_of((1.0, 1.0, 1.0, 1.0), (0.4,) * 4, sizes)
    assert plan_tree(PUBLISHED, slow_draft).depth < plan_tree(PUBLISHED, cheap).depth


def test_shrunk_trees_keep_elder_siblings_and_parents(published):
    tree = published.tree(64, 8)
    for nodes, depth in ((10, 8), (63, 3), (1, 1), (20, 4)):
        small = tree.shrunk(nodes, depth)
        assert len(small) <= nodes and small.depth <= depth
    assert tree.shrunk(0, 5).parents == ()
    assert expected_tokens(tree.shrunk(15, 8), PUBLISHED) > 0.97 * published.expected_tokens(16, 8)


def test_levels_list_what_the_draft_computes():
    tree = GrowMap.from_parents([-1, 0, 1, -1, 3, 0])
    assert tree.parents == (-1, -1, 0, 0, 1, 2)
    assert [level.nodes.tolist() for level in tree.levels] == [[0, 1], [2]]
    assert tree.levels[1].visible.tolist() == [[True, False, True]]
    assert GrowMap.expansion([2, 2]).parents == (-1, -1, 0, 0, 1, 1)
    assert GrowMap.sequences(2, 3).parents == (-1, -1, 0, 1, 2, 3)


def test_published_tree_shapes_can_be_read(tmp_path):
    data = Path(__file__).parents[3] / "shared" / "data" / "speculation" / "sequoia_trees.json"
    trees = json.loads(data.read_text())["trees"] if data.exists() else [{"size": 4, "parents": [-1, 0, 1, 0]}]
    for tree in trees:
        grown = GrowMap.from_parents([p - 1 for p in tree["parents"][1:]])
        assert len(grown) == tree["size"] - 1
    grown.save(tmp_path / "tree.json")
    assert GrowMap.load(tmp_path / "tree.json").parents == grown.parents
    with pytest.raises(UsageError, match=r"absent\.json"):
        GrowMap.load(tmp_path / "absent.json")


def test_counted_acceptance_converges_with_mixed_widths():
    rng = np.random.default_rng(1)
    counter = AcceptanceCounter(8)
    p = np.array([0.5, 0.2, 0.1, 0.05])
    for _ in range(20000):
        k = int(np.searchsorted(np.cumsum(p), rng.random()))
        width = int(rng.integers(1, 5))
        counter.add(width, k if k < width else None)
    np.testing.assert_allclose(counter.p[:4], p, atol=0.02)


def test_a_plan_by_depth_with_equal_rows_is_the_plan_of_the_row():
    p = [0.7, 0.1, 0.05, 0.02]
    profile = HardwareProfile((1, 4, 16, 64), (1,), ((5.0, 5.5, 8.0, 25.0),), ((0.3, 0.3, 0.4, 0.8),), 0.3)
    one, by_depth = (plan_trees(q, profile, max_size=32, max_depth=8) for q in (p, np.tile(p, (8, 1))))
    assert [(t.parents, t.expected_tokens) for t in one] == [(t.parents, t.expected_tokens) for t in by_depth]
    falling = np.array([[0.9, 0.02, 0.01, 0.0]] * 2 + [[0.05, 0.02, 0.0, 0.0]] * 6)
    assert plan_tree(falling, profile, max_size=32, max_depth=8).depth <= 3


def test_vectors_are_saved_whole(tmp_path):
    vector = AcceptanceVector((60.0, 20.0), 20.0, 0.6, 0.9, "static")
    vector.save(tmp_path / "v.json")
    assert AcceptanceVector.load(tmp_path / "v.json") == vector
    assert vector.p == (0.6, 0.2) and vector.reject == 0.2


# -- the whole plan against every tree ---------------------------------------------------------------------------------------------


@cache
def shapes(n):
    """(parents in level order, widths, expanded nodes per level below the root) of every ordered tree of n nodes."""
    found = []
    for tree in all_trees(n):
        parents, level, number = [], [(tree, -1)], 0
        while level:
            following = []
            for node, place in level:
                for child in node:
                    parents.append(place)
                    following.append((child, number))
                    number += 1
            level = following
        found.append(GrowMap(tuple(parents)))
    return found


def random_machine(rng, sizes=(1, 2, 4, 8, 16)):
    """A machine: flat at first, then linear, with steps of the draft that cost from a hundredth to a third of the target's."""
    n = np.array(sizes)
    target = np.maximum(1.0, rng.uniform(0.05, 0.6) * n + rng.uniform(0.0, 0.9))
    draft = rng.uniform(0.01, 0.33) * np.maximum(1.0, rng.uniform(0.05, 0.6) * n + rng.uniform(0.0, 0.9))
    batches = (1, 4)
    rows = [tuple(target), tuple(target * rng.uniform(1.0, 4.0))], [tuple(draft), tuple(draft * rng.uniform(1.0, 4.0))]
    return HardwareProfile(tuple(sizes), batches, tuple(rows[0]), tuple(rows[1]), rng.uniform(0, 0.2))


def test_the_plan_is_within_three_percent_of_every_tree_there_is():
    """All ordered trees up to 9 nodes, priced level by level by what the draft and the target take: no tree beats the plan by 3 %."""
    rng = np.random.default_rng(5)
    drafting = 0
    for _ in range(25):
        p = np.sort(rng.dirichlet(np.full(5, 0.6)))[::-1][:4] * rng.uniform(0.5, 1.0)
        profile, batch = random_machine(rng), int(rng.choice([1, 2, 4]))
        planned = plan_tree(p.tolist(), profile, batch=batch, max_size=9, max_depth=8, max_branch=4)
        plain_ms, best = profile.target_ms(batch, 1), 1.0
        for n in range(2, 10):
            floor_ms = profile.step_ms(batch, n, [])
            for tree in shapes(n):
                if max(map(len, tree.children)) > len(p):
                    continue
                tokens = expected_tokens(tree, p)
                if tokens * plain_ms / floor_ms > best:  # cheap bound first
                    best = max(best, tokens * plain_ms / profile.step_ms(batch, n, tree.frontiers))
        drafting += best > 1
        assert planned.expected_speedup >= 0.97 * best
        if len(planned):
            again = expected_tokens(planned, p) * plain_ms
            assert planned.expected_speedup == pytest.approx(
                again / profile.step_ms(batch, len(planned) + 1, planned.frontiers)
            )
    assert drafting >= 10  # the cases are not all trivial


def test_a_planner_that_ignores_the_draft_is_found_out():
    """Choosing by expected tokens alone loses more than 3 % in most of these cases."""
    rng = np.random.default_rng(6)
    worse = 0
    for _ in range(20):
        p = np.sort(rng.dirichlet(np.full(5, 0.6)))[::-1][:4]
        profile = random_machine(rng)
        planned = plan_tree(p.tolist(), profile, max_size=9, max_depth=8, max_branch=4)
        blind = TreeTables(p, 9, 9).tree(9, 9)
        speed = expected_tokens(blind, p) * profile.target_ms(1, 1) / profile.step_ms(1, 9, blind.frontiers)
        worse += speed < 0.97 * planned.expected_speedup
    assert worse >= 12
