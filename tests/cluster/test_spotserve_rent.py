"""Asking for machines: what is missing is asked for, what is too much given back, all of it paid for, and every option has its effect."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cluster.test_cli import run
from tests.cluster.test_spotserve import churn, cloud, toy
from wager.cluster.spotserve import controller
from wager.cluster.spotserve.bill import ON_DEMAND, SPOT, Lease, bill, lifetimes
from wager.cluster.spotserve.cloud import Cloud
from wager.cluster.spotserve.latency import Layout
from wager.cluster.spotserve.rent import DRAIN_S
from wager.cluster.spotserve.simulate import POLICIES, Rental, SpotSimulation
from wager.errors import UsageError
from wager.hardware.availability import Availability, Membership
from wager.simulate.trace import Arrival

LOST_S = 200.0


def needs_two() -> Cloud:
    """The toy model takes two machines of one device; a third makes no second pipeline."""
    return Cloud(
        devices_per_node=1, device_memory_bytes=7 * toy().layer_bytes, expected_rate=0.2, network_bytes_per_s=5e8, storage_bytes_per_s=1e8
    )  # fmt: skip


def two_wanted_one_lost(others: int = 2, end_s: float = 800.0) -> Availability:
    """Of the first machines one is taken; `others` are there from the start and stay."""
    stay = [Membership(0.0, f"n{i}", True) for i in range(1, 2 + others)]
    return Availability((Membership(0.0, "n0", True), *stay, Membership(LOST_S, "n0", False)), end_s)


def steady(end_s: float = 800.0, gap_s: float = 5.0) -> list[Arrival]:
    return [Arrival(float(t), 64, 32) for t in np.arange(1.0, end_s, gap_s)]


def play(trace, policy="spotserve", arrivals=None, here=None, **rental):
    sim = SpotSimulation(toy(), trace, arrivals or steady(), policy, here or needs_two(), rental=Rental(**rental))
    return sim.run()


def kinds(out, kind):
    return [h for h in sorted(out.happened) if h.kind == kind]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_reserve_shortens_an_outage(policy):
    """Without one the lost machine's successor is asked for at the notice and is ready a boot later; with one nobody waits."""
    trace = two_wanted_one_lost()
    here = replace(needs_two(), engine_start_s=0.0, storage_bytes_per_s=1e12)
    worst = {r: float(play(trace, policy, here=here, reserve=r, most=3).latencies_s.max()) for r in (0, 1)}
    outage = Rental.boot_s - here.notice_s  # asked for at the notice, gone a notice later
    assert worst[0] > outage - 10 and worst[1] < outage / 3, worst


def test_machines_are_asked_for_at_the_notice_and_come_after_their_boot():
    out = play(two_wanted_one_lost(), reserve=0, most=3)
    at = LOST_S - needs_two().notice_s
    assert [h.what for h in kinds(out, "asked") if h.time_s == at] == ["1 spot, 0 on-demand"]
    assert [h.time_s for h in kinds(out, "joined")] == [0.0, 0.0, at + Rental.boot_s]
    assert [h.time_s for h in kinds(out, "notice")] == [at] and [h.time_s for h in kinds(out, "left")] == [LOST_S]
    assert all(r.done == r.tokens for r in out.requests)


def test_on_demand_stands_in_and_goes_first_when_spot_comes():
    """The market has one machine, later a second and a third: on-demand fills the gap from the start and is given back for the first spot that comes."""
    events = [Membership(0.0, "n0", True), Membership(300.0, "n1", True), Membership(500.0, "n2", True)]
    trace = Availability(tuple(events), 800.0)
    out = play(trace, reserve=0, most=3, allow_on_demand=True)
    assert [h.what for h in kinds(out, "asked")][0] == "2 spot, 2 on-demand"
    assert [(h.time_s, h.what) for h in kinds(out, "released")] == [(300.0, "on-demand-0 (on-demand)")]
    assert sorted((x.node, x.kind, x.from_s, x.to_s) for x in out.leases) == [
        ("n0", SPOT, 0.0, 800.0),
        ("n1", SPOT, 300.0, 800.0),
        ("on-demand-0", ON_DEMAND, 0.0, 300.0 + DRAIN_S),
    ]
    assert out.recomputed_tokens == 0 and len(out.latencies_s) == len(out.requests)
    without = play(trace, reserve=0, most=3)
    assert all(x.kind == SPOT for x in without.leases) and without.latencies_s.max() > 250 > out.latencies_s.max()


