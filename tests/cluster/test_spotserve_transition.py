"""Moving between layouts: bytes add up, memory and deadlines are kept, pipelines begin when their bytes are there, no token is made twice."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cluster.test_spotserve import churn, cloud, placed, toy
from wager.cluster.spotserve import migration
from wager.cluster.spotserve.cloud import Cloud
from wager.cluster.spotserve.inspect import describe_move, parse_layout
from wager.cluster.spotserve.latency import Layout
from wager.cluster.spotserve.load import Load
from wager.cluster.spotserve.mapper import Sizes, inherit
from wager.cluster.spotserve.service import Batch, Served, Service
from wager.cluster.spotserve.simulate import SpotSimulation
from wager.cluster.spotserve.transition import Mover, perform
from wager.errors import UsageError
from wager.simulate.trace import Arrival

LAYOUTS = st.builds(Layout, st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]))


def batches(layout, done):
    return {
        d: Batch([Served(10 * d + i, 0.0, 32, done=done + i) for i in range(layout.batch)], 5.0, 0.0)
        for d in range(layout.data)
    }


def memory(model, layout, layers_beside):
    stage = math.ceil(model.layers / layout.pipeline)
    return (stage * (model.layer_bytes + layout.batch * model.kv_bytes(96)) + layers_beside * model.layer_bytes) / 1.0


@settings(max_examples=60, deadline=None)
@given(LAYOUTS, LAYOUTS, st.integers(0, 20), st.floats(0, 4), st.floats(0, 40), st.integers(0, 3))
def test_bytes_add_up_and_what_moves_ahead_fits_and_is_in_time(old, new, done, layers_beside, within_s, lost):
    model, held = toy(), placed(old)
    here = Cloud(device_memory_bytes=memory(model, old, layers_beside), network_bytes_per_s=2e7, background_share=0.5)
    devices = [*list(held)[lost:], *(f"new{i}/0" for i in range(new.devices))]
    mover = Mover(model, here, context=96, output=32)
    step = mover.plan(old, held, batches(old, done), new, devices, ahead_for_s=within_s)
    prompt = 64
    kv = {d: sum(model.kv_bytes(prompt + r.done) for r in b.requests) for d, b in batches(old, done).items()}
    whole = migration.plan(old, held, new, step.goal, Sizes(model.layers, model.layer_bytes, kv), step.heirs)
    assert step.moved_bytes == pytest.approx(whole.moved_bytes)
    assert migration.verify(whole, old, held, new, step.goal, model.layers) == []
    assert all(t.kind == "weights" for t in step.ahead) and step.ahead_s <= within_s
    for device in step.goal:
        beside = sum(t.size_bytes for t in step.ahead if t.target == device)
        in_use = mover._in_use(old, held[device]) if device in held else 0.0
        assert not beside or beside + in_use <= here.device_memory_bytes * (1 + 1e-9)
    for t in step.after:
        place = step.goal[t.target]
        alone = 0.0 if t.source == migration.STORAGE else t.size_bytes / here.local_bytes_per_s
        assert step.ready_s[place.data, place.stage] >= here.regroup_s + alone
    again = mover.plan(old, held, batches(old, done), new, devices, goal=step.goal, arrived=step.ahead)
    assert again.moved_bytes == pytest.approx(step.moved_bytes)
    assert sum(t.size_bytes for t in again.after) == pytest.approx(sum(t.size_bytes for t in step.after))


@settings(max_examples=60, deadline=None)
@given(LAYOUTS, LAYOUTS, st.integers(1, 20))
def test_performing_a_move_loses_no_request_and_begins_nothing_too_early(old, new, done):
    model, held = toy(), placed(old)
    service = Service(model, [])
    service.layout, service.batches = old, batches(old, done)
    before = sorted(r.index for r in service.unfinished())
    devices = [*held, *(f"new{i}/0" for i in range(new.devices))]
    mover = Mover(model, Cloud(network_bytes_per_s=2e8), context=96, output=32)
    step = mover.plan(old, held, service.batches, new, devices)
    perform(service, step, 10.0)
    assert sorted(r.index for r in service.unfinished()) == before
    # a pipeline that does not stop ends the batch that it has
    assert all(len(b.requests) <= (old.batch if d in step.same else new.batch) for d, b in service.batches.items())
    assert all(r.done == 0 for r in service.queue)
    for d in range(new.data):
        if d in step.same and not any(step.ready_s[d, p] for p in range(new.pipeline)):
            continue
        begins = service.batches[d].ready_s if d in service.batches else service.free_s[d]
        assert begins >= 10.0 + step.ready_s[d, 0]


def test_the_same_layout_on_the_same_machines_does_not_stop():
    model, layout = toy(), Layout(2, 2, 2, 2)
    service = Service(model, [])
    service.layout, service.batches = layout, batches(layout, 3)
    ready = {d: b.ready_s for d, b in service.batches.items()}
    step = Mover(model, Cloud(), 96, 32).plan(layout, placed(layout), service.batches, layout, list(placed(layout)))
    perform(service, step, 4.0)
    assert step.moved_bytes == 0 and step.stop_s == 0
    assert {d: b.ready_s for d, b in service.batches.items()} == ready


def test_no_token_is_generated_twice_when_the_notice_is_long_enough():
    rng = np.random.default_rng(3)
    arrivals = [Arrival(float(t), 64, 32) for t in np.cumsum(rng.exponential(1.5, 100))]
    out = SpotSimulation(toy(), churn(), arrivals, "spotserve", cloud()).run()
    assert out.recomputed_tokens == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.001, 3), min_size=1, max_size=60),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)
def test_every_request_is_served_once_and_nobody_idles_while_work_waits(gaps, data, stages, batch, continuous):
    requests = [Served(i, float(t), 32) for i, t in enumerate(np.cumsum(gaps))]
    service = Service(toy(layers=200), requests, continuous)
    service.layout = Layout(data, stages, 1, batch)
    at = 0.0
    while any(r.finished_s is None for r in requests):
        service.serve_until(at)
        idle = [d for d in range(data) if d not in service.batches and service.free_s.get(d, 0.0) < at]
        waiting = [r for r in service.queue if r.arrival_s < at]
        assert not (idle and waiting)
        assert all(0 < len(b.everyone) <= batch and b.requests for b in service.batches.values())
        at += 0.5
    assert all(r.done == r.generated == r.tokens for r in requests)
    alone = service.model.times(Layout(1, stages, 1, 1)).total(32)
    assert all((r.finished_s or 0.0) - r.arrival_s >= alone - 1e-6 for r in requests)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.sampled_from([1, 2, 4]))
def test_what_waits_is_spread_evenly_over_pipelines_that_are_ready(waiting, data, batch):
    service = Service(toy(layers=200), [Served(i, 0.0, 32) for i in range(waiting)], continuous=True)
    service.layout = Layout(data, 1, 1, batch)
    service.serve_until(0.2)
    sizes = [service._size(d) for d in range(data)]
    assert sum(sizes) == min(waiting, data * batch)
    assert max(sizes) - min(sizes) <= 1


def test_a_request_joins_at_the_next_step_and_the_others_wait_for_its_prefill():
    model = toy(layers=200)
    one, two = model.times(Layout(1, 1, 1, 1)), model.times(Layout(1, 1, 1, 2))
    came = one.prefill + 3.5 * one.step
    requests = [Served(0, 0.0, 10), Served(1, came, 10)]
    service = Service(model, requests, continuous=True)
    service.layout = Layout(1, 1, 1, 2)
    service.serve_until(1e9)
    joined = one.prefill + 4 * one.step
    assert requests[0].finished_s == pytest.approx(joined + one.prefill + 6 * two.step)
    assert requests[1].finished_s == pytest.approx(joined + one.prefill + 6 * two.step + 4 * one.step)


def test_a_prefill_fills_what_steps_leave_of_the_stages():
    """Two stages: the first request's steps become longer by a layer each and do not stop, the second's prefill gets the rest of the time."""
    model = toy(layers=200)
    one, two = (model.times(Layout(1, 2, 1, b)) for b in (1, 2))
    requests = [Served(0, 0.0, 200), Served(1, one.prefill + 3.5 * one.step, 10)]
    service = Service(model, requests, continuous=True)
    service.layout = Layout(1, 2, 1, 2)
    service.serve_until(1e9)
    layer = model.fix * model.prefill_ms[1, 1] / 1e3
    step, progress = one.step + layer, one.step + layer - one.busy
    assert one.beside(one) == pytest.approx((step, progress)) and 0 < one.busy < one.step
    count = math.ceil(one.prefill / progress)
    joined = one.prefill + 4 * one.step + count * step
    assert count * layer < one.prefill  # what a stop would have cost
    assert requests[1].finished_s == pytest.approx(joined + 10 * two.step)
    assert requests[0].finished_s == pytest.approx(joined + 10 * two.step + (200 - 4 - count - 10) * one.step)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_no_stage_works_longer_than_there_is_time(stages, batch, joining):
    model = toy(layers=200)
    now, joins = (model.times(Layout(1, stages, 1, b)) for b in (batch, joining))
    step, progress = now.beside(joins)
    assert now.busy <= now.step * (1 + 1e-9) and step > now.step
    assert progress + now.busy <= step * (1 + 1e-9)
    if stages == 1:
        assert now.busy == pytest.approx(now.step)


def test_a_stop_sends_back_who_was_joining_and_nobody_else():
    model, layout = toy(), Layout(1, 2, 1, 4)
    service = Service(model, [], continuous=True)
    ready, old = Served(2, 2.0, 32), Served(0, 0.0, 32, done=7, generated=7)  # one has its KV and no token yet
    joining = Served(1, 3.0, 32)
    service.layout, service.batches = layout, {0: Batch([old, ready], 4.0, 0.5, [joining])}
    assert {r.index for r in service.unfinished()} == {0, 1, 2} == {r.index for r in service.fork([]).unfinished()}
    held, target = placed(layout), Layout(1, 1, 1, 4)
    step = Mover(model, Cloud(network_bytes_per_s=1e9), 96, 32).plan(
        layout, held, service.batches, target, list(held)[:1]
    )
    perform(service, step, 4.2)
    assert [r.index for r in service.batches[0].requests] == [0, 2] and old.done == 7
    assert [r.index for r in service.queue] == [1] and joining.generated == 0


def test_serving_continuously_shortens_the_tail():
    def tail(continuous):
        requests = [Served(i, 4.0 * i, 32) for i in range(200)]
        service = Service(toy(layers=600), requests, continuous)
        service.layout = Layout(2, 1, 1, 4)
        service.serve_until(1e9)
        assert all(r.finished_s is not None for r in requests)
        return max((r.finished_s or 0.0) - r.arrival_s for r in requests[20:])

    assert tail(True) < tail(False)


def test_a_prefill_that_a_stop_interrupts_costs_nobody_else_a_token():
    model, layout = toy(), Layout(1, 1, 1, 4)
    service = Service(model, [], continuous=True)
    old, joined = Served(0, 0.0, 32, done=7, generated=7), Served(1, 3.0, 32)
    service.layout, service.batches = layout, {0: Batch([old, joined], 4.0, 0.5)}
    held, target = placed(layout), Layout(1, 2, 1, 4)
    step = Mover(model, Cloud(network_bytes_per_s=1e9), 96, 32).plan(
        layout, held, service.batches, target, [*held, "new/0"]
    )
    perform(service, step, 4.2)
    assert [r.index for r in service.batches[0].requests] == [0] and old.done == 7
    assert [r.index for r in service.queue] == [1] and joined.generated == 0


def test_a_forecast_knows_only_the_past_and_has_its_rate():
    times = list(np.cumsum(np.random.default_rng(0).exponential(2.0, 500)))
    load, other = Load(times, 30.0, 0.0), Load([t for t in times if t <= 400.0], 30.0, 0.0)
    ahead = [load.forecast(400.0, 200.0, np.random.default_rng(i)) for i in range(40)]
    assert ahead[0] == other.forecast(400.0, 200.0, np.random.default_rng(0))
    assert all(400.0 < t < 600.0 for one in ahead for t in one)
    assert np.mean([len(one) for one in ahead]) == pytest.approx(load.rate(400.0) * 200.0, rel=0.15)


def test_batches_that_find_no_slot_are_computed_again():
    model, old = toy(), Layout(2, 1, 1, 2)
    service = Service(model, [])
    service.layout, service.batches = old, batches(old, 5)
    target, held = Layout(1, 1, 1, 2), placed(old)
    step = Mover(model, Cloud(), 96, 32).plan(old, held, service.batches, target, list(held))
    assert step.heirs == inherit({0: [5, 6], 1: [5, 6]}, target) == {0: (0,)}
    perform(service, step, 6.0)
    assert [r.index for r in service.queue] == [10, 11] and [r.index for r in service.batches[0].requests] == [0, 1]


def test_a_move_is_described_with_its_bytes_and_bad_questions_are_refused():
    lines = describe_move(toy(), Cloud(), Layout(2, 2, 2, 1), Layout(1, 2, 2, 4), ["node-1"], 5, 64, 32)
    needed = 12 * toy().layer_bytes / 1e9
    assert lines[0].endswith("without node-1") and sum("held pipeline 0" in line for line in lines) == 4
    assert any(f"in place {needed:.2f} GB" in line for line in lines), lines
    assert any("pipeline 0 takes those of 0 and 1" in line for line in lines)
    for wrong, how in (
        ("node-9 holds nothing", (Layout(2, 2, 2, 1), Layout(1, 1, 1, 1), ["node-9"])),
        ("needs 8 devices and 4 stay", (Layout(2, 2, 2, 1), Layout(2, 2, 2, 1), ["node-0"])),
    ):
        with pytest.raises(UsageError, match=wrong):
            describe_move(toy(), Cloud(), *how, 5, 64, 32)
    with pytest.raises(UsageError, match="must be D,P,M,B"):
        parse_layout("2,2,8")
