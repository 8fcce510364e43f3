"""Times callables so that the figures can be compared: interleaved rounds, medians, the first contender twice for the noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Medians in seconds by name; `noise` is how far the first contender's two medians lie apart."""

    medians_s: dict[str, float]
    noise: float
    rounds: int


def time_together(
    contenders: Mapping[str, Callable[[], Any]], *, rounds: int = 20, warmup: int = 3, budget_s: float = 5.0
) -> Timing:
    """Interleaved medians. Stops after `rounds`, or when `budget_s` is spent and five rounds are done.

    A contender never follows itself or its twin: it would find its data in the cache, the others would not.
    """
    first = next(iter(contenders))
    runs = {**contenders, "": contenders[first]}
    between = next((run for name, run in contenders.items() if name != first), None)
    for run in contenders.values():
        for _ in range(warmup):
            run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    start, done = time.perf_counter(), 0
    names, previous = list(runs), None
    while done < rounds and (done < 5 or time.perf_counter() - start < budget_s):
        for name in names[done % len(names) :] + names[: done % len(names)]:
            if runs[name] is previous and between is not None:
                between()
            previous = runs[name]
            begin = time.perf_counter()
            previous()
            samples[name].append(time.perf_counter() - begin)
        done += 1
    medians = {name: statistics.median(values) for name, values in samples.items()}
    twin = medians.pop("")
    return Timing(medians, abs(twin / medians[first] - 1), done)


def quick_time(run: Callable[[], Any], *, rounds: int = 5) -> float:
    """The least of a few runs: it only ranks candidates, and the least is what a busy machine disturbs least."""
    run()
    samples = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        samples.append(time.perf_counter() - begin)
    return min(samples)
