"""Scores against PyOD's, detector by detector and table by table: how many rows differ by more than 1e-6 of themselves.

    python -m benchmarks.detect.equality --data DIR --peer-python VENV/bin/python [--quick] [--max-rows 4000 | --full]

The peer's environment has pyod==3.6.7 scikit-learn numba combo (see peer_worker). Every cell is measured twice: on the table as it is ("raw") and
with ties broken by the same noise of 1e-5 of each column's spread ("untied"), because among equal distances PyOD's neighbours are whichever its
tree meets first. Expected differences are listed in docs/outliers.md; `raw` may show them, `untied` should be 0 but for PCA's directions
without variance and values on the border of a LODA bin. SOD's ties are in counts of shared neighbours, which no noise breaks: its `untied` takes the
reference sets that PyOD chose, after checking that each shares as many neighbours as ours. PyOD's PCA is asked for the full SVD: its default
squares the condition number. Tables longer than --max-rows are cut for both sides; --full takes them whole
(hours, for PyOD's sake; COF stops at 12,000 rows, SOD at 1,000, LOCI at 300).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.detect.tod import SEEDED, WORKER, table
from benchmarks.harness import Report, Row, arguments, say
from benchmarks.worker import Worker
from wager.detect.registry import TABULAR
from wager.detect.tod import SOD, Execution, operators
from wager.detect.tod.knn import nearest

DETECTORS = (
    "knn", "knn-mean", "knn-median", "lof", "abod", "cof", "sod", "loci", "hbos", "loda", "pca", "ecod", "copod", "iforest", "feature_bagging",
)  # fmt: skip
MOST_ROWS = {"cof": 12_000, "sod": 1_000, "loci": 300}
PEER_CONFIG = {"pca": {"svd_solver": "full"}}
TOLERANCE, NOISE = 1e-6, 1e-5


def broken_ties(x: np.ndarray) -> np.ndarray:
    """The same noise that the peer adds."""
    scale = x.std(0) + 1e-3 * np.abs(x).max()
    return x + NOISE * scale * np.random.default_rng(0).normal(size=x.shape)


def cell(peer: Worker, name: str, x: np.ndarray, untied: bool) -> tuple[int, float]:
    """Rows that differ, and the largest relative difference of all rows."""
    det, _, method = name.partition("-")
    config: dict[str, Any] = SEEDED.get(det, {}) | ({"method": method} if method else {})
    ours = TABULAR[det](**config).fit(x).decision_scores_
    theirs = fetched(peer.call("scores", name=det, config=config | PEER_CONFIG.get(det, {})))
    if det == "sod" and untied:
        ours = scores_of_equal_references(x, fetched(peer.call("references")))
    finite = np.isfinite(theirs)
    size = np.maximum(np.abs(theirs), 1e-8 * np.abs(theirs[finite]).max(initial=1e-300))
    gap = np.abs(ours - theirs) / size
    return int((~(gap <= TOLERANCE)).sum()), float(np.nanmax(gap, initial=0.0))


def fetched(path: str) -> np.ndarray:
    """What the peer kept in a file, which is removed."""
    values = np.load(path)
    Path(path).unlink()
    return values


def scores_of_equal_references(x: np.ndarray, reference_RC: np.ndarray) -> np.ndarray:
    """SOD's scores over PyOD's reference sets; NaN (a difference) where a set shares fewer neighbours than ours does."""
    det = SOD()
    near = nearest(None, x, det.n_neighbors).index_RK
    ours = operators.shared(nearest(None, x, det.n_neighbors), det.ref_set)[0]
    member = np.zeros((len(x), len(x)), bool)
    np.put_along_axis(member, near, True, axis=1)

    def counts(sets_RC: np.ndarray) -> np.ndarray:
        return np.sort([[(member[i] & member[j]).sum() for j in row] for i, row in enumerate(sets_RC)], axis=1)

    reference_RC = reference_RC.astype(np.int64)
    score = operators.subspace_distance(Execution(), x, reference_RC, det.alpha)
    return np.where((counts(reference_RC) == counts(ours)).all(1), score, np.nan)


def main() -> None:
    parser = arguments("Scores against PyOD's.", repeats=False)
    parser.add_argument("--data", type=Path, required=True, help="folder of npz tables")
    parser.add_argument("--peer-python", required=True, help="interpreter of the environment with PyOD")
    parser.add_argument("--max-rows", type=int, default=None, help="use only the first rows of larger tables (4000)")
    parser.add_argument("--full", action="store_true", help="whole tables")
    parser.add_argument("--detectors", default=",".join(DETECTORS), help="detectors to compare")
    args = parser.parse_args()
    limit = None if args.full else args.max_rows or (300 if args.quick else 4000)
    names, rows, facts = args.detectors.split(","), [], {}
    print("| table | rows | " + " | ".join(names) + " |\n|---|---|" + "---|" * len(names))
    with Worker([args.peer_python, str(WORKER)], log=Path("pyod_worker.log")) as peer:
        for path in sorted(args.data.glob("*.npz")):
            shown = []
            for name in names:
                count = min(limit or 10**9, MOST_ROWS.get(name, 10**9))
                found = {}
                for kind, jitter in (("raw", 0.0), ("untied", NOISE)):
                    peer.call("load_table", path=str(path), rows=count, jitter=jitter)
                    x = table(args.data, path.stem, count)
                    found[kind] = cell(peer, name, broken_ties(x) if jitter else x, kind == "untied")
                facts[f"{path.stem} {name}"] = {k: {"differ": v[0], "largest": v[1]} for k, v in found.items()}
                shown.append("/".join(str(v[0]) for v in found.values()))
                same = 1 - found["untied"][0] / len(x)
                label = f"{name}, {path.stem} {len(x)}x{x.shape[1]}: share of equal scores, untied"
                rows.append(Row(label, "PyOD", "wager", "share", 1.0, same, same, same, same, 0.0, 1))
            print(
                f"| {path.stem} | {min(limit or 10**9, len(table(args.data, path.stem, None)))} | "
                + " | ".join(shown)
                + " |",
                flush=True,
            )
            say(f"{path.stem} done")
    print("cells: rows that differ by more than 1e-6, as stored / with ties broken")
    if not args.quick:
        print(f"written: {Report('detect', 'equality', rows, {'tolerance': TOLERANCE, 'cells': facts}).save()}")


if __name__ == "__main__":
    main()
