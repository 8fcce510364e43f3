"""Memory planning: where in one arena every tensor of a schedule lives.

Dynamic storage allocation over lifetimes [start, end]; several classical heuristics are tried, the lowest peak wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64


@dataclass(frozen=True)
class Lifetime:
    """A tensor of `size` bytes that is alive from step `start` through step `end`."""

    size: int
    start: int
    end: int


def plan(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """(offset of each tensor, peak). Tensors alive at a common step never overlap; offsets are aligned."""
    orders = (
        sorted(range(len(lifetimes)), key=lambda i: (lifetimes[i].start, -lifetimes[i].size)),
        sorted(range(len(lifetimes)), key=lambda i: -lifetimes[i].size),
        sorted(range(len(lifetimes)), key=lambda i: -(lifetimes[i].end - lifetimes[i].start) * lifetimes[i].size),
    )
    best: tuple[list[int], int] | None = None
    for order in orders:
        for tight in (False, True):
            offsets = _place(lifetimes, order, tight)
            peak = max((o + _up(t.size) for o, t in zip(offsets, lifetimes, strict=True)), default=0)
            if best is None or peak < best[1]:
                best = (offsets, peak)
    assert best is not None
    return best


def _up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _place(lifetimes: Sequence[Lifetime], order: Sequence[int], tight: bool) -> list[int]:
    """First fit, or with `tight` the smallest gap that fits."""
    offsets = [0] * len(lifetimes)
    done: list[int] = []
    for i in order:
        mine = lifetimes[i]
        busy = sorted(
            (offsets[j], offsets[j] + _up(lifetimes[j].size))
            for j in done
            if lifetimes[j].start <= mine.end and mine.start <= lifetimes[j].end
        )
        gaps, cursor = [], 0
        for low, high in busy:
            if low - cursor >= _up(mine.size):
                gaps.append((low - cursor, cursor))
            cursor = max(cursor, high)
        offsets[i] = (min(gaps)[1] if tight else gaps[0][1]) if gaps else cursor
        done.append(i)
    return offsets
