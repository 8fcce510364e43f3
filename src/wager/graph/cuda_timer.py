"""Times callables on a GPU: many calls captured in one CUDA graph, whole replays timed by events, contenders in turns.

One replay holds many calls, so that neither Python nor the launch of the graph is in the figure: it is the device's time a call, gaps between
kernels included. What is captured must not synchronise with the host. `alone()` keeps processes that tune on one GPU from timing at once.
"""

from __future__ import annotations

import fcntl
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from wager.graph.timer import Timing

CALLS = 20
_held = 0


@contextmanager
def alone() -> Iterator[None]:
    """Holds the file that the environment variable WAGER_GPU_LOCK names (nothing is held without it). May be nested in one process."""
    global _held
    path = os.environ.get("WAGER_GPU_LOCK")
    if not path or _held:
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _held += 1
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            _held -= 1


def capture(runs: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A graph that does these calls in order, each warmed up before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for run in dict.fromkeys(runs):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph


def replay_s(graph: torch.cuda.CUDAGraph, replays: int = 1) -> float:
    """Seconds of the device for one replay, the mean of some in a row."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / replays


def quick_time(run: Callable[[], Any], *, rounds: int = 5, calls: int = CALLS) -> float:
    """The least of a few replays, in seconds a call; it only ranks candidates."""
    graph = capture([run] * calls)
    replay_s(graph)
    return min(replay_s(graph) for _ in range(rounds)) / calls


def time_together(contenders: Mapping[str, Callable[[], Any]], *, rounds: int = 20, calls: int = CALLS) -> Timing:
    """Interleaved medians in seconds a call; the first contender runs twice in every round, for the noise."""
    first = next(iter(contenders))
    graphs = {name: capture([run] * calls) for name, run in contenders.items()}
    graphs[""] = graphs[first]
    for graph in graphs.values():
        replay_s(graph)
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    names = list(graphs)
    for done in range(rounds):
        for name in names[done % len(names) :] + names[: done % len(names)]:
            samples[name].append(replay_s(graphs[name]) / calls)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    twin = medians.pop("")
    return Timing(medians, abs(twin / medians[first] - 1), rounds)
