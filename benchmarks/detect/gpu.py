"""Detectors on a GPU against PyOD on the processor: fit and scores, end to end, copies to and from the GPU counted.

    python -m benchmarks.detect.gpu --data DIR --peer-python PYTHON [--quick] [--sets ...] [--detectors ...] [--budget-s 60] [--device cuda]

DIR holds npz tables (X); those of at least 20,000 rows are taken whole, but for COF, of which PyOD keeps all distances: its rows are
cut, and its ratio is in the record and in no mean. The peer's environment has pyod==3.6.7 and scikit-learn (see peer_pool).

PyOD runs with its defaults, warm (imported, loops compiled), before anything of ours. Fits of one thread run at once, each process pinned to a
core; fits that use all cores (brute-force neighbours above 15 features, PCA) and short ones run alone, as do KNN and LOF once more with n_jobs=-1:
`PyOD, all cores` rows compare with those. What the budget cuts off is named in the facts and counted nowhere. Our side is warmed on a slice of
each table, then fitted `repeats` times (median; A/A is the distance of the medians of its halves; the first full fit is in the facts).
The ensemble's baseline is the sum of PyOD's single fits. Saved after every row; `equal` counts rows whose scores agree to 1e-6, and
`against_cpu` is the largest relative difference from our own scores on the processor; `untied` compares LOF and ABOD where noise broke ties (see equality).
"""

from __future__ import annotations

import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.detect.equality import NOISE, TOLERANCE, broken_ties
from benchmarks.detect.tod import COF_ROWS, ENSEMBLE, SEEDED, table
from benchmarks.harness import Report, Row, arguments, say
from benchmarks.worker import Worker, WorkerError
from wager.detect import tod
from wager.detect.registry import TABULAR
from wager.detect.tod import native
from wager.detect.tod.base import fit_many

POOL = Path(__file__).with_name("peer_pool.py")
PAPER = ("knn", "lof", "abod", "hbos", "pca")  # whose 10.9x is the paper's mean
LARGE = 20_000
SHORT = ("hbos", "pca", "ecod", "copod")
NEIGHBORS = ("knn", "lof", "abod")
ALL_CORES = ("knn", "lof")
BRUTE_FROM = 16  # features from which scikit-learn's "auto" is the brute search, which uses every core
SLOWEST_FIRST = ("abod", "loda", "iforest", "lof", "cof", "knn", "ecod", "copod", "hbos", "pca")
TIED = ("lof", "abod")
BUDGETS = (500_000_000, 2_000_000_000)

Key = tuple[str, str]  # detector, table


def main() -> None:
    parser = arguments("Detectors on a GPU against PyOD on the processor.", device="cuda")
    parser.add_argument("--data", type=Path, required=True, help="folder of npz tables")
    parser.add_argument("--peer-python", required=True, help="interpreter of the environment with PyOD")
    parser.add_argument("--sets", default=None, help="tables to take; default: all of 20,000 rows or more")
    parser.add_argument("--detectors", default=",".join(ENSEMBLE), help="detectors to time")
    parser.add_argument("--budget-s", type=float, default=None, help="wall time of PyOD's side (60; 30 with --quick)")
    parser.add_argument(
        "--untied-s",
        type=float,
        default=0.0,
        help="give PyOD this long for LOF and ABOD with ties broken, to compare scores",
    )
    parser.add_argument("--profile", action="store_true", help="print what LOF spends its time on, kernel by kernel")
    parser.add_argument("--name", default=None, help="name of the record; default: after the device")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    budget_s = args.budget_s or (30.0 if args.quick else 60.0)
    names = args.detectors.split(",")
    sets = {n: table(args.data, n, None) for n in args.sets.split(",")} if args.sets else large(args.data)
    sets = dict(sorted(sets.items(), key=lambda item: len(item[1])))
    bench = Bench(args.device, names, sets, args.repeats or (2 if args.quick else 6), args.name)
    paths = {n: str(args.data / f"{n}.npz") for n in sets}
    failed: list[str] = []
    section("PyOD", lambda: bench.ask_peer(args.peer_python, paths, budget_s, args.untied_s), failed)
    for name in sets:
        for det in names:
            section(f"{det} on {name}", lambda det=det, name=name: bench.single(det, name), failed)
        section(f"ensemble on {name}", lambda name=name: bench.ensemble(name), failed)
        section(f"a budget on {name}", lambda name=name: bench.budget(name), failed)
        if args.profile:
            section(f"profile of {name}", lambda name=name: bench.profile(name), failed)
    bench.report.facts |= {"means": bench.means(), "failed": failed}
    print(bench.report.table())
    for line in (*bench.lines, *(f"{k}: {v}" for k, v in bench.means().items())):
        print(line)
    print(f"written: {bench.report.save()}")
    sys.exit(1 if failed else 0)


