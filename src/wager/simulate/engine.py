"""Runs the serving engine's own scheduler and block manager under a virtual clock: the same objects, no model.

The caller hands over the scheduler and its requests; a step takes as long as the price says. The engine loop is imitated: what arrived
before a step began may enter it, a request whose last committed token was computed gets one token more, and ends at its length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from wager.errors import WagerError
from wager.simulate.timeline import Record, Timeline

Price = Callable[[int, int, int], float]
FILLER_TOKEN = 1


def run_engine(
    scheduler: Any, requests: Sequence[Any], price_ms: Price, between_steps_s: float = 0.0, until_s: float | None = None
) -> Timeline:
    """Serve `requests` (the engine's own, with `arrival_s`, `max_total_tokens`) and return their timeline.

    price_ms(batch tokens, cached tokens attended to, spans) is the cost of a step, e.g. `StepCost.predict`; between_steps_s is added for
    what the loop does outside of steps. Requests end only at their length. Raises WagerError when the scheduler can never run one.
    """
    records = {
        r.id: Record(i, r.arrival_s, r.num_prompt_tokens, r.max_total_tokens - r.num_prompt_tokens)
        for i, r in enumerate(requests)
    }
    coming = sorted(requests, key=lambda r: r.arrival_s)[::-1]
    now_s, busy, steps = 0.0, [], 0
    while coming or scheduler.num_running or scheduler.num_waiting:
        while coming and coming[-1].arrival_s <= now_s:
            scheduler.add(coming.pop())
        if until_s is not None and now_s >= until_s:
            break
        plan = scheduler.next_batch(now_s)
        if plan.failed:
            raise WagerError(f"request {plan.failed[0][0].id} can never run: {plan.failed[0][1]}")
        if not plan.spans:
            if not coming:
                raise WagerError("the scheduler has requests but schedules none of them")
            now_s = coming[-1].arrival_s
            continue
        context = sum(s.request.num_computed_tokens for s in plan.spans)
        seconds = price_ms(plan.num_tokens, context, len(plan.spans)) / 1e3
        if not seconds > 0:
            raise WagerError(f"the price of a step of {plan.num_tokens} tokens is {seconds} s; a step takes time")
        begun, now_s = now_s, now_s + seconds
        busy.append((begun, now_s, len(plan.spans)))
        steps += 1
        for span in plan.spans:
            _advance(scheduler, span, records[span.request.id], now_s)
        now_s += between_steps_s
    return Timeline(
        list(records.values()), now_s, {"engine": busy}, {"engine": sum(e - b for b, e, _ in busy)}, {"engine": now_s},
        {"engine": 0.0}, 0.0, steps, steps,
    )  # fmt: skip


def _advance(scheduler: Any, span: Any, record: Record, now_s: float) -> None:
    """What the engine's commit does to a request, without tokens that mean anything."""
    request = span.request
    if record.admitted_s is None:
        record.admitted_s = now_s
    computed = request.num_computed_tokens + span.num_tokens
    generates = computed == request.num_tokens
    if generates:
        request.token_ids.append(FILLER_TOKEN)
        record.token_s.append(now_s)
    request.num_computed_tokens = computed
    scheduler.blocks.commit(request.id, request.token_ids, computed)
    if generates and request.num_tokens >= request.max_total_tokens:
        request.finish("length")
        scheduler.remove(request)
