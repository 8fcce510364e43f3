"""Tables and pictures of benchmark rows: mean, spread and best over trials with intervals, outlier types, leak baselines, comparisons of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata, studentized_range

from wager.detect.bond.graph import Graph
from wager.detect.bond.metrics import mean_interval, quality
from wager.detect.bond.protocol import DETECTORS
from wager.errors import UsageError

METRICS = ("auc", "ap", "recall", "auc_contextual", "auc_structural")
LEAKS = ("degree", "norm", "degree+norm")


def leak_baselines(graph: Graph) -> dict[str, np.ndarray]:
    """What injection gives away: degree finds cliques, the attribute norm finds copied rows; and the sum of both ranks."""
    degree = np.asarray(graph.simple.sum(1)).ravel()
    norm = graph.x.norm(dim=1).numpy()
    return {"degree": degree, "norm": norm, "degree+norm": rankdata(degree) + rankdata(norm)}


def leak_rows(dataset: str, graph: Graph) -> list[dict[str, Any]]:
    """The baselines as rows of the same form as trials."""
    assert graph.y is not None
    return [
        {
            "detector": name,
            "dataset": dataset,
            "status": "ok",
            "metrics": quality(graph.y.numpy(), score),
            "seconds": 0.0,
        }
        for name, score in leak_baselines(graph).items()
    ]


def cells(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Per (detector, dataset): values in percent, their mean, std, max and interval, and how many trials failed in which way."""
    if metric not in METRICS:
        raise UsageError(f"unknown metric {metric!r}; choose one of {', '.join(METRICS)}")
    grouped: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        cell = grouped.setdefault(
            (row["detector"], row["dataset"]), {"values": [], "failed": {}, "seconds": [], "peak_bytes": 0}
        )
        if row["status"] == "ok" and metric in row["metrics"]:
            cell["values"].append(100 * row["metrics"][metric])
            cell["seconds"].append(row["seconds"])
            cell["peak_bytes"] = max(cell["peak_bytes"], row.get("peak_bytes", 0))
        elif row["status"] != "ok":
            cell["failed"][row["status"]] = cell["failed"].get(row["status"], 0) + 1
    for cell in grouped.values():
        values = np.array(cell["values"])
        if len(values):
            cell |= {
                "mean": float(values.mean()),
                "std": float(values.std()),
                "max": float(values.max()),
                "interval": mean_interval(values),
            }
    return {key: grouped[key] for key in sorted(grouped, key=_place)}


def _place(key: tuple[str, str]) -> tuple[int, str, str]:
    """Detectors in the protocol's order, then the baselines: rows come as trials end, side by side."""
    detector, dataset = key
    order = [*DETECTORS, *LEAKS]
    return (order.index(detector) if detector in order else len(order), detector, dataset)


def table(rows: Sequence[Mapping[str, Any]], metric: str = "auc", flag: bool = True) -> str:
    """Markdown: detectors down, data sets across, mean +- std (max) in percent. `*` marks detectors no better than the leak degree+norm."""
    found = cells(rows, metric)
    detectors, datasets = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    lines = [f"| {metric} | " + " | ".join(datasets) + " |", "|---|" + "---|" * len(datasets)]
    for detector in detectors:
        shown = [
            _cell(
                found.get((detector, d)),
                found.get(("degree+norm", d)) if flag and detector not in LEAKS else None,
            )
            for d in datasets
        ]
        lines.append(f"| {detector} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _cell(cell: Mapping[str, Any] | None, leak: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    failed = " ".join(f"{name}×{count}" for name, count in cell["failed"].items())
    if "mean" not in cell:
        return failed or "–"
    star = "*" if leak and "mean" in leak and cell["mean"] <= leak["mean"] else ""
    text = f"{cell['mean']:.1f}±{cell['std']:.1f} ({cell['max']:.1f}){star}"
    return f"{text} {failed}".strip()


def compare(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], metric: str = "auc") -> str:
    """Paired by (detector, data set, trial): mean difference b - a with its 95 % interval."""
    pairs: dict[tuple[str, str], list[float]] = {}
    values = {
        (r["detector"], r["dataset"], r["trial"]): r["metrics"][metric]
        for r in a
        if r["status"] == "ok" and metric in r["metrics"]
    }
    for r in b:
        key = (r["detector"], r["dataset"], r["trial"])
        if r["status"] == "ok" and key in values and metric in r["metrics"]:
            pairs.setdefault(key[:2], []).append(100 * (r["metrics"][metric] - values[key]))
    if not pairs:
        raise UsageError("the two files have no trial in common")
    lines = ["| detector | data set | pairs | difference | 95 % interval |", "|---|---|---|---|---|"]
    for (detector, dataset), differences in pairs.items():
        low, high = mean_interval(np.array(differences))
        lines.append(
            f"| {detector} | {dataset} | {len(differences)} | {np.mean(differences):+.2f} | {low:+.2f} to {high:+.2f} |"
        )
    return "\n".join(lines)


def ranks(rows: Sequence[Mapping[str, Any]], metric: str = "auc") -> tuple[dict[str, float], float]:
    """Mean rank of each detector over the data sets where all have a value (1 is best), and Nemenyi's critical difference at 5 %."""
    found = cells(rows, metric)
    detectors = list(dict.fromkeys(d for d, _ in found))
    datasets = [
        s for s in dict.fromkeys(s for _, s in found) if all("mean" in found.get((d, s), {}) for d in detectors)
    ]
    if len(detectors) < 2 or not datasets:
        return {}, math.inf
    means = np.array([[found[d, s]["mean"] for s in datasets] for d in detectors])
    rank = rankdata(-means, axis=0).mean(1)
    k, n = len(detectors), len(datasets)
    critical = float(studentized_range.ppf(0.95, k, np.inf)) / math.sqrt(2) * math.sqrt(k * (k + 1) / (6 * n))
    return dict(sorted(zip(detectors, rank.tolist(), strict=True), key=lambda pair: pair[1])), critical


def plot(rows: Sequence[Mapping[str, Any]], path: Path, metric: str = "auc") -> None:
    """One panel per data set: every trial a dot, the mean a bar. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'wager[plot]'") from None
    found = cells(rows, metric)
    detectors, datasets = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    figure = Figure(figsize=(max(6, 0.45 * len(detectors) + 2), 2.4 * len(datasets)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(datasets), 1, sharex=True))
    for axis, dataset in zip(axes, datasets, strict=True):
        for i, detector in enumerate(detectors):
            values = found.get((detector, dataset), {}).get("values", [])
            if values:
                axis.bar(i, np.mean(values), color="#bcd", width=0.8)
                axis.plot([i] * len(values), values, ".", color="#246", markersize=4)
        axis.set_ylabel(f"{dataset}\n{metric} %")
        axis.axhline(50, color="#999", linewidth=0.6)
    axes[-1].set_xticks(range(len(detectors)), detectors, rotation=60, ha="right")
    figure.savefig(path)
