"""Trials in a worker process: limits on time and memory, every outcome a row of a JSON-lines file, a killed run goes on where it was.

A row holds configuration, seed, versions, seconds (preparation and motif counting included), peak bytes, status (ok, nan, oom, timeout, error) and
metrics. A failed cell is a result and stays in the table. A trial's draw depends on its name and the run's seed alone.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from wager.detect.bond.protocol import PROTOCOLS, entry_of, make, trial_config
from wager.errors import UsageError


@dataclass(frozen=True)
class Trial:
    """One cell's trial; `key` names it in the file."""

    detector: str
    dataset: str
    trial: int
    seed: int
    protocol: str
    epochs: int = 300
    symmetrize: bool = False

    @property
    def key(self) -> tuple:
        return tuple(asdict(self).values())


@dataclass(frozen=True)
class Limits:
    """Per trial; None is no limit."""

    time_s: float | None = None
    memory_bytes: int | None = None


def plan(
    detectors: Sequence[str],
    datasets: Sequence[str],
    trials: int,
    seed: int,
    protocol: str,
    epochs: int,
    symmetrize: bool,
) -> list[Trial]:
    """Every trial; detectors without anything random or drawn run once. Raises UsageError for unknown names."""
    if protocol not in PROTOCOLS:
        raise UsageError(f"unknown protocol {protocol!r}; choose one of {', '.join(PROTOCOLS)}")
    if trials < 1 or epochs < 1:
        raise UsageError(f"trials is {trials} and epochs {epochs}; both must be at least 1")
    found = []
    for dataset in datasets:
        for detector in detectors:
            entry = entry_of(detector)
            count = trials if entry.seeded or entry.own else 1
            found += [Trial(detector, dataset, t, seed, protocol, epochs, symmetrize) for t in range(count)]
    return found


def run(
    trials: Sequence[Trial],
    paths: Mapping[str, Path],
    out: Path,
    limits: Limits,
    progress: Callable[[int, int, dict], None] | None = None,
    jobs: int | None = None,
) -> list[dict]:
    """Run what `out` does not hold yet; returns all rows of these trials, in their order. jobs: worker processes of one thread each (None: one
    for every processor), so that a row has the same bits whatever runs beside it."""
    done = {key_of(row): row for row in read(out)} if out.exists() else {}
    todo = [t for t in trials if t.key not in done]
    todo.sort(key=lambda t: -paths[t.dataset].stat().st_size)  # no long trial is left to one worker at the end
    out.parent.mkdir(parents=True, exist_ok=True)
    for i, (trial, row) in enumerate(_rows(todo, paths, limits, jobs or len(os.sched_getaffinity(0)))):
        done[trial.key] = row
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if progress:
            progress(i + 1, len(todo), row)
    return [done[t.key] for t in trials]


def read(path: Path) -> list[dict]:
    """The rows of a file; a last line cut short by a kill is dropped."""
    if not path.is_file():
        raise UsageError(f"{path} does not exist; `wager detect bench graph --out {path}` writes it")
    rows = []
    lines = path.read_text().splitlines()
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if i + 1 < len(lines):
                raise UsageError(f"{path}: line {i + 1} is not JSON") from None
    if len(rows) < len(lines):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def key_of(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in Trial.__dataclass_fields__)


def _rows(todo: Sequence[Trial], paths: Mapping[str, Path], limits: Limits, jobs: int) -> Iterator[tuple[Trial, dict]]:
    """Trials with their rows as they are done; each of `jobs` threads drives a worker process of its own."""
    if jobs < 1:
        raise UsageError(f"jobs is {jobs}; it must be at least 1")
    waiting: queue.SimpleQueue[Trial] = queue.SimpleQueue()
    for trial in todo:
        waiting.put(trial)
    done: queue.SimpleQueue[tuple[Trial, dict] | BaseException] = queue.SimpleQueue()
    stop = threading.Event()

    def drive() -> None:
        worker: _Worker | None = None
        try:
            while not stop.is_set():
                trial = waiting.get_nowait()
                worker = worker if worker and worker.alive() else _Worker(limits.memory_bytes)
                done.put((trial, asdict(trial) | worker.do(trial, paths[trial.dataset], limits.time_s)))
        except queue.Empty:
            pass
        except BaseException as error:
            done.put(error)
        finally:
            if worker:
                worker.end()

    drivers = [threading.Thread(target=drive, daemon=True) for _ in range(min(jobs, len(todo)))]
    for driver in drivers:
        driver.start()
    try:
        for _ in todo:
            found = done.get()
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        stop.set()


class _Worker:
    """A process that does trials until it is killed for taking too long or too much."""

    def __init__(self, memory_bytes: int | None):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, memory_bytes), daemon=True)
        self.process.start()
        theirs.close()

    def alive(self) -> bool:
        return self.process.is_alive()

    def do(self, trial: Trial, path: Path, time_s: float | None) -> dict[str, Any]:
        start = time.perf_counter()
        self.pipe.send((trial, path))
        try:
            if self.pipe.poll(None if time_s is None else time_s + 0.01):
                return self.pipe.recv()
            status = "timeout"
        except (EOFError, ConnectionResetError):
            status = "oom"  # the system ended it
        self.end()
        return {"status": status, "seconds": time.perf_counter() - start}

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _work(pipe: Connection, memory_bytes: int | None) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    pipe_graphs: dict[Path, Any] = {}
    while True:
        try:
            trial, path = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(trial, path, pipe_graphs))


def attempt(trial: Trial, path: Path, graphs: dict[Path, Any]) -> dict[str, Any]:
    """Do one trial here; whatever happens is a row."""
    import torch

    from wager import __version__
    from wager.detect.bond.graph import Graph
    from wager.detect.bond.metrics import quality

    config, seed = trial_config(trial.detector, trial.dataset, trial.protocol, trial.trial, trial.seed, trial.epochs)
    row: dict[str, Any] = {
        "config": config,
        "trial_seed": seed,
        "versions": {"wager": __version__, "torch": torch.__version__},
    }
    if path not in graphs:
        graphs[path] = Graph.of(path)
    stored = graphs[path]
    assert stored.y is not None
    reset_peak()
    start = time.perf_counter()
    try:
        detector = make(trial.detector, config, seed, trial.symmetrize).fit(Graph(stored.x, stored.edge_index))
        score = detector.decision_score_.numpy()
        row |= {"edges": detector.edges_, "status": "ok"}
    except (MemoryError, RuntimeError) as error:
        memory = isinstance(error, MemoryError) or "allocate" in str(error) or "bad_alloc" in str(error)
        return row | {
            "status": "oom" if memory else "error",
            "error": str(error)[:300],
            "seconds": time.perf_counter() - start,
        }
    row |= {"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes()}
    if (score != score).any():
        return row | {"status": "nan"}
    return row | {"metrics": quality(stored.y.numpy(), score)}


def reset_peak() -> None:
    """Start counting the peak of resident memory anew, where the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
