"""Switches drafting off where it does not pay, by measurement, per batch size and per request, and back on when it pays again.

The engine's own steps are the experiment. For each batch size (in powers of two) two running averages are kept: milliseconds per step
with and without drafts, and with drafts the tokens a request gains per step. A token is worth what it costs without drafts, so drafting
pays a request while

    accepted guesses of the request x plain milliseconds per token  >  extra milliseconds of a drafted step per drafting request.

Both arms are tried from time to time; a trial that changes nothing doubles the wait until the next, up to MAX_WAIT steps, and what a
trial lost (catching up with long texts may cost more than the guesses are worth) must be no more than REGRET of the time until the next.
Steps with prompt tokens are not measured: they say nothing about decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

FIRST_WAIT = 16
MAX_WAIT = 512
REGRET, LONGEST_WAIT = 0.01, 16_384
MOST_LOST = 25  # plain steps that one step counts for at most: a hiccup of the machine is not the trial's fault
TRIAL_STEPS = 3  # a trial; its first step is not measured, caches and catching up disturb it
WEIGHT = 0.15  # of a new measurement in a running average
REQUEST_WEIGHT = 0.25


@dataclass
class Average:
    """A running average that starts with the plain mean of its first values."""

    value: float = 0.0
    count: int = 0

    def add(self, x: float, weight: float = WEIGHT) -> None:
        self.count += 1
        self.value += max(weight, 1 / self.count) * (x - self.value)


@dataclass
class BatchArm:
    """What is known about one batch size. wait: steps until the losing arm is tried again."""

    plain_ms: Average = field(default_factory=Average)
    drafted_ms: Average = field(default_factory=Average)
    accepted: Average = field(default_factory=Average)
    drafting: Average = field(default_factory=Average)
    wait: int = FIRST_WAIT
    since: int = 0
    trial: int = 0
    ending: bool = False  # its last step is out
    lost_ms: float = 0.0  # by it, so far

    def pays(self, batch: int) -> bool:
        """Whether drafting wins at this batch size, as far as is known; unknown counts as yes."""
        if not self.plain_ms.count or not self.drafted_ms.count:
            return True
        worth = self.accepted.value * self.plain_ms.value / batch
        return worth * self.drafting.value > self.drafted_ms.value - self.plain_ms.value

    def loss_ms(self, batch: int, step_ms: float, accepted: int) -> float:
        """What a step with so many accepted guesses, over all requests, took beyond the better arm's time for as many tokens."""
        if not self.plain_ms.count:
            return 0.0
        per_token = self.plain_ms.value
        if self.drafted_ms.count and self.pays(batch):
            per_token = self.drafted_ms.value / (1 + self.accepted.value * self.drafting.value / batch)
        return min(step_ms - per_token * (1 + accepted / batch), MOST_LOST * self.plain_ms.value)

    def end_trial(self) -> None:
        """Decide when the next trial begins."""
        self.since = 0
        self.wait = min(MAX_WAIT, 2 * self.wait)
        if self.plain_ms.count:
            earned_back = self.lost_ms / (REGRET * self.plain_ms.value)
            self.wait = min(LONGEST_WAIT, max(self.wait, round(earned_back)))
        self.lost_ms = 0.0

    def extra_per_request_ms(self) -> float:
        if not self.plain_ms.count or not self.drafted_ms.count:
            return 0.0
        return max(0.0, self.drafted_ms.value - self.plain_ms.value) / max(1.0, self.drafting.value)


@dataclass
class _Request:
    accepted: Average = field(default_factory=Average)
    idle: int = 0
    wait: int = FIRST_WAIT


class Gate:
    """Decides per step (`open_for`) and per request (`admits`), and learns from `measured`."""

    def __init__(self):
        self.arms: dict[int, BatchArm] = {}
        self.requests: dict[str, _Request] = {}
        self._trying = False  # this step drafts to learn, so every request does

    def arm(self, batch: int) -> BatchArm:
        return self.arms.setdefault(max(batch, 1).bit_length(), BatchArm())

    def open_for(self, batch: int) -> bool:
        """Whether this step drafts."""
        batch = max(batch, 1)
        arm = self.arm(batch)
        better = arm.pays(batch)
        self._trying = bool(arm.trial) and not better
        if arm.trial:
            arm.trial -= 1
            arm.ending = not arm.trial
            return not better
        if arm.ending:  # the trial's last step has been measured
            arm.ending = False
            arm.end_trial()
        arm.since += 1
        if arm.since >= arm.wait:
            arm.trial = TRIAL_STEPS
        return better

    def admits(self, request_id: str, batch: int) -> bool:
        """Whether this request drafts in a step that does."""
        arm, own = self.arm(batch), self.requests.setdefault(request_id, _Request())
        if self._trying or not own.accepted.count or not arm.plain_ms.count:
            return True
        if own.accepted.value * arm.plain_ms.value / batch > arm.extra_per_request_ms():
            own.wait, own.idle = FIRST_WAIT, 0
            return True
        own.idle += 1
        if own.idle >= own.wait:
            own.idle, own.wait = 0, min(MAX_WAIT, 2 * own.wait)
            return True
        return False

    def measured(self, batch: int, step_ms: float, accepted: Sequence[tuple[str, int]], drafted: bool) -> None:
        """A step without prompt tokens took `step_ms`; `accepted` lists the requests that drafted and their accepted guesses."""
        arm = self.arm(batch)
        for request_id, count in accepted:
            self.requests.setdefault(request_id, _Request()).accepted.add(count, REQUEST_WEIGHT)
        if arm.trial or arm.ending:
            arm.lost_ms += arm.loss_ms(batch, step_ms, sum(count for _, count in accepted))
        if arm.trial == TRIAL_STEPS - 1 and arm.drafted_ms.count and arm.plain_ms.count:
            return
        before = arm.pays(batch)
        if drafted:
            arm.drafted_ms.add(step_ms)
            arm.drafting.add(len(accepted))
            arm.accepted.add(sum(count for _, count in accepted) / max(1, len(accepted)))
        else:
            arm.plain_ms.add(step_ms)
        if arm.pays(batch) != before:
            arm.wait, arm.since, arm.trial, arm.ending, arm.lost_ms = FIRST_WAIT, 0, 0, False, 0.0

    def forget(self, request_id: str) -> None:
        self.requests.pop(request_id, None)
