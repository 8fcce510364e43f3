"""What the policy decides: which of several layouts, growing without a stop, what is given up when a notice is too short."""

from dataclasses import replace

import numpy as np
import pytest

from tests.cluster.test_spotserve import cloud, toy
from wager.cluster.spotserve import controller
from wager.cluster.spotserve.latency import Layout
from wager.cluster.spotserve.load import Load
from wager.cluster.spotserve.migrate import Choice, Migrate, Pending, Skills
from wager.cluster.spotserve.outcome import Outcome
from wager.cluster.spotserve.service import Service
from wager.cluster.spotserve.simulate import SpotSimulation
from wager.cluster.spotserve.transition import Mover
from wager.hardware.availability import Availability, Membership
from wager.simulate.trace import Arrival


def policy(continuous=True):
    model, here = toy(), cloud()
    service = Service(model, [], continuous)
    return Migrate(
        service, Mover(model, here, 96, 32), Load([], 30.0, 0.5), Outcome([]), np.random.default_rng(0), Skills()
    )


def test_of_layouts_with_about_equal_tails_the_one_with_most_throughput_is_taken():
    one, two, three = (Layout(d, 1, 1, 4) for d in (1, 2, 3))
    late = Pending(Mover(toy(), cloud(), 96, 32).plan(None, {}, {}, three, [f"n/{i}" for i in range(3)]), 10.0, 5.0)
    tails = [Choice(one, 10.0, None), Choice(two, 10.05, None), Choice(three, 10.2, None)]
    assert policy()._best(tails).target == two
    assert policy()._best([*tails, Choice(three, 1.0, late)]).target == two  # not in time


def test_candidates_of_a_continuous_service_have_as_many_slots_as_fit():
    chosen = policy()._candidates(0.0, 8)
    every = list(controller.layouts(toy(), 8, cloud().device_memory_bytes, 96))
    most = {(c.data, c.pipeline, c.tensor): c.batch for c in sorted(every)}
    assert len(chosen) > 4 and all(c.batch == most[c.data, c.pipeline, c.tensor] for c in chosen)
    assert {c.batch for c in policy(continuous=False)._candidates(0.0, 8)} > {1}


def machines(leaves):
    """Three machines of a device from the start, one of which leaves; or one that comes."""
    there = [Membership(0.0, f"n{i}", True) for i in range(3 if leaves else 2)]
    return Availability((*there, Membership(50.0, "n2", not leaves)), 120.0)


def single(**change):
    """Devices that hold the whole model, and no tensor parallelism."""
    whole = toy(layers=48)
    alone = {(tp, b) for tp, b in whole.prefill_ms if tp == 1}
    whole = replace(
        whole,
        prefill_ms={k: whole.prefill_ms[k] for k in alone},
        decode_ms={k: whole.decode_ms[k] for k in alone},
    )
    memory = 60 * whole.layer_bytes
    return whole, replace(cloud(), devices_per_node=1, device_memory_bytes=memory, **change)


def test_a_service_grows_by_pipelines_without_a_stop():
    model, here = single(expected_rate=0.05)
    arrivals = [
        Arrival(12.0 * i + 1.0, 64, 32) for i in range(9)
    ]  # so few that more pipelines make none of them faster
    out = SpotSimulation(model, machines(leaves=False), arrivals, "spotserve", here).run()
    layouts = [layout for _, layout in out.layouts if layout is not None]
    assert [x.data * x.pipeline for x in layouts] == [2, 3] and layouts[0].pipeline == layouts[1].pipeline == 1
    assert out.stalls_s == 0 and out.moved_bytes == pytest.approx(3 * 48 * model.layer_bytes)


def test_a_notice_that_is_too_short_costs_only_the_tokens_of_pipelines_that_end():
    model, here = single(notice_s=0.2, network_bytes_per_s=1e5)
    arrivals = [Arrival(1.0 * i + 0.25, 64, 32) for i in range(90)]
    out = SpotSimulation(model, machines(leaves=True), arrivals, "spotserve", here).run()
    twice = [r for r in out.requests if r.generated > r.done]
    flying = [r for r in out.requests if r.arrival_s < 49.9 and (r.finished_s or 0.0) > 50.1]
    assert all(r.done == 32 for r in out.requests)
    assert twice and set(twice) < set(flying) and len(twice) <= len(flying) / 2
    assert out.recomputed_tokens == sum(r.generated - 32 for r in twice)


def test_without_playing_the_controllers_choice_is_taken():
    model, here = single(expected_rate=0.05)
    arrivals = [Arrival(12.0 * i + 1.0, 64, 32) for i in range(9)]
    out = SpotSimulation(
        model, machines(leaves=False), arrivals, "spotserve", here, skills=Skills(look_ahead=False)
    ).run()
    first = controller.choose(model, 2, 0.05, 32, here.device_memory_bytes, 96, continuous=True)
    assert out.layouts[0][1] == first
