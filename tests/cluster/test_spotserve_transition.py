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
from wager.cluster.spotserve.latency import Layout, StepTimes
from wager.cluster.spotserve.load import Load
from wager.cluster.spotserve.mapper import Sizes, inherit, places
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
    assert all(len(b.everyone) <= (old.batch if d in step.same else new.batch) for d, b in service.batches.items())
    assert all(r.done == 0 for r in service.queue)
    for d in range(new.data):
        if d in step.same:
            assert service.batches[d].ready_s == 5.0 and service.batches[d].requests[0].index == 10 * step.same[d]
            assert not service.batches[d].arriving or service.batches[d].arrive_s >= 10.0 + step.ready_s[d, 0]
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
    """Two stages: the first request's steps wait for the layer that has begun and do not stop, the second's prefill gets the rest of the time."""
    model = toy(layers=200)
    one, two = (model.times(Layout(1, 2, 1, b)) for b in (1, 2))
    requests = [Served(0, 0.0, 200), Served(1, one.prefill + 3.5 * one.step, 10)]
    service = Service(model, requests, continuous=True)
    service.layout = Layout(1, 2, 1, 2)
    service.serve_until(1e9)
    layer = model.fix * model.prefill_ms[1, 1] / 1e3
    progress = math.ceil((one.step - one.busy) / layer) * layer
    step = one.busy + progress
    assert one.beside(one) == pytest.approx((step, progress)) and one.step < step < one.step + layer
    count = math.ceil(one.prefill / progress)
    joined = one.prefill + 4 * one.step + count * step
    assert count * (step - one.step) < one.prefill  # what a stop would have cost
    assert requests[1].finished_s == pytest.approx(joined + 10 * two.step)
    assert requests[0].finished_s == pytest.approx(joined + 10 * two.step + (200 - 4 - count - 10) * one.step)


def stage_by_stage(stages, layers, micro_batches, decode_s, layer_s):
    """(end of a prefill, mean step until then) of a pipeline that decodes beside it, played stage by stage: micro-batches that decode go first,
    a layer that has begun ends."""
    free, stage, done, at, ready, steps = [0.0] * stages, 0, 0, 0.0, 0.0, 0
    while stage < stages:
        ready_s = [ready] * micro_batches
        for s in range(stages):
            for j in range(micro_batches):
                while (
                    stage <= s and max(free[stage], at) < ready_s[j]
                ):  # layers that begin before this micro-batch comes
                    at = free[stage] = max(free[stage], at) + layer_s
                    done += 1
                    stage, done = (stage + 1, 0) if done == layers else (stage, done)
                ready_s[j] = free[s] = max(ready_s[j], free[s]) + decode_s
        ready, steps = max(ready_s), steps + 1
    return at, ready / steps


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 4), st.integers(8, 30), st.sampled_from([1, 2, 4]), st.floats(5, 60), st.floats(10, 60))
def test_a_prefill_beside_steps_takes_as_long_as_stage_by_stage(stages, layers, micro_batches, decode_s, layer_s):
    step = StepTimes(0.0, decode_s * (stages - 1 + micro_batches), decode_s * micro_batches, layer_s)
    joins = StepTimes(layer_s * layers * stages, 0.0, 0.0, layer_s)
    with_prefill, progress = step.beside(joins)
    end, mean_step = stage_by_stage(stages, layers, micro_batches, decode_s, layer_s)
    count = math.ceil(joins.prefill / progress)
    assert mean_step == pytest.approx(with_prefill, rel=0.12)
    assert end * 0.88 - with_prefill <= count * with_prefill <= end * 1.12 + with_prefill * stages


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_no_stage_works_longer_than_there_is_time(stages, batch, joining):
    model = toy(layers=200)
    now, joins = (model.times(Layout(1, stages, 1, b)) for b in (batch, joining))
    step, progress = now.beside(joins)
    assert now.busy <= now.step * (1 + 1e-9)
    assert now.step * (1 - 1e-9) <= step < now.step + joins.prefill_layer
    assert progress + now.busy <= step * (1 + 1e-9)
    if stages == 1:
        assert now.busy == pytest.approx(now.step)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.integers(1, 3), st.integers(0, 3), st.integers(1, 20), st.integers(0, 2))