def test_a_machine_on_demand_comes_after_its_boot_and_is_paid_for_from_when_it_was_asked_for():
    trace = Availability(
        (Membership(0.0, "n0", True), Membership(0.0, "n1", True), Membership(LOST_S, "n0", False)), 800.0
    )
    out = play(trace, reserve=0, most=2, allow_on_demand=True, boot_s=90.0)
    (bought,) = [x for x in out.leases if x.kind == ON_DEMAND]
    assert bought.from_s == LOST_S - 30.0 and bought.to_s == 800.0
    assert [h.time_s for h in kinds(out, "joined")][-1] == LOST_S - 30.0 + 90.0


def test_what_the_load_no_longer_needs_is_given_back_and_spot_serves_on():
    """A burst asks for more machines on demand; when it is over they go, after the machines that wait have been used for a boot's time."""
    model, here = toy(layers=60), replace(needs_two(), expected_rate=0.0)
    here = replace(here, device_memory_bytes=70 * model.layer_bytes)
    burst = [Arrival(float(t), 64, 32) for t in np.arange(100.0, 250.0, 0.12)]
    calm = [Arrival(float(t), 64, 32) for t in np.arange(1.0, 2000.0, 30.0)]
    trace = Availability((Membership(0.0, "n0", True),), 2000.0)
    out = SpotSimulation(model, trace, [*burst, *calm], "spotserve", here, rental=Rental(0, True, 60.0, most=5)).run()
    gone = kinds(out, "released")
    assert gone and all("on-demand" in h.what and h.time_s > 250 for h in gone)
    assert any(x.node == "n0" and x.to_s == 2000.0 for x in out.leases)
    assert all(x.from_s > 0 for x in out.leases if x.kind == ON_DEMAND)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_machine_that_left_without_notice_serves_again_when_it_comes_back(policy):
    events = (
        Membership(0.0, "n0", True),
        Membership(0.0, "n1", True),
        Membership(400.0, "n1", False),
        Membership(500.0, "n1", True),
    )
    here = replace(needs_two(), notice_s=0.0)
    out = play(
        Availability(events, 2000.0),
        policy,
        here=here,
        arrivals=steady(1500.0),
        reserve=0,
        allow_on_demand=True,
        most=3,
    )
    assert len(out.latencies_s) == len(out.requests)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2),
    st.booleans(),
    st.sampled_from([0.0, 10.0, 30.0]),
    st.integers(2, 6),
    st.sampled_from(POLICIES),
    st.data(),
)
def test_whatever_the_market_does_the_bill_is_that_of_the_lifetimes_and_no_request_is_lost(
    reserve, on_demand, grace, most, policy, data
):
    moves = data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=12))
    up, at, events = {0, 1}, 0.0, [Membership(0.0, f"n{i}", True) for i in (0, 1)]
    for node, gap in moves:
        at += gap * 10
        events.append(Membership(at, f"n{node}", node not in up))
        up ^= {node}
    trace = Availability(tuple(events), at + 500)
    here = replace(needs_two(), notice_s=grace)
    out = play(
        trace, policy, here=here, arrivals=steady(at + 400), reserve=reserve, allow_on_demand=on_demand, most=most
    )
    assert out.cost_usd == pytest.approx(
        sum((x.to_s - x.from_s) / 3600 * (1.9 if x.kind == SPOT else 3.9) for x in out.leases)
    )
    assert all(r.done <= r.tokens and r.done <= r.generated for r in out.requests)
    assert on_demand or all(x.kind == SPOT for x in out.leases)
    for x in out.leases:
        assert 0 <= x.from_s <= x.to_s <= trace.end_s
        if x.kind == SPOT:
            assert any(s.node == x.node and s.from_s <= x.from_s and x.to_s <= s.to_s for s in lifetimes(trace))
    for t in sorted({x.from_s for x in out.leases}):
        running = [x for x in out.leases if x.from_s <= t < x.to_s]
        leaving = {h.what.split()[0] for h in out.happened if h.kind in ("notice", "released") and h.time_s <= t}
        assert len([x for x in running if x.node not in leaving]) <= most
        names = [x.node for x in running]
        assert len(names) == len(set(names))
    if on_demand:
        assert len(out.latencies_s) == len(out.requests)


def test_the_bill_counts_every_kind_at_its_price():
    here = Cloud(spot_usd_per_h=2.0, on_demand_usd_per_h=5.0)
    paid = bill([Lease("a", SPOT, 0, 3600), Lease("b", SPOT, 1800, 3600), Lease("c", ON_DEMAND, 0, 720)], here)
    assert paid.usd == {SPOT: 3.0, ON_DEMAND: 1.0} and paid.total_usd == 4.0
    assert sum(x.seconds for x in lifetimes(churn())) == churn().node_seconds()


