"""An open-loop load generator for OpenAI-compatible servers: requests leave when they are due, however slow the server is."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from wager.errors import UsageError, WagerError
from wager.serve.bench.workload import Job


@dataclass
class Result:
    """What one request experienced; times in seconds. `start_s` counts from the start of the run. `itl_s` are the gaps between chunks."""

    job: Job
    start_s: float = 0.0
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for outputs of one token."""
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None


@dataclass(frozen=True)
class Target:
    """The server: base URL without /v1, the model's name, and what to add to every request body."""

    base_url: str
    model: str
    api_key: str | None = None
    extra_body: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 600.0

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


async def run(
    target: Target,
    jobs: Sequence[Job],
    *,
    max_concurrency: int | None = None,
    on_done: Callable[[Result], None] | None = None,
) -> tuple[list[Result], float]:
    """Send every job at its time; the results in the order of the jobs, and the duration in seconds.

    With `max_concurrency`, a job that is due while so many are in flight waits for one to end; its clock starts when it is sent.
    """
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else None
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=target.timeout_s, headers=target.headers) as client:
        begin = time.perf_counter()

        async def one(job: Job) -> Result:
            await asyncio.sleep(max(0.0, begin + (job.arrival_s or 0.0) - time.perf_counter()))
            if gate:
                async with gate:
                    result = await send(client, target, job, begin)
            else:
                result = await send(client, target, job, begin)
            if on_done:
                on_done(result)
            return result

        results = await asyncio.gather(*(one(job) for job in jobs))
        return list(results), time.perf_counter() - begin


async def send(client: httpx.AsyncClient, target: Target, job: Job, begin: float) -> Result:
    """Stream one request and time its chunks. Failures are recorded in the result, not raised."""
    path, body = request_body(target, job)
    start = time.perf_counter()
    result = Result(job, start_s=start - begin)
    last = start
    try:
        async with client.stream("POST", f"{target.base_url}{path}", json=body) as response:
            if response.status_code != 200:
                detail = (await response.aread()).decode(errors="replace")
                result.error = f"HTTP {response.status_code}: {detail[:300]}"
                return result
            async for line in response.aiter_lines():
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                now = time.perf_counter()
                if take_chunk(result, json.loads(line[5:])):
                    if result.ttft_s:
                        result.itl_s.append(now - last)
                    else:
                        result.ttft_s = now - start
                    last = now
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        result.error = f"{type(error).__name__}: {error}"
        return result
    if not result.ttft_s:  # tokens without text (a lone byte of a character): they arrive with the end
        last = time.perf_counter()
        result.ttft_s = last - start
    result.e2e_s = last - start
    if not result.error and not result.output_tokens:
        result.error = "the server reported no output token (it must support stream_options.include_usage)"
    return result


def request_body(target: Target, job: Job) -> tuple[str, dict[str, Any]]:
    """Path and JSON body; every output has exactly max_tokens tokens, so that contenders do the same work."""
    body: dict[str, Any] = {
        "model": target.model,
        "max_tokens": job.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "ignore_eos": True,
        **target.extra_body,
    }
    if job.is_chat:
        return "/v1/chat/completions", {**body, "messages": list(job.prompt)}
    prompt = job.prompt if isinstance(job.prompt, str) else list(job.prompt)
    return "/v1/completions", {**body, "prompt": prompt}


def take_chunk(result: Result, chunk: dict[str, Any]) -> bool:
    """Read one streamed object into the result; whether it carried output."""
    if "error" in chunk:
        result.error = str(chunk["error"].get("message", chunk["error"]))
        return False
    if usage := chunk.get("usage"):
        result.input_tokens = usage.get("prompt_tokens", 0)
        result.output_tokens = usage.get("completion_tokens", 0)
    carried = False
    for choice in chunk.get("choices", ()):
        delta = choice.get("delta") or {}
        text = choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""
        result.text += text
        carried |= bool(text)
    return carried


async def first_model(base_url: str, api_key: str | None = None) -> str:
    """The first model the server lists. Raises WagerError when it cannot be reached, UsageError when it lists none."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        async with httpx.AsyncClient(timeout=10, headers=headers) as client:
            response = await client.get(f"{base_url}/v1/models")
            response.raise_for_status()
    except httpx.HTTPError as error:
        raise WagerError(
            f"cannot list the models of {base_url} ({error or type(error).__name__}); is the server up?"
        ) from None
    models = response.json().get("data") or []
    if not models:
        raise UsageError(f"{base_url} serves no model; name one with --model")
    return models[0]["id"]
