"""POST /v1/completions: text or token prompts, several at once, echo and log-probabilities for evaluation harnesses."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from wager.errors import UsageError
from wager.serve.http.context import ServerContext, context_of, new_id
from wager.serve.http.running import all_of, merged, while_connected
from wager.serve.http.schemas import CompletionBody
from wager.serve.http.sse import DONE, event, primed, stream_response
from wager.serve.http.usage import FINGERPRINT, completion_logprobs, usage
from wager.serve.llm import AsyncLLM
from wager.serve.outputs import CompletionOutput, RequestOutput
from wager.serve.params import SamplingParams

router = APIRouter()


@dataclass(frozen=True)
class CompletionJob:
    """A validated completion request over one or several prompts."""

    body: CompletionBody
    llm: AsyncLLM
    model: str
    adapter: str | None
    prompts: list[str | list[int]]
    params: SamplingParams
    n: int
    id: str = field(default_factory=lambda: new_id("cmpl"))
    created: int = field(default_factory=lambda: int(time.time()))

    def streams(self) -> list[AsyncIterator[RequestOutput]]:
        body = self.body
        return [
            self.llm.generate(
                prompt,
                self.params,
                f"{self.id}-{number}",
                priority=body.priority or 0,
                adapter=self.adapter,
                cache_salt=body.cache_salt,
            )
            for number, prompt in enumerate(self.prompts)
        ]

    @property
    def head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }


def prepare(body: CompletionBody, context: ServerContext) -> CompletionJob:
    """Validate. Raises UsageError or HTTPError."""
    llm, model, adapter = context.resolve(body.model)
    body.check_stream_options()
    prompts = body.prompts()
    n, best_of = body.n or 1, body.best_of or body.n or 1
    if body.suffix:
        raise UsageError("suffix is not supported: this model cannot fill in the middle", param="suffix")
    if best_of < n:
        raise UsageError(f"best_of ({best_of}) must be at least n ({n})", param="best_of")
    if best_of > n and body.stream:
        raise UsageError("best_of above n cannot be streamed: the best is known at the end", param="best_of")
    if best_of * len(prompts) > context.settings.max_choices:
        raise UsageError(
            f"at most {context.settings.max_choices} choices in one request, got {best_of * len(prompts)}", param="n"
        )
    logprobs = body.logprobs if best_of == n else body.logprobs or 0
    params = body.sampling_params(
        llm.generation_defaults,
        max_tokens=body.max_tokens,
        logprobs=logprobs,
        constraint=body.constraint(),
        n=best_of,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    # Everything that can be wrong is found before the first prompt runs.
    for number, prompt in enumerate(prompts):
        llm.frontend.make(prompt, params, f"check-{number}", adapter=adapter)
    return CompletionJob(body, llm, model, adapter, prompts, params, n)


@router.post("/v1/completions")
async def completions(body: CompletionBody, request: Request) -> Response:
    """OpenAI completions; `stream: true` answers with server-sent events."""
    context = context_of(request)
    job = prepare(body, context)
    if body.stream:
        outputs = await primed(merged(job.streams()))
        return stream_response(chunks(job, outputs), context.settings.ping_s)
    outputs = await while_connected(request, all_of(job.streams()))
    return JSONResponse(response(job, outputs))


def response(job: CompletionJob, outputs: list[RequestOutput]) -> dict[str, Any]:
    """The whole answer; choice index = prompt number * n + j."""
    choices = []
    for number, output in enumerate(outputs):
        best = (
            sorted(output.outputs, key=_mean_logprob, reverse=True)[: job.n] if job.params.n > job.n else output.outputs
        )
        for j, completion in enumerate(best):
            choices.append(_choice(job, replace(completion, index=number * job.n + j), output, first=True))
    prompt_tokens = sum(len(o.prompt_token_ids) for o in outputs)
    generated = sum(len(c.token_ids) for o in outputs for c in o.outputs)
    cached = sum(o.num_cached_tokens for o in outputs)
    return {**job.head, "choices": choices, "usage": usage(prompt_tokens, generated, cached)}


async def chunks(job: CompletionJob, outputs: AsyncIterator[tuple[int, RequestOutput]]) -> AsyncIterator[str]:
    include_usage = bool(job.body.stream_options and job.body.stream_options.include_usage)
    extra = {"usage": None} if include_usage else {}
    started: set[int] = set()
    prompt_tokens: dict[int, tuple[int, int]] = {}
    generated = 0
    async for number, output in outputs:
        prompt_tokens[number] = (len(output.prompt_token_ids), output.num_cached_tokens)
        for completion in output.outputs:
            generated += len(completion.token_ids)
            index = number * job.n + completion.index
            choice = _choice(job, replace(completion, index=index), output, first=index not in started)
            started.add(index)
            yield event({**job.head, "choices": [choice], **extra})
    if include_usage:
        totals = usage(sum(p for p, _ in prompt_tokens.values()), generated, sum(c for _, c in prompt_tokens.values()))
        yield event({**job.head, "choices": [], "usage": totals})
    yield DONE


def _choice(job: CompletionJob, completion: CompletionOutput, output: RequestOutput, first: bool) -> dict[str, Any]:
    """One choice; the first piece of it carries the echoed prompt."""
    tokenizer = job.llm.tokenizer
    echo = job.body.echo and first
    prompt_text = ""
    if echo and tokenizer is not None:
        prompt_text = output.prompt if output.prompt is not None else tokenizer.decode(output.prompt_token_ids, False)
    logprobs = None
    if job.body.logprobs is not None and tokenizer is not None:
        token_ids = list(completion.token_ids)
        entries = list(completion.logprobs or ())
        if echo:
            token_ids = output.prompt_token_ids + token_ids
            entries = [*(output.prompt_logprobs or ()), *entries]
        logprobs, _ = completion_logprobs(tokenizer, token_ids, entries, job.body.logprobs, 0)
    return {
        "index": completion.index,
        "text": prompt_text + completion.text,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def _mean_logprob(completion: CompletionOutput) -> float:
    return (completion.cumulative_logprob or 0.0) / max(len(completion.token_ids), 1)