def test_without_notice_nothing_moves_in_time():
    rng = np.random.default_rng(3)
    arrivals = [Arrival(float(t), 64, 32) for t in np.cumsum(rng.exponential(0.1, 1500))]
    busy = replace(cloud(), expected_rate=10.0)
    outs = {
        grace: SpotSimulation(toy(layers=48), churn(), arrivals, "spotserve",
                              replace(busy, notice_s=grace, device_memory_bytes=24 * toy().layer_bytes)).run()
        for grace in (0.0, 30.0)
    }  # fmt: skip
    assert outs[30.0].recomputed_tokens == 0 and not kinds(outs[30.0], "lost")
    assert outs[0.0].recomputed_tokens > 0 and {h.time_s for h in kinds(outs[0.0], "lost")} <= {40.0, 90.0}


def test_a_pipeline_has_the_least_number_of_devices_and_reroute_its_shape():
    model = toy()
    every = list(controller.layouts(model, 12, 1e12, 100, least=6))
    assert every and all(c.pipeline * c.tensor >= 6 for c in every)
    wider = {c for c in controller.layouts(model, 12, 1e12, 100) if c.pipeline * c.tensor >= 6}
    assert wider == set(every)
    shape = Layout(1, 3, 2, 2)
    chosen = controller.choose(model, 24, 1e9, 32, 1e12, 100, shape=shape)
    assert chosen == Layout(4, 3, 2, 2)
    for policy in POLICIES:
        out = SpotSimulation(toy(), churn(), steady(200.0), policy, replace(cloud(), min_gpus=4)).run()
        assert all(c is None or c.pipeline * c.tensor >= 4 for _, c in out.layouts) and out.layouts[0][1]


@pytest.mark.parametrize("wrong", [lambda: Rental(reserve=-1), lambda: Rental(boot_s=-1.0), lambda: Rental(most=0)])
def test_bad_rentals_are_refused(wrong):
    with pytest.raises(UsageError):
        wrong()


def test_every_option_of_the_command(data, tmp_path, capsys):
    folder = data / "spot-traces"
    common = [
        "spot", "--profile", "T4-4x/megatron_h7168_profile", "--profiles", data / "gpu-serving-profiles",
        "--availability", folder / "spotserve-segments.csv", "--segment", "trace_0203",
        "--trace", folder / "requests-gamma-rate0.2_cv6.csv", "--rate", 0.2,
    ]  # fmt: skip

    def said(*options):
        assert run(*common, *options) == 0
        return capsys.readouterr().out

    plain = said("--policy", "reparallelize", "--policy", "reroute")
    assert [line.split()[0] for line in plain.splitlines()] == ["reparallelize", "reroute", "prices:"]
    assert "catalog of 2026-05" in plain and "0.00 h on-demand" in plain
    reroute = ["--policy", "reroute"]
    alone = said(*reroute).splitlines()[0]
    assert alone in plain
    assert said(*reroute, "--min-gpus", 32).splitlines()[0] != alone
    assert said(*reroute, "--spot-price", 19, "--on-demand-price", 39).splitlines()[0] != alone
    rented = said(*reroute, "--allow-on-demand")
    assert "0.00 h on-demand" not in rented and said(*reroute, "--allow-on-demand", "--reserve", 2) == rented
    assert said(*reroute, "--allow-on-demand", "--reserve", 0) != rented
    assert said(*reroute, "--allow-on-demand", "--boot", 10) != rented
    assert said(*reroute, "--allow-on-demand", "--max-machines", 5) != rented
    log = said(*reroute, "--events", "-")
    assert "notice" in log and "layout" in log and "left" in log
    short = said(*reroute, "--grace", 0, "--events", "-")
    times = [
        [float(line.split()[1]) for line in text.splitlines() if line.split()[3:4] == ["notice"]]
        for text in (log, short)
    ]
    assert times[0] and [t + 30 for t in times[0]] == times[1]
    said(*reroute, "--events", tmp_path / "log.csv")
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert len(rows) == sum(line.startswith("reroute") for line in log.splitlines()) - 1
    assert [float(r["time_s"]) for r in rows] == sorted(float(r["time_s"]) for r in rows)
    assert run(*common, "--policy", "hope") == 2 and "hope" in capsys.readouterr().err
    assert run(*common, "--boot", 10) == 2 and "--reserve" in capsys.readouterr().err
    assert run(*common[:2], "V100-9x/none", *common[3:]) == 2
