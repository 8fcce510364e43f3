"""Neighbours of a million rows under a memory budget, killed on the way and resumed.

    python -m benchmarks.detect.large [--rows 1000000] [--quick] [--folder DIR]

A first process is killed (SIGKILL) after a few finished blocks; a second one finds them in the checkpoint folder and does the rest. Peak resident
memory counts interpreter, libraries, data and results. A sample of rows is compared with the float64 definition. One million rows x 32
take about 8 minutes on two AVX-512 processors (3.2e13 multiply-adds); the command itself may be killed and started again with the
same --folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Report, Row, arguments, say
from wager.detect.tod.knn import exact_neighbors

FEATURES, NEIGHBORS, BUDGET_BYTES = 32, 10, 2_000_000_000
BASE_BYTES = (
    900_000_000  # interpreter, libraries, the data and the results, which the operators' own budget does not count
)
CHILD = """
import resource, sys, time, numpy as np
from wager.detect.tod import KNN, Execution
rows, features, k, budget, folder, out = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6]
x = np.random.default_rng(0).normal(size=(rows, features))
start = time.perf_counter()
execution = Execution(search="scan", memory_bytes=budget, checkpoint=folder, batch_rows=min(8192, max(64, rows // 20)))
score = KNN(n_neighbors=k, execution=execution).fit(x).decision_scores_
seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
np.save(out, score)
print(seconds, peak)
"""


def child(rows: int, folder: Path, out: Path) -> subprocess.Popen:
    arguments = [rows, FEATURES, NEIGHBORS, BUDGET_BYTES - BASE_BYTES, folder, out]
    return subprocess.Popen([sys.executable, "-c", CHILD, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def blocks(folder: Path) -> int:
    return len(list(folder.glob("[!.]*.npz")))


def killed(rows: int, folder: Path, out: Path, after: int) -> int:
    """Start, kill as soon as `after` blocks are finished; how many there are then."""
    process = child(rows, folder, out)
    while process.poll() is None and blocks(folder) < after:
        time.sleep(0.02)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return blocks(folder)


def measured(rows: int, folder: Path) -> dict[str, Any]:
    """Kill and resume; seconds of the second run, peak bytes, and how far a sample of scores lies from the definition."""
    out = folder / "score.bin.npy"
    kept = killed(rows, folder, out, 3)
    say(f"killed with {kept} blocks finished")
    start = time.perf_counter()
    process = child(rows, folder, out)
    printed, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"the resumed run failed with {process.returncode}")
    seconds, peak = map(float, printed.split())
    score = np.load(out)
    x = np.random.default_rng(0).normal(size=(rows, FEATURES))
    sample = np.random.default_rng(1).integers(0, rows, 20)
    error = max(
        abs(exact_neighbors(x[i : i + 1], np.delete(x, i, 0), NEIGHBORS).distance_RK[0, -1] - score[i]) for i in sample
    )
    return {
        "rows": rows, "features": FEATURES, "neighbors": NEIGHBORS, "budget_bytes": BUDGET_BYTES, "peak_bytes": peak,
        "blocks_before_kill": kept, "blocks": blocks(folder), "seconds_after_resume": seconds,
        "wall_s": time.perf_counter() - start, "largest_error_of_20_rows": float(error),
    }  # fmt: skip


def main() -> None:
    parser = arguments("A million rows under 2 GB, killed and resumed.", repeats=False)
    parser.add_argument("--rows", type=int, default=None, help="rows (1,000,000; 30,000 with --quick)")
    parser.add_argument("--folder", type=Path, default=None, help="where finished blocks are kept (a temporary folder)")
    args = parser.parse_args()
    rows = args.rows or (30_000 if args.quick else 1_000_000)
    with tempfile.TemporaryDirectory() as fresh:
        folder = args.folder or Path(fresh)
        folder.mkdir(parents=True, exist_ok=True)
        found = measured(rows, folder)
    ratio = BUDGET_BYTES / found["peak_bytes"]
    row = Row(
        f"kNN {rows}x{FEATURES}, k={NEIGHBORS}: peak memory", "budget", "wager", "bytes", BUDGET_BYTES,
        found["peak_bytes"], ratio, ratio, ratio, 0.0, 1,
    )  # fmt: skip
    report = Report("detect", "large", [row], {"large": found})
    print(report.table())
    print(*(f"{name}: {value}" for name, value in found.items()), sep="\n")
    if not args.quick:
        print(f"written: {report.save()}")


if __name__ == "__main__":
    main()
