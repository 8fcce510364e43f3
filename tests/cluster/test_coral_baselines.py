"""What Coral is compared with: the published greedy choices, by hand on small markets, and the tuned ones, which do better in hindsight."""

import dataclasses

import numpy as np
import pytest

from tests.cluster.coral_libraries import CARD, CONFIGURATIONS, library
from wager.cluster.coral import baselines
from wager.cluster.coral.market import Market, check
from wager.cluster.coral.stage import Demand


def market(stock, prices=((2.0, 1.1), (2.3, 0.9))):
    return Market(("r0", "r1"), CONFIGURATIONS, np.array(stock, float), np.array(prices))


def both_phases(prefill, decode, rate):
    """Libraries of one model: {machines of each kind: share of `rate`} as tokens/s of each phase."""
    return [
        library(rates, Demand(CARD, phase, 1.0, rate)) for rates, phase in ((prefill, "prefill"), (decode, "decode"))
    ]


def machines_of(plan, libraries, demand):
    return sum(n * libraries[d].counts_UC[u] for (d, _, u), n in plan.running.items() if d == demand).tolist()


def planned(libraries, rent, policy, share=1.0):
    plan = baselines.greedy(libraries, rent, policy, share)
    check(plan, libraries, rent)
    return plan


def test_homo_takes_the_most_per_dollar_and_in_hindsight_the_cheapest_plan():
    """The first kind serves 300 for its price and 10 are wanted: a machine of the second is enough."""
    rates = {(1, 0): 300.0, (0, 1): 20.0}
    libraries = [library(rates, Demand(CARD, "decode", 1.0, 10.0))]
    price_C = market([[9, 9], [9, 9]]).price_RC[0]
    assert 300 / price_C[0] > 20 / price_C[1] and price_C[0] > price_C[1]
    for stock, kind in (([[9, 9], [9, 9]], 0), ([[0, 9], [0, 9]], 1)):
        rent = market(stock)
        published, tuned = (planned(libraries, rent, p) for p in ("homo", "homo in hindsight"))
        for plan, used in ((published, kind), (tuned, 1)):
            assert plan.factor == 1 and machines_of(plan, libraries, 0)[1 - used] == 0
        assert published.usd_per_h >= tuned.usd_per_h


def test_homo_serves_both_phases_on_one_kind_and_cauchy_each_on_its_own():
    """Each kind is best at one phase; together the first is the better one for both."""
    libraries = both_phases({(1, 0): 40.0, (0, 1): 4.0}, {(1, 0): 15.0, (0, 1): 10.0}, 100.0)
    rent = market([[99, 99], [0, 0]], ((2.0, 1.0), (2.0, 1.0)))
    homo, cauchy = (planned(libraries, rent, p) for p in baselines.PUBLISHED)
    assert [machines_of(homo, libraries, d) for d in (0, 1)] == [[3, 0], [7, 0]]
    assert [machines_of(cauchy, libraries, d) for d in (0, 1)] == [[3, 0], [0, 10]]
    assert cauchy.usd_per_h < homo.usd_per_h == 20 and homo.factor == cauchy.factor == 1


def test_a_phase_has_replicas_of_one_kind_while_the_stock_lasts_then_of_the_next_best():
    libraries = both_phases({(1, 0): 50.0, (0, 1): 20.0}, {(1, 0): 50.0, (0, 1): 20.0}, 100.0)
    prices = ((2.0, 1.0), (2.0, 1.0))
    for policy in ("homo", "cauchy"):
        assert machines_of(planned(libraries, market([[4, 99], [0, 0]], prices), policy), libraries, 0) == [2, 0]
        short = planned(libraries, market([[2, 99], [0, 0]], prices), policy)
        assert short.factor == 1
        assert [machines_of(short, libraries, d) for d in (0, 1)] == [[1, 3], [1, 3]]  # each phase half and half


def test_what_one_phase_cannot_serve_the_other_does_not_rent():
    """Machines for prefill serve half; decoding rents for half too, and what is left goes to the next model."""
    libraries = both_phases({(1, 0): 10.0}, {(0, 1): 10.0}, 100.0)
    rent = market([[5, 20], [0, 0]])
    for policy, decoding in (("cauchy", 5), ("cauchy of any kinds", 10)):
        plan = planned(libraries, rent, policy)
        assert plan.factor == pytest.approx(0.5)
        assert machines_of(plan, libraries, 1) == [0, decoding]
    shared = both_phases({(1, 0): 10.0}, {(1, 0): 10.0}, 100.0)
    plan = planned(shared, market([[8, 0], [0, 0]]), "homo")
    assert plan.factor == pytest.approx(0.4, rel=2e-3)
    assert [machines_of(plan, shared, d)[0] for d in (0, 1)] == [4, 4]


def test_a_demand_takes_the_cheapest_region_first():
    libraries = [library({(1, 0): 10.0}, Demand(CARD, "decode", 1.0, 30.0))]
    for policy in baselines.POLICIES:
        plan = planned(libraries, market([[9, 0], [2, 0]], ((2.0, 1.0), (1.5, 1.0))), policy)
        assert plan.running == {(0, 1, 0): 2, (0, 0, 0): 1} and plan.usd_per_h == pytest.approx(5.0)


def test_a_scaled_baseline_starves_nobody():
    """Served in order the first model would take all machines; scaled down alike, each gets its part."""
    libraries = [library({(1, 0): 10.0}, Demand(CARD, "decode", 1.0, 100.0)) for _ in range(2)]
    rent = market([[4, 0], [0, 0]])
    for policy in ("cauchy of any kinds", "cauchy"):
        if policy == "cauchy":  # which plans both demands of one model together
            libraries[1] = library({(1, 0): 10.0}, Demand(dataclasses.replace(CARD, name="n"), "decode", 1.0, 100.0))
        assert baselines.greedy(libraries, rent, policy).factor == 0
        scaled = baselines.scaled(libraries, rent, policy)
        check(scaled, libraries, rent)
        assert scaled.factor == pytest.approx(0.2, abs=0.002) and sum(scaled.running.values()) == 4


def test_of_replicas_with_the_same_tokens_per_dollar_the_smaller_ones_are_taken():
    """Two machines serve twice as much as one, up to a rounding error in their favour."""
    libraries = [library({(1, 0): 10.0, (2, 0): 20.0 * (1 + 1e-13)}, Demand(CARD, "decode", 1.0, 30.0))]
    for policy in baselines.POLICIES:
        plan = planned(libraries, market([[9, 0], [0, 0]]), policy)
        assert machines_of(plan, libraries, 0) == [3, 0] and plan.usd_per_h == pytest.approx(6.0)
