"""Shared plans against PyOD one by one, detector by detector, and the neighbour search against scikit-learn; memory and parity.

    python -m benchmarks.detect.tod --data DIR --peer-python VENV/bin/python [--quick] [--million]

DIR holds npz tables (X, y). The peer's environment has pyod==3.6.7, scikit-learn, numba (see peer_worker); all get n_jobs of the machine.
Fits are interleaved; PyOD's compiled loops are warm. Parity compares scores on every table and again with ties broken by the same tiny
noise, because equal distances leave PyOD's choice of neighbours arbitrary. --million adds 1,000,000 x 32 under a budget of 2 GB.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Report, Row, arguments, compare, say
from benchmarks.worker import Worker
from wager.detect import tod
from wager.detect.registry import TABULAR
from wager.detect.tod import native
from wager.detect.tod.knn import nearest

WORKER = Path(__file__).with_name("peer_worker.py")
ENSEMBLE = ("knn", "lof", "abod", "cof", "hbos", "pca", "ecod", "copod", "iforest", "loda")
PARITY = (*ENSEMBLE, "knn-mean", "knn-median")
SEEDED = {"iforest": {"random_state": 5}, "loda": {"random_state": 5}}
CPUS = native.threads()  # OMP_NUM_THREADS limits both sides
MILLION = """
import resource, sys, time, numpy as np
from wager.detect.tod import KNN, Execution
x = np.random.default_rng(0).normal(size=(int(sys.argv[1]), 32))
start = time.perf_counter()
KNN(n_neighbors=10, execution=Execution(search="scan", memory_bytes=int(float(sys.argv[2])))).fit(x)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def main() -> None:
    parser = arguments("TOD against PyOD and scikit-learn.")
    parser.add_argument("--data", type=Path, required=True, help="folder of npz tables")
    parser.add_argument("--peer-python", required=True, help="interpreter of the environment with PyOD")
    parser.add_argument(
        "--million", action="store_true", help="also 1,000,000 x 32 neighbours under 2 GB (many minutes)"
    )
    parser.add_argument("--max-rows", type=int, default=None, help="use only the first rows of larger tables")
    args = parser.parse_args()
    limit = args.max_rows or (1200 if args.quick else None)
    repeats = args.repeats or (2 if args.quick else 3)
    with Worker([args.peer_python, str(WORKER)], log=Path("pyod_worker.log")) as peer:
        rows = ensembles(peer, args.data, ("mnist",) if args.quick else ("skin", "shuttle", "campaign"), limit, repeats)
        rows += singles(peer, args.data, 400 if args.quick else 2000, limit, repeats, args.quick)
        facts: dict[str, Any] = {"parity": parity(peer, args.data, args.quick)}
    if args.million:
        facts["million"] = million(20_000 if args.quick else 1_000_000, 2e9)
    report = Report("detect", "tod", rows, facts)
    print(report.table())
    print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n")
    if not args.quick:
        print(f"written: {report.save()}")


def table(data: Path, name: str, rows: int | None) -> np.ndarray:
    with np.load(data / f"{name}.npz") as stored:
        return np.ascontiguousarray(stored["X"][:rows], dtype=np.float64)


def ensembles(peer: Worker, data: Path, names: tuple[str, ...], limit: int | None, repeats: int) -> list[Row]:
    """Ten detectors. COF's distance matrix limits PyOD to about 20,000 rows here: larger tables are cut for both, and the label says so."""
    rows = []
    for name in names:
        count = limit or 20_000
        x = table(data, name, count)
        peer.call("load_table", path=str(data / f"{name}.npz"), rows=count)
        configs = [SEEDED.get(d, {}) for d in ENSEMBLE]

        def theirs(configs: list = configs) -> float:
            return peer.call("fit", names=list(ENSEMBLE), configs=configs, n_jobs=CPUS)

        def ours(x: np.ndarray = x) -> None:
            tod.fit_many([TABULAR[d](**SEEDED.get(d, {})) for d in ENSEMBLE], x)

        say(f"ten detectors on {name}")
        rows += compare(
            f"10 detectors, {name} {len(x)}x{x.shape[1]}", {"PyOD": theirs, "wager": ours}, repeats=repeats, warmup=1
        )
    return rows


