"""Coral's allocation: the two stages together equal to one joint optimum, lawful plans, never worse than plans of equal machines."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cluster.coral_libraries import CARD, CONFIGURATIONS, complete_library, library, tables
from wager.cluster.coral import baselines, pack
from wager.cluster.coral.allocate import Allocator
from wager.cluster.coral.market import Allocation, Market, check, reconcile
from wager.cluster.coral.pack import Packer
from wager.cluster.coral.stage import Demand
from wager.errors import WagerError
from wager.solve import LinearModel, solve


def joint_optimum(libraries, market, current=None, share=0.0):
    """Every template of every demand in every region in one integer program."""
    program, use = LinearModel(), {}
    serve = [[] for _ in libraries]
    for d, lib in enumerate(libraries):
        for u in range(len(lib)):
            for r in range(len(market.regions)):
                price = float(lib.counts_UC[u] @ market.price_RC[r])
                have = (current or {}).get((d, r, u), 0)
                for most, cost in ((have, price), (float("inf"), price * (1 + share))):
                    c = program.add("", 0, most, cost, integer=True)
                    serve[d].append((c, lib.rates_U[u]))
                    for k in range(2):
                        use.setdefault((r, k), []).append((c, float(lib.counts_UC[u, k])))
    for lib, terms in zip(libraries, serve, strict=True):
        program.row(terms, lower=lib.demand.tokens_per_s)
    for (r, k), terms in use.items():
        program.row(terms, upper=float(market.stock_RC[r, k]))
    return solve(program).value


def joint_share(libraries, market):
    """The largest common share of the demands: every template of every demand in every region in one integer program."""
    program = LinearModel(maximize=True)
    share, use = program.add("share", 0, 1, 1.0), {}
    for lib in libraries:
        terms = [(share, -lib.demand.tokens_per_s)]
        for u in range(len(lib)):
            for r in range(len(market.regions)):
                c = program.add("", 0, float("inf"), integer=True)
                terms.append((c, float(lib.rates_U[u])))
                for k in range(2):
                    use.setdefault((r, k), []).append((c, float(lib.counts_UC[u, k])))
        program.row(terms, lower=0)
    for (r, k), terms in use.items():
        program.row(terms, upper=float(market.stock_RC[r, k]))
    return solve(program).value


def market(stock, prices=((2.0, 1.1), (2.3, 0.9))):
    return Market(("r0", "r1"), CONFIGURATIONS, np.array(stock, float), np.array(prices))


@settings(max_examples=12, deadline=None)
@given(
    tables(), tables(), st.lists(st.integers(0, 9), min_size=4, max_size=4), st.integers(1, 120), st.integers(1, 120)
)
def test_two_stages_equal_the_joint_optimum(first, second, stock, rate0, rate1):
    libraries = [
        complete_library(t, Demand(CARD, "decode", 1.0, float(r))) for t, r in ((first, rate0), (second, rate1))
    ]
    if None in libraries:
        return
    rent = market([stock[:2], stock[2:]])
    joint = joint_optimum(libraries, rent)
    try:
        found = Allocator(libraries, rent).allocate(gap=0.0, time_limit_s=20)
    except WagerError:
        assert joint is None
        return
    check(found, libraries, rent)
    assert found.bound <= found.objective + 1e-6
    if joint is None:
        assert found.factor < 1 and found.factor == pytest.approx(joint_share(libraries, rent), rel=2e-3)
    else:
        assert found.factor == 1 and found.usd_per_h == pytest.approx(joint)
        for policy in baselines.POLICIES:
            other = baselines.greedy(libraries, rent, policy)
            assert other.factor < 1 - 1e-9 or other.usd_per_h >= found.usd_per_h - 1e-6


SIMPLE = library({(1, 0): 40.0, (0, 1): 15.0, (1, 1): 60.0, (0, 2): 31.0})


def cost(stock, rate, current=None, share=0.0):
    lib = dataclasses.replace(SIMPLE, demand=Demand(CARD, "decode", 1.0, rate))
    return Allocator([lib], market(stock), share).allocate(current, gap=0.0)


def test_more_stock_never_costs_more_and_more_demand_never_less():
    by_stock = [cost([[n, n], [n, n]], 200.0).usd_per_h for n in (3, 4, 6, 20)]
    assert by_stock == sorted(by_stock, reverse=True)
    by_demand = [cost([[9, 9], [9, 9]], r).usd_per_h for r in (10.0, 100.0, 250.0, 400.0)]
    assert by_demand == sorted(by_demand)


def test_a_large_start_up_penalty_keeps_the_running_plan():
    calm = cost([[9, 9], [9, 9]], 100.0)
    dear = {(0, 0, 1): 7}  # seven slow machines in r0: dearer, but they run
    assert cost([[9, 9], [9, 9]], 100.0, dear, share=0.0).running == calm.running
    kept = cost([[9, 9], [9, 9]], 100.0, dear, share=100.0)
    assert kept.running == dear and kept.penalty_usd == 0
    change = reconcile(dear, calm.running)
    assert change.drain == {(0, 0, 1): 7 - calm.running.get((0, 0, 1), 0)} and change.start


def test_the_penalty_is_in_the_joint_optimum_too():
    lib = dataclasses.replace(SIMPLE, demand=Demand(CARD, "decode", 1.0, 100.0))
    rent, current = market([[9, 9], [9, 9]]), {(0, 0, 1): 4}
    found = Allocator([lib], rent, 0.3).allocate(current, gap=0.0)
    assert found.objective == pytest.approx(joint_optimum([lib], rent, current, 0.3))


def test_scarce_stock_scales_every_demand_and_says_what_is_scarce():
    found = cost([[1, 0], [0, 1]], 1000.0)
    assert found.factor == pytest.approx(0.055, rel=1e-3)  # 40 + 15 of 1000
    with pytest.raises(WagerError, match="no part"):
        cost([[0, 0], [0, 0]], 10.0)
    tight = cost([[3, 0], [0, 0]], 115.0)
    assert tight.factor == 1 and tight.usd_per_h == pytest.approx(6.0)


def test_check_catches_a_wrong_plan():
    lib, rent = SIMPLE, market([[1, 1], [1, 1]])
    with pytest.raises(WagerError, match="rents 9"):
        check(Allocation({(0, 0, 0): 9}, 18.0, 0, 0, 1.0, 0, 0, False), [lib], rent)
    with pytest.raises(WagerError, match="promised"):
        check(Allocation({(0, 0, 0): 1}, 2.0, 0, 0, 1.0, 0, 0, False), [lib], rent)
    with pytest.raises(WagerError, match="cost"):
        check(Allocation({(0, 0, 0): 1}, 1.0, 0, 0, 0.1, 0, 0, False), [lib], rent)


def test_no_plan_is_worse_than_equal_machines_even_without_time():
    """The baselines are incumbents: a time limit that stops every solver at once still gives a lawful plan that is no worse."""
    demands = [Demand(CARD, "decode", 1.0, rate) for rate in (130.0, 75.0)]
    libraries = [dataclasses.replace(SIMPLE, demand=d) for d in demands]
    for stock in ([[9, 9], [9, 9]], [[2, 3], [3, 1]], [[1, 1], [1, 0]]):
        rent = market(stock)
        found = Allocator(libraries, rent).allocate(time_limit_s=1e-3)
        check(found, libraries, rent)
        for policy in baselines.POLICIES:
            other = baselines.greedy(libraries, rent, policy)
            assert other.factor <= found.factor * (1 + 1e-6)
            assert other.factor < found.factor * (1 - 1e-6) or other.usd_per_h >= found.usd_per_h - 1e-6


@settings(max_examples=15, deadline=None)
@given(
    st.lists(tables(), min_size=2, max_size=3), st.lists(st.integers(0, 6), min_size=4, max_size=4),
    st.lists(st.integers(1, 200), min_size=3, max_size=3), st.sampled_from([1e-3, 0.3]),
)  # fmt: skip
def test_no_baseline_is_better_anywhere(given_tables, stock, rates, limit_s):
    """Plenty or scarce, with time to solve or without: at least the share that any baseline reaches, and no dearer at the same share."""
    libraries = [
        complete_library(t, Demand(CARD, "decode", 1.0, float(r))) for t, r in zip(given_tables, rates, strict=False)
    ]
    if None in libraries:
        return
    rent = market([stock[:2], stock[2:]])
    others = [b(libraries, rent, p) for p in baselines.POLICIES for b in (baselines.greedy, baselines.scaled)]
    for other in others:
        check(other, libraries, rent)
    try:
        found = Allocator(libraries, rent).allocate(time_limit_s=limit_s)
    except WagerError:
        assert max(o.factor for o in others) == 0
        return
    check(found, libraries, rent)
    for other in others:
        assert other.factor <= found.factor * (1 + 1e-6)
        assert other.factor < found.factor * (1 - 1e-6) or other.usd_per_h >= found.usd_per_h - 1e-6


def test_a_large_replica_is_not_shared_among_demands():
    """The relaxation gives each demand a third of a machine that serves any of them alone; whole plans need the small machines."""
    counts = {(1, 0): 300.0, (0, 1): 20.0, (0, 2): 45.0}
    libraries = [library(counts, Demand(CARD, "decode", 1.0, 100.0)) for _ in range(3)]
    rent = market([[1, 4], [0, 0]])
    found = Allocator(libraries, rent).allocate()
    check(found, libraries, rent)
    assert found.factor == pytest.approx(0.45)  # one demand takes the large machine, each other two small ones
    packer = Packer(libraries, [lib.counts_UC @ rent.price_RC.T for lib in libraries], rent.stock_RC)
    worth_RC, soon = np.zeros((2, 2)), time.perf_counter() + 60
    assert packer.pack(0.45, worth_RC, soon) is not None and packer.pack(0.46, worth_RC, soon) is None
    share, plan = packer.largest(worth_RC, 0.0, 1.0, soon)
    assert packer.share(plan) == pytest.approx(0.45) and share == pytest.approx(0.45, rel=0.01)


def test_the_packer_looks_through_small_templates_first_where_there_are_too_many(monkeypatch):
    lib = library({(2, 0): 50.0, (1, 0): 20.0, (0, 1): 10.0, (0, 3): 40.0})
    rent = market([[1, 1], [2, 3]])

    def tried():
        packer = Packer([lib], [lib.counts_UC @ rent.price_RC.T], rent.stock_RC)
        return {(r, *lib.counts_UC[u]) for _, r, u in packer.columns()}

    assert tried() == {(0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (1, 2, 0), (1, 0, 3)}
    monkeypatch.setattr(pack, "MOST_COLUMNS", 6)
    assert tried() == {(0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (1, 2, 0)}
