"""What a step will cost: a small linear model fitted to the engine's own step log, used wherever a policy needs a price.

A step costs a constant, something per token, more per token beyond the ridge where weights stop being the bottleneck, something per cached
token attended to, and something per request. All coefficients are non-negative.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from wager.errors import UsageError, WagerError
from wager.serve.observe import StepRecord
from wager.serve.request import Request

HINGES = (8, 32, 128)
MIN_RECORDS = 20


class StepLog:
    """An engine Observer that appends one JSON line per step; a line is written whole or not at all."""

    def __init__(self, path: str | Path):
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UsageError(f"cannot write the step log {path}: {error.strerror}") from None

    def on_step(self, record: StepRecord) -> None:
        os.write(self._file, (json.dumps(asdict(record)) + "\n").encode())

    def on_tokens(self, request: Request, num_new_tokens: int, now_s: float) -> None:
        """Steps are logged, not tokens."""

    def on_finished(self, request: Request) -> None:
        """Steps are logged, not requests."""

    def close(self) -> None:
        os.close(self._file)


def read_step_log(path: str | Path) -> list[StepRecord]:
    """Records of a log; a torn last line (the process was killed) is left out."""
    names = {f.name for f in fields(StepRecord)}
    records = []
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise UsageError(f"the step log {path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if not isinstance(values, dict) or set(values) != names:
            raise WagerError(f"line {number} of {path} is no step record of this version; log again")
        records.append(StepRecord(**{**values, "accepted_per_position": tuple(values["accepted_per_position"])}))
    return records


@dataclass(frozen=True)
class StepCost:
    """`predict` gives milliseconds. median_error, p90_error: relative errors on held-out steps."""

    coefficients: tuple[float, ...]
    median_error: float
    p90_error: float

    def predict(self, tokens: float, context_tokens: float, num_spans: float) -> float:
        """Milliseconds of a step over `tokens` batch tokens in `num_spans` spans that see `context_tokens` cached tokens."""
        return float(np.dot(features(tokens, context_tokens, num_spans), self.coefficients))

    def save(self, path: str | Path) -> None:
        temporary = Path(f"{path}.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1))
        temporary.replace(path)

    @staticmethod
    def load(path: str | Path) -> StepCost:
        values = json.loads(Path(path).read_text())
        return StepCost(tuple(values["coefficients"]), values["median_error"], values["p90_error"])


def features(tokens: float, context_tokens: float, num_spans: float) -> list[float]:
    return [1.0, tokens, *(max(0.0, tokens - hinge) for hinge in HINGES), context_tokens, num_spans]


def fit(records: Iterable[StepRecord], holdout: float = 0.2) -> StepCost:
    """Fit on the earlier part of the log, report errors on the later `holdout` share. Raises WagerError on too short a log.

    Relative errors are minimised (rows are weighted by 1 / ms), because small steps matter as much as large ones.
    """
    from scipy.optimize import nnls

    steps = list(records)
    if len(steps) < MIN_RECORDS:
        raise WagerError(f"{len(steps)} steps are too few to fit a cost model; log at least {MIN_RECORDS}")
    rows = np.array([_row(r) for r in steps])
    ms = np.array([r.step_ms for r in steps])
    split = max(1, int(len(steps) * (1 - holdout)))
    scale = np.maximum(np.abs(rows[:split]).max(0), 1e-12)
    weighted = rows[:split] / scale / ms[:split, None]
    solution, _ = nnls(weighted, np.ones(split))
    coefficients = solution / scale
    errors = np.abs(rows[split:] @ coefficients - ms[split:]) / ms[split:]
    return StepCost(tuple(coefficients.tolist()), float(np.median(errors)), float(np.quantile(errors, 0.9)))


def _row(record: StepRecord) -> Sequence[float]:
    tokens = record.prefill_tokens + record.decode_tokens + record.draft_tokens
    return features(tokens, record.context_tokens, record.num_spans)
