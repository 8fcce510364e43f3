"""What a drafted step takes, by its rows and draft passes, and what a token is worth: the prices that dynamic trees are grown by.

A profile measured when the engine starts says what passes take. Real steps correct it: draft passes are timed as they are made, and trees
differ from step to step, so the times of real steps tell by themselves what one more row costs. The correction is a ridge regression of (real
- profiled) milliseconds on (1, rows per request), the latest steps weighing most.

A token is worth the time that one takes now. A tree that spends less than that on each expected token, row by row and pass by pass, has the
highest ratio of expected tokens to time (Dinkelbach's method for fractional programs, 1967).
"""

from __future__ import annotations

import numpy as np

from wager.serve.speculate.hardware_profile import HardwareProfile

MEMORY = 1 - 1 / 256  # of steps, a step later
SCATTER = 0.1  # of real steps, as part of a plain one
TRUST = np.array(
    [1.0, 0.1]
)  # how far off the profile may be, for a step and per row of a request: parts of a plain step
HICCUP = 2.0  # times the usual that a draft pass counts for at most
SOLVE_EVERY = 8  # steps, after the first ones
RATE_WEIGHT = 0.05  # of a new step in running averages


class StepPrice:
    """Prices of one batch size; times in milliseconds, rows of all requests together. like: a batch size whose steps are known; it is
    believed to be as far off its profile as that one."""

    def __init__(self, profile: HardwareProfile, batch: int, like: StepPrice | None = None):
        self.profile, self.batch = profile, batch
        self.plain_ms = profile.target_ms(batch, 1)
        self.pass_ms = profile.draft_ms(batch, 1)  # of one more level of the trees
        if like is not None:
            self.pass_ms *= like.pass_ms / like.profile.draft_ms(like.batch, 1)
        self.per_drafted_row_ms = max(0.0, profile.draft_ms(batch, 2) - profile.draft_ms(batch, 1)) / batch
        self.rows = 3.0 * batch  # of a step, running average
        self._ridge = np.diag((SCATTER / TRUST) ** 2)
        self._products, self._moments = np.zeros((2, 2)), np.zeros(2)
        self._start = np.zeros(2) if like is None else np.array([like._off[0], like._off[1] * batch / like.batch])
        self._off = self._start.tolist()
        self._timed = 0
        self._steps, self._tokens, self._ms = 0, float(batch), self.plain_ms
        self._slopes: dict[int, float] = {}

    @property
    def rate(self) -> float:
        """Tokens per millisecond of the latest steps, as expected."""
        return self._tokens / self._ms

    @property
    def usual_ms(self) -> float:
        """Of the latest steps, as expected."""
        return self._ms

    def step_ms(self, rows: float, passes: int) -> float:
        profiled = self._profiled(rows, passes)
        off, per_row = self._off
        return max(profiled + off + per_row * rows / self.batch, 0.1 * profiled)

    def row_ms(self, rows: float) -> float:
        """One more row of the target where there are so many: the slope over a quarter of them to both sides."""
        key = max(1, round(rows))
        if key not in self._slopes:
            reach, size = max(1.0, key / 4), self.profile.target_ms
            low = max(float(self.batch), key - reach)
            self._slopes[key] = (size(self.batch, (key + reach) / self.batch) - size(self.batch, low / self.batch)) / (key + reach - low)  # fmt: skip
        return max(0.0, self._slopes[key] + self._off[1] / self.batch)

    def grown(self, rows: int, passes: int, tokens: float) -> None:
        """A step over so many rows was put together; it is expected to bring so many tokens."""
        self._steps += 1
        weight = max(RATE_WEIGHT, 1 / (self._steps + 1))
        self.rows += weight * (rows - self.rows)
        self._tokens += weight * (tokens - self._tokens)
        self._ms += weight * (self.step_ms(rows, passes) - self._ms)

    def drafted(self, passes: int, took_ms: float) -> None:
        """So many draft passes after the first, and filling in their nodes, took so long."""
        self.pass_ms += RATE_WEIGHT * (min(took_ms / passes, HICCUP * self.pass_ms) - self.pass_ms)

    def timed(self, rows: int, passes: int, step_ms: float) -> None:
        """Such a step took so long. What is beyond twice the expected time may be a hiccup and weighs less, the more the longer."""
        expected = self.step_ms(rows, passes)
        x = np.array([1.0, rows / self.batch])
        off_ms = step_ms - self._profiled(rows, passes) - self._start @ x
        weight = min(1.0, (expected / max(step_ms - expected, 1e-9)) ** 2)
        self._products = MEMORY * self._products + weight * np.outer(x, x)
        self._moments = MEMORY * self._moments + weight * x * off_ms
        self._timed += 1
        if self._timed <= SOLVE_EVERY or self._timed % SOLVE_EVERY == 0:
            self._off = (self._start + np.linalg.solve(self._products + self._ridge, self._moments)).tolist()

    def _profiled(self, rows: float, passes: int) -> float:
        return self.profile.target_ms(self.batch, rows / self.batch) + passes * self.pass_ms + self.profile.overhead
