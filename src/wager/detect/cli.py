"""`wager detect`: score rows of a table, benchmark detectors of rows and of graph nodes."""

from __future__ import annotations

import pickle
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from wager.detect.tables import plot_scores, read_rows, write_scores
from wager.errors import UsageError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Find outliers: rows of tables (TOD) and nodes of graphs (BOND)."
)
bench = typer.Typer(no_args_is_help=True, help="Benchmark detectors on labelled tables (tabular) or graphs (graph).")
app.add_typer(bench, name="bench")

Data = Annotated[Path, typer.Argument(help="A .csv, .parquet or .npz file (arrays X and, if labelled, y).")]
Names = Annotated[str, typer.Option("--detector", help="Detectors, e.g. knn,lof; all: every one.")]
Param = Annotated[
    list[str] | None, typer.Option("--param", help="DETECTOR.NAME=VALUE, e.g. knn.n_neighbors=10; may be repeated.")
]
Label = Annotated[
    str | None, typer.Option("--label", help="The column that marks outliers (only used for ROC-AUC and the plot).")
]
Out = Annotated[Path | None, typer.Option("--out", help="Write scores and labels of every row to this csv.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw score histograms (and ROC curves) to this png or svg.")]
Top = Annotated[int, typer.Option("--top", help="Show this many of the most abnormal rows.", min=0)]
Memory = Annotated[
    str | None, typer.Option("--memory", help="What operators may allocate, e.g. 2GB; default: 0.8 of what is free.")
]
Workers = Annotated[int, typer.Option("--workers", help="Processes that share the neighbour search.", min=1)]


