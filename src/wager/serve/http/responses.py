"""POST /v1/responses: the newer OpenAI interface as a thin converter over chat."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from wager.errors import UsageError
from wager.serve.http.chat import ChatJob, count_tokens, prepare
from wager.serve.http.chat import response as chat_response
from wager.serve.http.context import context_of, new_id
from wager.serve.http.response_items import ItemWriter
from wager.serve.http.running import checked, final, while_connected
from wager.serve.http.schemas import Body, ChatBody
from wager.serve.http.sse import event, primed, stream_response
from wager.serve.http.usage import usage
from wager.serve.outputs import RequestOutput

router = APIRouter()


class ResponsesBody(Body):
    model: str | None = None
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None


def to_chat(body: ResponsesBody) -> ChatBody:
    """The same request in chat form. Raises UsageError for items chat cannot express."""
    for name in ("previous_response_id", "conversation", "background"):
        if getattr(body, name):
            raise UsageError(
                f"{name} is not supported: this server keeps no answers; send the whole conversation as input",
                param=name,
            )
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    messages += [_message(item) for item in items]
    tools = [{"type": "function", "function": {k: v for k, v in t.items() if k != "type"}} for t in body.tools or ()]
    choice = body.tool_choice
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    chosen = {
        "model": body.model,
        "messages": messages,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "stream": body.stream,
        "tools": tools or None,
        "tool_choice": choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _response_format(body.text),
    }
    try:
        return ChatBody.model_validate({k: v for k, v in chosen.items() if v is not None})
    except ValueError as error:
        raise UsageError(f"the input cannot be read: {str(error).splitlines()[-2].strip()}", param="input") from None


def _message(item: dict[str, Any]) -> dict[str, Any]:
    kind = item.get("type", "message")
    if kind == "message":
        return {"role": item.get("role"), "content": item.get("content")}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
        return {
            "role": "assistant",
            "tool_calls": [{"id": item.get("call_id"), "type": "function", "function": function}],
        }
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
    raise UsageError(f"input items of type {kind!r} are not supported", param="input")


def _response_format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    fmt = (text or {}).get("format")
    if not isinstance(fmt, dict) or fmt.get("type") in (None, "text"):
        return None
    if fmt["type"] == "json_schema":
        return {"type": "json_schema", "json_schema": {"name": fmt.get("name", "schema"), "schema": fmt.get("schema")}}
    return fmt


@router.post("/v1/responses")
async def responses(body: ResponsesBody, request: Request) -> Response:
    """OpenAI responses; `stream: true` answers with typed events."""
    context = context_of(request)
    job = prepare(to_chat(body), context)
    shell = _shell(body, job)
    if body.stream:
        outputs = await primed(job.outputs())
        return stream_response(events(job, shell, outputs), context.settings.ping_s)
    output = await while_connected(request, final(job.outputs()))
    chat = chat_response(job, output)
    choice = chat["choices"][0]
    items = ItemWriter()
    for delta in message_deltas(choice["message"]):
        for _ in items.push(delta):
            pass
    for _ in items.finish():
        pass
    return JSONResponse(finished(shell, items.done, choice["finish_reason"], chat["usage"]))


def message_deltas(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A whole message as deltas, so that both kinds of answer are made in one way."""
    for name in ("reasoning_content", "content"):
        if message.get(name):
            yield {name: message[name]}
    for index, call in enumerate(message.get("tool_calls", ())):
        yield {"tool_calls": [{"index": index, **call}]}


def _shell(body: ResponsesBody, job: ChatJob) -> dict[str, Any]:
    """The response object before anything was generated."""
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": job.created,
        "model": job.model,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "temperature": job.params.temperature,
        "top_p": job.params.top_p,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "tool_choice": body.tool_choice or "auto",
        "tools": [{"strict": None, **tool} for tool in body.tools or ()],
        "output": [],
        "usage": None,
    }


def finished(
    shell: dict[str, Any], items: list[dict[str, Any]], reason: str | None, counts: dict[str, Any]
) -> dict[str, Any]:
    cut = reason == "length"
    return {
        **shell,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": items,
        "usage": {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": counts["prompt_tokens_details"]["cached_tokens"]},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": counts["completion_tokens_details"]["reasoning_tokens"]},
            "total_tokens": counts["total_tokens"],
        },
    }


async def events(job: ChatJob, shell: dict[str, Any], outputs: AsyncIterator[RequestOutput]) -> AsyncIterator[str]:
    """Typed events with running sequence numbers: items open, grow and close as the model writes them."""
    number, token_ids, last = 0, 0, None

    def send(payload: dict[str, Any]) -> str:
        nonlocal number
        number += 1
        return event({**payload, "sequence_number": number - 1}, name=payload["type"])

    yield send({"type": "response.created", "response": shell})
    yield send({"type": "response.in_progress", "response": shell})
    text, items = job.choice_text(), ItemWriter()
    async for output in outputs:
        last = checked(output)
        piece = output.outputs[0]
        token_ids += len(piece.token_ids)
        for delta in text.push(piece.text, last=piece.finish_reason is not None):
            for payload in items.push(delta):
                yield send(payload)
    assert last is not None
    for payload in items.finish():
        yield send(payload)
    counts = usage(
        len(last.prompt_token_ids), token_ids, last.num_cached_tokens, count_tokens(job, text.reasoning_text)
    )
    done = finished(shell, items.done, last.outputs[0].finish_reason, counts)
    yield send({"type": f"response.{done['status']}", "response": done})