def singles(peer: Worker, data: Path, loci_rows: int, limit: int | None, repeats: int, quick: bool) -> list[Row]:
    """kNN against PyOD and scikit-learn; ABOD, COF, LOCI, SOD against PyOD."""
    rows = []
    jobs = [("knn", n, limit) for n in (("mnist",) if quick else ("campaign", "mnist", "shuttle", "skin"))]
    jobs += [(d, "mnist", limit) for d in ("lof", "abod", "cof")]
    jobs += [("sod", "cardio", limit), ("loci", "cardio", 150 if quick else 400)]
    for det, name, count in jobs:
        x = table(data, name, count)
        peer.call("load_table", path=str(data / f"{name}.npz"), rows=count)
        contenders: dict[str, Any] = {
            "PyOD": lambda det=det: peer.call("fit", names=[det], configs=[{}], n_jobs=CPUS),
            "wager": lambda det=det, x=x: void(TABULAR[det]().fit(x)),
        }
        if det == "knn":
            k = tod.KNN().n_neighbors
            contenders = {"scikit-learn": lambda k=k: peer.call("neighbors", k=k, n_jobs=CPUS)} | contenders
        say(f"{det} on {name}")
        found = compare(f"{det}, {name} {len(x)}x{x.shape[1]}", contenders, repeats=repeats, warmup=1)
        rows += [row for row in found if row.ours == "wager"]
        if det == "knn":
            pair = {n: contenders[n] for n in ("PyOD", "wager")}
            rows += compare(f"{det}, {name} {len(x)}x{x.shape[1]}", pair, repeats=repeats, warmup=0)
    return rows


def void(_: Any) -> None:
    """A contender returns nothing: its wall time counts."""


def parity(peer: Worker, data: Path, quick: bool) -> dict[str, Any]:
    """Per table and detector the rows whose score differs by more than 1e-6 of itself (or 1e-8 of the largest), raw and without ties."""
    found: dict[str, Any] = {}
    for path in sorted(data.glob("*.npz")):
        for jitter in (0.0, 1e-5):
            shape = peer.call("load_table", path=str(path), rows=400 if quick else None, jitter=jitter)
            x = table(data, path.stem, 400 if quick else None)
            if jitter:
                x = x + jitter * (x.std(0) + 1e-3 * np.abs(x).max()) * np.random.default_rng(0).normal(size=x.shape)
            for name in PARITY:
                if name == "cof" and shape[0] > 12_000:
                    continue
                det, _, method = name.partition("-")
                config = SEEDED.get(det, {}) | ({"method": method} if method else {})
                ours = TABULAR[det](**config).fit(x).decision_scores_
                kept = Path(peer.call("scores", name=det, config=config))
                theirs = np.load(kept)
                kept.unlink()
                scale = np.maximum(np.abs(theirs), 1e-8 * np.nanmax(np.abs(theirs[np.isfinite(theirs)]), initial=0))
                differ = int((~(np.abs(ours - theirs) <= 1e-6 * scale)).sum())
                if differ:
                    found[f"{path.stem} {name}{' without ties' if jitter else ''}"] = f"{differ} of {shape[0]}"
        say(f"parity: {path.stem} done")
    return {"tolerance": "1e-6 relative", "rows_that_differ": found}


def million(rows: int, budget: float) -> dict[str, float]:
    """Neighbours of a million rows in a process of their own: seconds and peak resident bytes, interpreter and data included."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MILLION, str(rows), str(budget - 0.9e9)], capture_output=True, text=True, check=True
    )
    seconds, peak = map(float, done.stdout.split())
    return {
        "rows": rows,
        "budget_bytes": budget,
        "peak_bytes": peak,
        "seconds": seconds,
        "wall_s": time.perf_counter() - start,
    }


def answer(x: np.ndarray, k: int) -> np.ndarray:
    """Neighbour indices, for interactive comparison."""
    return nearest(None, x, k).index_RK


if __name__ == "__main__":
    main()
