"""The whole graph benchmark: fourteen detectors on every shared graph, with its table, how long it took, and the leak baselines.

    python -m benchmarks.detect.graphs --data DIR [--trials 5] [--rows FILE] [--quick]

Runs `wager detect bench graph` and keeps mean, spread and best of every cell. FILE holds one line a trial: a run that was stopped goes on with what
it lacks, and a finished one is only read again; seconds are those of the trials, divided by the processes that worked side by side.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, arguments
from wager.detect.bond import report
from wager.detect.bond.graph import Graph
from wager.detect.bond.runner import read

BAR_MINUTES = 60


def main() -> None:
    parser = arguments("The whole benchmark of graph detectors.", repeats=False)
    parser.add_argument("--data", type=Path, required=True, help="folder of npz graphs")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--rows", type=Path, default=None, help="file of trials; an unfinished one is gone on with")
    args = parser.parse_args()
    options = ["--epochs", "3", "--datasets", "disney,gen_100"] if args.quick else []
    with tempfile.TemporaryDirectory() as folder:
        path = args.rows or Path(folder) / "trials.jsonl"
        command = [sys.executable, "-m", "wager", "detect", "bench", "graph", "--data", str(args.data)]
        subprocess.run([*command, "--trials", str(args.trials), "--out", str(path), *options], check=True)
        rows = read(path)
    made = Report("detect", "bond-graphs", [], summary(rows, args.data, len(os.sched_getaffinity(0))))
    if not args.quick:
        print(f"written: {made.save()}")


def summary(rows: list[dict[str, Any]], data: Path, jobs: int) -> dict[str, Any]:
    """Times, outcomes, and for every detector and graph the AUC in percent, with the baselines that need no learning."""
    seconds = sum(r.get("seconds", 0.0) for r in rows)
    outcomes = {status: sum(r["status"] == status for r in rows) for status in sorted({r["status"] for r in rows})}
    leaks = [
        row
        for name in sorted({r["dataset"] for r in rows})
        for row in report.leak_rows(name, Graph.of(data / f"{name}.npz"))
    ]
    table: dict[str, dict[str, Any]] = {}
    for (detector, dataset), cell in report.cells([*rows, *leaks], "auc").items():
        found = {key: round(float(cell[key]), 2) for key in ("mean", "std", "max") if cell.get(key) is not None}
        table.setdefault(dataset, {})[detector] = found | {"failed": cell["failed"]} if cell["failed"] else found
    return {
        "trials": len(rows), "outcomes": outcomes, "jobs": jobs, "trial_seconds": seconds,
        "minutes": seconds / jobs / 60, "bar_minutes": BAR_MINUTES, "auc_percent": table,
    }  # fmt: skip


if __name__ == "__main__":
    main()
