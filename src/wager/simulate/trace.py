"""Requests to come: from published traces, or drawn from a generator."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wager.errors import UsageError

COLUMNS = (("arrival_s", "context_tokens", "generated_tokens"), ("arrival_s", "input_tokens", ""))


@dataclass(frozen=True)
class Arrival:
    """`cached_tokens` have their KV already where the request goes (it was prefilled elsewhere); they are part of no prompt here."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    model: str = ""

    def __post_init__(self):
        if (
            self.prompt_tokens + self.cached_tokens < 1
            or self.output_tokens < 1
            or min(self.prompt_tokens, self.cached_tokens) < 0
        ):
            raise UsageError(
                f"a request of {self.prompt_tokens} prompt and {self.output_tokens} output tokens cannot be served"
            )


def read_trace(path: str | Path, output_tokens: int | None = None, max_prompt: int | None = None) -> list[Arrival]:
    """arrival_s,context_tokens,generated_tokens, or arrival_s,input_tokens with `output_tokens` given. Longer prompts than `max_prompt`
    are left out; so are requests that generate nothing. Raises UsageError naming the line."""
    arrivals = []
    with open(path, newline="") as handle:
        reader = csv.DictReader(handle)
        found = next((c for c in COLUMNS if set(filter(None, c)) <= set(reader.fieldnames or ())), None)
        if found is None or (not found[2] and output_tokens is None):
            raise UsageError(f"{path} is no request trace: it has the columns {', '.join(reader.fieldnames or ())}")
        for line, row in enumerate(reader, 2):
            try:
                prompt = int(row[found[1]])
                output = output_tokens if output_tokens is not None else int(row[found[2]])
                if output < 1 or (max_prompt is not None and prompt > max_prompt):
                    continue
                arrivals.append(Arrival(float(row["arrival_s"]), prompt, output))
            except (TypeError, ValueError, UsageError) as error:
                raise UsageError(f"line {line} of {path} is no request: {error}") from None
    return arrivals


def poisson(
    lengths: Iterable[tuple[int, int]], rate: float, duration_s: float, rng: np.random.Generator
) -> list[Arrival]:
    """Arrivals at `rate` per second whose (prompt, output) lengths are drawn from `lengths` with replacement."""
    pool = list(lengths)
    if rate <= 0 or not pool:
        raise UsageError(f"a rate of {rate} requests/s over {len(pool)} lengths makes no trace")
    times = np.cumsum(rng.exponential(1 / rate, max(16, int(rate * duration_s * 1.5 + 50))))
    times = times[times < duration_s]
    return [Arrival(float(t), *pool[i]) for t, i in zip(times, rng.integers(len(pool), size=len(times)), strict=True)]


def all_at_once(arrivals: Iterable[Arrival]) -> list[Arrival]:
    """The same requests, waiting from the start: the offline case."""
    return [Arrival(0.0, a.prompt_tokens, a.output_tokens, a.cached_tokens, a.model) for a in arrivals]
