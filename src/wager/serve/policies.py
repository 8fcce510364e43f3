"""The protocols behind which policies live. A policy knows requests and tokens, never tensors of the engine, so that the simulator can
run the very same object under a virtual clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from wager.serve.request import Request


@dataclass(frozen=True)
class ScheduledSpan:
    """`num_tokens` committed tokens of `request` to compute now, from `request.num_computed_tokens` on, and room (KV slots and token
    budget) for `num_draft_tokens` guesses after them. Only a span that reaches the last committed token has room for guesses."""

    request: Request
    num_tokens: int
    num_draft_tokens: int = 0


@dataclass
class StepPlan:
    """Decision for one step. `failed` requests can never run (reason given) and have left the queues."""

    spans: list[ScheduledSpan] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    failed: list[tuple[Request, str]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens + s.num_draft_tokens for s in self.spans)


class Scheduler(Protocol):
    """Owns the queues and asks the block manager for room. Every live request is in exactly one queue."""

    def add(self, request: Request) -> None: ...

    def remove(self, request: Request) -> None:
        """Take a request out of every queue and free its blocks; used for finish and abort alike. Unknown requests are ignored."""
        ...

    def next_batch(self, now_s: float, draft_tokens: int = 0) -> StepPlan:
        """Choose this step's spans. Decode requests get room for up to `draft_tokens` guesses while the budget lasts."""
        ...

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...
