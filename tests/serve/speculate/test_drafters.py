"""Drafters without an engine: SpecExec's search, SpecInfer's merge, the suffix cache, prompt look-up, the gate."""

import heapq
import math

import numpy as np
import pytest

from wager.errors import UsageError
from wager.serve.params import SamplingParams
from wager.serve.request import Request
from wager.serve.speculate.gate import Gate
from wager.serve.speculate.ngram import NGramIndex
from wager.serve.speculate.specexec import Search
from wager.serve.speculate.specinfer import GrownTree, merge
from wager.serve.speculate.suffix import SuffixCache, SuffixDrafter
from wager.serve.speculate.suffix_tree import DraftLimits


def make_request(name, prompt, output=(), **options):
    request = Request(name, list(prompt), SamplingParams(max_tokens=100), 0.0, 1000, **options)
    request.token_ids += list(output)
    return request


# -- SpecExec: the exact top of an infinite tree -----------------------------------------------------------------------------------


def table_logprobs(path, vocab):
    """A fixed random distribution after every path."""
    rng = np.random.default_rng(abs(hash(tuple(path))) % 2**32)
    return np.log(rng.dirichlet(np.full(vocab, 0.6)))


def dijkstra(budget, vocab, decay):
    """The `budget` nodes nearest to the root."""
    heap, kept = [(0.0, ())], set()
    while len(kept) <= budget:
        distance, path = heapq.heappop(heap)
        kept.add(path)
        for token, logprob in enumerate(table_logprobs(path, vocab)):
            heapq.heappush(heap, (distance - logprob - math.log(decay), (*path, token)))
    return kept - {()}


def search(budget, beams, vocab, decay, passes=10_000):
    found = Search(budget, decay)
    root = table_logprobs((), vocab)
    found.add(np.array([-1]), np.arange(vocab)[None], root[None])
    for _ in range(passes):
        beam = found.beam(beams, 10_000)
        if not len(beam):
            break
        found.expand(None, beam)
        logprobs = np.stack([table_logprobs(found.path(int(n)), vocab) for n in beam])
        found.add(beam, np.tile(np.arange(vocab), (len(beam), 1)), logprobs)
    return found


@pytest.mark.parametrize("beams", [1, 4, 50])
@pytest.mark.parametrize("decay", [0.95, 1.0])
def test_the_search_finds_the_exact_best_nodes(beams, decay):
    for budget in (1, 7, 40):
        found = search(budget, beams, 4, decay)
        kept = found.best(budget)
        assert {found.path(int(n)) for n in kept} == dijkstra(budget, 4, decay)
        inner = found.parents[kept] >= 0
        assert (found.scores[kept][inner] < found.scores[found.parents[kept][inner]]).all()
        assert set(found.parents[kept][inner]) <= set(kept.tolist())


def test_larger_budgets_contain_smaller_ones():
    trees = []
    for budget in (5, 20, 60):
        found = search(budget, 8, 4, 0.95)
        trees.append({found.path(int(n)) for n in found.best(budget)})
    assert trees[0] < trees[1] < trees[2]


def test_computed_rows_see_their_ancestors():
    found = search(30, 3, 4, 0.95)
    for node in np.flatnonzero(found.row_of >= 0):
        seen = set(np.flatnonzero(found.ancestors[found.row_of[node]][: found.rows]))
        above, expected = int(node), set()
        while above >= 0:
            expected.add(int(found.row_of[above]))
            above = int(found.parents[above])
        assert seen == expected


def test_a_search_of_a_thousand_nodes_stays_within_its_budget_and_knows_every_node_once():
    rng = np.random.default_rng(0)
    found = Search(1024, 0.95)
    found.add(np.array([-1]), np.arange(16)[None], np.log(rng.dirichlet(np.full(16, 0.3), 1)))
    expanded: list[int] = []
    for _ in range(16):
        beam = found.beam(128, 99)
        if not len(beam):
            break
        expanded += beam.tolist()
        logprobs = np.log(rng.dirichlet(np.full(16, 0.3), len(beam)) + 1e-9)
        found.expand(None, beam)
        found.add(beam, np.tile(np.arange(16), (len(beam), 1)), logprobs)
    assert len(expanded) == len(set(expanded)) >= 128


# -- SpecInfer: merging ------------------------------------------------------------------------------------------------------------


def grown(paths):
    """A tree whose draws are these paths, each its own draw from a uniform distribution."""
    tree, q = GrownTree(), np.full(9, 1 / 9)
    for path in paths:
        parent = -1
        for token in path:
            child = tree.child(parent, token)
            tree.draws.setdefault(parent, []).append((child, q))
            parent = child
    return tree


def paths_of(tree):
    return {tuple(int(tree.tokens[n]) for n in tree.path(node)) for node in range(len(tree))}


def test_the_merged_tree_has_the_union_of_paths():
    a, b = grown([(1, 2, 3), (1, 4)]), grown([(1, 2, 5), (6, 4)])
    both = {(1,), (1, 2), (1, 2, 3), (1, 4), (1, 2, 5), (6,), (6, 4)}
    for trees in ([a, b], [b, a], [a, b, a]):
        assert paths_of(merge(trees, 100)[0]) == both
    assert paths_of(merge([a], 100)[0]) == {(1,), (1, 2), (1, 2, 3), (1, 4)}


