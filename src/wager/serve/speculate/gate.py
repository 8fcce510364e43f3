"""Switches drafting off where it does not pay, by measurement, per batch size and per request, and back on when it pays again.

The engine's own steps are the experiment. For each batch size (in powers of two) running averages are kept: milliseconds per step with
and without drafts, and with drafts the tokens a request gains per step. A token is worth what it costs without drafts, so drafting pays
a batch while

    accepted guesses of all its requests x plain milliseconds per token  >  extra milliseconds of a drafted step.

A batch size that was never seen is judged by its neighbours: drafting that does not pay at a smaller batch does not pay at a larger one.
Both arms are tried a few steps at first and from time to time; a trial that changes nothing doubles the wait until the next, up to
MAX_WAIT steps, and what a trial lost (catching up with long texts may cost more than the guesses are worth) must be no more than REGRET
of the time until the next. A request is left out while its own guesses, believed as far as there are enough of them, are not worth what one more drafting request
costs. Steps with prompt tokens say nothing about decoding, and the times of a step in which a request drafts for the first time in a
while say how long catching up takes: neither is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

FIRST_WAIT = 16
MAX_WAIT = 512
REGRET, LONGEST_WAIT = 0.01, 16_384
MOST_LOST = 25  # plain steps that one step counts for at most: a hiccup of the machine is not the trial's fault
HICCUP = 2.0  # times the average that a step's time counts for at most
TRIAL_STEPS = 3  # of a trial; its first step is not measured, caches and catching up disturb it
LOOK_STEPS = 5  # of each arm at first
DOUBT = 4  # measurements that a trial leaves of what was known of the losing arm: what it finds counts
TIME_WEIGHT = 0.1  # of a new measurement in a running average
GAIN_WEIGHT = 0.05  # of a step's accepted guesses: they vary more than times
WORTHWHILE = 0.05  # more tokens per second that drafting must bring to be switched on; it stays on until it brings none. Near break-even
# it is not worth its trouble: guesses that only some requests get right part them, and the last finish in a small batch
BELIEF = 8  # steps of a request that weigh as much as what is known of the others
MEMORY = 24  # of its last steps count
MARGINAL = 0.5  # of the extra time per drafting request that one more request costs


@dataclass
class Average:
    """A running average that starts with the plain mean of its first values."""

    value: float = 0.0
    count: int = 0

    def add(self, x: float, weight: float = TIME_WEIGHT) -> None:
        self.count += 1
        self.value += max(weight, 1 / self.count) * (x - self.value)

    def doubt(self) -> None:
        self.count = min(self.count, DOUBT)

    def add_time(self, x: float) -> None:
        self.add(min(x, HICCUP * self.value) if self.count > 1 else x)


@dataclass
class BatchArm:
    """What is known about one batch size. wait: steps until the losing arm is tried again."""

    plain_ms: Average = field(default_factory=Average)
    drafted_ms: Average = field(default_factory=Average)
    accepted: Average = field(default_factory=Average)
    drafting: Average = field(default_factory=Average)
    drafts: bool = False  # the choice, once both arms were seen
    wait: int = FIRST_WAIT
    since: int = 0
    trial: int = 0
    ending: bool = False  # its last step is out
    lost_ms: float = 0.0  # by it, so far
    explored: int = 0  # steps of the first look at both arms

    @property
    def known(self) -> bool:
        return bool(self.plain_ms.count and self.drafted_ms.count)

    def gain_ms(self, batch: int) -> float:
        """What the guesses of a drafted step save, less what it takes beyond a plain one; 0 while unknown."""
        if not self.known:
            return 0.0
        worth = self.accepted.value * self.drafting.value * self.plain_ms.value / batch
        return worth - (self.drafted_ms.value - self.plain_ms.value)

    def decide(self, batch: int) -> bool:
        """Choose anew; whether that changed the choice."""
        before, least_ms = self.drafts, 0.0 if self.drafts else WORTHWHILE * self.drafted_ms.value
        self.drafts = self.gain_ms(batch) > least_ms
        return self.drafts != before

    def loss_ms(self, batch: int, step_ms: float, accepted: int) -> float:
        """What a step with so many accepted guesses, over all requests, took beyond the better arm's time for as many tokens."""
        if not self.plain_ms.count:
            return 0.0
        per_token = self.plain_ms.value
        if self.known and self.drafts:
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
        if not self.known:
            return 0.0
        return max(0.0, self.drafted_ms.value - self.plain_ms.value) / max(1.0, self.drafting.value)


