"""What many verdicts add up to, by both ways of counting what failed.

KernelBench's fast_p (arXiv 2502.10517): the share of operators that are right and more than p times as fast as the baseline; a mean of
speedups alone can be driven by one huge or tiny value.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from wager.kernels.referee.judge import Status, Verdict

SELF_TEST_NOISE = 0.05  # above it a run says nothing about small differences


@dataclass(frozen=True)
class Score:
    """correct: share that passed, of all that were not skipped. fallback_speedup: geometric mean where a failed operator counts as the
    baseline itself (1.0); passed_speedup: over those that passed. fast_p: by p. noise: median A/A noise of the timed cases."""

    operators: int
    skipped: int
    correct: float
    fallback_speedup: float | None
    passed_speedup: float | None
    compiled_speedup: float | None
    fast_p: dict[str, float]
    noise: float | None

    def as_dict(self) -> dict:
        return asdict(self)


def score(verdicts: Sequence[Verdict]) -> Score:
    """A skipped operator counts nowhere: neither as passed nor as failed."""
    judged = [v for v in verdicts if v.status is not Status.SKIPPED]
    passed = [v for v in judged if v.status is Status.PASSED]
    speedups = [v.speedup for v in passed if v.speedup]
    compiled = [v.compiled_speedup for v in passed if v.compiled_speedup]
    noises = [c.noise for v in verdicts for c in v.cases if c.noise is not None]
    share = (lambda n: n / len(judged)) if judged else (lambda n: 0.0)
    return Score(
        len(judged), len(verdicts) - len(judged), share(len(passed)),
        statistics.geometric_mean(speedups + [1.0] * (len(judged) - len(speedups))) if judged else None,
        statistics.geometric_mean(speedups) if speedups else None,
        statistics.geometric_mean(compiled) if compiled else None,
        {str(p): share(len(passed) if p == 0 else sum(s > p for s in speedups)) for p in (0, 1, 2)},
        statistics.median(noises) if noises else None,
    )  # fmt: skip


def amdahl(shares: Sequence[float], speedups: Sequence[float]) -> float:
    """The whole's speedup when parts that take these shares of its time become so many times faster."""
    return 1.0 / (1.0 - sum(shares) + sum(share / speedup for share, speedup in zip(shares, speedups, strict=True)))
