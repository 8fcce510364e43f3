"""The compiled suffix trees against a dictionary of all substrings and against brute-force speculation."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wager.errors import UsageError
from wager.serve.speculate.suffix_tree import DraftLimits, SuffixSession, SuffixTree


def substrings(sequences, depth):
    """Every substring up to the depth with its number of occurrences."""
    counts = Counter()
    for tokens in sequences:
        for i in range(len(tokens)):
            for j in range(i + 1, min(i + depth, len(tokens)) + 1):
                counts[tuple(tokens[i:j])] += 1
    return counts


def ends_of(sequences, depth):
    return Counter(tuple(t[i : i + depth]) for t in sequences for i in range(len(t)))


def assert_same(tree, sequences, depth):
    tree.check()
    counts = substrings(sequences, depth)
    for string, count in counts.items():
        assert tree.count(string) == count, (string, sequences)
    for string in list(counts)[:50]:
        longer = (*string, 99)
        assert tree.count(longer) == 0
    # one node per class of strings that are never seen apart: minimal, so nothing is stored twice
    ends = ends_of(sequences, depth)
    children = {}
    for string, count in counts.items():
        children.setdefault(string[:-1], []).append((string[-1], count))
    nodes = 1 + sum(1 for s, c in counts.items() if ends[s] or len(children.get(s, [])) != 1 or children[s][0][1] != c)
    assert tree.num_nodes == nodes
    assert tree.num_tokens == sum(map(len, sequences))


operation = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 3), st.lists(st.integers(0, 2), min_size=1, max_size=8)),
    st.tuples(st.just("remove"), st.integers(0, 3), st.just([])),
)


@settings(max_examples=60)
@given(st.lists(operation, max_size=25), st.integers(1, 6))
def test_counts_are_those_of_all_substrings_after_appends_and_removals(operations, depth):
    tree, live = SuffixTree(depth), {}
    for kind, name, tokens in operations:
        if kind == "append":
            if name not in live:
                live[name] = (tree.open(), [])
            tree.append(live[name][0], tokens)
            live[name][1].extend(tokens)
        elif name in live:
            tree.remove(live.pop(name)[0])
        assert_same(tree, [tokens for _, tokens in live.values()], depth)


@pytest.mark.parametrize("alphabet", [1, 2, 40])  # 40: nodes with an index of their children
def test_long_random_histories_keep_the_structure(alphabet):
    rng = np.random.default_rng(alphabet)
    tree, live = SuffixTree(5), []
    for step in range(600):
        if live and rng.random() < 0.15:
            sequence, _ = live.pop(rng.integers(len(live)))
            tree.remove(sequence)
        elif not live or rng.random() < 0.2:
            live.append((tree.open(), []))
        else:
            sequence, tokens = live[rng.integers(len(live))]
            new = rng.integers(0, alphabet, rng.integers(1, 6)).tolist()
            tree.append(sequence, new)
            tokens.extend(new)
        if step % 20 == 0:
            assert_same(tree, [t for _, t in live], 5)
    for sequence, _ in live:
        tree.remove(sequence)
    tree.check()
    assert tree.num_nodes == 1 and tree.num_tokens == 0


def test_the_order_of_insertion_does_not_matter():
    texts = [[1, 2, 3, 1, 2, 4], [1, 2, 3, 5], [2, 3, 5, 2, 3]]
    forward, backward = SuffixTree(4), SuffixTree(4)
    for tree, order in ((forward, texts), (backward, texts[::-1])):
        for text in order:
            tree.append(tree.open(), text)
    assert forward.num_nodes == backward.num_nodes
    assert all(forward.count(s) == backward.count(s) for s in substrings(texts, 4))


# -- speculation against brute force ---------------------------------------------------------------------------------------------


def follow(counts, here, limits, budget, p=1.0):
    """Scores of the likeliest paths from the end of the string `here`: several where counts tie."""
    kids = [(c, s) for s, c in counts.items() if s[:-1] == here]
    if not kids or not budget:
        return {0.0}
    most = max(kids)[0]
    q = p * most / counts[here]
    if q < limits.min_probability - 1e-6:
        return {0.0}
    return {round(q + rest, 9) for c, s in kids if c == most for rest in follow(counts, s, limits, budget - 1, q)}


def grow(counts, context, limits, budget):
    """Score of the likeliest `budget` nodes below the string."""
    frontier, chosen = [(1.0, tuple(context))], []
    while frontier and len(chosen) < budget + 1:
        frontier.sort(key=lambda e: -e[0])
        p, here = frontier.pop(0)
        chosen.append(p)
        for string, count in counts.items():
            if string[:-1] == here:
                q = p * count / counts[here]
                if q >= limits.min_probability - 1e-6:
                    frontier.append((q, string))
    return sum(chosen[1:])


def brute_scores(counts, context, depth, limits):
    """(lowest, highest) best score over all match lengths, over all ways to break ties."""
    low = high = 0.0
    for m in range(1, min(depth, len(context)) + 1):
        suffix = tuple(context[-m:])
        if suffix not in counts:
            break
        budget = max(0, min(limits.max_tokens, int(limits.factor * m + limits.offset)))
        scores = {grow(counts, suffix, limits, budget)} if limits.branch else follow(counts, suffix, limits, budget)
        low, high = max(low, min(scores)), max(high, max(scores))
    return low, high


@settings(max_examples=60)
@given(
    prompt=st.lists(st.integers(0, 2), min_size=1, max_size=14),
    output=st.lists(st.integers(0, 2), max_size=14),
    others=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), max_size=3),
    late=st.lists(st.integers(0, 2), max_size=6),
    depth=st.integers(2, 6),
    factor=st.sampled_from([0.5, 1.0, 2.0]),
    offset=st.sampled_from([-1.0, 0.0, 1.0]),
    branch=st.booleans(),
    share=st.booleans(),
)
def test_drafts_score_what_brute_force_scores(prompt, output, others, late, depth, factor, offset, branch, share):
    limits = DraftLimits(8, factor, offset, 0.1, branch)
    shared = SuffixTree(depth)
    numbers = [shared.open() for _ in others]
    for number, tokens in zip(numbers, others, strict=True):
        shared.append(number, tokens)
    session = SuffixSession(depth, shared, share)
    session.extend(prompt, output=False)
    seen = [list(o) for o in others]
    for i, token in enumerate(output):
        session.extend([token], output=True)
        if numbers and i == len(output) // 2:  # another request grows, another one is evicted: cursors must notice
            shared.append(numbers[-1], late)
            seen[-1] += late
            if len(numbers) > 1:
                shared.remove(numbers.pop(0))
                seen.pop(0)
    draft = session.speculate(limits)
    text = prompt + output
    mine = brute_scores(substrings([text], depth), text, depth, limits)
    in_shared = seen + [output] if share else seen
    theirs = brute_scores(substrings(in_shared, depth), text, depth, limits)
    assert max(mine[0], theirs[0]) - 1e-5 <= draft.score <= max(mine[1], theirs[1]) + 1e-5
    if theirs[0] > mine[1] + 1e-5 or theirs[1] < mine[0] + 1e-5:
        assert draft.from_shared == (theirs[0] > mine[1])
    assert draft.score == pytest.approx(float(draft.probabilities.sum()), abs=1e-5)
    assert len(draft.tokens) <= min(8, max(0, int(factor * draft.match_length + offset)))
    counts = substrings(in_shared if draft.from_shared else [text], depth)
    for i, parent in enumerate(draft.parents):
        path, node = [], i
        while node >= 0:
            path.append(int(draft.tokens[node]))
            node = draft.parents[node]
        tail = text[len(text) - draft.match_length :]
        string = tuple(tail + path[::-1])
        above = tuple(tail + path[:0:-1])
        if len(string) <= depth:
            assert counts[string] > 0
            reached = draft.probabilities[parent] if parent >= 0 else 1.0
            assert draft.probabilities[i] == pytest.approx(reached * counts[string] / counts[above], abs=1e-5)
        assert draft.probabilities[i] >= 0.1 - 1e-6


def test_a_tree_scores_at_least_its_path():
    rng = np.random.default_rng(0)
    shared = SuffixTree(8)
    for _ in range(20):
        shared.append(shared.open(), rng.integers(0, 3, 40))
    session = SuffixSession(8, shared)
    for token in rng.integers(0, 3, 60).tolist():
        session.extend([token], output=True)
        path = session.speculate(DraftLimits(12, 2.0, branch=False))
        tree = session.speculate(DraftLimits(12, 2.0, branch=True))
        assert tree.score >= path.score - 1e-5


def test_a_repeated_line_is_drafted_whole():
    line = list(range(100, 130))
    session = SuffixSession(24, None)
    session.extend(line * 3 + line[:10], output=False)
    draft = session.speculate(DraftLimits(16))
    assert draft.tokens.tolist() == line[10:22]  # 12 matched and 12 drafted tokens fill the depth
    assert not draft.from_shared and draft.match_length == 12


def test_ended_requests_leave_no_memory():
    shared = SuffixTree(16)
    rng = np.random.default_rng(1)

    def cycle():
        session = SuffixSession(16, shared)
        session.extend(rng.integers(0, 50, 100).tolist(), output=False)
        session.extend(rng.integers(0, 50, 100).tolist(), output=True)
        shared.remove(session.sequence)

    for _ in range(20):
        cycle()
    settled = shared.nbytes
    for _ in range(60):
        cycle()
    assert shared.num_nodes == 1 and shared.nbytes <= settled * 1.05


@pytest.mark.parametrize("depth", [0, 5000])
def test_bad_depths_are_named(depth):
    with pytest.raises(UsageError, match=str(depth)):
        SuffixTree(depth)
