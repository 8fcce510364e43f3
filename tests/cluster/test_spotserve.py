"""SpotServe: the latency model against published values, matching against brute force, plans that move exactly what is missing."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wager.cluster.spotserve import arranger, controller, migration
from wager.cluster.spotserve.latency import Layout, ServedModel, read_model
from wager.cluster.spotserve.mapper import Place, Sizes, assign, inherit, places, reusable_bytes
from wager.cluster.spotserve.service import Served, Service
from wager.cluster.spotserve.simulate import POLICIES, Cloud, SpotSimulation
from wager.errors import UsageError
from wager.hardware.availability import Availability, Membership, read_membership
from wager.simulate.trace import Arrival, read_trace


def toy(layers=12, hidden=1000):
    degrees = [(tp, b) for tp in (1, 2, 4) for b in (1, 2, 4)]
    return ServedModel(
        "toy", layers, hidden, {k: 20.0 * k[1] / k[0] for k in degrees}, {k: (2 + 0.2 * k[1]) / k[0] ** 0.8 for k in degrees},
        1.0, 0.1, (0.1, 0.1, 0.1), 1.0,
    )  # fmt: skip


layouts = st.builds(Layout, st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 2]), st.just(2))
SIZES = Sizes(6, 100.0, {0: 10.0, 1: 30.0})


def placed(layout):
    return {f"n{i // 2}/{i % 2}": p for i, p in enumerate(places(layout))}


def test_the_worked_example_of_the_paper():
    """Two pipelines of 2 x 2 lose two devices; six devices go on as 2 pipelines of 3 stages."""
    old, new, layers = Layout(2, 2, 2, 1), Layout(2, 3, 1, 1), 12
    sizes = Sizes(layers, 1.0, {})
    holder = Place(0, 0, 0)  # layers 0 to 6, the first half of each
    assert reusable_bytes(old, holder, new, Place(0, 0, 0), sizes, {}) == 4 * 0.5
    assert reusable_bytes(old, holder, new, Place(0, 1, 0), sizes, {}) == 2 * 0.5
    assert reusable_bytes(old, holder, new, Place(0, 2, 0), sizes, {}) == 0
    with_kv = Sizes(layers, 1.0, {0: 1.0})
    assert reusable_bytes(old, holder, new, Place(1, 0, 0), with_kv, {0: (0,), 1: (1,)}) == 2
    assert reusable_bytes(old, holder, new, Place(0, 0, 0), with_kv, {0: (0,), 1: (1,)}) == 4
    held = placed(old)
    alive = {d: p for d, p in list(held.items())[:6]}
    goal = assign(old, alive, list(alive), new, sizes, {})
    plan = migration.plan(old, alive, new, goal, sizes, {})
    assert migration.verify(plan, old, alive, new, goal, layers) == []
    assert all(t.source in alive for t in plan.transfers)  # the other holder of every missing half is still there


@settings(max_examples=40, deadline=None)
@given(layouts, layouts, st.data())
def test_the_assignment_is_the_brute_force_best(old, new, data):
    held = placed(old)
    devices = sorted(data.draw(st.permutations(list(held))))[: max(1, min(6, old.devices))]
    if len(devices) < new.devices or new.devices > 6:
        return
    heir = inherit({0: [3], 1: [9]} if old.data == 2 else {0: [3]}, new)
    goal = assign(old, {d: held[d] for d in devices}, devices, new, SIZES, heir)
    assert sorted(goal.values()) == places(new)

    def worth(pairs):
        return sum(reusable_bytes(old, held[d], new, p, SIZES, heir) for d, p in pairs)

    best = max(worth(zip(order, places(new), strict=False)) for order in itertools.permutations(devices, new.devices))
    assert worth(goal.items()) == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(layouts, layouts, st.data(), st.floats(0.5, 4))
def test_plans_move_exactly_what_is_missing(old, new, data, most):
    held = placed(old)
    alive = dict(sorted(held.items())[: data.draw(st.integers(0, len(held)))])
    devices = [*alive, *(f"new{i}/0" for i in range(max(0, new.devices - len(alive))))]
    heir = inherit({d: [d + 1] for d in {p.data for p in alive.values()}}, new)
    goal = assign(old, alive, devices, new, SIZES, heir)
    plan = migration.plan(old, alive, new, goal, SIZES, heir, most)
    assert migration.verify(plan, old, alive, new, goal, SIZES.layers) == []
    weights = sum(t.size_bytes for t in plan.transfers if t.kind == "weights")
    needed = new.data * SIZES.layers * SIZES.layer_bytes
    in_place = sum(
        reusable_bytes(old, alive[d], new, p, Sizes(6, 100.0, {}), {}) for d, p in goal.items() if d in alive
    )
    assert weights == pytest.approx(needed - in_place)
    kinds = [t.kind for t in plan.transfers]
    assert kinds == sorted(kinds)  # "kv" before "weights": all of the cache moves first
    buffer = dict.fromkeys([*alive, *goal], 0.0)
    peak = 0.0
    for layer in plan.layer_order:
        moves = [t for t in plan.transfers if t.kind == "weights" and t.layer == layer]
        buffer = migration.buffers_after(buffer, moves, SIZES.layer_bytes)
        peak = max([peak, *buffer.values()])
    assert peak == pytest.approx(plan.peak_buffer)
    assert plan.seconds({x: x for t in plan.transfers for x in (t.source, t.target)}, 100.0, 1e9, 50.0) >= 0


def test_the_time_of_a_migration_is_that_of_the_busiest_network_card():
    old = Layout(1, 2, 1, 1)
    moves = [
        migration.Transfer("weights", i, s, t, 0, 1, 100.0)
        for i, (s, t) in enumerate([("a/0", "b/0"), ("a/0", "c/0"), ("c/0", "c/1")])
    ]
    plan = migration.Migration(tuple(moves), (0, 1, 2), 0, 0)
    assert plan.seconds({x: x[0] for x in ("a/0", "b/0", "c/0", "c/1")}, 100.0, 1000.0, 1.0) == pytest.approx(2.1)
    assert old.devices == 2


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 60), st.floats(0, 60), st.floats(0.01, 5), st.integers(0, 500))
def test_stopping_and_moving_ends_before_the_machine_leaves(notice, moving, step, left):
    steps = arranger.steps_before_leaving(notice, moving, step, left)
    assert 0 <= steps <= left
    if steps:
        assert steps * step + moving < notice + 1e-9
    assert steps == left or (steps + 1) * step >= notice - moving - 1e-9
    joining = arranger.steps_before_joining(notice, step, left)
    assert joining == left or joining * step + 1e-9 >= notice > (joining - 1) * step - 1e-9


def test_fewer_pipelines_keep_the_batches_with_most_tokens():
    assert inherit({0: [5], 1: [50], 2: [20]}, Layout(2, 1, 1, 1)) == {1: (1,), 0: (2,)}
    assert inherit({0: [5], 1: []}, Layout(3, 1, 1, 4)) == {0: (0,)}


def test_batches_share_a_pipeline_while_its_slots_last():
    assert inherit({0: [5, 5], 1: [50], 2: [20]}, Layout(1, 1, 1, 4)) == {0: (1, 2, 0)}
    assert inherit({0: [5, 5], 1: [50], 2: [20]}, Layout(1, 1, 1, 3)) == {0: (1, 2)}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(1, 99), max_size=5), max_size=5), st.integers(1, 4), st.sampled_from([1, 2, 4, 8]))
def test_inherited_batches_fit_and_none_goes_to_two_pipelines(batches, data, slots):
    old, new = dict(enumerate(batches)), Layout(data, 1, 1, slots)
    heirs = inherit(old, new)
    given_away = [d for olds in heirs.values() for d in olds]
    assert len(set(given_away)) == len(given_away) and set(heirs) <= set(range(data))
    for olds in heirs.values():
        assert len(olds) == 1 or sum(len(old[d]) for d in olds) <= slots
    left = [d for d, batch in old.items() if batch and d not in given_away]
    assert not left or len(heirs) == data


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 24), st.floats(0, 3))
def test_the_chosen_layout_keeps_up_or_none_does(devices, rate):
    model = toy()
    memory = 6 * model.layer_bytes
    chosen = controller.choose(model, devices, rate, 32, memory, 100)
    every = list(controller.layouts(model, devices, memory, 100))
    assert (chosen is None) == (not every)
    if chosen is None:
        return
    assert chosen.devices <= devices
    if controller.throughput(model, chosen, 32) <= rate:
        assert max(controller.throughput(model, c, 32) for c in every) == controller.throughput(model, chosen, 32)
        assert not any(controller.throughput(model, c, 32) > rate for c in every)


def churn():
    events = [Membership(0.0, f"n{i}", True) for i in range(4)]
    events += [
        Membership(40.0, "n1", False),
        Membership(70.0, "n4", True),
        Membership(90.0, "n0", False),
        Membership(90.0, "n2", False),
    ]
    return Availability((*events, Membership(120.0, "n5", True)), 200.0)


def cloud():
    return Cloud(
        device_memory_bytes=6 * toy().layer_bytes, storage_bytes_per_s=1e8, network_bytes_per_s=5e8, expected_rate=0.5
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_answered_once_under_churn(policy):
    rng = np.random.default_rng(3)
    arrivals = [Arrival(float(t), 64, 32) for t in np.cumsum(rng.exponential(1.5, 100))]
    out = SpotSimulation(toy(), churn(), arrivals, policy, cloud()).run()
    assert len(out.latencies_s) == 100 and (out.latencies_s > 0).all()
    assert all(r.done == r.tokens <= r.generated for r in out.requests)
    assert Counter(r.index for r in out.requests) == Counter(range(100))
    assert out.node_seconds == 40 + 130 + 90 * 2 + 200 + 80 and out.cost_usd == pytest.approx(
        out.node_seconds / 3600 * 1.9
    )


@pytest.mark.parametrize("continuous", [True, False])
def test_migration_beats_restart_and_generates_less_twice(continuous):
    rng = np.random.default_rng(3)
    arrivals = [Arrival(float(t), 64, 32) for t in np.cumsum(rng.exponential(0.3, 500))]
    slow = toy(layers=48)
    roomy = replace(cloud(), device_memory_bytes=24 * slow.layer_bytes)
    outs = {p: SpotSimulation(slow, churn(), arrivals, p, roomy, continuous=continuous).run() for p in POLICIES}
    assert outs["spotserve"].quantile(0.99) < outs["reparallelize"].quantile(0.99)
    assert outs["spotserve"].recomputed_tokens < outs["reparallelize"].recomputed_tokens
    assert outs["spotserve"].stalls_s < outs["reparallelize"].stalls_s


def test_a_pipeline_that_still_loads_is_not_ready_because_another_machine_joins():
    """Rerouting once forgot, at every change, which pipelines were loading: requests then began before their pipeline existed."""
    model, end_s = toy(layers=48), 200.0
    events = [Membership(0.0, "n0", True), Membership(50.0, "n0", False), Membership(50.0, "n1", True)]
    trace = Availability((*events, Membership(51.0, "n2", True)), end_s)
    slow = replace(cloud(), devices_per_node=1, device_memory_bytes=50 * model.layer_bytes, storage_bytes_per_s=1e8)
    arrivals = [Arrival(float(t), 64, 32) for t in (49.0, 52.0, 60.0)]
    sim = SpotSimulation(model, trace, arrivals, "reroute", slow, shape=Layout(1, 1, 1, 1))
    out = sim.run()
    ready = 50.0 + slow.engine_start_s + 48 * model.layer_bytes / slow.storage_bytes_per_s
    assert all((r.finished_s or 0.0) >= ready + model.times(Layout(1, 1, 1, 1)).total(32) - 1e-6 for r in out.requests)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.floats(1.05, 2))
def test_the_model_of_a_continuous_service_rises_with_the_load_and_is_infinite_beyond_its_throughput(
    rate, data, stages, batch, more
):
    model, layout = toy(layers=200), Layout(data, stages, 1, batch)
    reach = controller.throughput(model, layout, 32, continuous=True)
    here = controller.request_s(model, layout, 32, rate, continuous=True)
    assert (here == float("inf")) == (rate >= reach) or abs(rate - reach) < 1e-6 * reach
    assert controller.request_s(model, layout, 32, rate * more, continuous=True) >= here * (1 - 1e-6)
    assert here >= model.times(Layout(1, stages, 1, 1)).total(32) * (1 - 1e-9)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_throughput_of_a_continuous_service_is_what_it_serves(stages):
    model, layout = toy(layers=200), Layout(1, stages, 1, 4)
    reach = controller.throughput(model, layout, 32, continuous=True)
    requests = [Served(i, 0.0, 32) for i in range(200)]
    service = Service(model, requests, continuous=True)
    service.layout = layout
    service.serve_until(1e9)
    assert 200 / max(r.finished_s or 0.0 for r in requests) == pytest.approx(reach, rel=0.15)


def test_a_migration_before_a_removal_ends_before_it():
    arrivals = [Arrival(0.01 * i, 64, 32) for i in range(9000)]
    busy = replace(cloud(), expected_rate=90.0, network_bytes_per_s=2e7)  # so much that every machine is used
    out = SpotSimulation(toy(), churn(), arrivals, "spotserve", busy).run()
    for removal in (40.0, 90.0):
        began, ready = max((b, r) for b, r in out.moves if b <= removal)
        assert removal - 30 < began <= ready <= removal + 1e-6
    assert any(began < ready for began, ready in out.moves if ready <= 90)


def test_bad_requests_are_refused():
    with pytest.raises(UsageError, match="hope"):
        SpotSimulation(toy(), churn(), [Arrival(0, 1, 1)], "hope", Cloud())
    with pytest.raises(UsageError, match="tensor degree 3"):
        toy().times(Layout(1, 1, 3, 1))
    with pytest.raises(UsageError, match="at least 1"):
        Layout(0, 1, 1, 1)


@pytest.mark.parametrize(
    "profile, layout, seconds",
    [
        ("6.7B_profile", (1, 1, 4, 1), 5.447),
        ("h6144_profile", (1, 3, 4, 1), 14.373),
        ("h7168_profile", (1, 2, 8, 1), 17.540),
    ],
)
def test_latency_is_the_published_one_within_two_percent(data, profile, layout, seconds):
    model = read_model(data / "gpu-serving-profiles", f"T4-4x/megatron_{profile}")
    assert model.times(Layout(*layout)).total(128) == pytest.approx(seconds, rel=0.02)
    fewest = {"6.7B_profile": 4, "h6144_profile": 12, "h7168_profile": 16}[profile]
    memory = Cloud().device_memory_bytes
    assert controller.choose(model, fewest, 0.1, 128, memory, 640) and not controller.choose(
        model, fewest - 4, 0.1, 128, memory, 640
    )


def test_the_published_traces_are_served_faster_than_by_the_baselines(data):
    model = read_model(data / "gpu-serving-profiles", "T4-4x/megatron_h7168_profile")
    trace = read_membership(data / "spot-traces" / "spotserve-segments.csv", "trace_0203_real")
    arrivals = [
        a for a in read_trace(data / "spot-traces" / "requests-gamma-rate0.2_cv6.csv", 128) if a.arrival_s < trace.end_s
    ]
    p99 = {
        p: SpotSimulation(model, trace, arrivals, p, Cloud(expected_rate=0.2), continuous=p == "spotserve")
        .run()
        .quantile(0.99)
        for p in POLICIES
    }
    assert p99["reparallelize"] > 2.4 * p99["spotserve"] and p99["reroute"] > 2.4 * p99["spotserve"]


def test_pipelines_that_stay_keep_the_tail_below_that_of_rerouting(data):
    """Where there is little to win: a small model, whose pipelines are a machine each. The layout is never one with fewer slots."""
    model = read_model(data / "gpu-serving-profiles", "T4-4x/megatron_6.7B_profile")
    trace = read_membership(data / "spot-traces" / "spotserve-segments.csv", "trace_0203")
    arrivals = [
        a for a in read_trace(data / "spot-traces" / "requests-gamma-rate1.5_cv6.csv", 128) if a.arrival_s < trace.end_s
    ]
    known = Cloud(expected_rate=1.5)
    ours = SpotSimulation(model, trace, arrivals, "spotserve", known).run()
    shape = Layout(1, 1, 4, 8)
    for continuous in (False, True):
        reroute = SpotSimulation(model, trace, arrivals, "reroute", known, shape=shape, continuous=continuous).run()
        assert ours.quantile(0.99) < reroute.quantile(0.99)
    assert ours.recomputed_tokens == 0 and not any(h.kind == "lost" for h in ours.happened)
    assert all(layout is not None and layout.batch == 8 for _, layout in ours.layouts)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_batch_takes_a_request_from_the_future(policy):
    """Nobody is served faster than alone on the fastest layout: a batch that took requests before they came would be."""
    model, rng = toy(), np.random.default_rng(5)
    arrivals = [Arrival(float(t), 64, 32) for t in np.cumsum(rng.exponential(4.0, 40))]
    alone = min(
        model.times(c).total(32) for c in controller.layouts(model, 24, 6 * model.layer_bytes, 100) if c.batch == 1
    )
    out = SpotSimulation(model, churn(), arrivals, policy, cloud()).run()
    assert out.latencies_s.min() >= alone * (1 - 1e-9)
