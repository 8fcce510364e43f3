"""Shared plans against PyOD one by one, detector by detector, and the neighbour search against scikit-learn.

    python -m benchmarks.detect.tod --data DIR --peer-python VENV/bin/python [--quick] [--part plan|knn|single]

DIR holds npz tables (X, y). The peer's environment has pyod==3.6.7, scikit-learn, numba (see peer_worker); all get n_jobs of the machine.
Fits are interleaved; PyOD's compiled loops are warm. Equality of scores is `benchmarks.detect.equality`, a million rows `benchmarks.detect.large`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Report, Row, arguments, compare, rows_table, say
from benchmarks.worker import Worker
from wager.detect import tod
from wager.detect.registry import TABULAR
from wager.detect.tod import native

WORKER = Path(__file__).with_name("peer_worker.py")
ENSEMBLE = ("knn", "lof", "abod", "cof", "hbos", "pca", "ecod", "copod", "iforest", "loda")
SEEDED = {name: {"random_state": 5} for name in ("iforest", "loda", "feature_bagging")}
COF_ROWS = 6000
CPUS = native.threads()  # OMP_NUM_THREADS limits both sides


def main() -> None:
    parser = arguments("TOD against PyOD and scikit-learn.")
    parser.add_argument("--data", type=Path, required=True, help="folder of npz tables")
    parser.add_argument("--peer-python", required=True, help="interpreter of the environment with PyOD")
    parser.add_argument("--max-rows", type=int, default=None, help="use only the first rows of larger tables")
    parser.add_argument(
        "--part",
        choices=("all", "plan", "knn", "single"),
        default="all",
        help="ten detectors, the neighbour search, other single detectors, or all",
    )
    args = parser.parse_args()
    limit = args.max_rows or (1200 if args.quick else None)
    repeats = args.repeats or 2
    with Worker([args.peer_python, str(WORKER)], log=Path("pyod_worker.log")) as peer:
        rows = []
        if args.part in ("all", "plan"):
            sets = ("mnist",) if args.quick else ("skin", "shuttle", "campaign")
            rows += ensembles(peer, args.data, sets, limit, repeats)
        if args.part in ("all", "knn"):
            rows += singles(peer, args.data, searches(limit, args.quick), repeats)
        if args.part in ("all", "single"):
            rows += singles(peer, args.data, others(limit, args.quick), repeats)
    report = Report("detect", "tod" if args.part == "all" else f"tod-{args.part}", rows, {})
    print(report.table())
    if not args.quick:
        print(f"written: {report.save()}")


def table(data: Path, name: str, rows: int | None) -> np.ndarray:
    with np.load(data / f"{name}.npz") as stored:
        return np.ascontiguousarray(stored["X"][:rows], dtype=np.float64)


def ensembles(peer: Worker, data: Path, names: tuple[str, ...], limit: int | None, repeats: int) -> list[Row]:
    """Ten detectors on the first rows, as many as PyOD's COF does in about a quarter of a minute (its time grows with the square, from 20,000 rows
    on it takes more than two minutes a fit), and the nine others on whole tables. PyOD's loops are compiled on a small table first."""
    without = tuple(d for d in ENSEMBLE if d != "cof")
    rows = []
    for name in names:
        warm(peer, data / f"{name}.npz")
        for detectors, count in ((ENSEMBLE, limit or COF_ROWS), (without, limit)):
            x = table(data, name, count)
            peer.call("load_table", path=str(data / f"{name}.npz"), rows=count)
            configs = [SEEDED.get(d, {}) for d in detectors]

            def theirs(configs: list = configs, detectors: tuple = detectors) -> float:
                return peer.call("fit", names=list(detectors), configs=configs, n_jobs=CPUS)

            def ours(x: np.ndarray = x, detectors: tuple = detectors) -> None:
                tod.fit_many([TABULAR[d](**SEEDED.get(d, {})) for d in detectors], x)

            ours(x[:500])
            which = f"{len(detectors)} detectors{'' if 'cof' in detectors else ' (all but COF)'}"
            say(f"{which} on {name}")
            contenders: dict[str, Any] = {"PyOD": theirs, "wager": ours}
            label = f"{which}, {name} {len(x)}x{x.shape[1]}"
            rows += told(compare(label, contenders, repeats=repeats, warmup=0))
    return rows


def warm(peer: Worker, path: Path) -> None:
    """Compile PyOD's loops."""
    peer.call("load_table", path=str(path), rows=500)
    for d in (*ENSEMBLE, "sod"):
        peer.call("fit", names=[d], configs=[SEEDED.get(d, {})], n_jobs=CPUS)


def told(rows: list[Row]) -> list[Row]:
    """The rows, each said as soon as it is measured: a run that is stopped leaves what it found."""
    for row in rows:
        say(rows_table([asdict(row)]).splitlines()[-1])
    return rows


Job = tuple[str, str, int | None]  # detector, table, rows


def searches(limit: int | None, quick: bool) -> list[Job]:
    return [("knn", name, limit) for name in (("mnist",) if quick else ("campaign", "mnist", "shuttle", "skin"))]


def others(limit: int | None, quick: bool) -> list[Job]:
    """PyOD's LOCI grows with the cube of the rows: half a minute for 400."""
    jobs: list[Job] = [("lof", "mnist", limit), ("cof", "mnist", limit or 4000)]
    jobs += [("abod", name, limit) for name in (("mnist",) if quick else ("skin", "shuttle", "campaign"))]
    return [*jobs, ("sod", "cardio", limit), ("loci", "cardio", 150 if quick else 200)]


def singles(peer: Worker, data: Path, jobs: list[Job], repeats: int) -> list[Row]:
    """kNN against PyOD and scikit-learn; other detectors against PyOD."""
    rows = []
    warm(peer, data / "mnist.npz")
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
        TABULAR[det]().fit(x[:300])
        found = compare(f"{det}, {name} {len(x)}x{x.shape[1]}", contenders, repeats=repeats, warmup=0)
        rows += told([row for row in found if row.ours == "wager"])
        if det == "knn":
            pair = {n: contenders[n] for n in ("PyOD", "wager")}
            rows += told(compare(f"{det}, {name} {len(x)}x{x.shape[1]}", pair, repeats=repeats, warmup=0))
    return rows


def void(_: Any) -> None:
    """A contender returns nothing: its wall time counts."""


if __name__ == "__main__":
    main()
