"""Coral's templates: the compiled search equal to every partition and split tried, and to the paper's program; dominance that loses nothing."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cluster.coral_libraries import CARD, CONFIGURATIONS, DEMAND, complete_library, library, tables
from wager.cluster.coral import native
from wager.cluster.coral.reference import (
    best_of_partitions,
    best_rates,
    set_partitions,
    solve_template_ilp,
    splits,
)
from wager.cluster.coral.stage import Demand, stage_throughput
from wager.cluster.coral.templates import budgets, build, multisets, split, undominated
from wager.errors import UsageError
from wager.hardware.cluster import Link
from wager.hardware.layer_cost import Roofline

ROOFLINE, LINK = Roofline(0.5, 0.5, 1e-4), Link(1e9, 1e-3)


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


@st.composite
def share_tables(draw, configurations=2, layers=6):
    """tokens/s by layers that do not rise along layers nor fall with the share: share -> [C, L + 1]."""
    full = np.array([
        [0.0, *sorted((draw(st.integers(0, 60)) for _ in range(layers)), reverse=True)] for _ in range(configurations)
    ], float)  # fmt: skip
    strict = draw(st.sampled_from([0.3, 1.0, 2.0]))

    def table(share):
        late = np.arange(layers + 1) > np.ceil(layers * share * strict)  # what a short budget cannot hold
        return np.where(late[None, :], 0.0, np.floor(full * (0.4 + 0.6 * share)))

    return table


@settings(max_examples=12, deadline=None)
@given(share_tables(), st.sampled_from([None, 2, 5]), st.booleans())
def test_the_compiled_search_equals_every_partition_and_every_split(table, units, every):
    """All multisets of up to four machines of two kinds, with and without those that smaller ones replace."""
    machines_UN, kinds, layers = multisets(2, 4), 2, 6
    grids = budgets(table, 4, units)
    found = native.search(machines_UN, kinds, np.ones(len(machines_UN), bool), grids, every)
    exact, most = {}, {}
    for u, row in enumerate(machines_UN):
        machines = [int(c) for c in row if c < kinds]
        best = exact[tuple(machines)] = best_of_partitions(machines, table, layers, units)
        parts = max(
            (most[tuple(itertools.compress(machines, mask))] + most[tuple(itertools.compress(machines, np.logical_not(mask)))]
             for mask in itertools.product((False, True), repeat=len(machines)) if 0 < sum(mask) < len(machines)),
            default=0.0,
        )  # fmt: skip
        most[tuple(machines)] = max(best, parts)
        assert found.useful_U[u] == (best > parts)
        if every or best > parts or len(set(machines)) == 1:
            assert found.rates_U[u] == pytest.approx(best)
        else:
            assert found.rates_U[u] == 0
        if found.rates_U[u]:
            _is_an_arrangement(found, u, machines, table, grids, layers)


def _is_an_arrangement(found, u, machines, table, grids, layers):
    units = grids[found.grids_U[u]].units
    stages, shares = found.stages_UN[u][: len(machines)], found.units_UN[u] / units
    assert set(stages) == set(range(max(stages) + 1)) and (shares > 0).sum() == max(stages) + 1
    assert found.units_UN[u].sum() <= units
    held = 0
    for stage in range(max(stages) + 1):
        group = [m for m, s in zip(machines, stages, strict=True) if s == stage]
        held += int((table(shares[stage])[group].sum(0)[1:] >= found.rates_U[u] * (1 - 1e-12)).sum())
    assert held >= layers


def test_an_uneven_split_of_the_budget_can_serve_what_an_even_one_cannot():
    """A slow machine that needs two thirds of the time for its half of the layers."""
    full = np.array([[0.0, 10, 10, 0, 0], [0.0, 10, 10, 0, 0]])

    def table(share):
        return np.where(np.array([[share >= 1 / 3], [share >= 2 / 3]]), full, 0.0)

    for units, rate in ((None, 0), (2, 0), (3, 10)):
        found = native.search(multisets(2, 2), 2, np.ones(5, bool), budgets(table, 2, units), True)
        at = multisets(2, 2).tolist().index([0, 1])
        assert found.rates_U[at] == rate
    assert sorted(found.units_UN[at]) == [1, 2]
    with pytest.raises(UsageError, match="1 to 64 units, not 65"):
        budgets(table, 2, 65)


def test_shares_of_the_budget_add_up_to_all_of_it():
    for units, stages in ((6, 1), (6, 3), (5, 5)):
        all_ways = {one for one in itertools.product(range(1, units + 1), repeat=stages) if sum(one) == units}
        assert set(splits(units, stages)) == all_ways and len(list(splits(units, stages))) == len(all_ways)


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
    for units in (None, 4):
        lib = build(DEMAND, CONFIGURATIONS, table, max_nodes=3, units=units)
        assert len(lib)
        for u in range(len(lib)):
            stages = split(lib, u, table)
            assert sum(k for _, k, _ in stages) == CARD.layers and sum(x for _, _, x in stages) <= 1 + 1e-12
            assert min(table(x)[g, k].sum() for g, k, x in stages) >= lib.rates_U[u] * (1 - 1e-9)


def table(share):
    return np.stack([stage_throughput(DEMAND, c, share, ROOFLINE, LINK) for c in CONFIGURATIONS])


def test_a_library_without_dominated_templates_has_the_same_useful_ones():
    full = build(DEMAND, CONFIGURATIONS, table, max_nodes=5)
    short = build(DEMAND, CONFIGURATIONS, table, max_nodes=5, dominated=False)
    assert len(short) < len(full) and set(full.useful) <= set(undominated(full))

    def useful(lib):
        return {tuple(lib.counts_UC[u]): lib.rates_U[u] for u in lib.useful}

    assert useful(short) == useful(full)
    equal = [{tuple(lib.counts_UC[u]): lib.rates_U[u] for u in lib.equal} for lib in (full, short)]
    assert equal[0] == equal[1]


def test_throughput_never_falls_with_the_share_of_the_budget():
    shares = [k / 12 for k in range(1, 13)]
    rows = np.stack([table(x) for x in shares])
    assert (np.diff(rows, axis=0) >= 0).all() and rows[-1].max() > rows[0].max()


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


def test_templates_serve_other_rates_of_the_same_demand_only():
    lib = complete_library({s: np.array([[0.0, 9, 9, 9, 9], [0.0, 5, 5, 5, 5]]) for s in range(1, 5)}, DEMAND)
    other = lib.for_demand(dataclasses.replace(DEMAND, tokens_per_s=7.0))
    assert other.demand.tokens_per_s == 7.0 and other.rates_U is lib.rates_U and (other.useful == lib.useful).all()
    with pytest.raises(UsageError, match="differ in more than their rates"):
        lib.for_demand(dataclasses.replace(DEMAND, objective_s=2.0))