@dataclass
class _Request:
    steps: float = 0.0
    accepted: float = 0.0
    idle: int = 0
    wait: int = FIRST_WAIT

    def add(self, count: int) -> None:
        keep = min(1.0, MEMORY / (self.steps + 1))
        self.steps, self.accepted = keep * (self.steps + 1), keep * (self.accepted + count)

    def believed(self, usual: float) -> float:
        """Accepted guesses per step to expect, when those of all requests are `usual`."""
        return (self.accepted + BELIEF * usual) / (self.steps + BELIEF)


class Gate:
    """Decides per step (`open_for`) and per request (`admits`), and learns from `measured`."""

    def __init__(self):
        self.arms: dict[int, BatchArm] = {}
        self.requests: dict[str, _Request] = {}
        self._trying = False  # this step drafts to learn, so every request does
        self._admitted: set[str] = set()
        self._admitted_before: set[str] = set()

    def arm(self, batch: int) -> BatchArm:
        return self.arms.setdefault(max(batch, 1).bit_length(), BatchArm())

    def open_for(self, batch: int) -> bool:
        """Whether this step drafts."""
        arm = self.arm(batch)
        self._admitted, self._admitted_before = set(), self._admitted
        if not arm.known:
            return self._first_look(arm, batch)
        better = arm.drafts
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
            for average in (arm.plain_ms,) if better else (arm.drafted_ms, arm.drafting, arm.accepted):
                average.doubt()
        return better

    def _first_look(self, arm: BatchArm, batch: int) -> bool:
        """Some drafted steps and some without, in turns; where neighbours say that drafting loses, it waits as a trial would."""
        number = max(batch, 1).bit_length()
        arm.explored += 1
        if any(n < number and a.known and not a.drafts for n, a in self.arms.items()) and arm.explored <= FIRST_WAIT:
            self._trying = False
            return False
        self._trying = (arm.explored - 1) // LOOK_STEPS % 2 == 0
        return self._trying

    def admits(self, request_id: str, batch: int) -> bool:
        """Whether this request drafts in a step that does."""
        admitted = self._admits(self.arm(batch), request_id, batch)
        if admitted:
            self._admitted.add(request_id)
        return admitted

    def _admits(self, arm: BatchArm, request_id: str, batch: int) -> bool:
        own = self.requests.setdefault(request_id, _Request())
        if self._trying or not arm.known:
            return True
        worth = own.believed(arm.accepted.value) * arm.plain_ms.value / batch
        if worth > MARGINAL * arm.extra_per_request_ms():
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
        steady = self._admitted <= self._admitted_before if drafted else not self._admitted_before
        for request_id, count in accepted:
            self.requests.setdefault(request_id, _Request()).add(count)
        if arm.trial or arm.ending:
            arm.lost_ms += arm.loss_ms(batch, step_ms, sum(count for _, count in accepted))
        if drafted:
            arm.drafting.add(len(accepted))
            arm.accepted.add(sum(count for _, count in accepted) / max(1, len(accepted)), GAIN_WEIGHT)
        if steady:
            (arm.drafted_ms if drafted else arm.plain_ms).add_time(step_ms)
        if arm.known and arm.decide(batch):
            arm.wait, arm.since, arm.trial, arm.ending, arm.lost_ms = max(FIRST_WAIT, arm.wait // 4), 0, 0, False, 0.0

    def forget(self, request_id: str) -> None:
        self.requests.pop(request_id, None)
