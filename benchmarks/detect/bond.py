"""Graph detectors against pygod: seconds and memory per epoch, motif counting, and AUC over seeds with the same hyper-parameters.

    python -m benchmarks.detect.bond --data DIR --peer-python VENV/bin/python [--quick] [--part training|large|motifs|parity]

DIR holds npz graphs (x, edge_index, y). The peer's environment has pygod==1.1.0 and torch-geometric (see peer_worker). Each memory figure is
the growth of resident memory over what the process held before training.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import RESULTS, Report, Row, arguments, compare, say
from benchmarks.worker import Worker, WorkerError
from wager.detect import bond
from wager.detect.bond.metrics import eval_roc_auc, mean_interval
from wager.detect.bond.motifs import motif_counts
from wager.detect.tod import native

WORKER = Path(__file__).with_name("peer_worker.py")
CPUS = native.threads()  # OMP_NUM_THREADS limits both sides
OURS: dict[str, Any] = {
    "DOMINANT": (bond.DOMINANT, {}), "GAE": (bond.GAE, {"recon_s": True}), "CONAD": (bond.CONAD, {}), "DONE": (bond.DONE, {}),
}  # fmt: skip
PARITY: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "DOMINANT": (bond.DOMINANT, {}, {}),
    "CONAD": (bond.CONAD, {}, {}),
    "DONE": (bond.DONE, {}, {}),
    "AdONE": (bond.AdONE, {}, {"pairing": "all"}),
    "AnomalyDAE": (bond.AnomalyDAE, {"theta": 10.0, "eta": 5.0}, {}),
    "GAAN": (bond.GAAN, {}, {"pairs": "rows"}),
    "GUIDE": (bond.GUIDE, {}, {}),
    "GAE": (bond.GAE, {}, {}),
    "Radar": (bond.Radar, {}, {}),
    "ANOMALOUS": (bond.ANOMALOUS, {}, {}),
    "SCAN": (bond.SCAN, {}, {}),
}
STEADY = ("SCAN", "Radar")  # nothing in them is drawn
MEMORY = """
import sys, time
from pathlib import Path
from wager.detect import bond
from wager.detect.bond import inject, runner
name, source, epochs, options = sys.argv[1], sys.argv[2], int(sys.argv[3]), eval(sys.argv[4])
graph = inject.generated(int(source), 0, m=10, n=20) if source.isdigit() else bond.Graph.of(source)
getattr(bond, name)(epoch=1, seed=0, **options).fit(inject.generated(100, 0))
def held():
    return next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS"))
