"""What is known of the arrivals: their rate so far, and what may come next."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

RECENT_GAPS = 64


class Load:
    """The arrivals of a trace, of which only those up to the time asked about are known."""

    def __init__(self, arrival_s: Sequence[float], window_s: float, expected_rate: float):
        self.arrival_s, self.window_s, self.expected_rate = list(arrival_s), window_s, expected_rate

    def rate(self, at_s: float) -> float:
        """Arrivals per second lately, not below what came in the long run or is expected; infinite before anything is known."""
        came = bisect_right(self.arrival_s, at_s)
        recent = (came - bisect_right(self.arrival_s, at_s - self.window_s)) / self.window_s
        known = at_s >= self.window_s or self.expected_rate > 0
        overall = came / at_s if at_s >= self.window_s else 0.0
        return max(recent, overall, self.expected_rate) if known else math.inf

    def forecast(self, at_s: float, horizon_s: float, rng: np.random.Generator) -> list[float]:
        """Times of arrivals after `at_s`: gaps drawn from the latest ones, so that bursts come in bursts, scaled to the rate."""
        rate = self.rate(at_s)
        if not 0 < rate < math.inf:
            return []
        came = self.arrival_s[
            max(0, bisect_right(self.arrival_s, at_s) - RECENT_GAPS) : bisect_right(self.arrival_s, at_s)
        ]
        gaps = np.diff(came)
        count = int(rate * horizon_s * 2) + 8
        if len(gaps) < 8 or gaps.mean() <= 0:
            drawn = np.full(count, 1 / rate)
        else:
            drawn = rng.choice(gaps, count) / (gaps.mean() * rate)
        times = at_s + np.cumsum(drawn)
        return times[times < at_s + horizon_s].tolist()
