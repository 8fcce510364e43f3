"""Continuous batching with chunked prefill: every step mixes decode tokens and prompt chunks under one token budget.

No phases: a request has tokens whose KV is computed and tokens whose KV is not; a step computes some of the latter. Running requests come
first, in order; waiting ones enter while budget and blocks last. When blocks run out the last running request is preempted: it gives up
its blocks and later computes them again, mostly from the prefix cache. (Orca, OSDI 2022; Sarathi-Serve, arXiv 2403.02310.)
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from wager.errors import UsageError
from wager.serve.cache.block_manager import BlockManager
from wager.serve.config import POLICIES
from wager.serve.policies import ScheduledSpan, StepPlan
from wager.serve.request import Request, Status

LOOK_AHEAD = 32  # waiting requests the longest-prefix policy looks at in a step


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step.

    max_num_batched_tokens: tokens. long_prefill_threshold: most prompt tokens of one request, 0 is no limit. watermark: share of
    the blocks to keep free when admitting beside running requests. max_wait_s: after this long in the queue, arrival order beats any policy.
    """

    max_num_seqs: int = 128
    max_num_batched_tokens: int = 512
    long_prefill_threshold: int = 0
    policy: str = "fcfs"
    watermark: float = 0.01
    max_wait_s: float = 30.0

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise UsageError(f"scheduling policy {self.policy!r} is unknown; use one of {', '.join(POLICIES)}")


