"""Side-by-side measurements that one can believe.

Contenders run interleaved, in an order shuffled anew every round, after warm-up, and are compared by medians. The baseline runs twice
per round, as A and A': how far the two medians lie apart is the noise of this machine today (A/A), printed beside every ratio. The ratio
has a bootstrap confidence interval that resamples whole rounds. A ratio above 1 always means "better than the baseline".

    rows = compare("sort 1e6", {"list.sort": a, "numpy": b}, repeats=9)
    report = Report("serve", "sorting", rows)
    print(report.table()); report.save()

A contender is a callable without arguments that does the work once. It returns None (its wall time is the measurement) or a number it
measured itself, e.g. tokens per second with `unit="tok/s", higher_is_better=True`. Engines that live in environments of their own run
behind `benchmarks.worker.Worker`, whose calls are such callables.

Records go to benchmarks/results and pictures to docs/images/results, or both below the folder that WAGER_RESULTS names.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(os.environ.get("WAGER_RESULTS") or Path(__file__).parent / "results")
PICTURES = RESULTS if os.environ.get("WAGER_RESULTS") else Path(__file__).parents[1] / "docs" / "images" / "results"
BOOTSTRAP_SAMPLES = 2000
CONFIDENCE = 0.95

Contender = Callable[[], "float | None"]


@dataclass(frozen=True)
class Row:
    """One contender against the baseline on one workload. Values are medians in `unit`; ratio > 1 means better than the baseline.

    ratio_low and ratio_high bound the ratio with 95 % confidence. aa_noise is the relative distance of the baseline's two medians.
    """

    workload: str
    baseline: str
    ours: str
    unit: str
    baseline_value: float
    ours_value: float
    ratio: float
    ratio_low: float
    ratio_high: float
    aa_noise: float
    repeats: int
    samples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Whether the interval lies wholly on one side of 1 and the difference exceeds the A/A noise."""
        if self.ratio_low > 1 and self.ratio > 1 + self.aa_noise:
            return "faster"
        if self.ratio_high < 1 and self.ratio < 1 - self.aa_noise:
            return "slower"
        return "no difference shown"


def compare(
    workload: str,
    contenders: Mapping[str, Contender],
    *,
    repeats: int = 7,
    warmup: int = 2,
    unit: str = "s",
    higher_is_better: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Measure every contender; the first of the mapping is the baseline. Returns one row per other contender.

    Raises ValueError when fewer than two contenders or repeats are given, or a contender returns a value that is not positive and finite.
    """
    if len(contenders) < 2 or repeats < 2:
        raise ValueError(f"compare needs two contenders and two repeats, got {len(contenders)} and {repeats}")
    baseline, *others = contenders
    samples = sample(contenders, repeats=repeats, warmup=warmup, seed=seed, progress=progress)
    aa_noise = abs(statistics.median(samples[baseline]) / statistics.median(samples[twin(baseline)]) - 1)
    rows = []
    for name in others:
        ratio, low, high = ratio_of_medians(
            samples[baseline], samples[name], higher_is_better, np.random.default_rng(seed)
        )
        rows.append(
            Row(
                workload=workload,
                baseline=baseline,
                ours=name,
                unit=unit,
                baseline_value=statistics.median(samples[baseline]),
                ours_value=statistics.median(samples[name]),
                ratio=ratio,
                ratio_low=low,
                ratio_high=high,
                aa_noise=aa_noise,
                repeats=repeats,
                samples={k: samples[k] for k in (baseline, twin(baseline), name)},
            )
        )
    return rows


def twin(baseline: str) -> str:
    """The name under which the baseline's second run of a round is kept."""
    return f"{baseline} (again)"


def sample(
    contenders: Mapping[str, Contender],
    *,
    repeats: int,
    warmup: int,
    seed: int,
    progress: Callable[[str], None] | None = None,
) -> dict[str, list[float]]:
    """The measurements, in rounds: sample i of every contender was taken in round i. The baseline has a twin."""
    baseline = next(iter(contenders))
    runs = {**contenders, twin(baseline): contenders[baseline]}
    for name, contender in contenders.items():
        for _ in range(warmup):
            measure(name, contender)
    rng = np.random.default_rng(seed)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats):
        for name in rng.permutation(list(runs)):
            samples[name].append(measure(name, runs[name]))
            if progress:
                progress(f"round {i + 1}/{repeats}: {name} {samples[name][-1]:.4g}")
    return samples


