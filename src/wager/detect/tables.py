"""Rows in and out of files: csv, parquet and npz in, csv out; the picture of scores."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wager.errors import UsageError


@dataclass(frozen=True)
class Rows:
    """x_ND with the names of its columns, and labels (1 outlier) if the file has them."""

    x_ND: np.ndarray
    columns: list[str]
    y_N: np.ndarray | None = None


def read_rows(path: Path, label: str | None = None) -> Rows:
    """Numbers of a file; `label` names the column (or npz array) of labels. Raises UsageError naming what is wrong."""
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give a .csv, .parquet or .npz file")
    kind = path.suffix.lower()
    if kind == ".npz":
        return _npz(path, label)
    if kind == ".parquet":
        names, columns = _parquet(path)
    elif kind in (".csv", ".tsv", ".txt"):
        names, columns = _csv(path, "\t" if kind == ".tsv" else ",")
    else:
        raise UsageError(f"{path}: cannot read {kind or 'a file without an ending'}; give .csv, .parquet or .npz")
    if label is not None and label not in names:
        raise UsageError(f"{path} has no column {label!r}; it has {', '.join(names)}")
    kept = [n for n in names if n != label]
    x = np.stack([columns[n] for n in kept], 1) if kept else np.zeros((0, 0))
    return Rows(x, kept, None if label is None else columns[label] > 0)


def _npz(path: Path, label: str | None) -> Rows:
    with np.load(path, allow_pickle=False) as stored:
        name = next((n for n in ("X", "x", *stored.files) if n in stored.files), None)
        if name is None or stored[name].ndim != 2:
            raise UsageError(f"{path} holds no two-dimensional array; name it X")
        y = stored[label or "y"] if (label or "y") in stored.files else None
        if label is not None and y is None:
            raise UsageError(f"{path} has no array {label!r}; it has {', '.join(stored.files)}")
        x = stored[name]
    return Rows(x, [f"x{i}" for i in range(x.shape[1])], None if y is None else np.asarray(y).ravel() > 0)


def _csv(path: Path, delimiter: str) -> tuple[list[str], dict[str, np.ndarray]]:
    with path.open(newline="") as file:
        lines = [line for line in csv.reader(file, delimiter=delimiter) if line]
    if not lines:
        raise UsageError(f"{path} is empty")
    headed = any(not _number(cell) for cell in lines[0])
    names = lines[0] if headed else [f"x{i}" for i in range(len(lines[0]))]
    body = lines[1:] if headed else lines
    for i, line in enumerate(body, 1 + headed):
        if len(line) != len(names):
            raise UsageError(f"{path}: line {i} has {len(line)} cells, the first line {len(names)}")
    columns = {}
    for j, name in enumerate(names):
        try:
            columns[name] = np.array([line[j] or "nan" for line in body], dtype=np.float64)
        except ValueError:
            bad = next(line[j] for line in body if line[j] and not _number(line[j]))
            raise UsageError(
                f"{path}: column {name!r} holds {bad!r}, which is not a number; drop or encode the column"
            ) from None
    return names, columns


def _number(cell: str) -> bool:
    try:
        float(cell or "nan")
    except ValueError:
        return False
    return True


def _parquet(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    try:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError("reading parquet needs pyarrow: pip install 'wager[detect]'") from None
    table = parquet.read_table(path)
    columns = {}
    for name in table.column_names:
        try:
            columns[name] = np.asarray(table[name].to_numpy(), dtype=np.float64)
        except (TypeError, ValueError):
            raise UsageError(f"{path}: column {name!r} does not hold numbers; drop or encode it") from None
    return table.column_names, columns


def write_scores(path: Path, scores: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> None:
    """A csv with a score and a label column for each detector, written whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", *(f"{n}_{what}" for n in scores for what in ("score", "outlier"))])
        for i in range(len(next(iter(scores.values())))):
            writer.writerow([i, *(v for n in scores for v in (repr(float(scores[n][i])), int(labels[n][i])))])
    temporary.replace(path)


def plot_scores(
    path: Path, scores: Mapping[str, np.ndarray], thresholds: Mapping[str, float], y_N: np.ndarray | None
) -> None:
    """For each detector a histogram of scores with its threshold, and with labels the ROC curves. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'wager[plot]'") from None
    panels = len(scores) + (y_N is not None)
    figure = Figure(figsize=(4.2 * min(panels, 3), 3.2 * -(-panels // 3)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(-(-panels // 3), min(panels, 3))).ravel()
    for axis, (name, score) in zip(axes, scores.items(), strict=False):
        groups: Sequence[np.ndarray] = [score] if y_N is None else [score[~y_N], score[y_N]]
        low, high, usual = float(score.min()), float(score.max()), float(np.percentile(score, 99))
        far = low > 0 and high > 100 * usual  # a few scores would leave all others in one bar
        bins = np.geomspace(low, high, 51) if far else 50
        axis.hist(groups, bins, stacked=True, log=True, color=["#8ab", "#c43"][: len(groups)])
        if far:
            axis.set_xscale("log")
        axis.set(xlabel="score", ylabel="rows")
        axis.axvline(thresholds[name], color="#222", linewidth=0.8, linestyle="--")
        axis.set_title(name)
    if y_N is not None and 0 < y_N.sum() < len(y_N):
        axis = axes[len(scores)]
        for name, score in scores.items():
            hit = y_N[np.argsort(-score, kind="stable")]
            axis.plot(np.cumsum(~hit) / (~hit).sum(), np.cumsum(hit) / hit.sum(), label=name, linewidth=1)
        axis.plot([0, 1], [0, 1], color="#bbb", linewidth=0.6)
        axis.set(title="ROC", xlabel="false positive rate", ylabel="true positive rate")
        axis.legend(fontsize=7)
        panels = len(scores) + 1
    else:
        panels = len(scores)
    for axis in axes[panels:]:
        axis.set_axis_off()
    figure.savefig(path)