def test_pipelines_that_keep_their_machines_go_on_while_others_move_in(data, stages, lost, done, joining):
    """One machine leaves: the others' batches do not stop, and the broken one's requests go on with them once their KV is there."""
    model, old = toy(layers=200), Layout(data, stages, 1, 8)
    lost %= data
    held = {f"n{p.data}/{p.stage}": p for p in places(old)}
    service = Service(model, [], continuous=True)
    service.layout = old
    service.batches = {
        d: Batch([Served(10 * d + i, 0.0, 32, done + i, done + i) for i in range(2)], 5.0, 0.0) for d in range(data)
    }
    other = service.batches[(lost + 1) % data]
    begun = [Served(100 + i, 4.0, 32) for i in range(joining)]
    (other.joining if stages > 1 else other.requests).extend(begun)
    other.prefill_left_s = 0.5 if joining else 0.0
    requests = service.unfinished()
    devices = [x for x, p in held.items() if p.data != lost]
    target = Layout(data - 1, stages, 1, 4)
    step = Mover(model, Cloud(), 96, 32).plan(old, held, service.batches, target, devices)
    assert sorted(step.same.values()) == [d for d in range(data) if d != lost] and step.stall_s == 0
    assert all(t.kind == "kv" for t in step.after)
    assert all((held[x].stage, held[x].shard) == (p.stage, p.shard) for x, p in step.goal.items())
    kept = {new: (service.batches[d], service.batches[d].ready_s) for new, d in step.same.items()}
    perform(service, step, 5.1)
    assert all(service.batches[new] is b and b.ready_s == ready_s for new, (b, ready_s) in kept.items())
    arriving = [r for b in service.batches.values() for r in b.arriving]
    assert sorted(r.index for r in arriving) == [10 * lost, 10 * lost + 1]
    assert all(b.arrive_s > 5.1 + Cloud().regroup_s for b in service.batches.values() if b.arriving)
    assert {r.index for r in service.unfinished()} == {r.index for r in requests}
    fork = service.fork([])
    for one in (fork, service):
        one.serve_until(1e9)
    assert all(r.done == r.generated == 32 and r.finished_s is not None for r in requests)
    assert all(b.arriving == [] for b in service.batches.values()) and not fork.unfinished()
    wait = min(r.finished_s for r in arriving) - 5.1  # type: ignore[operator]
    assert wait >= Cloud().regroup_s + (32 - done - 1) * model.times(Layout(1, stages, 1, 1)).step - 1e-9


def test_requests_that_have_just_begun_to_join_make_room_for_those_that_arrive_with_tokens():
    model, old = toy(layers=200), Layout(2, 2, 1, 2)
    held = {f"n{p.data}/{p.stage}": p for p in places(old)}
    service = Service(model, [], continuous=True)
    stays, joins, comes = Served(0, 0.0, 32, 9, 9), Served(1, 4.0, 32), Served(2, 0.0, 32, 5, 5)
    service.layout, service.batches = old, {0: Batch([stays], 5.0, 0.5, [joins]), 1: Batch([comes], 5.0, 0.0)}
    step = Mover(model, Cloud(), 96, 32).plan(old, held, service.batches, Layout(1, 2, 1, 2), ["n0/0", "n0/1"])
    perform(service, step, 5.0)
    batch = service.batches[0]
    assert (batch.requests, batch.joining, batch.arriving) == ([stays], [], [comes])
    assert batch.prefill_left_s == 0 and list(service.queue) == [joins]


