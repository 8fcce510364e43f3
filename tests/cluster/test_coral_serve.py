"""Serving a Coral plan in simulation: every request once, KV never over its room, batches as large as the objective allows, the objective kept
where the plan has room to spare."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wager.cluster.coral.allocate import Allocator
from wager.cluster.coral.decode import Decode, DecodeReplica, DecodeSimulation, DecodeStage, shared_seconds
from wager.cluster.coral.market import Market
from wager.cluster.coral.rent import tables_of
from wager.cluster.coral.serve import decode_replica, replicas_of, serve_plan
from wager.cluster.coral.stage import Configuration, Demand, stage_batch, stage_throughput
from wager.cluster.coral.templates import build
from wager.errors import UsageError, WagerError
from wager.hardware.cluster import Device, Link
from wager.hardware.layer_cost import ModelCard, Roofline
from wager.simulate.timeline import Record
from wager.simulate.trace import Arrival, poisson

LINK, ROOFLINE = Link(1.25e9, 1e-3), Roofline(0.5, 0.6, 1e-5)
CARD = ModelCard("m", 12, 4096, 1e9, 1e4)
SHAPES = (Configuration(Device("big", 24e9, 9e11, 3e14), 1), Configuration(Device("small", 12e9, 3e11, 1e14), 1))
RATE = 40.0
LENGTHS = [(400, 60), (800, 90), (1200, 30)]
PROMPT, OUTPUT = 800, 60


def rented(share=1.0):
    """(libraries, market, plan) for `share` times the load."""
    demands = [
        Demand(CARD, "prefill", 1.5, share * RATE * PROMPT, PROMPT, PROMPT + OUTPUT // 2),
        Demand(CARD, "decode", 0.1, share * RATE * OUTPUT, PROMPT, PROMPT + OUTPUT // 2),
    ]
    libraries = [build(d, SHAPES, tables_of(d, SHAPES, ROOFLINE, LINK), 3) for d in demands]
    market = Market(("here",), SHAPES, np.array([[50.0, 50.0]]), np.array([[3.0, 1.0]]))
    return libraries, market, Allocator(libraries, market).allocate()


def test_the_batch_of_a_stage_is_the_one_its_throughput_was_made_of():
    for phase, objective in (("prefill", 1.5), ("decode", 0.1)):
        demand = Demand(CARD, phase, objective, 1.0, PROMPT, PROMPT)
        for share in (1.0, 0.7, 0.5):
            rates = stage_throughput(demand, SHAPES[0], share, ROOFLINE, LINK)
            for layers in (3, 6, 12):
                batch = stage_batch(demand, SHAPES[0], layers, share, ROOFLINE, LINK)
                assert (batch > 0) == (rates[layers] > 0)
                if batch and phase == "decode":
                    seconds = layers * ROOFLINE.decode_s(batch, PROMPT, CARD, SHAPES[0].device, 1)
                    assert batch / seconds == pytest.approx(rates[layers])


def test_a_plan_with_a_fifth_to_spare_keeps_its_objectives():
    """Gaps stay below the objective; prompts that must wait for a batch under way are in time twice over."""
    libraries, market, plan = rented(1.25)
    arrivals = {"m": poisson(LENGTHS, RATE, 60.0, np.random.default_rng(0))}
    timeline = serve_plan(plan, libraries, market, ROOFLINE, LINK, arrivals, 100.0)["m"]
    assert len(timeline.finished) == len(arrivals["m"])
    assert (
        np.quantile(timeline.inter_token_latencies(), 0.99) <= 0.1 + 0.4
    )  # with the transfer of the KV in one gap of each
    assert timeline.goodput(3.0, 0.1) > 0.97
    for record, arrival in zip(timeline.records, arrivals["m"], strict=True):
        assert len(record.token_s) == arrival.output_tokens and (np.diff(record.token_s) > 0).all()
        assert record.token_s[0] > arrival.arrival_s
    assert timeline.cost_usd == pytest.approx(plan.usd_per_h * 100 / 3600)
    assert all(0 < peak <= 1 for peak in timeline.kv_peak.values())
    assert all(busy <= timeline.end_s for busy in timeline.node_busy_s.values())


def test_more_load_than_was_planned_for_is_served_late():
    libraries, market, plan = rented()
    share = {}
    for load in (0.6, 3.0):
        arrivals = {"m": poisson(LENGTHS, RATE * load, 60.0, np.random.default_rng(0))}
        share[load] = serve_plan(plan, libraries, market, ROOFLINE, LINK, arrivals, 70.0)["m"].goodput(3.0, 0.1)
    assert share[0.6] > 0.95 > 0.6 > share[3.0]


def test_replicas_are_the_plan():
    libraries, market, plan = rented()
    replicas = replicas_of(plan, libraries, market, ROOFLINE, LINK)
    for d, library in enumerate(libraries):
        mine = replicas[library.demand.name]
        assert len(mine) == sum(n for (k, _, _), n in plan.running.items() if k == d)
        assert sum(r.tokens_per_s for r in mine) >= library.demand.tokens_per_s * (1 - 1e-9)
        for replica in mine:
            edges = [(stage[0].node.first, stage[0].node.last) for stage in replica.stages]
            assert edges[0][0] == 0 and edges[-1][1] == CARD.layers
            assert all(a[1] == b[0] for a, b in zip(edges, edges[1:], strict=False))
            assert min(sum(m.tokens_per_s for m in stage) for stage in replica.stages) >= replica.tokens_per_s * (
                1 - 1e-9
            )
    slots = [decode_replica(r) for r in replicas["m/decode"]]
    assert all(r.batch >= 1 and r.kv_tokens >= r.batch * len(r.stages) * PROMPT for r in slots)
    with pytest.raises(UsageError, match="other/prefill"):
        serve_plan(plan, libraries, market, ROOFLINE, LINK, {"other": [Arrival(0, 5, 5)]}, 1.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0.01, 1), min_size=1, max_size=5), min_size=1, max_size=3))
def test_sequences_are_shared_so_that_the_slowest_machine_is_as_fast_as_can_be(steps):
    machines = [np.concatenate([[0.0], np.cumsum(one)]) for one in steps]
    seconds = shared_seconds(machines)
    assert len(seconds) == 1 + sum(len(m) - 1 for m in machines)
    for size in range(len(seconds)):
        best = min(
            max(float(m[c]) for m, c in zip(machines, counts, strict=True))
            for counts in np.ndindex(*(len(m) for m in machines))
            if sum(counts) == size
        )
        assert seconds[size] == pytest.approx(best)


def one_replica(stages=2, batch=4, kv=10**6):
    table = np.array([0.0, *(0.010 + 0.001 * b for b in range(1, batch + 1))])
    return DecodeReplica(100.0, tuple(DecodeStage((f"s{i}",), table, kv) for i in range(stages)), 1.0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=40),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 2),
)
def test_every_token_comes_once_in_order_and_kv_never_exceeds_its_room(asked, stages, batch, replicas):
    requests = [Decode(at, context, Record(i, at, 0, output)) for i, (at, context, output) in enumerate(asked)]
    room = max(context + output for _, context, output in asked) + 20
    simulation = DecodeSimulation([one_replica(stages, batch, room)] * replicas, Link(float("inf"), 0.001), 1.0)
    simulation.run(requests, 1e6)
    for one in requests:
        assert len(one.record.token_s) == one.record.output_tokens
        gaps = np.diff([one.at_s, *one.record.token_s])
        assert (gaps >= stages * 0.011 - 1e-9).all()
        # a stage works on at most `stages` batches in turn
        assert (gaps[1:] <= stages * stages * (0.010 + 0.001 * batch) + 0.001 * stages + 1e-9).all()
    for live in simulation.live:
        assert live.kv_used == 0 and live.kv_peak <= room
        assert not any(len(g) or g.running for g in live.groups)
    assert not simulation.waiting


def test_a_request_that_no_replica_can_hold_is_refused():
    with pytest.raises(WagerError, match="the largest replica holds 50"):
        DecodeSimulation([one_replica(kv=50)], LINK, 1.0).run([Decode(0.0, 60, Record(0, 0.0, 0, 5))], 1.0)


def test_requests_are_shared_in_proportion_to_throughput():
    fast, slow = one_replica(1, 64), one_replica(1, 64)
    slow = DecodeReplica(fast.tokens_per_s / 3, slow.stages, 1.0)
    simulation = DecodeSimulation([fast, slow], LINK, 1.0)
    simulation.run([Decode(0.01 * i, 10, Record(i, 0.0, 0, 3)) for i in range(400)], 100.0)
    assert [round(x.load * x.replica.tokens_per_s) for x in simulation.live] == [300, 100]
