"""CP-SAT over a task of plain numbers. `python -m wager.solve.cpsat` reads the task as JSON on standard input and answers the same way."""

from __future__ import annotations

import json
import sys
from typing import Any


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Solve `task` (see `solvers._task`). Answers status, x (None when nothing was found) and the proven bound."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    x = [model.new_int_var(low, high, "") for low, high in task["bounds"]]
    for columns, values, low, high in task["rows"]:
        low = cp_model.INT_MIN if low is None else low
        high = cp_model.INT_MAX if high is None else high
        model.add_linear_constraint(
            cp_model.LinearExpr.weighted_sum([x[c] for c in columns], values), max(low, cp_model.INT_MIN), high
        )
    objective = cp_model.LinearExpr.weighted_sum(x, task["objective"])
    (model.maximize if task["maximize"] else model.minimize)(objective)
    if task["hint"] is not None:
        for variable, value in zip(x, task["hint"], strict=True):
            model.add_hint(variable, value)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = task["workers"]
    solver.parameters.relative_gap_limit = task["gap"]
    solver.parameters.random_seed = 0
    if task["time_limit_s"] is not None:
        solver.parameters.max_time_in_seconds = task["time_limit_s"]
    status = solver.solve(model)
    names = {cp_model.OPTIMAL: "optimal", cp_model.FEASIBLE: "feasible", cp_model.INFEASIBLE: "infeasible"}
    name = names.get(status, "unknown")  # type: ignore[call-overload]
    found = name in ("optimal", "feasible")
    return {
        "status": name,
        "x": [solver.value(v) for v in x] if found else None,
        "bound": solver.best_objective_bound if found else None,
    }


if __name__ == "__main__":
    json.dump(run(json.load(sys.stdin)), sys.stdout)