def test_one_token_below_two_parents_is_two_nodes():
    tree, _, _ = merge([grown([(1, 4), (6, 4)])], 100)
    assert sorted(tree.tokens.tolist()) == [1, 4, 4, 6]


def test_equal_draws_share_a_node_and_are_tried_as_often_as_drawn():
    tree, candidates, places = merge([grown([(3,), (3,)]), grown([(3,)])], 100)
    assert len(tree) == 1 and len(candidates.of_row[0]) == 3
    assert [place[0] for place in places] == [0, 0]


def test_a_limit_counts_draws_not_nodes():
    tree, candidates, _ = merge([grown([(3,), (3,), (4,)])], 2)
    assert tree.tokens.tolist() == [3] and len(candidates.of_row[0]) == 2


# -- the suffix cache --------------------------------------------------------------------------------------------------------------

LINE = list(range(50, 70))


def draft_of(drafter, request):
    tree = drafter.propose([request], [16], [16])[0]
    return [] if tree is None else tree.tokens.tolist()


def test_later_requests_draft_from_earlier_and_from_running_outputs():
    drafter = SuffixDrafter(SuffixCache(24), DraftLimits(8))
    first = make_request("a", [1, 2], LINE)
    draft_of(drafter, first)
    second = make_request("b", [3], LINE[:6])
    assert draft_of(drafter, second) == LINE[6:12]  # from the running one
    drafter.remove(first)
    assert draft_of(drafter, make_request("c", [4], LINE[:5])) == LINE[5:10]


def test_prompts_of_others_are_not_drafted():
    drafter = SuffixDrafter(SuffixCache(24), DraftLimits(8))
    request = make_request("a", LINE, [1])
    draft_of(drafter, request)
    drafter.remove(request)
    assert draft_of(drafter, make_request("b", [2], LINE[:8])) == []
    assert draft_of(drafter, make_request("c", [*LINE, 9], LINE[:8])) == LINE[8:16]  # but one's own is


def test_tenants_do_not_see_one_anothers_outputs():
    drafter = SuffixDrafter(SuffixCache(24), DraftLimits(8))
    request = make_request("a", [1], LINE, cache_salt="tenant")
    draft_of(drafter, request)
    drafter.remove(request)
    assert draft_of(drafter, make_request("b", [2], LINE[:8])) == []
    assert draft_of(drafter, make_request("c", [2], LINE[:8], adapter="x", cache_salt="tenant")) == []
    assert draft_of(drafter, make_request("d", [2], LINE[:8], cache_salt="tenant")) == LINE[8:16]


@pytest.mark.parametrize("limits", [{"max_tokens": 60}, {"max_requests": 3}])
def test_the_oldest_outputs_are_evicted(limits):
    cache = SuffixCache(24, **limits)
    drafter = SuffixDrafter(cache, DraftLimits(8))
    for i in range(10):
        request = make_request(f"r{i}", [1], [100 * i + t for t in LINE])
        draft_of(drafter, request)
        drafter.remove(request)
        assert cache.num_tokens <= 60
    tree = cache.tree((None, None))
    tree.check()
    assert tree.num_tokens == 60
    assert draft_of(drafter, make_request("x", [1], [t for t in LINE[:8]])) == []
    assert draft_of(drafter, make_request("y", [1], [900 + t for t in LINE[:8]])) == [900 + t for t in LINE[8:16]]


def test_a_saved_cache_drafts_the_same(tmp_path):
    file = tmp_path / "cache.npz"
    drafter = SuffixDrafter(SuffixCache(24), DraftLimits(8), cache_file=file)
    for i in range(3):
        request = make_request(f"r{i}", [1], [100 * i + t for t in LINE], cache_salt="s" if i == 2 else None)
        draft_of(drafter, request)
        drafter.remove(request)
    drafter.save()
    again = SuffixDrafter(SuffixCache(24), DraftLimits(8), cache_file=file)
    assert draft_of(again, make_request("x", [1], [100 + t for t in LINE[:8]])) == [100 + t for t in LINE[8:16]]
    assert draft_of(again, make_request("y", [1], [200 + t for t in LINE[:8]])) == []
    file.write_bytes(b"nonsense")
    with pytest.raises(UsageError, match=r"cache\.npz"):
        SuffixDrafter(SuffixCache(24), DraftLimits(8), cache_file=file)


def test_no_cache_keeps_nothing():
    drafter = SuffixDrafter(SuffixCache(24, max_requests=0), DraftLimits(8))
    request = make_request("a", LINE, LINE[:8])
    assert draft_of(drafter, request) == LINE[8:16]
    drafter.remove(request)
    assert not drafter.cache.namespaces


def test_prompt_look_up_finds_the_latest_earlier_occurrence():
    index = NGramIndex(1, 3)
    index.extend([1, 2, 3, 4, 1, 2, 9, 9, 5, 1, 2])
    assert index.continuation(3) == [9, 9, 5]
    index.extend([77])
    assert index.continuation(3) == []


