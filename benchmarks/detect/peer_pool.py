# pyright: reportMissingImports=false
"""PyOD fits timed one by one, or many at once, each on a core of its own; driven by benchmarks.worker.

    python benchmarks/detect/peer_pool.py      (requests on stdin: ready, together, alone)

Needs pyod==3.6.7 and scikit-learn. Everything is imported and PyOD's loops are compiled before anything is timed; `together` then forks a
process a fit, which therefore starts warm. Start it with OMP_NUM_THREADS=1 for that: a process that has used OpenMP threads must not fork.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.detect.peer_worker import detector
from benchmarks.worker import serve

warnings.filterwarnings("ignore")
FOLDER = Path(tempfile.mkdtemp(prefix="peer_pool_"))
TABLES: dict[str, np.ndarray] = {}


def ready(names: list[str], tables: dict[str, str]) -> dict[str, str]:
    """Read the tables, import the detectors and compile their loops on a small slice; {detector: why it cannot run}."""
    for name, path in tables.items():
        with np.load(path) as stored:
            TABLES[name] = np.ascontiguousarray(stored["X"], dtype=np.float64)
    failed = {}
    for name in names:
        try:
            detector(name, {}).fit(next(iter(TABLES.values()))[:400])
        except Exception as error:
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
    return failed


def alone(
    name: str, table: str, config: dict[str, Any], rows: int | None = None, repeats: int = 1, jitter: float = 0.0
) -> dict[str, Any]:
    """Seconds of each fit, and the scores in a file; jitter breaks ties as `peer_worker.load_table` does."""
    x, seconds, made = TABLES[table][:rows], [], None
    if jitter:
        x = x + jitter * (x.std(0) + 1e-3 * np.abs(x).max()) * np.random.default_rng(0).normal(size=x.shape)
    for _ in range(repeats):
        made = detector(name, dict(config))
        start = time.perf_counter()
        made.fit(x)
        seconds.append(time.perf_counter() - start)
    assert made is not None
    path = FOLDER / f"{name}-{table}-{os.getpid()}-{time.monotonic_ns()}.npy"
    np.save(path, made.decision_scores_)
    return {"seconds": seconds, "scores": str(path)}


def together(jobs: list[dict[str, Any]], limit_s: float, first_core: int) -> list[dict[str, Any] | None]:
    """Every job in a forked process with a core of its own, all at once if there are cores enough; None where the limit ended it."""
    for old in FOLDER.glob("job-*.json"):
        old.unlink()
    cores = sorted(os.sched_getaffinity(0))[first_core:] or sorted(os.sched_getaffinity(0))
    end, running, waiting, free = time.monotonic() + limit_s, {}, list(range(len(jobs))), list(cores)
    while (waiting or running) and time.monotonic() < end:
        while waiting and free:
            core, i = free.pop(), waiting.pop(0)
            pid = os.fork()
            if pid == 0:
                child(jobs[i], FOLDER / f"job-{i}.json", core)
            running[pid] = (core, i)
        time.sleep(0.02)
        for pid in list(running):
            if os.waitpid(pid, os.WNOHANG)[0]:
                free.append(running.pop(pid)[0])
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    paths = [FOLDER / f"job-{i}.json" for i in range(len(jobs))]
    return [json.loads(path.read_text()) if path.exists() else None for path in paths]


def child(job: dict[str, Any], path: Path, core: int) -> None:
    """One job; never returns."""
    try:
        os.sched_setaffinity(0, {core})
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(alone(**job)))
        temporary.replace(path)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    serve({"ready": ready, "alone": alone, "together": together})
