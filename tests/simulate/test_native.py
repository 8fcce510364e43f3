"""The compiled simulator: the reference's timeline to the last bit, on random clusters, loads, memories and routers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wager.cluster.helix.flow import solve_flow
from wager.cluster.helix.route import FlowRouter
from wager.errors import BuildError, UsageError, WagerError
from wager.hardware.cluster import Link, uniform
from wager.hardware.layer_cost import ModelCard
from wager.simulate import native
from wager.simulate.nodes import NodeModel, Stage
from wager.simulate.pipeline import Simulator
from wager.simulate.trace import Arrival

LAYERS = 4
CARD = ModelCard("tiny", LAYERS, 8, 1e6, 64)


@pytest.fixture(autouse=True)
def compiled():
    try:
        native.library()
    except BuildError as error:
        pytest.skip(str(error))


def same(one, other):
    assert [vars(r) for r in one.records] == [vars(r) for r in other.records]
    for name in ("end_s", "busy", "node_busy_s", "node_up_s", "kv_peak", "cost_usd", "events", "batches"):
        assert getattr(one, name) == getattr(other, name), name


def both(nodes, link, router, arrivals, until_s=None, keep_busy=True):
    """(reference, compiled), each with a router of its own."""
    links = link if callable(link) else lambda a, b: link
    reference = Simulator(nodes, links, LAYERS, 1000.0, router(), arrivals, keep_busy=keep_busy).run(until_s)
    return reference, native.simulate(nodes, links, LAYERS, 1000.0, router(), arrivals, until_s, keep_busy)


class AnyPath:
    """Random lawful paths through whatever holds the next layer; at most `limit` requests at a time. Iterations count one by one."""

    def __init__(self, limit=6, seed=0):
        self.limit, self.active, self.nodes, self.iterations = limit, set(), {}, 0
        self.rng = np.random.default_rng(seed)

    def changed(self, nodes):
        self.nodes = nodes

    def route(self, request, now_s, state):
        if len(self.active) >= self.limit:
            return None
        path, at = [], 0
        while at < LAYERS:
            ways = [n for n in self.nodes.values() if n.first <= at < n.last]
            chosen = ways[int(self.rng.integers(len(ways)))]
            path.append(Stage(chosen.name, at, chosen.last))
            at = chosen.last
        self.active.add(request.index)
        return tuple(path)

    def iterated(self, request, path, tokens):
        self.iterations += tokens

    def ended(self, request, path):
        self.active.remove(request.index)


@st.composite
def clusters(draw):
    windows = [(0, 2), (2, 4), *draw(st.lists(st.sampled_from([(0, 4), (1, 3), (0, 3), (1, 4), (3, 4)]), max_size=3))]
    slow = draw(st.lists(st.floats(1e-4, 0.05), min_size=len(windows), max_size=len(windows)))
    blocks = draw(st.integers(6, 40))
    return [
        NodeModel(
            f"n{i}", first, last, tuple(s * t for t in range(1, 60)), (0.0, s, 1.3 * s, 1.7 * s), blocks,
            draw(st.integers(1, 3)), draw(st.integers(10, 90)), draw(st.integers(1, 9)), draw(st.sampled_from([0.0, 1e-4])), 1.5,
        )
        for i, ((first, last), s) in enumerate(zip(windows, slow, strict=True))
    ]  # fmt: skip


requests = st.lists(
    st.builds(Arrival, st.floats(0, 3), st.integers(1, 50), st.integers(1, 25), st.sampled_from([0, 0, 0, 16])),
    min_size=1, max_size=30,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(clusters(), requests, st.integers(1, 12), st.integers(0, 5), st.sampled_from([None, 1.0]))
def test_every_time_is_the_reference_s(nodes, arrivals, limit, seed, until_s):
    link = Link(1e5, 1e-3)
    routers = []

    def router():
        routers.append(AnyPath(limit, seed))
        return routers[-1]

    try:
        reference = Simulator(nodes, lambda a, b: link, LAYERS, 1000.0, router(), arrivals, keep_busy=True).run(until_s)
    except WagerError as error:
        with pytest.raises(WagerError) as raised:
            native.simulate(nodes, lambda a, b: link, LAYERS, 1000.0, router(), arrivals, until_s, True)
        assert str(raised.value) == str(error)
        return
    same(reference, native.simulate(nodes, lambda a, b: link, LAYERS, 1000.0, router(), arrivals, until_s, True))
    assert routers[0].iterations == routers[1].iterations and routers[0].active == routers[1].active


class OneByOne(FlowRouter):
    """Adds the tokens of several rounds as the reference hears of them, so that sums round alike."""

    def iterated(self, request, path, tokens):
        for _ in range(tokens):
            super().iterated(request, path, 1)


@pytest.mark.parametrize("selector", ["maxflow", "swarm", "random", "queue"])
def test_helix_routes_alike(selector):
    placement = {"n0": (0, 2), "n1": (0, 3), "n2": (2, 4), "n3": (1, 4)}
    throughput = {"a": {2: 30.0, 3: 25.0}, "b": {2: 10.0, 3: 9.0}}
    flow = solve_flow(uniform(["a", "b", "b", "a"], Link(1e9)), CARD, throughput, placement)
    nodes = [
        NodeModel(n, s, e, (0, 0.002, 0.003), (0, 0.001 + 0.0003 * i, 0.0015), 60, 2, 200, 8, 1e-5)
        for i, (n, (s, e)) in enumerate(placement.items())
    ]
    rng = np.random.default_rng(1)
    arrivals = [Arrival(float(t), int(rng.integers(1, 90)), int(rng.integers(1, 40))) for t in rng.uniform(0, 3, 120)]

    def router():
        return OneByOne(flow, placement, 15, selector, output_ratio=0.5, rng=np.random.default_rng(2))

    reference, compiled = both(nodes, Link(1e6, 1e-3), router, arrivals)
    same(reference, compiled)
    assert all(r.finished for r in compiled.records) and sum(r.restarts for r in compiled.records) > 0


def test_what_a_router_raises_comes_out():
    class Broken(AnyPath):
        def ended(self, request, path):
            raise KeyError("lost")

    nodes = [NodeModel("a", 0, 4, (0, 0.1), (0, 0.1), 100)]
    with pytest.raises(KeyError, match="lost"):
        native.simulate(nodes, lambda a, b: Link(1e9), LAYERS, 1000.0, Broken(), [Arrival(0.0, 5, 2)])


def test_a_missing_link_is_named():
    nodes = [NodeModel("a", 0, 2, (0, 0.1), (0, 0.1), 100), NodeModel("b", 2, 4, (0, 0.1), (0, 0.1), 100)]
    links = lambda a, b: None if (a, b) == ("a", "b") else Link(1e9)
    with pytest.raises(UsageError, match="from a to b"):
        native.simulate(nodes, links, LAYERS, 1000.0, AnyPath(), [Arrival(0.0, 5, 2)])


def test_without_a_compiler_the_reference_runs_and_says_so(monkeypatch, caplog):
    def fails():
        raise BuildError("no C++ compiler found")

    native.available.cache_clear()
    monkeypatch.setattr(native, "library", fails)
    nodes = [NodeModel("a", 0, 4, (0, 0.1), (0, 0.1), 100)]
    timeline = native.simulate(nodes, lambda a, b: Link(1e9), LAYERS, 1000.0, AnyPath(), [Arrival(0.0, 5, 2)])
    assert timeline.records[0].finished and "no C++ compiler" in caplog.text
    native.available.cache_clear()