@pytest.mark.parametrize("left, joining", [(20, False), (20, True), (1, False), (1, True)])
def test_who_arrives_takes_part_in_the_first_step_after(left, joining):
    """Also while a prefill fills the gaps of the steps, and when nobody else is left."""
    model = toy(layers=200)
    one, two = model.times(Layout(1, 2, 1, 1)), model.times(Layout(1, 2, 1, 2))
    service = Service(model, [], continuous=True)
    service.layout = Layout(1, 2, 1, 4)
    here, comes = Served(0, 0.0, 32, 32 - left, 32 - left), Served(1, 0.0, 32, 12, 12)
    arrive_s = 5.0 + 4.5 * one.step
    begun = [Served(2, 4.0, 32)] if joining else []
    prefill = one.prefill if joining else 0.0
    service.batches = {0: Batch([here], 5.0, prefill, begun, [comes], arrive_s)}
    service.serve_until(1e9)
    assert comes.finished_s is not None and comes.done == comes.generated == 32
    most = 21 * max(one.beside(one)[0], two.beside(one)[0], model.times(Layout(1, 2, 1, 4)).step)
    alone = one.prefill if joining and left == 1 else 0.0  # a prefill that has the stages to itself ends first
    assert arrive_s + 20 * one.step - 1e-9 <= comes.finished_s <= arrive_s + most + alone


def test_the_most_kv_that_may_move_covers_a_batch_with_more_requests_than_slots():
    """A pipeline that goes on keeps its batch when the layout has fewer slots."""
    model, old, target = toy(), Layout(2, 1, 1, 2), Layout(1, 1, 1, 8)
    full = {d: Batch([Served(10 * d + i, 0.0, 32, 31) for i in range(6)], 5.0, 0.0) for d in range(2)}
    mover, devices = Mover(model, Cloud(network_bytes_per_s=1e6), 96, 32), ["n0/0"]
    held = {"n0/0": places(old)[0], "n1/0": places(old)[1]}
    bound = mover.plan(old, held, full, target, devices, most_kv=True)
    full[0].requests = full[0].requests[:2]
    assert mover.plan(old, held, full, target, devices).stop_s <= bound.stop_s


def test_only_pipelines_that_stop_are_sharp():
    """Before a deadline a pipeline that goes on begins a step that ends later; one that stops does not."""
    model, layout = toy(layers=200), Layout(2, 1, 1, 2)
    service = Service(model, [])
    service.layout, service.batches = layout, batches(layout, 3)
    step = model.times(layout).step
    service.serve_until(5.0 + 2.5 * step, sharp={0})
    assert service.batches[0].ready_s == pytest.approx(5.0 + 2.5 * step) and service.batches[0].requests[0].done == 5
    assert service.batches[1].ready_s == pytest.approx(5.0 + 3 * step) and service.batches[1].requests[0].done == 6


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
    assert "go on without a stop: pipeline 0 as 0" in lines
    same = describe_move(toy(), Cloud(), Layout(3, 1, 4, 1), Layout(2, 1, 4, 4), ["node-1"], 5, 64, 32)
    other = describe_move(toy(), Cloud(), Layout(2, 2, 2, 1), Layout(1, 1, 4, 4), ["node-1"], 5, 64, 32)
    assert "go on without a stop: none" in other
    assert "go on without a stop: pipeline 0 as 0, pipeline 2 as 1" in same
    for wrong, how in (
        ("node-9 holds nothing", (Layout(2, 2, 2, 1), Layout(1, 1, 1, 1), ["node-9"])),
        ("needs 8 devices and 4 stay", (Layout(2, 2, 2, 1), Layout(2, 2, 2, 1), ["node-0"])),
    ):
        with pytest.raises(UsageError, match=wrong):
            describe_move(toy(), Cloud(), *how, 5, 64, 32)
    with pytest.raises(UsageError, match="must be D,P,M,B"):
        parse_layout("2,2,8")