class ContinuousScheduler:
    """See the module's docstring. The runner reports progress by setting `request.num_computed_tokens` and appending tokens."""

    def __init__(self, config: SchedulerConfig, blocks: BlockManager):
        self.config, self.blocks = config, blocks
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def unblock(self, request: Request) -> None:
        """What the request waited for (a grammar, an adapter) is there."""
        if request.status is Status.BLOCKED:
            request.status = Status.WAITING

    def remove(self, request: Request) -> None:
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        self.blocks.free(request.id)

    def next_batch(self, now_s: float, draft_tokens: int = 0) -> StepPlan:
        plan = StepPlan()
        if self.config.policy in ORDERS:
            self.running.sort(key=ORDERS[self.config.policy])
        budget = self._continue_running(plan, draft_tokens)
        if not plan.preempted:
            self._admit(plan, budget, now_s)
        return plan

    # -- running requests --------------------------------------------------------------------------------------------------------

    def _continue_running(self, plan: StepPlan, draft_tokens: int) -> int:
        """Give each running request its share, preempting from the end when blocks are short; returns the budget left."""
        budget = self.config.max_num_batched_tokens
        index = 0
        draft_tokens = min(draft_tokens, self._room_for_drafts(budget)) if draft_tokens else 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            tokens = self._share(request, budget)
            decodes = request.num_computed_tokens + tokens == request.num_tokens > request.num_prompt_tokens
            drafts = min(draft_tokens, budget - tokens) if decodes else 0
            if self.blocks.reserve(request.id, request.num_computed_tokens + tokens + drafts):
                pass
            elif drafts and self.blocks.reserve(request.id, request.num_computed_tokens + tokens):
                drafts = 0
            else:
                self._make_room(plan, request)
                continue  # the same request again, unless it was itself the victim
            plan.spans.append(ScheduledSpan(request, tokens, drafts))
            budget -= tokens + drafts
            index += 1
        return budget

    def _room_for_drafts(self, budget: int) -> int:
        """Guesses per request such that every running request still gets the tokens it needs."""
        needed = sum(self._share(request, budget) for request in self.running)
        return max(0, budget - needed) // max(1, len(self.running))

    def _share(self, request: Request, budget: int) -> int:
        tokens = min(request.num_uncomputed_tokens, budget)
        threshold = self.config.long_prefill_threshold
        return min(tokens, threshold) if threshold else tokens

    def _make_room(self, plan: StepPlan, request: Request) -> None:
        """Preempt the last running request; when that is the only one, it can never fit."""
        if len(self.running) == 1:
            self._fail(plan, request)
            return
        victim = self.running.pop()
        self.blocks.free(victim.id)
        victim.status = Status.WAITING
        victim.num_computed_tokens = 0
        victim.metrics.num_preemptions += 1
        self.waiting.appendleft(victim)
        plan.preempted.append(victim)

    def _fail(self, plan: StepPlan, request: Request) -> None:
        capacity = self.blocks.num_blocks * self.blocks.block_size
        self.remove(request)
        reason = (
            f"the KV cache holds {capacity} tokens, too few for this request of {request.num_tokens} tokens so far; "
            "raise kv_cache_memory or shorten the request"
        )
        plan.failed.append((request, reason))

    # -- waiting requests --------------------------------------------------------------------------------------------------------

    def _admit(self, plan: StepPlan, budget: int, now_s: float) -> None:
        for request in self._candidates(now_s):
            if budget <= 0 or len(self.running) >= self.config.max_num_seqs:
                return
            if not self._open(request):
                continue
            tokens = self._share(request, budget)
            if not self._fits(request, tokens):
                self.blocks.free(request.id)
                request.num_computed_tokens = 0
                if self.running:
                    return
                self._fail(plan, request)
                continue
            self.waiting.remove(request)
            self.running.append(request)
            request.status = Status.RUNNING
            if request.metrics.first_scheduled_s is None:
                request.metrics.first_scheduled_s = now_s
                request.num_cached_tokens = request.num_computed_tokens
            plan.spans.append(ScheduledSpan(request, tokens))
            budget -= tokens

    def _candidates(self, now_s: float) -> list[Request]:
        """Waiting requests in the order the policy wants them; those that waited too long come first."""
        ready = [r for r in self.waiting if r.status is Status.WAITING]
        if self.config.policy == "fcfs" or not ready:
            return ready
        late = [r for r in ready if now_s - r.arrival_s > self.config.max_wait_s]
        rest = [r for r in ready if now_s - r.arrival_s <= self.config.max_wait_s]
        if self.config.policy in ORDERS:
            return sorted(late, key=lambda r: r.arrival_s) + sorted(rest, key=ORDERS[self.config.policy])
        near, far = rest[:LOOK_AHEAD], rest[LOOK_AHEAD:]
        near.sort(key=lambda r: -self.blocks.match(r.token_ids, r.cache_key))
        return late + near + far

    def _open(self, request: Request) -> bool:
        """Start the request's block table on cached blocks, or on its sibling's; False when it must wait for the sibling."""
        sibling = request.shares_prompt_with
        if sibling is not None:
            computed = sibling.status is Status.RUNNING and sibling.num_computed_tokens >= sibling.num_prompt_tokens
            if computed and self.blocks.can_resume(sibling.id, request.num_prompt_tokens - 1):
                request.num_computed_tokens = request.num_prompt_tokens - 1
                self.blocks.fork(sibling.id, request.id, request.num_computed_tokens)
                request.shares_prompt_with = None
                return True
            if not (computed or sibling.finished or sibling.metrics.num_preemptions):
                return False
            request.shares_prompt_with = None
        request.num_computed_tokens = self.blocks.start(request.id, request.token_ids, request.cache_key)
        return True

    def _fits(self, request: Request, tokens: int) -> bool:
        if not self.blocks.reserve(request.id, request.num_computed_tokens + tokens):
            return False
        return not self.running or self.blocks.num_free_blocks >= self.config.watermark * self.blocks.num_blocks


def _by_priority(request: Request) -> tuple[int, float]:
    return request.priority, request.arrival_s


def _by_deadline(request: Request) -> tuple[float, float]:
    """Requests without a deadline come after those that have one, in order of arrival."""
    due_ms = math.inf if request.params.deadline_ms is None else request.params.deadline_ms
    return request.arrival_s + due_ms / 1e3, request.arrival_s


ORDERS = {"priority": _by_priority, "deadline": _by_deadline}
