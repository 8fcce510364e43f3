"""Spreads requests over replicas in proportion to their weights, and looks to the HTTP server like the engine.

Interleaved weighted round robin over tokens, as Helix does it: a request goes to the replica with the smallest (load + its tokens / weight).
A replica whose engine has stopped is passed over. A request stays where its KV is. (Helix: arXiv 2406.01566.)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import fields
from typing import Any

from wager.cluster.deploy.engine import DeployedLLM
from wager.errors import CapacityError, UsageError
from wager.serve.llm import EngineStats, Prompt
from wager.serve.outputs import EmbeddingOutput, RequestOutput
from wager.serve.params import SamplingParams

ASSUMED_OUTPUT_TOKENS = 128  # of a request that sets no limit


class WeightedChoice:
    """IWRR: `take(tokens, open)` names the member that gets the next piece of work; shares converge to the weights."""

    def __init__(self, weights: Sequence[float]):
        if not weights or min(weights) <= 0:
            raise UsageError(f"weights must be positive, got {list(weights)}")
        self.weights, self.load = list(weights), [0.0] * len(weights)

    def take(self, tokens: int, open_: Sequence[bool]) -> int | None:
        able = [i for i, o in enumerate(open_) if o]
        if not able:
            return None
        chosen = min(able, key=lambda i: (self.load[i] + tokens / self.weights[i], i))
        self.load[chosen] += tokens / self.weights[chosen]
        return chosen


class RoutedLLM:
    """The face of AsyncLLM over several. What describes the model is read from the first: all replicas serve the same one."""

    def __init__(self, replicas: Sequence[DeployedLLM], weights: Sequence[float]):
        self.replicas = list(replicas)
        self.choice = WeightedChoice(weights)
        first = self.replicas[0]
        self.engine, self.frontend, self.served_name = first.engine, first.frontend, first.served_name
        self.max_model_len, self.tokenizer = first.max_model_len, first.tokenizer
        self.generation_defaults = first.generation_defaults

    async def generate(
        self, prompt: Prompt, params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        count = len(prompt) if isinstance(prompt, list) else len(prompt) // 4 + 1
        wanted = ASSUMED_OUTPUT_TOKENS if params.max_tokens is None else params.max_tokens
        chosen = self._choose(count + wanted * params.n)
        async with aclosing(chosen.generate(prompt, params, request_id, **options)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                yield output

    async def embed(self, prompt: Prompt, request_id: str, *, adapter: str | None = None) -> EmbeddingOutput:
        count = len(prompt) if isinstance(prompt, list) else len(prompt) // 4 + 1
        return await self._choose(count).embed(prompt, request_id, adapter=adapter)

    def _choose(self, tokens: int) -> DeployedLLM:
        number = self.choice.take(tokens, [r.alive for r in self.replicas])
        if number is None:
            raise CapacityError("no replica is running; retry later", retry_after_s=5.0)
        return self.replicas[number]

    async def abort(self, request_id: str) -> None:
        await asyncio.gather(*(r.abort(request_id) for r in self.replicas))

    @property
    def adapters(self) -> dict[str, str]:
        return {}

    async def load_adapter(self, name: str, path: str) -> None:
        raise UsageError(f"adapter {name!r}: a deployed pipeline serves no adapters", param="lora_name")

    async def unload_adapter(self, name: str) -> None:
        raise UsageError(f"adapter {name!r} is not loaded", param="lora_name", code="model_not_found")

    async def reset_prefix_cache(self) -> bool:
        return all(await asyncio.gather(*(r.reset_prefix_cache() for r in self.replicas)))

    def stats(self) -> EngineStats:
        """Sums over the replicas; the fullest KV cache."""
        each = [r.stats() for r in self.replicas]
        return EngineStats(
            **{
                f.name: (max if f.name == "kv_usage" else sum)(getattr(s, f.name) for s in each)
                for f in fields(EngineStats)
            }
        )

    @property
    def alive(self) -> bool:
        return any(r.alive for r in self.replicas)

    async def shutdown(self, drain_s: float = 0.0) -> None:
        await asyncio.gather(*(r.shutdown(drain_s) for r in self.replicas))
