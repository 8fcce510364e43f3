"""Which of the best few placements becomes the plan: judged on more requests, and by latency where rates are a tie.

One run of waiting requests says little about rates that are a per cent apart and nothing about latency. So the finalists each serve the same
windows of requests twice: all waiting, for the rate, and arriving at a share of what the best can serve, for the latencies. Rates tie when their
difference, window by window, is less than twice its standard error.

Chains have an order that the flow does not see: prompts enter at the first stage, and where stages are unequal it matters whether they meet the
short ones first. Chains therefore come in several orders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from wager.cluster.helix.flow import Placement
from wager.simulate.trace import Arrival, poisson

WINDOWS = 12
ONLINE_SHARE = 0.6  # of the best rate with all requests waiting
LATENCIES = ("first_token_s_p50", "first_token_s_p99", "inter_token_s_p50", "inter_token_s_p99")


@dataclass(frozen=True)
class Window:
    """One run of requests, all waiting or as they arrive."""

    waiting: tuple[Arrival, ...]
    arriving: tuple[Arrival, ...]


@dataclass(frozen=True)
class Judged:
    """What a placement served: output tokens/s by window, and its latency, the geometric mean of medians and 99th percentiles of time to first token
    and of gaps between tokens, in seconds."""

    rates: tuple[float, ...]
    latency_s: float

    @property
    def rate(self) -> float:
        return float(np.mean(self.rates))


def windows(
    arrivals: Sequence[Arrival], rate: float, seconds: float, rng: np.random.Generator, count: int = WINDOWS
) -> list[Window]:
    """`count` windows: the requests from another place on, and the same lengths as Poisson arrivals that ask for a share of `rate` output tokens/s."""
    mean_output = float(np.mean([a.output_tokens for a in arrivals]))
    found = []
    for i in range(count):
        first = i * len(arrivals) // count
        part = [*arrivals[first:], *arrivals[:first]]
        lengths = [(a.prompt_tokens, a.output_tokens) for a in part[: max(1, len(arrivals) // count)]]
        arriving = poisson(lengths, max(ONLINE_SHARE * rate / mean_output, 2 / seconds), seconds, rng)
        found.append(Window(tuple(replace(a, arrival_s=0.0) for a in part), tuple(arriving)))
    return found


def latency_s(summaries: Sequence[Mapping[str, float]]) -> float:
    """Geometric mean over windows and quantiles; infinite where nothing came out."""
    values = [s[name] for s in summaries for name in LATENCIES if name in s]
    return math.exp(float(np.mean(np.log(np.maximum(values, 1e-9))))) if values else math.inf


def tied(best: Judged, other: Judged) -> bool:
    """Whether the difference of rates may be luck: within two standard errors of the difference window by window."""
    difference = np.subtract(best.rates, other.rates)
    error = float(np.std(difference, ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return float(np.mean(difference)) <= 2 * error


def winner(judged: Sequence[Judged]) -> int:
    """Of those that tie with the highest rate the one with the least latency."""
    best = max(judged, key=lambda j: j.rate)
    return min((i for i, j in enumerate(judged) if tied(best, j)), key=lambda i: (judged[i].latency_s, i))


def reordered(placement: Placement, machine: Mapping[str, str]) -> list[dict[str, tuple[int, int]]]:
    """Other orders of a chain; nothing where layers have several holders. Shorter stages first; first among machines of a kind; and that with
    a layer more from the first to the last machine of a kind that can take it without being its longest."""
    chain = sorted(placement.items(), key=lambda item: item[1])
    ends = [0, *(end for _, (_, end) in chain)]
    if any(start != end for (_, (start, _)), end in zip(chain, ends, strict=False)):
        return []
    sizes = {n: end - start for n, (start, end) in chain}
    nodes = list(sizes)
    kinds = {m: [n for n in nodes if machine[n] == m] for m in sorted({machine[n] for n in nodes})}
    rising = dict(sizes)
    for same in kinds.values():
        rising |= dict(zip(same, sorted(sizes[n] for n in same), strict=True))
    found = [laid_out(sorted(nodes, key=lambda n: sizes[n]), sizes), laid_out(nodes, rising)]
    for same in kinds.values():
        short = [n for n in same[1:] if rising[n] < rising[same[-1]]]
        if short and rising[same[0]] > 1:
            found.append(laid_out(nodes, rising | {same[0]: rising[same[0]] - 1, short[-1]: rising[short[-1]] + 1}))
    return [p for i, p in enumerate(found) if p != dict(placement) and p not in found[:i]]


def laid_out(order: Sequence[str], sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    placement, at = {}, 0
    for node in order:
        placement[node] = (at, at + sizes[node])
        at += sizes[node]
    return placement
