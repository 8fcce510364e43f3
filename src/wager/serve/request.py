"""One sequence being generated. n > 1 is n requests that share their prompt's KV blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from wager.serve.outputs import RequestMetrics
from wager.serve.params import SamplingParams

if TYPE_CHECKING:
    from wager.serve.sampling.thinking import ThinkingBudget


class Status(Enum):
    WAITING = "waiting"  # in the queue; holds no blocks
    BLOCKED = (
        "blocked"  # waits for a grammar, an adapter or the sibling whose prompt it shares; does not hold up others
    )
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """The scheduler's view of a generation: which tokens exist and how many of them have their KV in the cache.

    Attributes:
        id: unique among live requests.
        generation_id: the call this request belongs to; its n requests share it. Empty: the request's own id.
        token_ids: prompt followed by the committed output.
        num_computed_tokens: leading tokens whose KV is valid. A running decode request has exactly one token beyond it.
        priority: lower runs first under the priority policy.
        adapter: name of the LoRA adapter, None for the base model.
        adapter_version: which loading of the adapter it runs with (0: the base model).
        cache_salt: requests share cached prefixes only within one salt and one adapter.
        max_total_tokens: the request ends when prompt plus output reach this (from max_tokens and the model's limit).
        index: which of the n continuations of its prompt this is.
        shares_prompt_with: the sibling (n > 1) whose prompt blocks this request forks once they are computed.
        pooling: "mean" or "last" for an embedding request, which ends when its prompt is computed; None generates.
        thinking: counts the tokens of its thoughts where the caller bounded them.
    """

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_s: float
    max_total_tokens: int
    generation_id: str = ""
    priority: int = 0
    adapter: str | None = None
    adapter_version: int = 0
    cache_salt: str | None = None
    eos_token_ids: frozenset[int] = frozenset()
    index: int = 0
    shares_prompt_with: Request | None = None
    pooling: str | None = None
    thinking: ThinkingBudget | None = None
    status: Status = Status.WAITING
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] = field(init=False)
    metrics: RequestMetrics = field(init=False)

    def __post_init__(self):
        self.token_ids = list(self.prompt_token_ids)
        self.generation_id = self.generation_id or self.id
        self.metrics = RequestMetrics(self.arrival_s)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_token_ids) :]

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def cache_key(self) -> tuple[int, str | None]:
        """What besides the tokens must agree for two requests to share KV blocks.

        A request that wants something of every prompt position (logprobs, a pooled embedding) must compute them all: it shares with
        nobody but itself, so that it still resumes from its own blocks after a preemption.
        """
        if self.needs_every_prompt_row:
            return self.adapter_version, f"{self.cache_salt}/{self.id}"
        return self.adapter_version, self.cache_salt

    @property
    def needs_every_prompt_row(self) -> bool:
        return self.params.prompt_logprobs is not None or self.pooling is not None

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        self.status = Status.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason
