"""What comes back from a generation. Field names follow vLLM's RequestOutput."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Logprob:
    """log p of a token, its rank in the vocabulary (1 is the most likely), and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]


@dataclass
class CompletionOutput:
    """One of the n continuations of a prompt. finish_reason: stop, length, abort, error, or None while running."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Times of one request in seconds of the monotonic clock; None before the event."""

    arrival_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    finished_s: float | None = None
    num_preemptions: int = 0


@dataclass
class RequestOutput:
    """The state of one request as its caller sees it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    error: str | None = None


@dataclass
class EmbeddingOutput:
    """One embedded text: `embedding` is float32 [D], L2-normalised unless asked otherwise."""

    request_id: str
    prompt_token_ids: list[int]
    embedding: np.ndarray
    extra: dict = field(default_factory=dict)