# -- the gate ----------------------------------------------------------------------------------------------------------------------


def run_gate(gate, steps, plain_ms, drafted_ms, accepted, batch=1):
    """Share of the steps that drafted, and milliseconds per token."""
    drafted = tokens = spent = 0
    for _ in range(steps):
        if gate.open_for(batch) and gate.admits("r", batch):
            drafted += 1
            spent += drafted_ms
            tokens += 1 + accepted
            gate.measured(batch, drafted_ms, [("r", accepted)], True)
        else:
            spent += plain_ms
            tokens += 1
            gate.measured(batch, plain_ms, [], False)
    return drafted / steps, spent / tokens


def test_the_gate_keeps_drafts_that_pay_and_drops_those_that_do_not():
    share, cost = run_gate(Gate(), 4000, 2.0, 3.0, 2)
    assert share > 0.97 and cost < 1.03 * 1.0
    share, cost = run_gate(Gate(), 4000, 2.0, 4.0, 0.5)
    assert share < 0.03 and cost < 2.0 / 0.97


def test_drafting_comes_back_when_it_pays_again():
    gate = Gate()
    run_gate(gate, 2000, 2.0, 4.0, 0.2)
    share, _ = run_gate(gate, 3000, 2.0, 3.0, 3)
    assert share > 0.6
    share, _ = run_gate(gate, 3000, 2.0, 6.0, 0.2)
    assert share < 0.2


def test_batch_sizes_are_judged_apart():
    gate = Gate()
    run_gate(gate, 500, 2.0, 3.0, 2, batch=1)
    run_gate(gate, 500, 20.0, 90.0, 2, batch=64)
    assert gate.arm(1).drafts and not gate.arm(64).drafts


def test_trials_that_cost_much_become_rare():
    """Catching up makes the first step of a trial twenty times as slow; what trials lose stays a small share all the same."""
    gate, drafted_before, times = Gate(), False, []
    for _ in range(4000):
        drafts = gate.open_for(1) and gate.admits("r", 1)
        times.append((3.5 if drafted_before else 40.0) if drafts else 2.0)
        gate.measured(1, times[-1], [("r", 0)] if drafts else [], drafts)
        drafted_before = drafts
    settled = times[200:]
    assert sum(settled) < 1.03 * 2.0 * len(settled)
    assert max(settled) == 40.0, "it is still tried"


def noisy_run(gate, steps, batch, plain_ms, fixed_ms, rates, seed=0):
    """Requests of different luck in one batch; a drafted step costs `fixed_ms` more. Milliseconds per token and steps that drafted."""
    rng = np.random.default_rng(seed)
    spent = tokens = drafted = 0.0
    for _ in range(steps):
        open_ = gate.open_for(batch)
        who = [i for i in range(batch) if open_ and gate.admits(str(i), batch)]
        accepted = [(str(i), int(rng.geometric(1 / (1 + rates[i])) - 1)) for i in who]
        step_ms = (plain_ms + (fixed_ms if who else 0.0)) * rng.uniform(0.9, 1.2) * (4 if rng.random() < 0.02 else 1)
        spent, tokens, drafted = spent + step_ms, tokens + batch + sum(n for _, n in accepted), drafted + bool(who)
        if who or not open_:
            gate.measured(batch, step_ms, accepted, bool(who))
    return spent / tokens, drafted / steps


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("gain", [0.5, 0.8, 1.3, 2.0])
def test_bad_luck_and_hiccups_do_not_mislead_the_gate(batch, gain):
    """Guesses come geometrically, times scatter and sometimes quadruple: the gate stays near the better arm all the same."""
    extra = (1 + 1.0) / gain - 1.0  # of a plain step, where one guess per step and request is accepted
    cost, _ = noisy_run(Gate(), 4000, batch, 10.0, 10.0 * extra, [1.0] * batch)
    plain, _ = noisy_run(_Fixed(False), 4000, batch, 10.0, 10.0 * extra, [1.0] * batch)
    always, _ = noisy_run(_Fixed(True), 4000, batch, 10.0, 10.0 * extra, [1.0] * batch)
    assert cost < 1.05 * min(plain, always)


class _Fixed:
    """A gate that does not think."""

    def __init__(self, open_):
        self.open = open_

    def open_for(self, batch):
        return self.open

    def admits(self, request_id, batch):
        return True

    def measured(self, *_):
        pass


def test_requests_without_luck_stop_drafting_and_leave_the_others_alone():
    gate = Gate()
    noisy_run(gate, 600, 4, 10.0, 4.0, [2.0, 2.0, 2.0, 0.0])
    assert gate.arm(4).drafts
    believed = [gate.requests[str(i)].believed(gate.arm(4).accepted.value) for i in range(4)]
    assert believed[3] < 0.6 < min(believed[:3])


def test_a_batch_size_never_seen_is_judged_by_smaller_ones():
    gate = Gate()
    run_gate(gate, 400, 2.0, 9.0, 0.2, batch=4)
    assert not any(gate.open_for(16) for _ in range(10)), "what loses at 4 loses at 16"
    assert any(gate.open_for(16) for _ in range(40)), "but it is tried"
