"""Coral: templates equal to the paper's program and to brute force, the two stages together equal to one joint optimum, lawful plans."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wager.cluster.coral import baselines
from wager.cluster.coral.allocate import Allocator
from wager.cluster.coral.market import Allocation, Market, check, reconcile
from wager.cluster.coral.pack import Packer
from wager.cluster.coral.stage import Configuration, Demand, stage_throughput
from wager.cluster.coral.templates import (
    Library,
    best_rates,
    build,
    multisets,
    set_partitions,
    solve_template_ilp,
    split,
    undominated,
)
from wager.errors import UsageError, WagerError
from wager.hardware.cluster import Device, Link
from wager.hardware.layer_cost import ModelCard, Roofline
from wager.solve import LinearModel, solve

CARD = ModelCard("m", 5, 64, 1e9, 1e3)
CONFIGURATIONS = tuple(
    Configuration(Device(n, mem, 1e12, 1e14), c) for n, mem in (("x", 8e9), ("y", 5e9)) for c in (1,)
)
DEMAND = Demand(CARD, "decode", 1.0, 100.0)


@st.composite
def tables(draw, configurations=2, layers=4):
    """Random non-rising tokens/s by layers, per number of stages."""
    rows = {}
    for stages in range(1, 5):
        table = [
            [0.0, *sorted((draw(st.integers(0, 60)) for _ in range(layers)), reverse=True)]
            for _ in range(configurations)
        ]
        rows[stages] = np.array(table, float)
    return rows


@settings(max_examples=12, deadline=None)
@given(tables(), st.lists(st.integers(0, 1), min_size=1, max_size=3))
def test_templates_equal_the_paper_program_and_brute_force(table, machines):
    """The paper's program gives every stage a layer; a template may also leave a stage empty, so it is at least as good."""
    layers = 4
    everywhere, program = {}, {}
    for partition in set_partitions(len(machines)):
        stages = max(partition) + 1
        groups = [[c for c, s in zip(machines, partition, strict=True) if s == stage] for stage in range(stages)]
        rates = np.stack([table[stages][g].sum(0) for g in groups])[:, None, :]
        splits = [js for js in itertools.product(range(layers + 1), repeat=stages) if sum(js) == layers]
        values = {js: min(rates[s, 0, j] for s, j in enumerate(js) if j) for js in splits}
        assert best_rates(rates, layers)[0] == pytest.approx(max(values.values()))
        full = max((v for js, v in values.items() if min(js)), default=0.0)
        everywhere[stages] = max(everywhere.get(stages, 0.0), full)
    for stages, value in everywhere.items():
        program[stages] = solve_template_ilp(table[stages], machines, stages)
        assert program[stages] == pytest.approx(value, abs=1e-4)  # the solver keeps rows to 1e-6


def library(rates_by_counts, demand=DEMAND):
    counts = np.array(list(rates_by_counts))
    return Library(demand, counts, np.array(list(rates_by_counts.values()), float), np.zeros((len(counts), 3), int))


@pytest.mark.parametrize("kinds, most", [(20, 5), (40, 4), (3, 6)])
def test_dominance_looks_at_the_parts_themselves_however_many_kinds_there_are(kinds, most):
    """Keys that are only nearly equal once passed for equal: a template was dropped for the rate of other machines."""
    rng = np.random.default_rng(kinds)

    def multiset():
        """Most differ in the first kinds alone."""
        machines = rng.integers(kinds, size=int(rng.integers(1, most + 1)))
        machines[1:] %= 3
        machines[:1] = kinds - 1 - machines[:1] % 2
        return tuple(np.bincount(machines, minlength=kinds))

    chosen = {multiset() for _ in range(150)}
    rates = {}
    for counts in sorted(chosen, key=sum):
        rates[counts] = float(sum(counts) * rng.uniform(1, 1.6))
    for first, second in itertools.combinations(list(rates)[:25], 2):
        together = tuple(np.add(first, second))
        if sum(together) <= most:
            rates[together] = (rates[first] + rates[second]) * float(rng.choice([0.9, 1.1]))

    def replaced(counts):
        return any(
            all(f <= c for f, c in zip(part, counts, strict=True)) and part != counts
            and rates[part] + rates.get(tuple(np.subtract(counts, part)), 0.0) >= rates[counts] * (1 - 1e-12)
            for part in rates
        )  # fmt: skip

    assert {tuple(c) for c in library(rates).counts_UC[undominated(library(rates))]} == {
        c for c in rates if not replaced(c)
    }


def test_split_covers_every_layer_at_the_promised_rate():
    roofline = Roofline(0.5, 0.5, 1e-4)

    def table(stages):
        return np.stack([stage_throughput(DEMAND, c, stages, roofline, Link(1e9, 1e-3)) for c in CONFIGURATIONS])

    lib = build(DEMAND, CONFIGURATIONS, table, max_nodes=3)
    assert len(lib)
    for u in range(len(lib)):
        stages = split(lib, u, table)
        assert sum(k for _, k in stages) == CARD.layers
        used = int(lib.stages_UN[u].max()) + 1
        assert min(table(used)[g, k].sum() for g, k in stages) >= lib.rates_U[u] * (1 - 1e-9)