def measure(name: str, contender: Contender) -> float:
    """One run: what the contender returns, or else its wall time in seconds."""
    start = time.perf_counter()
    returned = contender()
    value = time.perf_counter() - start if returned is None else float(returned)
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"contender {name!r} measured {value}; a measurement must be positive and finite")
    return value


def ratio_of_medians(
    baseline: Sequence[float], ours: Sequence[float], higher_is_better: bool, rng: np.random.Generator
) -> tuple[float, float, float]:
    """How many times better ours is, with a 95 % interval from resampling rounds (both contenders of a round stay together)."""
    pairs_R2 = np.array([baseline, ours], dtype=float).T
    drawn_BR = rng.integers(0, len(pairs_R2), size=(BOOTSTRAP_SAMPLES, len(pairs_R2)))
    medians_B2 = np.median(pairs_R2[drawn_BR], axis=1)
    point_2 = np.median(pairs_R2, axis=0)

    def ratio(a: Any, b: Any) -> Any:
        return b / a if higher_is_better else a / b

    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratio(medians_B2[:, 0], medians_B2[:, 1]), [tail, 1 - tail])
    return float(ratio(*point_2)), float(low), float(high)


@dataclass
class Report:
    """What one benchmark found. `facts` holds single numbers and settings that are not comparisons."""

    wing: str
    system: str
    rows: list[Row]
    facts: dict[str, Any] = field(default_factory=dict)
    command: str = field(
        default_factory=lambda: " ".join(["python", "-m", module_name(), *map(short_path, sys.argv[1:])])
    )

    def table(self) -> str:
        return rows_table([asdict(row) for row in self.rows])

    def save(self, machine: Mapping[str, Any] | None = None, root: Path = RESULTS) -> Path:
        """Write results/<wing>/<system>.json whole or not at all; returns its path."""
        if machine is None:
            from wager.hardware.measure import machine as describe

            described = describe()
            machine = described if isinstance(described, Mapping) else asdict(described)
        record = {
            "wing": self.wing,
            "system": self.system,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": self.command,
            "machine": dict(machine),
            "facts": self.facts,
            "rows": [asdict(row) for row in self.rows],
        }
        path = root / self.wing / f"{self.system}.json"
        write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
        return path


def rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Workload, baseline, ours, ratio, A/A noise; columns aligned, readable in a terminal and in Markdown."""
    head = ["workload", "baseline", "ours", "ratio (95 % interval)", "A/A noise"]
    body = [
        [
            row["workload"],
            f"{row['baseline']} {row['baseline_value']:.4g} {row['unit']}",
            f"{row['ours']} {row['ours_value']:.4g} {row['unit']}",
            f"{row['ratio']:.2f}x ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})",
            f"{row['aa_noise']:.1%}",
        ]
        for row in rows
    ]
    return format_table([head, *body])


def format_table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up."""
    widths = [max(len(line[c]) for line in lines) for c in range(len(lines[0]))]

    def render(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([render(lines[0]), rule, *(render(line) for line in lines[1:])])


def picture_path(wing: str, system: str) -> Path:
    """Where a benchmark's plot goes, for the results page to show it."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    return PICTURES / f"{wing}-{system}.svg"


def write_atomically(path: Path, text: str) -> None:
    """Write to a temporary name beside `path` and rename, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_results(root: Path = RESULTS) -> Iterator[dict[str, Any]]:
    """Every saved report, ordered by path."""
    for path in sorted(root.glob("*/*.json")):
        yield json.loads(path.read_text())


def short_path(argument: str) -> str:
    """An absolute path loses its machine's folders, so that a recorded command reads the same everywhere."""
    key, separator, value = argument.rpartition("=")
    return f"{key}{separator}.../{Path(value).name}" if Path(value).is_absolute() else argument


def module_name() -> str:
    """The dotted name of the running benchmark, for the record."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).name


def arguments(description: str, device: str = "", repeats: bool = True) -> argparse.ArgumentParser:
    """--quick, which every benchmark has; --device with this default and --repeats where it heeds them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and few repeats: does it run, not how fast is it"
    )
    if device:
        parser.add_argument("--device", default=device, help="where to run: cpu or cuda")
    if repeats:
        parser.add_argument("--repeats", type=int, default=None, help="measured rounds; default depends on --quick")
    return parser


def say(line: str) -> None:
    """Progress goes to stderr, so that stdout holds the table alone."""
    print(line, file=sys.stderr, flush=True)
