"""What the engine tells whoever watches it: the metrics endpoint, the step log, the live panel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from wager.serve.request import Request


@dataclass(frozen=True)
class StepRecord:
    """One engine step. Times in ms; *_total fields are counters since the engine started.

    prefill_tokens, decode_tokens and draft_tokens add up to the batch's tokens; context_tokens is the sum over spans of the cached tokens
    they attend to. accepted_per_position[i] counts drafts whose guess at depth i + 1 was accepted in this step.
    """

    time_s: float
    prefill_tokens: int
    decode_tokens: int
    draft_tokens: int
    context_tokens: int
    num_spans: int
    running: int
    waiting: int
    kv_usage: float
    schedule_ms: float
    forward_ms: float
    sample_ms: float
    output_ms: float
    step_ms: float
    prompt_tokens_total: int
    generation_tokens_total: int
    prefix_queries_total: int
    prefix_hits_total: int
    preemptions_total: int
    host_hits_total: int = 0
    drafts: int = 0
    accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()


class Observer(Protocol):
    """Called on the engine's thread: must be quick and must not raise."""

    def on_step(self, record: StepRecord) -> None: ...

    def on_tokens(self, request: Request, num_new_tokens: int, now_s: float) -> None:
        """Output tokens were committed; request.metrics still holds the time of the ones before."""
        ...

    def on_finished(self, request: Request) -> None: ...