def test_stage_throughput_respects_memory_latency_and_layers():
    roofline = Roofline(0.5, 0.5, 1e-4)
    small, large = CONFIGURATIONS[1], CONFIGURATIONS[0]
    rate = stage_throughput(DEMAND, small, 1, roofline, Link(1e9))
    assert rate[4] > 0 == rate[5]  # 0.9 * 5 GB hold four layers of 1 GB and some KV
    assert (np.diff(rate[1:]) <= 0).all() and (stage_throughput(DEMAND, large, 1, roofline, Link(1e9)) >= rate).all()
    tight = Demand(CARD, "decode", 0.012, 1.0)
    assert (
        stage_throughput(tight, large, 1, roofline, Link(1e9))
        <= stage_throughput(DEMAND, large, 1, roofline, Link(1e9))
    ).all()
    assert stage_throughput(Demand(CARD, "decode", 1e-4, 1.0), large, 1, roofline, Link(1e9)).max() == 0
    with pytest.raises(UsageError, match="training"):
        Demand(CARD, "training", 1.0, 1.0)


def complete_library(table, demand, max_nodes=3):
    counts = {}
    for row in multisets(2, max_nodes):
        machines = [int(c) for c in row if c < 2]
        best = 0.0
        for partition in set_partitions(len(machines)):
            stages = max(partition) + 1
            groups = [[c for c, s in zip(machines, partition, strict=True) if s == x] for x in range(stages)]
            best = max(best, best_rates(np.stack([table[stages][g].sum(0) for g in groups])[:, None, :], 4)[0])
        if best > 0:
            counts[machines.count(0), machines.count(1)] = best
    return library(counts, demand) if counts else None


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


@settings(max_examples=12, deadline=None)
@given(tables())
def test_dominated_templates_are_replaced_by_smaller_ones(table):
    lib = complete_library(table, DEMAND)
    if lib is None:
        return
    kept = set(undominated(lib).tolist())
    for u in set(range(len(lib))) - kept:
        others = [v for v in range(len(lib)) if v != u and (lib.counts_UC[v] <= lib.counts_UC[u]).all()]
        pairs = [
            lib.rates_U[a] + lib.rates_U[b]
            for a in others
            for b in others
            if (lib.counts_UC[a] + lib.counts_UC[b] <= lib.counts_UC[u]).all()
        ]
        assert max([lib.rates_U[v] for v in others] + pairs) >= lib.rates_U[u] * (1 - 1e-9)


SIMPLE = library({(1, 0): 40.0, (0, 1): 15.0, (1, 1): 60.0, (0, 2): 31.0})


def cost(stock, rate, current=None, share=0.0):
    lib = Library(Demand(CARD, "decode", 1.0, rate), SIMPLE.counts_UC, SIMPLE.rates_U, SIMPLE.stages_UN)
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
    lib = Library(Demand(CARD, "decode", 1.0, 100.0), SIMPLE.counts_UC, SIMPLE.rates_U, SIMPLE.stages_UN)
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
    libraries = [Library(d, SIMPLE.counts_UC, SIMPLE.rates_U, SIMPLE.stages_UN) for d in demands]
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


def test_homo_by_ratio_takes_the_most_per_dollar_where_homo_takes_the_cheapest_plan():
    """The first kind serves 300 for its price and 10 are wanted: a machine of the second is enough."""
    lib = library({(1, 0): 300.0, (0, 1): 20.0}, Demand(CARD, "decode", 1.0, 10.0))
    price_C = market([[9, 9], [9, 9]]).price_RC[0]
    assert 300 / price_C[0] > 20 / price_C[1] and price_C[0] > price_C[1]
    for stock, kind in (([[9, 9], [9, 9]], 0), ([[0, 9], [0, 9]], 1)):
        rent = market(stock)
        described, ours = (baselines.greedy([lib], rent, p) for p in (baselines.BY_RATIO, "homo"))
        for plan, used in ((described, kind), (ours, 1)):
            check(plan, [lib], rent)
            assert plan.factor == 1 and all(lib.counts_UC[u, used] == 1 for _, _, u in plan.running)
        assert described.usd_per_h >= ours.usd_per_h


def test_a_scaled_baseline_starves_nobody():
    """Served in order the first model would take all machines; scaled down alike, each gets its part."""
    libraries = [library({(1, 0): 10.0}, Demand(CARD, "decode", 1.0, 100.0)) for _ in range(2)]
    rent = market([[4, 0], [0, 0]])
    assert baselines.greedy(libraries, rent, "cauchy").factor == 0
    scaled = baselines.scaled(libraries, rent, "cauchy")
    check(scaled, libraries, rent)
    assert scaled.factor == pytest.approx(0.2, abs=0.002) and sum(scaled.running.values()) == 4
