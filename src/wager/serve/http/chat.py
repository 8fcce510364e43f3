"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from wager.errors import UsageError
from wager.serve.http.context import ServerContext, context_of, new_id
from wager.serve.http.running import checked, final, while_connected
from wager.serve.http.schemas import ChatBody
from wager.serve.http.sse import DONE, event, primed, stream_response
from wager.serve.http.usage import FINGERPRINT, chat_logprobs, usage
from wager.serve.llm import AsyncLLM
from wager.serve.outputs import CompletionOutput, RequestOutput
from wager.serve.params import SamplingParams
from wager.serve.text.reasoning import ReasoningStream, reasoning_stream
from wager.serve.text.tool_streams import ToolStream
from wager.serve.text.tools import MAX_FORCED_CALLS, forced_constraint, forced_stream, tool_stream

router = APIRouter()


@dataclass
class ChoiceText:
    """Turns one choice's text into message deltas: reasoning, content, tool calls."""

    reasoning: ReasoningStream | None
    tools: ToolStream | None
    max_calls: int | None = None  # calls after these are dropped: the client said that it takes no more
    call_ids: dict[int, str] = field(default_factory=dict)
    reasoning_text: str = ""

    def push(self, text: str, last: bool) -> list[dict[str, Any]]:
        """Deltas for new text; with `last` also what was held back."""
        deltas: list[dict[str, Any]] = []
        thought, said = ("", text)
        if self.reasoning is not None:
            split = self.reasoning.push(text)
            thought, said = split.reasoning, split.content
            if last:
                rest = self.reasoning.finish()
                thought, said = thought + rest.reasoning, said + rest.content
        if thought:
            self.reasoning_text += thought
            deltas.append({"reasoning_content": thought})
        events: list[Any] = [said] if said else []
        if self.tools is not None:
            events = self.tools.push(said) + (self.tools.finish() if last else [])
        return deltas + [self._delta(e) for e in events if e != "" and self._wanted(e)]

    def _wanted(self, event_: Any) -> bool:
        return isinstance(event_, str) or self.max_calls is None or event_.index < self.max_calls

    def _delta(self, event_: Any) -> dict[str, Any]:
        if isinstance(event_, str):
            return {"content": event_}
        if event_.name is not None:
            self.call_ids[event_.index] = new_id("call")
            head = {"index": event_.index, "id": self.call_ids[event_.index], "type": "function"}
            return {"tool_calls": [{**head, "function": {"name": event_.name, "arguments": ""}}]}
        return {"tool_calls": [{"index": event_.index, "function": {"arguments": event_.arguments}}]}

    def finish_reason(self, reason: str | None) -> str | None:
        return "tool_calls" if self.call_ids and reason == "stop" else reason


@dataclass(frozen=True)
class ChatJob:
    """A validated chat request, ready to run."""

    body: ChatBody
    llm: AsyncLLM
    model: str
    adapter: str | None
    prompt: str
    prompt_ids: list[int]
    params: SamplingParams
    context: ServerContext
    id: str = field(default_factory=lambda: new_id("chatcmpl"))
    created: int = field(default_factory=lambda: int(time.time()))

    def outputs(self) -> AsyncIterator[RequestOutput]:
        body = self.body
        return self.llm.generate(
            self.prompt_ids,
            self.params,
            self.id,
            priority=body.priority or 0,
            adapter=self.adapter,
            cache_salt=body.cache_salt,
        )

    def choice_text(self) -> ChoiceText:
        settings, body = self.context.settings, self.body
        forced = body.forced_tool()
        reasoning = settings.reasoning_parser if not forced else None
        tools = (
            forced_stream(forced) if forced else tool_stream(settings.tool_call_parser) if body.tool_dicts() else None
        )
        max_calls = 1 if body.parallel_tool_calls is False else None
        return ChoiceText(reasoning_stream(reasoning, self.prompt) if reasoning else None, tools, max_calls)