def keep(path: Path, fitted: dict[str, Any]) -> None:
    """Pickle what `wager detect score` needs, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(pickle.dumps(fitted))
    temporary.replace(path)
    print(f"kept: {path}")


@app.command()
def fit(
    data: Data,
    detector: Names = "knn,lof,iforest",
    param: Param = None,
    contamination: Annotated[float, typer.Option(help="Expected share of outliers; sets the threshold.")] = 0.1,
    label: Label = None,
    standardize: Annotated[bool, typer.Option(help="Bring every column to mean 0 and variance 1 first.")] = False,
    out: Out = None,
    save: Annotated[
        Path | None, typer.Option(help="Keep the fitted detectors here (a pickle, for `wager detect score`).")
    ] = None,
    plot: Plot = None,
    top: Top = 10,
    memory: Memory = None,
    workers: Workers = 1,
    ray: Annotated[
        str | None, typer.Option(help="Do the neighbour search on a Ray cluster: auto, local or host:port.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Keep finished row blocks in this folder; a killed run goes on there.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    precision: Annotated[
        str,
        typer.Option(
            help="Arithmetic that proposes neighbours: auto, fp64, fp32, int8, fp16 or bf16; scores are the same."
        ),
    ] = "auto",
    explain: Annotated[bool, typer.Option("--explain", help="Print the shared plan and its bytes, and stop.")] = False,
) -> None:
    """Score the rows of DATA with several detectors that share one plan."""
    from wager.detect.registry import tabular
    from wager.detect.tod import Execution, fit_many
    from wager.detect.tod import explain as explained
    from wager.detect.tod.batching import parse_bytes
    from wager.detect.tod.checks import check_rows

    rows = read_rows(data, label)
    made = tabular(detector, param or (), contamination=contamination)
    execution = Execution(
        device=device, precision=precision, memory_bytes=parse_bytes(memory) if memory else None, workers=workers,
        checkpoint=str(checkpoint) if checkpoint else None, ray_address=ray,
    )  # fmt: skip
    x = check_rows(rows.x_ND, at_least=2)
    centre, scale = np.zeros(x.shape[1]), np.ones(x.shape[1])
    if standardize:
        centre, scale = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1.0)
    x = (x - centre) / scale
    if explain:
        print(explained(list(made.values()), x, execution))
        return
    start = time.perf_counter()
    fit_many(list(made.values()), x, execution, lambda step: print(f"  {step}", file=sys.stderr))
    print(f"{len(x)} rows x {x.shape[1]} columns, {len(made)} detectors, {time.perf_counter() - start:.2f} s")
    scores = {name: d.decision_scores_ for name, d in made.items()}
    labels = {name: d.labels_ for name, d in made.items()}
    show(scores, {n: d.threshold_ for n, d in made.items()}, labels, rows.y_N, top)
    finish(out, plot, scores, labels, {n: d.threshold_ for n, d in made.items()}, rows.y_N)
    if save:
        keep(save, {"detectors": made, "centre": centre, "scale": scale, "columns": rows.columns})


@app.command()
def score(
    data: Data,
    model: Annotated[Path, typer.Option(help="What `wager detect fit --save` kept. A pickle: open only your own.")],
    label: Label = None,
    out: Out = None,
    plot: Plot = None,
    top: Top = 10,
) -> None:
    """Score new rows with detectors that were fitted before."""
    if not model.is_file():
        raise UsageError(f"{model} does not exist; `wager detect fit DATA --save {model}` writes it")
    try:
        kept: dict[str, Any] = pickle.loads(model.read_bytes())
        detectors, centre, scale = kept["detectors"], kept["centre"], kept["scale"]
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise UsageError(f"{model} was not written by this version's `wager detect fit --save` ({error})") from None
    rows = read_rows(data, label)
    if rows.x_ND.shape[1] != len(centre):
        raise UsageError(f"{data} has {rows.x_ND.shape[1]} columns, the detectors were fitted on {len(centre)}")
    x = (rows.x_ND.astype(np.float64) - centre) / scale
    scores = {name: d.decision_function(x) for name, d in detectors.items()}
    thresholds = {name: d.threshold_ for name, d in detectors.items()}
    labels = {name: (s > thresholds[name]).astype(int) for name, s in scores.items()}
    show(scores, thresholds, labels, rows.y_N, top)
    finish(out, plot, scores, labels, thresholds, rows.y_N)


def show(scores: dict, thresholds: dict, labels: dict, y_N: np.ndarray | None, top: int) -> None:
    """A line for each detector, then the rows that rank highest on average."""
    from rich.console import Console
    from rich.table import Table
    from scipy.stats import rankdata

    from wager.detect.bond.metrics import eval_average_precision, eval_roc_auc

    judged = y_N is not None and 0 < y_N.sum() < len(y_N)
    head = Table("detector", "threshold", "outliers", *(["ROC-AUC", "average precision"] if judged else []))
    for name, s in scores.items():
        quality = (
            [f"{eval_roc_auc(y_N, s):.4f}", f"{eval_average_precision(y_N, s):.4f}"]
            if judged and y_N is not None
            else []
        )
        head.add_row(name, f"{thresholds[name]:.6g}", str(int(labels[name].sum())), *quality)
    Console().print(head)
    mean_rank = np.mean([rankdata(s) for s in scores.values()], axis=0)
    rows = Table("row", *scores, *(["label"] if judged else []), title=f"top {top} by mean rank", title_justify="left")
    for i in np.argsort(-mean_rank, kind="stable")[:top]:
        rows.add_row(
            str(i),
            *(f"{s[i]:.5g}" for s in scores.values()),
            *([str(int(y_N[i]))] if judged and y_N is not None else []),
        )
    if top:
        Console().print(rows)


def finish(
    out: Path | None, plot: Path | None, scores: dict, labels: dict, thresholds: dict, y_N: np.ndarray | None
) -> None:
    if out:
        write_scores(out, scores, labels)
        print(f"written: {out}")
    if plot:
        plot_scores(plot, scores, thresholds, y_N)
        print(f"drawn: {plot}")


DataDir = Annotated[Path, typer.Option("--data", help="Folder of .npz files.")]
Datasets = Annotated[
    str | None, typer.Option("--datasets", help="Names of the files to use, e.g. mnist,letter; default: all.")
]


def files_of(folder: Path, names: str | None) -> dict[str, Path]:
    found = {p.stem: p for p in sorted(folder.glob("*.npz"))}
    wanted = list(found) if names is None else names.split(",")
    missing = [n for n in wanted if n not in found]
    if missing or not wanted:
        raise UsageError(f"{folder} has no {', '.join(missing) or '.npz file'}; it has {', '.join(found) or 'none'}")
    return {n: found[n] for n in wanted}


@bench.command()
def tabular(
    data: DataDir,
    detector: Names = "knn,lof,abod,cof,hbos,pca,ecod,copod,iforest,loda",
    param: Param = None,
    datasets: Datasets = None,
    max_rows: Annotated[int | None, typer.Option(help="Leave out larger sets (their names are said).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of detectors that draw.")] = 0,
) -> None:
    """ROC-AUC and seconds of detectors on labelled tables, one shared plan for each table."""
    from wager.detect.bond.metrics import eval_roc_auc
    from wager.detect.registry import tabular as make
    from wager.detect.tod import fit_many

    head: list[str] | None = None
    for name, path in files_of(data, datasets).items():
        rows = read_rows(path)
        if rows.y_N is None:
            raise UsageError(f"{path} has no labels y; a benchmark needs them")
        if max_rows is not None and len(rows.x_ND) > max_rows:
            print(f"left out: {name} ({len(rows.x_ND)} rows)", file=sys.stderr)
            continue
        made = make(detector, param or ())
        for det in made.values():
            if "random_state" in det.get_params():
                det.set_params(random_state=seed)
        start = time.perf_counter()
        fit_many(list(made.values()), rows.x_ND)
        seconds = time.perf_counter() - start
        if head is None:
            head = ["data set", "rows", "columns", *made, "seconds"]
            print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        cells = [f"{eval_roc_auc(rows.y_N, d.decision_scores_):.4f}" for d in made.values()]
        print(f"| {name} | {len(rows.x_ND)} | {rows.x_ND.shape[1]} | {' | '.join(cells)} | {seconds:.2f} |", flush=True)


@bench.command()
def graph(
    data: DataDir,
    detectors: Annotated[str, typer.Option(help="Detectors, e.g. dominant,gaan; all: the fourteen.")] = "all",
    datasets: Datasets = None,
    protocol: Annotated[str, typer.Option(help="bond-2022 (as published) or pygod-1.")] = "bond-2022",
    trials: Annotated[int, typer.Option(help="Draws of hyper-parameters for each cell.")] = 20,
    epochs: Annotated[int, typer.Option(help="Training epochs of a trial.")] = 300,
    seed: Annotated[int, typer.Option(help="Seed of the whole run.")] = 0,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds of a trial; longer ones are recorded as timeout.")
    ] = None,
    mem_limit: Annotated[str | None, typer.Option(help="Memory of a trial, e.g. 8GB; more is recorded as oom.")] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Worker processes of one thread each; default: one for every processor.", min=1)
    ] = None,
    symmetrize: Annotated[bool, typer.Option(help="Use every edge in both directions instead of as stored.")] = False,
    metric: Annotated[str, typer.Option(help="auc, ap, recall, auc_contextual or auc_structural.")] = "auc",
    out: Annotated[
        Path, typer.Option(help="One JSON line for each trial; a run goes on with what this file lacks.")
    ] = Path("bond.jsonl"),
    plot: Annotated[Path | None, typer.Option(help="Draw every trial to this png or svg.")] = None,
) -> None:
    """The benchmark of graph detectors: trials with drawn hyper-parameters, failures kept, leak baselines beside every injected set."""
    from wager.detect.bond import protocol as rules
    from wager.detect.bond import runner
    from wager.detect.tod.batching import parse_bytes

    names = list(rules.DETECTORS) if detectors == "all" else detectors.split(",")
    paths = files_of(data, datasets)
    wanted = runner.plan(names, list(paths), trials, seed, protocol, epochs, symmetrize)
    limits = runner.Limits(time_limit, parse_bytes(mem_limit) if mem_limit else None)

    def tell(done: int, total: int, row: dict) -> None:
        auc = f" auc {row['metrics']['auc']:.3f}" if row["status"] == "ok" else ""
        print(
            f"{done}/{total} {row['dataset']} {row['detector']} #{row['trial']}: {row['status']}{auc} {row.get('seconds', 0):.1f} s",
            file=sys.stderr,
        )

    rows = runner.run(wanted, paths, out, limits, tell, jobs)
    present(rows, metric, paths, plot)


def present(rows: list[dict], metric: str, paths: dict[str, Path], plot: Path | None) -> None:
    """The table with leak baselines, the ranks, the picture."""
    from wager.detect.bond import report
    from wager.detect.bond.graph import Graph

    leaks = [row for name, path in paths.items() for row in report.leak_rows(name, Graph.of(path))]
    print(report.table([*rows, *leaks], metric))
    print("\nmean±std (max) of the trials in percent; * no better than the leak baseline degree+norm")
    print(f"{len(rows)} trials took {sum(row.get('seconds', 0.0) for row in rows):.0f} s, each on one thread")
    order, critical = report.ranks(rows, metric)
    if order:
        print(
            "mean rank: "
            + ", ".join(f"{n} {r:.1f}" for n, r in order.items())
            + f"; critical difference {critical:.1f}"
        )
    if plot:
        report.plot(rows, plot, metric)
        print(f"drawn: {plot}")


@app.command()
def table(
    results: Annotated[Path, typer.Argument(help="A file that `wager detect bench graph` wrote.")],
    metric: Annotated[str, typer.Option(help="auc, ap, recall, auc_contextual or auc_structural.")] = "auc",
    data: Annotated[Path | None, typer.Option(help="The folder of graphs, to add the leak baselines.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw every trial to this png or svg.")] = None,
) -> None:
    """Print the table of a benchmark run again, by another metric or outlier type."""
    from wager.detect.bond.runner import read

    rows = read(results)
    names = ",".join(dict.fromkeys(r["dataset"] for r in rows))
    present(rows, metric, files_of(data, names) if data else {}, plot)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A results file.")],
    second: Annotated[Path, typer.Argument(help="Another, with the same seed and trials.")],
    metric: Annotated[str, typer.Option(help="auc, ap, recall, auc_contextual or auc_structural.")] = "auc",
) -> None:
    """Compare two benchmark runs trial by trial: mean difference and its interval."""
    from wager.detect.bond import report
    from wager.detect.bond.runner import read

    print(report.compare(read(first), read(second), metric))


@app.command()
def inject(
    data: Annotated[Path, typer.Argument(help="A graph: .npz with x and edge_index.")],
    out: Annotated[Path, typer.Argument(help="Where the graph with outliers goes (.npz).")],
    m: Annotated[int, typer.Option(help="Nodes of a clique.")] = 10,
    n: Annotated[int, typer.Option(help="Cliques; as many contextual outliers (m n nodes) are made.")] = 5,
    k: Annotated[int, typer.Option(help="Candidates that a contextual outlier copies the farthest of.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
) -> None:
    """Put structural and contextual outliers into a graph."""
    from wager.detect.bond.graph import Graph
    from wager.detect.bond.inject import inject as put

    made = put(Graph.of(data), m, n, k, seed)
    assert made.y is not None
    temporary = out.with_name(f".{out.stem}.tmp.npz")
    np.savez_compressed(temporary, x=made.x.numpy(), edge_index=made.edge_index.numpy(), y=made.y.numpy())
    temporary.replace(out)
    print(f"written: {out} ({int((made.y > 0).sum())} outliers among {made.nodes} nodes)")
