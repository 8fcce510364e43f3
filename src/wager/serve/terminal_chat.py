"""The terminal chat behind `wager chat`: a loop over questions, with the engine in this process or behind a URL."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

import httpx

from wager.errors import UsageError, WagerError
from wager.serve.params import OutputKind, SamplingParams

Messages = list[dict[str, Any]]


class Chat(Protocol):
    name: str

    def answer(self, messages: Messages, temperature: float, max_tokens: int | None) -> Iterator[str]:
        """Pieces of the next answer as they come."""
        ...

    def close(self) -> None: ...


class RemoteChat:
    """A server that speaks the OpenAI API."""

    def __init__(self, url: str, api_key: str | None):
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(
            base_url=url.rstrip("/") + "/", headers=headers, timeout=httpx.Timeout(10, read=300)
        )
        try:
            listed = self._client.get("models")
        except httpx.HTTPError as error:
            raise WagerError(f"cannot reach {url}: {error}") from None
        if listed.status_code != 200:
            raise WagerError(f"{url} answered {listed.status_code}: {_message(listed.text)}")
        self.name = listed.json()["data"][0]["id"]

    def answer(self, messages: Messages, temperature: float, max_tokens: int | None) -> Iterator[str]:
        body = {"model": self.name, "messages": messages, "temperature": temperature, "stream": True}
        if max_tokens:
            body["max_tokens"] = max_tokens
        with self._client.stream("POST", "chat/completions", json=body) as response:
            if response.status_code != 200:
                raise WagerError(f"the server answered {response.status_code}: {_message(response.read().decode())}")
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise WagerError(event["error"]["message"])
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""

    def close(self) -> None:
        self._client.close()


class LocalChat:
    """The engine in this process."""

    def __init__(self, model: str):
        from wager.serve.llm import AsyncLLM

        self._llm = AsyncLLM(model, max_num_seqs=1)
        self.name = self._llm.served_name
        self._loop = asyncio.new_event_loop()

    def answer(self, messages: Messages, temperature: float, max_tokens: int | None) -> Iterator[str]:
        tokenizer = self._llm.tokenizer
        if tokenizer is None:
            raise UsageError("this model has no tokenizer, so it cannot chat")
        prompt = tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)
        params = SamplingParams(temperature=temperature, max_tokens=max_tokens, output_kind=OutputKind.DELTA)
        stream = self._llm.generate(prompt, params, uuid.uuid4().hex)
        try:
            while True:
                output = self._loop.run_until_complete(anext(stream, None))
                if output is None:
                    return
                yield output.outputs[0].text
        finally:
            self._loop.run_until_complete(_close(stream))

    def close(self) -> None:
        self._loop.run_until_complete(self._llm.shutdown())
        self._loop.close()


async def _close(stream: AsyncIterator[Any]) -> None:
    await stream.aclose()  # type: ignore[attr-defined]


def run_chat(backend: Chat, system: str | None, temperature: float, max_tokens: int | None) -> None:
    """Read questions until the end of input; an interrupted answer is kept as far as it came."""
    start: Messages = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    print(f"chatting with {backend.name}; /reset forgets, /quit leaves", file=sys.stderr)
    try:
        while (question := _ask()) is not None:
            if question == "/quit":
                return
            if question == "/reset":
                messages = list(start)
            elif question:
                messages.append({"role": "user", "content": question})
                messages.append(
                    {"role": "assistant", "content": _show(backend.answer(messages, temperature, max_tokens))}
                )
    finally:
        backend.close()


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _show(pieces: Iterator[str]) -> str:
    answer = ""
    try:
        for piece in pieces:
            answer += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [interrupted]", end="")
    print()
    return answer


def _message(body: str) -> str:
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return body[:200]
