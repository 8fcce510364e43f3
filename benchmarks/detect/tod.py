"""Shared plans against PyOD one by one, detector by detector, and the neighbour search against scikit-learn.

    python -m benchmarks.detect.tod --data DIR --peer-python VENV/bin/python [--quick] [--part plan|single]

DIR holds npz tables (X, y). The peer's environment has pyod==3.6.7, scikit-learn, numba (see peer_worker); all get n_jobs of the machine.
Fits are interleaved; PyOD's compiled loops are warm. Equality of scores is `benchmarks.detect.equality`, a million rows `benchmarks.detect.large`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Report, Row, arguments, compare, say
from benchmarks.worker import Worker
from wager.detect import tod
from wager.detect.registry import TABULAR
from wager.detect.tod import native

WORKER = Path(__file__).with_name("peer_worker.py")
ENSEMBLE = ("knn", "lof", "abod", "cof", "hbos", "pca", "ecod", "copod", "iforest", "loda")
SEEDED = {name: {"random_state": 5} for name in ("iforest", "loda", "feature_bagging")}
CPUS = native.threads()  # OMP_NUM_THREADS limits both sides


def main() -> None:
    parser = arguments("TOD against PyOD and scikit-learn.")
    parser.add_argument("--data", type=Path, required=True, help="folder of npz tables")
    parser.add_argument("--peer-python", required=True, help="interpreter of the environment with PyOD")
    parser.add_argument("--max-rows", type=int, default=None, help="use only the first rows of larger tables")
    parser.add_argument(
        "--part", choices=("all", "plan", "single"), default="all", help="ten detectors, single ones, or both"
    )
    args = parser.parse_args()
    limit = args.max_rows or (1200 if args.quick else None)
    repeats = args.repeats or (2 if args.quick else 3)
    with Worker([args.peer_python, str(WORKER)], log=Path("pyod_worker.log")) as peer:
        rows = []
        if args.part in ("all", "plan"):
            sets = ("mnist",) if args.quick else ("skin", "shuttle", "campaign")
            rows += ensembles(peer, args.data, sets, limit, repeats)
        if args.part in ("all", "single"):
            rows += singles(peer, args.data, limit, repeats, args.quick)
    report = Report("detect", "tod" if args.part == "all" else f"tod-{args.part}", rows, {})
    print(report.table())
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


def singles(peer: Worker, data: Path, limit: int | None, repeats: int, quick: bool) -> list[Row]:
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


if __name__ == "__main__":
    main()