before = held(); runner.reset_peak(); start = time.perf_counter()
getattr(bond, name)(epoch=epochs, seed=0, **options).fit(graph)
print(runner.peak_bytes() - before, runner.peak_bytes(), time.perf_counter() - start)
"""


def main() -> None:
    parser = arguments("BOND's detectors against pygod.")
    parser.add_argument("--data", type=Path, required=True, help="folder of npz graphs")
    parser.add_argument("--peer-python", required=True, help="interpreter of the environment with pygod")
    parser.add_argument(
        "--part",
        choices=("all", "training", "large", "motifs", "parity"),
        default="all",
        help="speed and memory of training, 100,000 nodes, motif counts, agreement of scores, or all (each with a record)",
    )
    parser.add_argument(
        "--detectors", default=None, help="detectors whose training is measured (DOMINANT,GAE,CONAD,DONE)"
    )
    parser.add_argument("--seeds", type=int, default=None, help="seeds of the parity runs (20; 3 with --quick)")
    parser.add_argument(
        "--datasets",
        default=None,
        help="graphs of the parity runs (disney,books,inj_cora) or of the motif counts (gen_500,gen_1000; minutes for inj_cora)",
    )
    parser.add_argument("--resume", action="store_true", help="parity: go on with what is not yet in the record")
    args = parser.parse_args()
    torch.set_num_threads(CPUS)
    with Worker([args.peer_python, str(WORKER)], log=Path("pygod_worker.log")) as peer:
        if args.part in ("all", "training"):
            for name in (args.detectors or ",".join(OURS)).split(","):
                finish(args, f"bond-{name.lower()}", *training(peer, args, name))
        if args.part in ("all", "large"):
            finish(args, "bond-large", *large(5000 if args.quick else 100_000))
        if args.part in ("all", "motifs"):
            names = tuple((args.datasets or ("gen_100" if args.quick else "gen_500,gen_1000")).split(","))
            finish(args, "bond-motifs", motifs(peer, args.data, names, args.repeats or 2), {})
        if args.part in ("all", "parity"):
            sets = (args.datasets or ("disney" if args.quick else "disney,books,inj_cora")).split(",")
            seeds, epochs = args.seeds or (3 if args.quick else 20), 10 if args.quick else 100
            for name in sets:
                kept = Agreement(name, None if args.quick else RESULTS, resume=args.resume)
                parity(peer, args.data, kept, seeds, epochs)
                print(kept.report().table())


def finish(args: Any, system: str, rows: list[Row], facts: dict[str, Any]) -> None:
    report = Report("detect", system, rows, facts)
    print(report.table())
    print(*(f"{k}: {v}" for part in facts.values() for k, v in part.items()), sep="\n")
    if not args.quick:
        print(f"written: {report.save()}")


def training(peer: Worker, args: Any, name: str) -> tuple[list[Row], dict[str, Any]]:
    """Seconds of training and growth of memory of one detector."""
    path = args.data / f"{'gen_1000' if args.quick else 'enron'}.npz"
    epochs, repeats = 2 if args.quick else 3, args.repeats or 2
    graph, (kind, options) = bond.Graph.of(path), OURS[name]
    peer.call("load_graph", path=str(path))
    say(f"{name} on {path.stem}")
    theirs_bytes: list[int] = []

    def theirs() -> float:
        found = peer.call("train", name=name, config={"epoch": epochs, **options}, seed=0, threads=CPUS)
        theirs_bytes.append(found["peak_bytes"])
        return found["seconds"]

    def ours() -> None:
        kind(epoch=epochs, seed=0, **options).fit(graph)

    rows = compare(f"{name}, {path.stem}, {epochs} epochs", {"pygod": theirs, "wager": ours}, repeats=repeats, warmup=1)
    mine = alone(name, str(path), epochs, options)[0]
    memory = {
        "pygod_bytes": max(theirs_bytes), "wager_bytes": mine, "times less": max(theirs_bytes) / max(mine, 1),
    }  # fmt: skip
    return rows, {"memory": memory}


def large(nodes: int) -> tuple[list[Row], dict[str, Any]]:
    """Peak memory of DOMINANT on a generated graph, against the bar of 4 GB: one dense adjacency of it would be 40 GB."""
    bar = 4e9
    _, peak, seconds = alone("DOMINANT", str(nodes), 2, {})
    ratio = bar / peak
    row = Row(f"DOMINANT, {nodes} nodes: peak memory", "bar", "wager", "bytes", bar, peak, ratio, ratio, ratio, 0.0, 1)
    return [row], {"large": {"nodes": nodes, "peak_bytes": peak, "seconds of 2 epochs": seconds}}


def alone(name: str, source: str, epochs: int, options: dict[str, Any]) -> tuple[float, float, float]:
    """Growth of memory, peak and seconds of a training in a fresh process."""
    command = [sys.executable, "-c", MEMORY, name, source, str(epochs), repr(options)]
    grown, peak, seconds = map(
        float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    )
    return grown, peak, seconds


def motifs(peer: Worker, data: Path, names: tuple[str, ...], repeats: int) -> list[Row]:
    """Seconds of motif counting, on the nodes that have an edge (pygod fails on others)."""
    rows = []
    for name in names:
        stored = bond.Graph.of(data / f"{name}.npz")
        kept, renamed = stored.edge_index.unique(return_inverse=True)
        graph = bond.Graph(stored.x[kept], renamed)
        peer.call("load_graph", path=str(data / f"{name}.npz"))
        say(f"motifs of {name}")

        def ours(graph: bond.Graph = graph) -> None:
            motif_counts(bond.Graph(graph.x, graph.edge_index), CPUS)

        rows += compare(
            f"motif counts, {name}", {"pygod": lambda: peer.call("motifs"), "wager": ours}, repeats=repeats, warmup=0
        )
    return rows


class Agreement:
    """Verdicts on one graph, written to its record after every detector: a run of an hour that is stopped has not lost them."""

    def __init__(self, graph: str, root: Path | None, resume: bool):
        self.graph, self.root = graph, root
        self.rows: list[Row] = []
        self.found: dict[str, str] = {}
        record = None if root is None else root / "detect" / f"{self.system}.json"
        if resume and record is not None and record.exists():
            stored = json.loads(record.read_text())
            self.rows, self.found = [Row(**row) for row in stored["rows"]], stored["facts"]["parity"]

    @property
    def system(self) -> str:
        return f"bond-parity-{self.graph}"

    def report(self) -> Report:
        return Report("detect", self.system, self.rows, {"parity": self.found})

    def add(self, name: str, ours: list[float], theirs: list[float], failure: str) -> None:
        if ours and theirs:
            a, b = float(np.mean(theirs)), float(np.mean(ours))
            label = f"{name}: mean AUC of {len(ours)} seeds"
            self.rows.append(Row(label, "pygod", "wager", "AUC", a, b, b / a, b / a, b / a, 0.0, len(ours)))
        self.note(name, verdict(np.array(ours), np.array(theirs)) + failure)

    def note(self, name: str, text: str) -> None:
        self.found[name] = text
        say(f"{name} {text}")
        if self.root is not None:
            self.report().save(root=self.root)


def parity(peer: Worker, data: Path, kept: Agreement, seeds: int, epochs: int) -> None:
    """Mean AUC over seeds, both with a 95 % interval, same hyper-parameters; `agree` where the intervals meet.

    What does not agree runs again as `mended`, which shows why: on the graph with every edge once (pygod's GAAN refuses others) and without
    constant attributes (a large one drowns the others in float32), and SCAN with similarities that numpy does not cut to whole numbers.
    Where a detector that draws nothing still differs, pygod is held against itself with another number of threads: rounding alone.
    """
    name = kept.graph
    path = data / f"{name}.npz"
    compare_scores(peer, path, name, tuple(PARITY), kept, seeds, epochs)
    unlike = tuple(d for d in PARITY if not kept.found[f"{name} {d}"].startswith("agree"))
    with tempfile.TemporaryDirectory() as folder:
        tidy = mended(path, Path(folder))
        compare_scores(peer, tidy, f"{name} mended", unlike, kept, seeds, epochs, mended=True)
    for detector in set(STEADY) & set(unlike):
        if not kept.found[f"{name} mended {detector}"].startswith("agree"):
            by_itself(peer, path, kept, detector, epochs)


def by_itself(peer: Worker, path: Path, kept: Agreement, detector: str, epochs: int) -> None:
    """pygod's AUC with one thread and with all."""
    label = f"{kept.graph} {detector}, pygod by itself"
    if label in kept.found:
        return
    y = np.load(path)["y"] > 0
    (_, shared, _), learning = PARITY[detector], {"epoch": epochs} if detector != "SCAN" else {}
    peer.call("load_graph", path=str(path))
    found = {}
    for threads in (1, CPUS):
        made = peer.call("train", name=detector, config=learning | shared, seed=0, threads=threads)
        found[threads] = eval_roc_auc(y, np.array(made["scores"]))
    kept.note(label, ", ".join(f"{auc:.4f} with {threads} threads" for threads, auc in found.items()))


def compare_scores(
    peer: Worker, path: Path, name: str, detectors: tuple[str, ...], kept: Agreement, seeds: int, epochs: int,
    mended: bool = False,
) -> None:  # fmt: skip
    graph = bond.Graph.of(path)
    assert graph.y is not None
    y = graph.y.numpy() > 0
    peer.call("load_graph", path=str(path))
    for detector in detectors:
        if f"{name} {detector}" in kept.found:
            continue
        (kind, shared, own), learns = PARITY[detector], detector != "SCAN"
        learning = {"epoch": epochs} if learns else {}
        both: list[list[float]] = [[], []]
        failure = ""
        for seed in range(1 if detector in STEADY else seeds):
            seeded = {"seed": seed} if learns else {}
            scores = [kind(**learning, **shared, **own, **seeded).fit(graph).decision_score_.numpy()]
            config = learning | shared
            try:
                made = peer.call("train", name=detector, config=config, seed=seed, threads=CPUS, mended=mended)
                scores.append(np.array(made["scores"]))
            except WorkerError as error:
                failure = f" ({str(error).split(': ', 1)[-1]})"
            for values, score in zip(both, scores, strict=False):
                if np.isfinite(score).all():
                    values.append(eval_roc_auc(y, score))
        kept.add(f"{name} {detector}", both[0], both[1], failure)


def mended(path: Path, folder: Path) -> Path:
    """A copy of a graph with every edge once and without constant attributes."""
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays["edge_index"] = np.unique(arrays["edge_index"], axis=1)
    arrays["x"] = arrays["x"][:, np.ptp(arrays["x"], axis=0) > 0]
    np.savez(folder / path.name, **arrays)
    return folder / path.name


def verdict(ours: np.ndarray, theirs: np.ndarray) -> str:
    if not len(ours) or not len(theirs):
        return f"ours {len(ours)} finite runs, pygod {len(theirs)}"
    (a, b), (c, d) = mean_interval(ours), mean_interval(theirs)
    same = len(ours) == 1 and ours[0] == theirs[0]
    agree = "agree" if same or (max(a, c) <= min(b, d) and len(ours) > 1) else "differ"
    return f"{agree}: ours {ours.mean():.4f}±{ours.std():.4f}, pygod {theirs.mean():.4f}±{theirs.std():.4f}"


if __name__ == "__main__":
    main()
