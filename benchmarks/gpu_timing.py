"""Timing on a GPU: work captured as a CUDA graph over rotating buffers, replays timed by events; and sections that fail alone.

A captured graph leaves out what launching costs the processor, which is most of the time of one small kernel launched from Python and none of
it inside an engine that replays graphs. Buffers rotate so that together they exceed the L2 cache several times.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from benchmarks.harness import Report, say

COLD_BYTES = 400 << 20  # several times the L2 of the largest GPUs
LEAST_CALLS = 12


def device_tag() -> str:
    """A short name for file names: "h100" of "NVIDIA H100 80GB HBM3"."""
    words = torch.cuda.get_device_name().lower().replace("nvidia", "").split()
    return words[0] if words else "gpu"


def copies_of(nbytes: int) -> int:
    """How many buffers of that size it takes to be out of the cache when each one's turn comes."""
    return max(1, min(64, -(-COLD_BYTES // nbytes)))


def graphed(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    """A contender: seconds of one call, averaged over one replay of all of them in turn."""
    calls = list(calls) * -(-LEAST_CALLS // len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        kept = [call() for call in calls]
    del kept
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def run() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(calls)

    return run


def rate(seconds: Callable[[], float], nbytes: float) -> Callable[[], float]:
    """GB/s of something that moves `nbytes` in so many seconds."""
    return lambda: nbytes / seconds() / 1e9


def copy_contender(nbytes: int = 1 << 30) -> Callable[[], float]:
    """GB/s of a device copy, bytes read plus bytes written. Not captured: a copy inside a graph took 1.55 times as long on an H200."""
    source = torch.randint(0, 127, (nbytes,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def run() -> float:
        target.copy_(source)
        start.record()
        for _ in range(LEAST_CALLS):
            target.copy_(source)
        end.record()
        end.synchronize()
        return 2 * nbytes * LEAST_CALLS / (start.elapsed_time(end) / 1e3) / 1e9

    return run


def run_sections(
    sections: Mapping[str, Callable[[], None]], wanted: Iterable[str], report: Report, save: bool = True
) -> list[str]:
    """Run each in turn, save after each, go on after a failure. Returns the names of those that failed."""
    failed = []
    for name in wanted:
        begun = time.perf_counter()
        try:
            sections[name]()
        except Exception:
            failed.append(name)
            traceback.print_exc()
        report.facts.setdefault("seconds", {})[name] = round(time.perf_counter() - begun, 2)
        say(f"== {name}: {time.perf_counter() - begun:.1f} s{' FAILED' if name in failed else ''}")
        torch.cuda.empty_cache()
        if save:
            report.facts["failed"] = list(failed)
            report.save()
    return failed
