"""Validates what callers ask and makes requests of it; shared by LLM, AsyncLLM and through them the HTTP server."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from wager.errors import UsageError
from wager.serve.build import Engine
from wager.serve.generation import Generation
from wager.serve.lora import load_adapter
from wager.serve.params import OutputKind, SamplingParams
from wager.serve.request import Request
from wager.serve.sampling.thinking import ThinkingBudget

MAX_N = 256
EMBED_PARAMS = SamplingParams(max_tokens=0, output_kind=OutputKind.FINAL_ONLY)

Prompt = str | list[int]


class Frontend:
    """Turns (prompt, params) into a Generation and hands its requests to the core."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.generations: dict[str, Generation] = {}

    def tokenize(self, prompt: Prompt, truncate: int | None = None) -> tuple[str | None, list[int]]:
        """(text, token ids) of a prompt. Raises UsageError for ids outside the vocabulary or text without a tokenizer."""
        tokenizer = self.engine.tokenizer
        if isinstance(prompt, str):
            if tokenizer is None:
                raise UsageError(
                    "a text prompt needs a tokenizer: pass token ids or drop skip_tokenizer_init", param="prompt"
                )
            text, token_ids = prompt, tokenizer.encode(prompt)
        else:
            text, token_ids = None, list(prompt)
            vocab = self.engine.vocab_size
            wrong = next((t for t in token_ids if not 0 <= t < vocab), None)
            if wrong is not None:
                raise UsageError(f"token id {wrong} is outside the vocabulary of {vocab} tokens", param="prompt")
        token_ids = token_ids[-truncate:] if truncate else token_ids
        if not token_ids:
            raise UsageError("the prompt has no tokens; give at least one", param="prompt")
        return text, token_ids

    def make(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        adapter: str | None = None,
        cache_salt: str | None = None,
        pooling: str | None = None,
    ) -> Generation:
        """Validate against the model's limits and build the n requests. Touches no engine state."""
        if params.n > MAX_N:
            raise UsageError(f"n must be at most {MAX_N}, got {params.n}", param="n")
        version = self._adapter_version(adapter)
        self._check_engine_has(params)
        self._check_token_ids(params)
        text, token_ids = self.tokenize(prompt, params.truncate_prompt_tokens)
        limit = self._max_total_tokens(len(token_ids), params, pooling)
        requests: list[Request] = []
        for index in range(params.n):
            requests.append(
                Request(
                    id=request_id if params.n == 1 else f"{request_id}/{index}",
                    prompt_token_ids=token_ids,
                    params=params,
                    arrival_s=time.monotonic(),
                    max_total_tokens=limit,
                    generation_id=request_id,
                    priority=priority,
                    adapter=adapter,
                    adapter_version=version,
                    cache_salt=cache_salt,
                    eos_token_ids=self.engine.eos_token_ids,
                    index=index,
                    shares_prompt_with=requests[0] if index else None,
                    pooling=pooling,
                    thinking=self._thinking_budget(token_ids, params),
                )
            )
        return Generation(request_id, text, requests, self.engine.tokenizer)

    def make_embedding(self, prompt: Prompt, request_id: str, adapter: str | None = None) -> Generation:
        """A request for one vector pooled from the last hidden states."""
        return self.make(prompt, EMBED_PARAMS, request_id, adapter=adapter, pooling=self.engine.config.pooling)

    def _thinking_budget(self, prompt_token_ids: list[int], params: SamplingParams) -> ThinkingBudget | None:
        if params.thinking_token_budget is None:
            return None
        if self.engine.tokenizer is None:
            raise UsageError(
                "thinking_token_budget needs a tokenizer: drop skip_tokenizer_init", param="thinking_token_budget"
            )
        return ThinkingBudget(self.engine.tokenizer, prompt_token_ids, params.thinking_token_budget)

    def _max_total_tokens(self, num_prompt: int, params: SamplingParams, pooling: str | None) -> int:
        longest = self.engine.max_model_len
        wanted = 0 if pooling else params.max_tokens
        generates = wanted is None or wanted > 0
        if num_prompt + (wanted if wanted is not None else 1) > longest:
            asked = f" and {wanted} in the completion" if wanted is not None and generates else ""
            raise UsageError(
                f"This model's maximum context length is {longest} tokens. However, you requested "
                f"{num_prompt + (wanted or 0)} tokens ({num_prompt} in the prompt{asked}). "
                "Shorten the prompt or the completion.",
                param="messages" if not pooling else "input",
                code="context_length_exceeded",
            )
        return longest if wanted is None else num_prompt + wanted

    def _check_engine_has(self, params: SamplingParams) -> None:
        """What the request asks for beyond plain sampling: a grammar compiler, a method of speculation."""
        engine = self.engine
        if params.structured_outputs is not None and engine.grammars is None:
            raise UsageError(
                "structured outputs need a tokenizer: drop skip_tokenizer_init", param="structured_outputs"
            )
        if engine.core.speculator is not None:
            engine.core.speculator.check_method(params.speculative_method)
        elif params.speculative_method not in (None, "none"):
            raise UsageError(
                f"speculative_method {params.speculative_method!r} needs an engine with a speculative_config",
                param="speculative_method",
            )

    def _check_token_ids(self, params: SamplingParams) -> None:
        vocab = self.engine.vocab_size
        named = {
            "logit_bias": params.logit_bias or (),
            "allowed_token_ids": params.allowed_token_ids or (),
            "stop_token_ids": params.stop_token_ids,
        }
        for name, token_ids in named.items():
            wrong = next((t for t in token_ids if not 0 <= t < vocab), None)
            if wrong is not None:
                raise UsageError(f"{name} names token {wrong}, outside the vocabulary of {vocab} tokens", param=name)

    def _adapter_version(self, name: str | None) -> int:
        if name is None:
            return 0
        adapter = self.engine.core.adapters.get(name)
        if adapter is None:
            raise UsageError(f"adapter {name!r} is not loaded; load it first", param="model", code="model_not_found")
        return adapter.version

    def submit(self, generation: Generation) -> None:
        """Hand the requests to the core; on the engine's thread. An adapter that was replaced since `make` is taken as it is now."""
        for request in generation.requests:
            request.adapter_version = self._adapter_version(request.adapter)
        if generation.request_id in self.generations:
            raise UsageError(
                f"request id {generation.request_id!r} is already running; use a fresh id", param="request_id"
            )
        params, engine = generation.params, self.engine
        bad_words = self._bad_words(params)
        self.generations[generation.request_id] = generation
        for request in generation.requests:
            grammar = (
                engine.grammars.submit(params.structured_outputs)
                if engine.grammars and params.structured_outputs
                else None
            )
            engine.core.add(request, grammar, bad_words)

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        if not params.bad_words:
            return []
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise UsageError("bad_words need a tokenizer: drop skip_tokenizer_init", param="bad_words")
        forms = {form for word in params.bad_words for form in (word, " " + word.lstrip())}
        return [tokenizer.encode(form, add_special_tokens=False) for form in sorted(forms)]

    def step(self) -> list[tuple[Generation, object]]:
        """One engine step; the outputs that callers should see, with their generation."""
        core, outputs = self.engine.core, []
        for done in core.step():
            generation = self.generations.get(done.request.generation_id)
            if generation is None:
                continue
            output = generation.update(done, core.finish)
            if output is not None:
                outputs.append((generation, output))
            if generation.finished:
                self.generations.pop(generation.request_id, None)
        return outputs

    def abort(self, request_id: str) -> Generation | None:
        """End every unfinished choice of a generation; None when it is not running."""
        generation = self.generations.pop(request_id, None)
        if generation is not None:
            generation.abort(self.engine.core.finish)
        return generation

    def load_adapter(self, name: str, path: str) -> None:
        """Load a PEFT adapter under `name`. Raises UsageError when the name is taken or the limit is reached."""
        adapters, limit = self.engine.core.adapters, self.engine.config.max_loras
        if name in adapters:
            raise UsageError(f"adapter {name!r} is already loaded; unload it first", param="lora_name")
        if len(adapters) >= limit:
            raise UsageError(f"{limit} adapters are loaded already (max_loras); unload one", param="lora_name")
        adapters[name] = load_adapter(Path(path), self.engine.core.runner.model)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises UsageError when it is unknown or a live request uses it."""
        core = self.engine.core
        if name not in core.adapters:
            raise UsageError(f"adapter {name!r} is not loaded", param="lora_name", code="model_not_found")
        users = sum(r.adapter == name for r in core.requests.values())
        if users:
            raise UsageError(
                f"adapter {name!r} serves {users} running requests; retry when they are done", param="lora_name"
            )
        del core.adapters[name]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many → a list: a string and a list of ints are single prompts."""
    if isinstance(prompts, str):
        return [prompts]
    prompts = list(prompts)  # type: ignore[arg-type]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def per_prompt(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise UsageError(
            f"{len(params)} sampling_params were given for {count} prompts; give one or as many as prompts"
        )
    return list(params)