def prepare(body: ChatBody, context: ServerContext) -> ChatJob:
    """Validate, render the template, tokenise. Raises UsageError or HTTPError."""
    llm, model, adapter = context.resolve(body.model)
    body.check_stream_options()
    if (body.n or 1) > context.settings.max_choices:
        raise UsageError(f"n must be at most {context.settings.max_choices}, got {body.n}", param="n")
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise UsageError("this server runs without a tokenizer and cannot chat; use /v1/completions with token ids")
    add_prompt = (not body.continue_final_message) if body.add_generation_prompt is None else body.add_generation_prompt
    options = {k: v for k, v in (body.chat_template_kwargs or {}).items() if k not in ("messages", "tools")}
    prompt = tokenizer.render_chat(
        body.message_dicts(),
        tools=body.tool_dicts(),
        add_generation_prompt=add_prompt,
        continue_final_message=body.continue_final_message,
        **options,
    )
    constraint, forced = body.constraint(), body.forced_tool()
    if forced:
        if constraint is not None:
            raise UsageError("response_format and a forced tool_choice exclude each other", param="response_format")
        max_calls = 1 if body.parallel_tool_calls is False else MAX_FORCED_CALLS
        constraint = forced_constraint(body.tool_dicts() or [], forced, max_calls)
    params = body.sampling_params(
        llm.generation_defaults,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=body.top(),
        constraint=constraint,
    )
    return ChatJob(
        body, llm, model, adapter, prompt, tokenizer.encode(prompt, add_special_tokens=False), params, context
    )


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: Request) -> Response:
    """OpenAI chat completions; `stream: true` answers with server-sent events."""
    job = prepare(body, context_of(request))
    if body.stream:
        outputs = await primed(job.outputs())
        return stream_response(chunks(job, outputs), job.context.settings.ping_s)
    output = await while_connected(request, final(job.outputs()))
    return JSONResponse(response(job, output))


def response(job: ChatJob, output: RequestOutput) -> dict[str, Any]:
    """The whole answer."""
    choices, reasoning_tokens = [], 0
    for completion in output.outputs:
        text = job.choice_text()
        message = _message(text.push(completion.text, last=True))
        if job.body.echo and job.body.continue_final_message:
            message["content"] = str(job.body.messages[-1].content or "") + (message["content"] or "")
        reasoning_tokens += count_tokens(job, text.reasoning_text)
        choices.append(
            {
                "index": completion.index,
                "message": message,
                "logprobs": _logprobs(job, completion),
                "finish_reason": text.finish_reason(completion.finish_reason),
                "stop_reason": completion.stop_reason,
            }
        )
    generated = sum(len(c.token_ids) for c in output.outputs)
    return {
        "id": job.id,
        "object": "chat.completion",
        "created": job.created,
        "model": job.model,
        "choices": choices,
        "usage": usage(len(output.prompt_token_ids), generated, output.num_cached_tokens, reasoning_tokens),
        "system_fingerprint": FINGERPRINT,
    }


async def chunks(job: ChatJob, outputs: AsyncIterator[RequestOutput]) -> AsyncIterator[str]:
    """Server-sent events: role first, then content, then an empty delta with the finish reason, usage if asked, [DONE]."""
    body = job.body
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    head = {
        "id": job.id,
        "object": "chat.completion.chunk",
        "created": job.created,
        "model": job.model,
        "system_fingerprint": FINGERPRINT,
    }

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, **extra: Any) -> str:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": extra.pop("logprobs", None),
            "finish_reason": finish,
            **extra,
        }
        return event({**head, "choices": [choice], **({"usage": None} if include_usage else {})})

    texts = [job.choice_text() for _ in range(job.params.n)]
    for index in range(job.params.n):
        yield chunk(index, {"role": "assistant", "content": ""})
    generated, last = 0, None
    async for output in outputs:
        last = checked(output)
        for completion in output.outputs:
            generated += len(completion.token_ids)
            text, ended = texts[completion.index], completion.finish_reason is not None
            logprobs = _logprobs(job, completion)
            deltas = text.push(completion.text, last=ended)
            if logprobs and logprobs["content"] and not deltas:
                deltas = [{"content": ""}]
            for delta in deltas:
                yield chunk(completion.index, delta, logprobs=logprobs)
                logprobs = None
            if ended:
                reason = text.finish_reason(completion.finish_reason)
                yield chunk(completion.index, {}, reason, stop_reason=completion.stop_reason)
    if include_usage and last is not None:
        reasoning = sum(count_tokens(job, t.reasoning_text) for t in texts)
        totals = usage(len(last.prompt_token_ids), generated, last.num_cached_tokens, reasoning)
        yield event({**head, "choices": [], "usage": totals})
    yield DONE


def _message(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """One message out of all its deltas."""
    content = "".join(d.get("content", "") for d in deltas)
    reasoning = "".join(d.get("reasoning_content", "") for d in deltas)
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                calls[piece["index"]] = {"id": piece["id"], "type": "function", "function": dict(piece["function"])}
            else:
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": content if content.strip() or not calls else None,
        "refusal": None,
    }
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [call for _, call in sorted(calls.items())]
    return message


def _logprobs(job: ChatJob, completion: CompletionOutput) -> dict[str, Any] | None:
    if completion.logprobs is None or job.llm.tokenizer is None:
        return None
    return chat_logprobs(job.llm.tokenizer, completion.token_ids, completion.logprobs, job.body.top() or 0)


def count_tokens(job: ChatJob, text: str) -> int:
    return len(job.llm.tokenizer.encode(text, add_special_tokens=False)) if text and job.llm.tokenizer else 0