def section(title: str, do: Callable[[], None], failed: list[str]) -> None:
    """One part; if it fails, the others still run, and the record and the exit status say so."""
    start = time.perf_counter()
    try:
        do()
    except Exception as error:
        failed.append(f"{title}: {error!r:.200}")
        say(f"{title} failed\n{traceback.format_exc()}")
    say(f"[{title}: {time.perf_counter() - start:.1f} s]")


def large(data: Path) -> dict[str, np.ndarray]:
    """The tables of at least 20,000 rows."""
    every = {path.stem: table(data, path.stem, None) for path in sorted(data.glob("*.npz"))}
    return {name: x for name, x in every.items() if len(x) >= LARGE}


class Bench:
    """What is measured, by detector and table."""

    def __init__(self, device: str, names: list[str], sets: dict[str, np.ndarray], repeats: int, record: str | None):
        import torch

        self.torch, self.device, self.names, self.sets, self.repeats = torch, device, names, sets, repeats
        self.execution = tod.Execution(device=device)
        self.on_gpu = device.startswith("cuda")
        gpu = torch.cuda.get_device_name(device) if self.on_gpu else device
        self.peer: dict[Key, dict[str, Any]] = {}
        self.peer_all: dict[Key, dict[str, Any]] = {}
        self.untied: dict[Key, str] = {}
        self.lines: list[str] = []
        short = next((s for s in ("h100", "h200") if s in gpu.lower()), gpu.lower().replace(" ", "-").replace(":", ""))
        facts = {"device": gpu, "torch": torch.__version__, "cpu_cores": native.threads(), "left_out": {}, "cells": {}}
        self.report = Report("detect", record or f"tod-gpu_{short}", [], facts)

    # -- PyOD ----------------------------------------------------------------------------------------------------------------------------

    def job(self, det: str, name: str, **more: Any) -> dict[str, Any]:
        rows = COF_ROWS if det == "cof" else None
        return {"name": det, "table": name, "config": SEEDED.get(det, {}) | more, "rows": rows}

    def ask_peer(self, python: str, paths: dict[str, str], budget_s: float, untied_s: float) -> None:
        """PyOD's side. While its processes import and compile, ours wakes the GPU and builds its loops."""
        single = Worker([python, str(POOL)], env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, log=Path("pyod_pool.log"))  # fmt: skip
        with single, Worker([python, str(POOL)], log=Path("pyod_alone.log")) as whole:
            failed: dict[str, str] = {}
            tasks = [lambda: failed.update(single.call("ready", names=self.names, tables=paths)),
                     lambda: whole.call("ready", names=self.names, tables=paths), self.wake]  # fmt: skip
            start = time.perf_counter()
            with ThreadPoolExecutor(len(tasks)) as pool:
                for waiting in [pool.submit(task) for task in tasks]:
                    waiting.result()
            say(f"PyOD and the GPU are warm after {time.perf_counter() - start:.1f} s; cannot run: {failed or 'none'}")
            self.report.facts["left_out"] |= failed
            keys = [(d, n) for d in self.names for n in self.sets if d not in failed]
            self.ask_pool(single, [key for key in keys if not self.runs_alone(*key)], 0.55 * budget_s)
            end = time.perf_counter() + 0.45 * budget_s
            self.ask_alone(whole, [key for key in keys if self.runs_alone(*key)], end)
            self.ask_untied(single, [key for key in keys if key[0] in TIED], untied_s)
        for key in keys:
            if key not in self.peer:
                self.report.facts["left_out"].setdefault(f"{key[0]} on {key[1]}", "PyOD did not end within the budget")

    def runs_alone(self, det: str, name: str) -> bool:
        return det in SHORT or (det in NEIGHBORS and self.sets[name].shape[1] >= BRUTE_FROM)

    def ask_pool(self, worker: Worker, keys: list[Key], limit_s: float) -> None:
        keys = sorted(
            keys,
            key=lambda key: (SLOWEST_FIRST.index(key[0]) if key[0] in SLOWEST_FIRST else 0, -self.sets[key[1]].size),
        )
        found = worker.call("together", jobs=[self.job(*key) for key in keys], limit_s=limit_s, first_core=1)
        for key, value in zip(keys, found, strict=True):
            if value:
                self.peer[key] = value | {"how": "one thread, on a core of its own beside others"}
                say(f"PyOD {key[0]} on {key[1]}: {value['seconds'][0]:.3f} s")

    def ask_untied(self, worker: Worker, keys: list[Key], limit_s: float) -> None:
        """Scores alone: which of equally near rows is a neighbour is arbitrary in PyOD, so they compare only where ties are broken."""
        if limit_s:
            jobs = [self.job(*key) | {"jitter": NOISE} for key in keys]
            found = worker.call("together", jobs=jobs, limit_s=limit_s, first_core=1)
            self.untied = {key: value["scores"] for key, value in zip(keys, found, strict=True) if value}

    def ask_alone(self, worker: Worker, keys: list[Key], end: float) -> None:
        again = [(d, n) for d in ALL_CORES for n in self.sets if d in self.names]
        for det, name, store in [(*key, self.peer) for key in keys] + [(*key, self.peer_all) for key in again]:
            if time.perf_counter() > end:
                return
            more = {"n_jobs": -1} if store is self.peer_all else {}
            try:
                value = worker.call("alone", **self.job(det, name, **more), repeats=3 if det in SHORT else 1)
            except WorkerError as error:
                self.report.facts["left_out"][f"{det} on {name}{', n_jobs=-1' if more else ''}"] = f"{error!s:.200}"
                continue
            store[det, name] = value | {"how": "alone"}
            say(f"PyOD {det} on {name}{', n_jobs=-1' if more else ''}: {statistics.median(value['seconds']):.3f} s")

    def wake(self) -> None:
        """The GPU's context and kernels, and our loops on the processor."""
        native.library()
        for x in self.sets.values():
            for det in self.names:
                self.fit(det, x[:3000])

    # -- ours ----------------------------------------------------------------------------------------------------------------------------

    def fit(self, det: str, x: np.ndarray, execution: tod.Execution | None = None) -> Any:
        settings: dict[str, Any] = {"execution": execution or self.execution} | SEEDED.get(det, {})
        return TABULAR[det](**settings).fit(x)

    def timed(self, do: Callable[[], Any]) -> tuple[list[float], float, Any, int]:
        """Seconds of each repeat, of the first, the last result, and the peak of the device's memory."""
        seconds, result = [], None
        if self.on_gpu:
            self.torch.cuda.reset_peak_memory_stats()
        for _ in range(1 + self.repeats):
            start = time.perf_counter()
            result = do()
            seconds.append(time.perf_counter() - start)
        peak = self.torch.cuda.max_memory_allocated() if self.on_gpu else 0
        return seconds[1:], seconds[0], result, peak

    def single(self, det: str, name: str) -> None:
        x = self.sets[name][: COF_ROWS if det == "cof" else None]
        seconds, first_s, made, peak = self.timed(lambda: self.fit(det, x))
        here = tod.Execution()
        self.fit(det, x[:2000], here)
        start = time.perf_counter()
        on_cpu = self.fit(det, x, here)
        cpu_s = time.perf_counter() - start
        cell = {
            "gpu_s": statistics.median(seconds), "first_s": first_s, "cpu_s": cpu_s, "peak_device_bytes": peak,
            "against_cpu": gap(made.decision_scores_, on_cpu.decision_scores_)[1],
        }  # fmt: skip
        label = f"{det}, {name} {len(x)}x{x.shape[1]}"
        if det == "cof":
            whole = self.timed(lambda: self.fit(det, self.sets[name]))
            cell |= {"whole_table_gpu_s": statistics.median(whole[0]), "whole_table_peak_device_bytes": whole[3]}
        for store, who in ((self.peer, "PyOD"), (self.peer_all, "PyOD, all cores")):
            theirs = store.get((det, name))
            if theirs is None:
                continue
            if store is self.peer:
                differ, largest = gap(made.decision_scores_, np.load(theirs["scores"]))
                cell |= {"pyod_how": theirs["how"], "equal": len(x) - differ, "differ": differ, "largest": largest}
            self.add(label, who, theirs["seconds"], seconds)
            cell |= {f"ratio to {who}": self.report.rows[-1].ratio, f"{who} s": theirs["seconds"]}
        if (det, name) in self.untied:
            apart = gap(self.fit(det, broken_ties(x)).decision_scores_, np.load(self.untied[det, name]))
            cell |= {"untied_differ": apart[0], "untied_largest": apart[1]}
        self.report.facts["cells"][f"{det} {name}"] = cell
        self.tell(label, cell)
        self.save()

    def ensemble(self, name: str) -> None:
        """All but COF as one plan, against the sum of PyOD's fits."""
        used = [d for d in self.names if d != "cof" and ((d, name) in self.peer or not self.peer)]
        x = self.sets[name]

        def ours() -> Any:
            return fit_many([TABULAR[d](**SEEDED.get(d, {})) for d in used], x, self.execution)

        seconds, first_s, done, peak = self.timed(ours)
        cell = {"detectors": used, "gpu_s": statistics.median(seconds), "first_s": first_s, "peak_device_bytes": peak}
        cell |= {"steps_s": dict(done.seconds), "search": {k: dict(v) for k, v in done.facts.items()}}
        theirs = [statistics.median(self.peer[d, name]["seconds"]) for d in used if (d, name) in self.peer]
        if theirs:
            self.add(f"{len(used)} detectors, {name} {len(x)}x{x.shape[1]}", "PyOD one by one", [sum(theirs)], seconds)
        self.report.facts["cells"][f"ensemble {name}"] = cell
        steps = sorted(done.seconds.items(), key=lambda item: -item[1])
        self.lines.append(f"steps of {name}: " + ", ".join(f"{k[:40]} {1e3 * v:.1f} ms" for k, v in steps))
        self.lines.append(f"search of {name}: {cell['search']}")
        say("\n".join(self.lines[-2:]))
        self.save()

    def budget(self, name: str) -> None:
        """LOF under a tight budget: the same scores, and what it really allocated beside its input and its lists."""
        x, k = self.sets[name], tod.LOF().n_neighbors
        wanted = self.fit("lof", x).decision_scores_
        for limit in BUDGETS:
            tight = tod.Execution(device=self.device, memory_bytes=limit)
            seconds, _, made, peak = self.timed(lambda tight=tight: self.fit("lof", x, tight))
            lists = 8 * len(x) * (x.shape[1] + 4 * (k + 1))
            cell = {
                "budget_bytes": limit,
                "peak_device_bytes": peak,
                "rows_and_lists_bytes": lists,
                "gpu_s": min(seconds),
            }
            cell["equal"] = bool(np.array_equal(made.decision_scores_, wanted))
            self.report.facts["cells"][f"budget {limit} {name}"] = cell
            self.lines.append(f"budget on {name}: {cell}")
            say(self.lines[-1])
        self.save()

    def profile(self, name: str) -> None:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            self.fit("lof", self.sets[name])
        say(
            f"LOF on {name}\n"
            + found.key_averages().table(sort_by="self_device_time_total", row_limit=14, max_name_column_width=60)
        )

    # -- records -------------------------------------------------------------------------------------------------------------------------

    def add(self, label: str, who: str, theirs: list[float], ours: list[float]) -> None:
        noise = abs(statistics.median(ours[::2]) / statistics.median(ours[1::2] or ours) - 1)
        base, own = statistics.median(theirs), statistics.median(ours)
        samples = {who: theirs, "wager": ours}
        self.report.rows.append(
            Row(label, who, "wager", "s", base, own, base / own, min(theirs) / max(ours), max(theirs) / min(ours), noise, len(ours), samples)
        )  # fmt: skip

    def tell(self, label: str, cell: dict[str, Any]) -> None:
        ratio = cell.get("ratio to PyOD")
        line = f"{label}: {1e3 * cell['gpu_s']:.1f} ms (first {1e3 * cell['first_s']:.0f}), on the processor {1e3 * cell['cpu_s']:.0f} ms"
        line += (
            f", {ratio:.1f}x PyOD, {cell['differ']} rows differ (largest {cell['largest']:.1e})"
            if ratio
            else ", no PyOD"
        )
        if "untied_differ" in cell:
            line += f", untied {cell['untied_differ']} (largest {cell['untied_largest']:.1e})"
        self.lines.append(
            f"{line}, against cpu {cell['against_cpu']:.1e}, peak {cell['peak_device_bytes'] / 1e9:.2f} GB"
        )
        say(self.lines[-1])

    def means(self) -> dict[str, Any]:
        """Mean ratios over (detector, table): of all, and of the five detectors that the paper averages over."""
        ratio = {(r.workload.split(",")[0], r.workload.split()[1], r.baseline): r.ratio for r in self.report.rows}
        single = {k: v for k, v in ratio.items() if k[0] in self.names and k[0] != "cof" and k[2] == "PyOD"}
        best = {k: min(v, ratio.get((k[0], k[1], "PyOD, all cores"), v)) for k, v in single.items()}
        found: dict[str, Any] = {}
        for what, values in (("PyOD", single), ("the quicker of PyOD and PyOD with all cores", best)):
            for which, chosen in (("all detectors", self.names), ("the paper's five", PAPER)):
                kept = [v for k, v in values.items() if k[0] in chosen]
                if kept:
                    arithmetic, geometric = float(np.mean(kept)), float(np.exp(np.mean(np.log(kept))))
                    found[f"{which} against {what}"] = {
                        "arithmetic": arithmetic,
                        "geometric": geometric,
                        "rows": len(kept),
                    }
        return found

    def save(self) -> None:
        self.report.facts["means"] = self.means()
        self.report.save()


def gap(ours: np.ndarray, theirs: np.ndarray) -> tuple[int, float]:
    """Rows that differ by more than 1e-6 of themselves, and the largest relative difference."""
    finite = np.isfinite(theirs)
    size = np.maximum(np.abs(theirs), 1e-8 * np.abs(theirs[finite]).max(initial=1e-300))
    apart = np.abs(ours - theirs) / size
    return int((~(apart <= TOLERANCE)).sum()), min(1e300, float(np.nanmax(apart, initial=0.0)))


if __name__ == "__main__":
    main()
