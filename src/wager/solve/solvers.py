"""Hands a LinearModel to HiGHS (the copy inside scipy) or to OR-tools CP-SAT.

`highs` takes any model; it is exact to its tolerances. `cpsat` takes models whose columns are all integer with finite bounds and whose
coefficients are integers; it is exact, takes a hint and uses several cores. The free-standing highspy and OR-tools bring clashing copies
of HiGHS: a process that has imported the one cannot import the other. So CP-SAT runs in a process of its own whenever highspy is loaded here.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from typing import Any

import numpy as np

from wager.errors import UsageError, WagerError
from wager.solve.model import INFINITE, LinearModel, Solution, Status

METHODS = ("highs", "cpsat")
INTEGRAL = 1e-9


def solve(
    model: LinearModel,
    method: str = "highs",
    time_limit_s: float | None = None,
    gap: float = 0.0,
    hint: np.ndarray | None = None,
    workers: int = 1,
) -> Solution:
    """Solve and say how well. At the time limit the best found so far is returned with its bound.

    gap: stop once proven this close, relative. hint: a starting point for cpsat (highs takes none and refuses it).
    workers: threads of cpsat; highs uses one.
    Raises UsageError for an unknown method or a model it cannot take, WagerError when OR-tools is missing or the solver breaks.
    """
    if method not in METHODS:
        raise UsageError(f"solver {method!r} is unknown; use one of {', '.join(METHODS)}")
    if time_limit_s is not None and time_limit_s <= 0:
        raise UsageError(f"time_limit_s={time_limit_s} leaves no time; give a positive number or none")
    if not model.names:
        return Solution("optimal", 0.0, 0.0, np.zeros(0), 0.0, method)
    begun = time.perf_counter()
    if method == "cpsat":
        return _cpsat(model, time_limit_s, gap, hint, workers, begun)
    if hint is not None:
        raise UsageError("highs takes no hint; leave it out or use cpsat")
    return _milp(model, time_limit_s, gap, begun) if any(model.integer) else _lp(model, time_limit_s, begun)


def _milp(model: LinearModel, time_limit_s: float | None, gap: float, begun: float) -> Solution:
    from scipy.optimize import Bounds, LinearConstraint, milp

    sign = -1.0 if model.maximize else 1.0
    sides: Any = (np.array(model.row_lower), np.array(model.row_upper))
    box: Any = (np.array(model.lower), np.array(model.upper))
    rows = [LinearConstraint(model.matrix_RC, *sides)] if model.row_lower else []
    options = {"mip_rel_gap": gap} | ({"time_limit": time_limit_s} if time_limit_s else {})
    result = milp(
        sign * np.array(model.objective), integrality=np.array(model.integer, int), constraints=rows,
        bounds=Bounds(*box), options=options,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    worst = INFINITE if model.maximize else -INFINITE
    if result.x is None:
        status: Status = {2: "infeasible", 3: "unbounded"}.get(result.status, "unknown")  # type: ignore[assignment]
        bound = getattr(result, "mip_dual_bound", None)
        return Solution(status, None, worst if bound is None else sign * bound, None, seconds, "highs")
    x = np.where(model.integer, np.round(result.x), result.x)
    bound = result.mip_dual_bound
    return Solution(
        "optimal" if result.status == 0 else "feasible", model.evaluate(x),
        worst if bound is None else sign * bound, x, seconds, "highs",
    )  # fmt: skip


def _lp(model: LinearModel, time_limit_s: float | None, begun: float) -> Solution:
    """A linear program, with duals in the sense of the model's own objective."""
    from scipy.optimize import linprog
    from scipy.sparse import vstack

    sign = -1.0 if model.maximize else 1.0
    lower, upper = np.array(model.row_lower), np.array(model.row_upper)
    matrix = model.matrix_RC
    equal = lower == upper
    above, below = np.flatnonzero(~equal & np.isfinite(upper)), np.flatnonzero(~equal & np.isfinite(lower))
    inequality = vstack([matrix[above], -matrix[below]]) if len(above) + len(below) else None
    result = linprog(
        sign * np.array(model.objective), A_ub=inequality,
        b_ub=np.concatenate([upper[above], -lower[below]]) if inequality is not None else None,
        A_eq=matrix[np.flatnonzero(equal)] if equal.any() else None, b_eq=lower[equal] if equal.any() else None,
        bounds=np.stack([model.lower, model.upper], 1), method="highs",
        options={"time_limit": time_limit_s} if time_limit_s else {},
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    if result.status != 0:
        status: Status = {2: "infeasible", 3: "unbounded"}.get(result.status, "unknown")  # type: ignore[assignment]
        return Solution(status, None, INFINITE if model.maximize else -INFINITE, None, seconds, "highs")
    duals = np.zeros(len(lower))
    if inequality is not None:
        duals[above] += result.ineqlin.marginals[: len(above)]
        duals[below] -= result.ineqlin.marginals[len(above) :]
    if equal.any():
        duals[equal] = result.eqlin.marginals
    value = model.evaluate(result.x)
    return Solution("optimal", value, value, result.x, seconds, "highs", sign * duals)


def _cpsat(
    model: LinearModel, time_limit_s: float | None, gap: float, hint: np.ndarray | None, workers: int, begun: float
) -> Solution:
    _check_integral(model)
    if importlib.util.find_spec("ortools") is None:
        raise WagerError("CP-SAT needs OR-tools: pip install 'wager[plan]', or use the highs solver")
    task = _task(model, time_limit_s, gap, hint, workers)
    if "highspy" in sys.modules:
        answer = _in_own_process(task, time_limit_s)
    else:
        from wager.solve.cpsat import run

        answer = run(task)
    x = None if answer["x"] is None else np.array(answer["x"], float)
    value = None if x is None else model.evaluate(x)
    bound = answer["bound"]
    if bound is None:
        bound = INFINITE if model.maximize else -INFINITE
    return Solution(answer["status"], value, bound, x, time.perf_counter() - begun, "cpsat")


def _task(model: LinearModel, time_limit_s: float | None, gap: float, hint: np.ndarray | None, workers: int) -> dict:
    matrix = model.matrix_RC
    rows = [
        (
            matrix.indices[a:b].tolist(),
            np.round(matrix.data[a:b]).astype(int).tolist(),
            _whole(low, 1),
            _whole(high, -1),
        )
        for a, b, low, high in zip(matrix.indptr, matrix.indptr[1:], model.row_lower, model.row_upper, strict=False)
    ]
    return {
        "bounds": [(int(low), int(high)) for low, high in zip(model.lower, model.upper, strict=True)],
        "objective": [round(v) for v in model.objective],
        "maximize": model.maximize,
        "rows": rows,
        "hint": None if hint is None else [round(float(v)) for v in hint],
        "time_limit_s": time_limit_s,
        "gap": gap,
        "workers": workers,
    }


def _whole(bound: float, side: int) -> int | None:
    """The tightest whole number for a lower (side 1) or upper (side -1) bound of an integer row; None is open."""
    if not np.isfinite(bound):
        return None
    return int(np.ceil(bound - INTEGRAL)) if side > 0 else int(np.floor(bound + INTEGRAL))


def _check_integral(model: LinearModel) -> None:
    def fail(what: str) -> None:
        raise UsageError(f"cpsat takes whole numbers only: {what}; scale the model or use highs")

    for name, whole, low, high in zip(model.names, model.integer, model.lower, model.upper, strict=True):
        if not whole or not np.isfinite([low, high]).all() or low != int(low) or high != int(high):
            fail(f"column {name} is continuous, unbounded or has fractional bounds [{low}, {high}]")
    data = np.concatenate([model.matrix_RC.data, np.array(model.objective)])
    if not (np.isfinite(data).all() and np.abs(data - np.round(data)).max(initial=0) <= INTEGRAL):
        fail("a coefficient is fractional")


def _in_own_process(task: dict, time_limit_s: float | None) -> dict:
    """Run the task in a fresh interpreter: needed when a clashing HiGHS is loaded in this one."""
    limit = None if time_limit_s is None else time_limit_s + 60
    done = subprocess.run(
        [sys.executable, "-m", "wager.solve.cpsat"],
        input=json.dumps(task), capture_output=True, text=True, timeout=limit,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise WagerError(f"the CP-SAT process failed: {lines[-1]}")
    return json.loads(done.stdout)
