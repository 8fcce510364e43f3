"""Both solvers agree with brute force; bounds are true bounds; duals predict what a change is worth."""

import itertools
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wager.errors import UsageError
from wager.solve import LinearModel, solve

whole = st.integers(-4, 6)


def random_model(columns, rows, maximize, draw):
    model = LinearModel(maximize=maximize)
    for c in range(columns):
        model.add(f"x{c}", 0, 3, draw(whole), integer=True)
    for _ in range(rows):
        model.row([(c, draw(whole)) for c in range(columns)], upper=draw(st.integers(0, 10)))
    return model


def brute_force(model):
    points = map(np.array, itertools.product(range(4), repeat=len(model.names)))
    values = [model.evaluate(p) for p in points if model.violation(p) == 0]
    return (max if model.maximize else min)(values)


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(0, 3), st.booleans())
@pytest.mark.parametrize("method", ["highs", "cpsat"])
def test_the_optimum_is_the_brute_force_optimum(method, data, columns, rows, maximize):
    if method == "cpsat":
        pytest.importorskip("ortools")
    model = random_model(columns, rows, maximize, data.draw)
    answer = solve(model, method)
    assert answer.status == "optimal" and answer.x is not None
    assert model.violation(answer.x) < 1e-6
    assert answer.value == pytest.approx(brute_force(model))
    assert answer.bound == pytest.approx(answer.value, abs=1e-6) and answer.gap < 1e-6


def knapsack(seed=0, n=60):
    rng = np.random.default_rng(seed)
    model = LinearModel(maximize=True)
    weights = rng.integers(20, 100, (5, n))
    for c in range(n):
        model.binary(f"x{c}", int(weights[:, c].sum() + rng.integers(0, 30)))
    for row in weights:
        model.row(list(enumerate(row.tolist())), upper=int(row.sum() // 2))
    return model


@pytest.mark.parametrize("method", ["highs", "cpsat"])
def test_at_the_time_limit_the_best_so_far_comes_with_a_true_bound(method):
    if method == "cpsat":
        pytest.importorskip("ortools")
    model = knapsack()
    answer = solve(model, method, time_limit_s=0.5)
    assert answer.seconds < 5
    assert answer.x is not None and model.violation(answer.x) < 1e-6
    assert answer.bound >= answer.value and answer.gap < 0.2
    relaxed = LinearModel(**{**vars(model), "integer": [False] * 60})
    assert answer.bound <= solve(relaxed).value + 1e-6


def test_duals_are_the_worth_of_a_unit_in_the_models_own_sense():
    def model(capacity, demand, maximize):
        sign = 1 if maximize else -1
        m = LinearModel(maximize=maximize)
        x, y = m.add("x", objective=3 * sign), m.add("y", objective=2 * sign)
        m.row({x: 1, y: 1}, upper=capacity)
        m.row({x: 1, y: -1}, lower=-10, upper=2)
        m.row({x: 1}, lower=demand)
        return m

    for maximize in (True, False):
        base = solve(model(10, 1, maximize))
        for row, changed in ((0, model(10.5, 1, maximize)), (2, model(10, 1.5, maximize))):
            assert solve(changed).value - base.value == pytest.approx(0.5 * base.duals[row])


def test_infeasible_and_unbounded_are_said():
    m = LinearModel()
    m.add("x", 0, 1, integer=True)
    m.row({0: 1}, lower=2)
    assert solve(m).status == "infeasible" and solve(m).gap == float("inf")
    m = LinearModel(maximize=True)
    m.add("x", objective=1)
    assert solve(m).status == "unbounded"


def test_cpsat_runs_in_its_own_process_beside_highspy(monkeypatch):
    pytest.importorskip("ortools")
    model = knapsack(n=12)
    here = solve(model, "cpsat")
    monkeypatch.setitem(sys.modules, "highspy", types.ModuleType("highspy"))
    monkeypatch.setattr("wager.solve.cpsat.run", lambda task: pytest.fail("CP-SAT ran beside highspy"))
    assert solve(model, "cpsat").value == here.value == solve(model).value


def test_a_hint_is_used_and_highs_refuses_it():
    pytest.importorskip("ortools")
    model = knapsack(n=12)
    best = solve(model)
    assert solve(model, "cpsat", hint=best.x).value == best.value
    with pytest.raises(UsageError, match="hint"):
        solve(model, hint=best.x)


@pytest.mark.parametrize("method, said", [("gurobi", "gurobi"), ("cpsat", "whole numbers")])
def test_bad_requests_are_refused(method, said):
    m = LinearModel()
    m.add("x", 0, 1)
    with pytest.raises(UsageError, match=said):
        solve(m, method)
