"""One demand at least cost: the covering knapsack equal to an integer program, with what runs already at its own price and number."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wager.cluster.coral import native
from wager.cluster.coral.lagrange import PARTS, Column, cheapest, columns_of, frontier
from wager.solve import LinearModel, solve

COLUMN = st.tuples(st.integers(1, 40), st.floats(0.5, 60), st.sampled_from([-1, -1, 0, 1, 3]))


def by_program(columns, wanted):
    program = LinearModel()
    numbers = [program.add("", 0, c.most, c.cost, integer=True) for c in columns]
    program.row([(n, c.rate) for n, c in zip(numbers, columns, strict=True)], lower=wanted)
    return solve(program, gap=0.0).value


@settings(max_examples=40, deadline=None)
@given(st.lists(COLUMN, min_size=1, max_size=6), st.floats(1, 300))
def test_the_cheapest_replicas_equal_the_integer_program(raw, wanted):
    columns = [Column(0, i, float(c), r, np.inf if m < 0 else m) for i, (c, r, m) in enumerate(raw)]
    bound, chosen = cheapest(columns, wanted)
    exact = by_program(columns, wanted)
    if exact is None:
        assert chosen is None
        return
    assert bound <= exact + 1e-6
    if chosen is not None:
        counts = {i: chosen.get((0, i), 0) for i in range(len(columns))}
        assert all(n <= columns[i].most for i, n in counts.items())
        assert sum(n * columns[i].rate for i, n in counts.items()) >= wanted * (1 - 1e-9)
        cost = sum(n * columns[i].cost for i, n in counts.items())
        assert cost >= exact - 1e-6
        # a rate is off by less than one part: of a demand smaller by as many parts as there are replicas the bound is the optimum
        assert bound >= (
            by_program(columns, wanted * (1 - sum(counts.values()) / PARTS)) or 0.0
        ) - 1e-6 or bound == pytest.approx(cost)


def test_whole_numbers_are_covered_exactly_and_limits_kept():
    least, counts = native.cover(10, np.array([3.0, 1.0, 2.0]), np.array([7, 2, 4]), np.array([-1, -1, 1]))
    assert least == 5 and counts.tolist() in ([1, 0, 1], [1, 2, 0])
    assert native.cover(10, np.array([1.0]), np.array([4]), np.array([2]))[0] == np.inf
    assert native.cover(10, np.array([1.0]), np.array([0]), np.array([-1]))[0] == np.inf


def test_a_template_is_offered_where_it_is_cheapest_and_what_runs_as_often_as_it_runs():
    price_UR = np.array([[2.0, 1.0], [3.0, 4.0], [5.0, 5.0]])
    rate_U = np.array([10.0, 30.0, 20.0])
    found = columns_of(price_UR, np.zeros((3, 2)), rate_U, np.arange(3), {(1, 2): 4}, 0.5)
    assert found == [Column(0, 1, 4.5, 30.0, np.inf), Column(1, 0, 1.5, 10.0, np.inf), Column(1, 2, 5.0, 20.0, 4.0)]
    assert frontier(np.array([1.0, 2.0, 2.0]), np.array([5.0, 5.0, 9.0])).tolist() == [2, 0]
