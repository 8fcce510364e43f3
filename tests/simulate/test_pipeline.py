"""The cluster simulator: exact on cases that can be worked out by hand, lawful on random ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wager.errors import UsageError, WagerError
from wager.hardware.cluster import Link
from wager.simulate.nodes import NodeModel, Stage
from wager.simulate.pipeline import Change, Simulator
from wager.simulate.trace import Arrival, all_at_once, poisson, read_trace

LAYERS = 4


class RoundRobin:
    """Paths through the nodes that hold each half, in turn."""

    def __init__(self, limit=1000):
        self.turn = self.active = 0
        self.limit, self.nodes, self.ended_calls = limit, {}, 0

    def changed(self, nodes):
        self.nodes = nodes

    def route(self, request, now_s, state):
        halves = [[n for n in self.nodes.values() if n.first == first] for first in (0, 2)]
        if self.active >= self.limit or not all(halves):
            return None
        self.turn += 1
        self.active += 1
        return tuple(Stage((n := half[self.turn % len(half)]).name, n.first, n.last) for half in halves)

    def iterated(self, request, path, tokens):
        assert tokens == 1

    def ended(self, request, path):
        self.active -= 1
        self.ended_calls += 1


def node(name, first, blocks=100, **fields):
    prompt = tuple(0.01 * t for t in range(101))
    decode = (0.0, 0.1, 0.15, 0.2)
    return NodeModel(name, first, first + 2, prompt, decode, blocks, **fields)


FAST = Link(1e9, 0.0)


def simulator(arrivals, nodes=None, link=FAST, **fields):
    nodes = nodes or [node("a", 0), node("b", 2)]
    return Simulator(nodes, lambda a, b: link, LAYERS, 1000.0, fields.pop("router", RoundRobin()), arrivals, **fields)


def test_one_request_takes_the_sum_of_its_stages_and_links():
    link = Link(1000.0, 0.5)  # 1000 bytes/s: a token id takes 2 ms, an activation 1 s
    record = simulator([Arrival(1.0, 10, 2)], link=link).run().records[0]
    prompt = (0.02 + 0.5) + 2 * 0.1 + (10 + 0.5) + 2 * 0.1 + (0.002 + 0.5)
    decode = (0.002 + 0.5) + 2 * 0.1 + (1 + 0.5) + 2 * 0.1 + (0.002 + 0.5)
    assert record.token_s == pytest.approx([1 + prompt, 1 + prompt + decode])


def test_requests_that_wait_together_are_one_batch():
    timeline = simulator([Arrival(0.0, 1, 1)] + [Arrival(0.01, 1, 1)] * 2).run()
    first, *later = [r.token_s[0] for r in timeline.records]
    assert first == pytest.approx(0.4, abs=1e-5)
    assert later == pytest.approx([0.2 + 0.3 + 0.3] * 2, abs=1e-4)  # two share a batch: 0.15 s per layer
    assert timeline.batches == 4


def test_a_link_carries_one_message_after_another():
    slow = Link(100.0, 0.0)  # an activation takes 10 s
    timeline = simulator([Arrival(0.0, 1, 1), Arrival(0.25, 1, 1)], link=slow).run()
    done = sorted(r.token_s[0] for r in timeline.records)
    assert done[1] - done[0] == pytest.approx(10.0, abs=0.05)


def test_a_partial_stage_runs_only_its_layers():
    nodes = [NodeModel("a", 0, 3, (0, 1.0), (0, 1.0), 100), NodeModel("b", 1, 4, (0, 1.0), (0, 1.0), 100)]

    class Partial(RoundRobin):
        def route(self, request, now_s, state):
            return Stage("a", 0, 3), Stage("b", 3, 4)

    timeline = simulator([Arrival(0, 1, 1)], nodes, router=Partial()).run()
    assert timeline.records[0].token_s[0] == pytest.approx(4.0, abs=1e-5)


def test_a_path_that_skips_a_layer_is_refused():
    class Skips(RoundRobin):
        def route(self, request, now_s, state):
            return Stage("a", 0, 2), Stage("b", 3, 4)

    with pytest.raises(UsageError, match="layer 2"):
        simulator([Arrival(0, 1, 1)], router=Skips()).run()


def test_cached_tokens_are_held_but_not_computed():
    sim = simulator([Arrival(0.0, 0, 1, cached_tokens=64)])
    sim.run(0.05)
    assert sim.nodes["a"].kv_used == 2 * 5 and sim.nodes["b"].kv_used == 2 * 4
    assert sim.run().records[0].token_s[0] == pytest.approx(0.4, abs=1e-5)


def test_a_request_that_can_never_fit_is_named():
    nodes = [node("a", 0, blocks=2), node("b", 2)]
    with pytest.raises(WagerError, match="request 0 of 40 tokens"):
        simulator([Arrival(0.0, 40, 1)], nodes).run()


arrivals = st.lists(
    st.builds(Arrival, st.floats(0, 5), st.integers(1, 60), st.integers(1, 12)), min_size=1, max_size=25
)


@settings(max_examples=40, deadline=None)
@given(arrivals, st.integers(5, 30), st.booleans(), st.integers(1, 30))
def test_conservation_under_churn_and_short_memory(requests, blocks, churn, limit):
    nodes = [node("a", 0, blocks), node("a2", 0, blocks, usd_per_h=3600.0), node("b", 2, blocks), node("b2", 2, blocks)]
    changes = [Change(1.0, leave=("a",)), Change(2.0, join=(node("a", 0, blocks),), leave=("b2",))] if churn else []
    router = RoundRobin(limit)
    sim = simulator(sorted(requests, key=lambda a: a.arrival_s), nodes, changes=changes, router=router)
    for step in np.arange(0.1, 8, 0.35):
        sim.run(float(step))
        sim.check()
    timeline = sim.run()
    sim.check()
    assert all(r.finished for r in timeline.records)
    assert sum(len(r.token_s) for r in timeline.records) == sum(a.output_tokens for a in requests)
    assert all(r.token_s == sorted(r.token_s) and r.token_s[0] > r.arrival_s for r in timeline.records)
    assert all(n.kv_used == 0 for n in sim.nodes.values()) and router.active == 0
    assert all(share <= 1 for share in timeline.kv_peak.values())
    assert timeline.cost_usd == pytest.approx(timeline.end_s)
    if not churn and blocks >= 30 and len(requests) * 5 < blocks:
        assert sum(r.restarts for r in timeline.records) == 0


def test_a_machine_that_comes_back_keeps_its_first_life_in_the_picture():
    changes = [Change(2.0, leave=("a",)), Change(5.0, join=(node("a", 0),))]
    sim = simulator([Arrival(0.5 * i, 4, 4) for i in range(20)], changes=changes)
    sim.keep_busy = True
    timeline = sim.run()
    begun = [start for start, _, _ in timeline.busy["a"]]
    assert begun == sorted(begun) and begun[0] < 2.0 and begun[-1] > 5.0
    assert timeline.node_up_s["a"] == pytest.approx(timeline.end_s - 3.0)
    assert timeline.node_busy_s["a"] == pytest.approx(sum(end - start for start, end, _ in timeline.busy["a"]))


def test_lost_machines_cost_recomputation_and_nothing_else():
    requests = [Arrival(0.0, 10, 30)] * 4
    nodes = [node("a", 0), node("a2", 0), node("b", 2)]
    calm = simulator(requests, nodes).run()
    hit = simulator(requests, nodes, changes=[Change(3.0, leave=("a",))]).run()
    assert sum(r.restarts for r in calm.records) == 0 < sum(r.restarts for r in hit.records)
    assert all(r.finished for r in hit.records) and hit.end_s > calm.end_s
    assert all(r.recomputed_tokens >= 10 for r in hit.records if r.restarts)


def test_the_mean_wait_of_a_single_server_queue_is_the_textbook_one():
    """Poisson arrivals, fixed service, one at a time (M/D/1): mean wait = rho s / (2 (1 - rho))."""
    service, rho = 0.2, 0.7
    arrivals = poisson([(1, 1)], rho / service, 6000.0, np.random.default_rng(0))
    one = [NodeModel("a", 0, 4, (0, 1.0), (0.0, service / 4), 10**6, max_decodes=1)]

    class Direct(RoundRobin):
        def route(self, request, now_s, state):
            return (Stage("a", 0, 4),)

    timeline = simulator(arrivals, one, link=Link(1e12), router=Direct()).run()
    wait = np.mean([r.latency_s - service for r in timeline.records])
    assert wait == pytest.approx(rho * service / (2 * (1 - rho)), rel=0.06)


def test_summary_goodput_and_series():
    timeline = simulator([Arrival(0.0, 10, 5), Arrival(0.0, 10, 1)], keep_busy=True).run()
    assert timeline.goodput(1e9, 1e9) == 1 and timeline.goodput(1e-9, 1e9) == 0
    assert timeline.summary()["finished"] == 2
    assert timeline.series(0.5)["tokens_per_s"].sum() * 0.5 == 6
    assert sum(end - start for start, end, _ in timeline.busy["a"]) == pytest.approx(timeline.node_busy_s["a"])


def test_plot_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from wager.simulate.plot import plot

    path = plot(simulator([Arrival(0.0, 10, 5)], keep_busy=True).run(), tmp_path / "run.svg")
    assert path.read_text().startswith("<?xml")
    with pytest.raises(UsageError, match="gif"):
        plot(simulator([Arrival(0.0, 10, 5)]).run(), tmp_path / "run.gif")


def test_traces_are_read_and_refused(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,context_tokens,generated_tokens\n0.5,10,3\n0.6,9999,3\n0.7,5,0\n")
    assert read_trace(path, max_prompt=2048) == [Arrival(0.5, 10, 3)]
    assert all_at_once(read_trace(path))[1] == Arrival(0.0, 9999, 3)
    path.write_text("arrival_s,context_tokens,generated_tokens\n0.5,x,3\n")
    with pytest.raises(UsageError, match="line 2"):
        read_trace(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="columns a, b"):
        read_trace(path)
