"""Server-sent events byte by byte: framing, order, keep-alive, failures after the headers are gone, and what a disconnect does."""

import asyncio
import json
import re
import socket
import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serve.http.conftest import KEY, serving, wait_idle
from wager.errors import CapacityError, UsageError
from wager.serve.http.settings import ServerSettings
from wager.serve.http.sse import DONE, PING, event, primed, stream_response

CHAT = {
    "messages": [{"role": "user", "content": "Count from one to ten."}],
    "temperature": 0,
    "max_tokens": 20,
    "ignore_eos": True,
}
WRITE = {"prompt": "Once upon", "temperature": 0, "max_tokens": 20, "ignore_eos": True}
USAGE = {"stream_options": {"include_usage": True}}


def stream(http, path, body):
    """(response, parsed data events); fails on any byte that a strict reader would not expect."""
    response = http.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
    assert response.text.endswith("\n\n")
    blocks = response.text.removesuffix("\n\n").split("\n\n")
    assert all(re.fullmatch(r"(event: [a-z._]+\n)?data: [^\r\n]+", block) for block in blocks)
    return response, [block.split("data: ", 1)[1] for block in blocks]


def test_chat_chunks_come_in_the_order_clients_rely_on(http):
    _, data = stream(http, "/v1/chat/completions", CHAT)
    assert data[-1] == "[DONE]" and data.count("[DONE]") == 1
    chunks = [json.loads(d) for d in data[:-1]]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1
    choices = [c["choices"][0] for c in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert all(list(c["delta"]) == ["content"] and c["finish_reason"] is None for c in choices[1:-1])
    assert choices[-1]["delta"] == {} and choices[-1]["finish_reason"] == "length"
    assert all("usage" not in c for c in chunks)


def test_chat_usage_is_null_until_one_extra_chunk(http):
    _, data = stream(http, "/v1/chat/completions", {**CHAT, **USAGE})
    chunks = [json.loads(d) for d in data[:-1]]
    assert all(c["usage"] is None for c in chunks[:-1])
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 20
    whole = http.post("/v1/chat/completions", json=CHAT).json()["usage"]
    assert {k: chunks[-1]["usage"][k] for k in ("prompt_tokens", "total_tokens")} == {
        k: whole[k] for k in ("prompt_tokens", "total_tokens")
    }


def test_completion_chunks(http):
    _, data = stream(
        http,
        "/v1/completions",
        {**WRITE, **USAGE, "prompt": ["Once upon", "One two"], "n": 2, "temperature": 1, "seed": 1},
    )
    assert data[-1] == "[DONE]"
    chunks = [json.loads(d) for d in data[:-1]]
    assert {c["object"] for c in chunks} == {"text_completion"} and len({(c["id"], c["created"]) for c in chunks}) == 1
    ends = [c["choices"][0]["index"] for c in chunks if c["choices"] and c["choices"][0]["finish_reason"]]
    assert sorted(ends) == [0, 1, 2, 3] and chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 80


def test_stop_at_the_first_token_still_has_every_part(http):
    first = http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 1}).json()["choices"][0]["message"]["content"]
    _, data = stream(http, "/v1/chat/completions", {**CHAT, "stop": [first]})
    chunks = [json.loads(d) for d in data[:-1]]
    assert [c["choices"][0]["delta"] for c in chunks] == [{"role": "assistant", "content": ""}, {}]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop" and chunks[-1]["choices"][0]["stop_reason"] == first


def test_responses_events_are_named(http):
    response, data = stream(http, "/v1/responses", {"input": "Count.", "max_output_tokens": 5})
    names = re.findall(r"^event: (.+)$", response.text, re.MULTILINE)
    assert names == [json.loads(d)["type"] for d in data]
    assert names[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert [json.loads(d)["sequence_number"] for d in data] == list(range(len(data)))


def test_the_request_id_of_the_client_comes_back_if_it_is_sane(http):
    given_ = http.get("/v1/models", headers={"x-request-id": "my-trace:42"}).headers
    assert given_["x-request-id"] == "my-trace:42" and given_["x-content-type-options"] == "nosniff"
    for odd in ("a b", "x" * 200, "<script>"):
        assert re.fullmatch(
            "[0-9a-f]{32}", http.get("/v1/models", headers={"x-request-id": odd}).headers["x-request-id"]
        )
    response, _ = stream(http, "/v1/completions", {**WRITE, "max_tokens": 1})
    assert response.headers["x-request-id"]


# -- the framing alone -----------------------------------------------------------------------------------------------------------


@given(st.text())
def test_an_event_is_one_line_for_every_kind_of_line_reader(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return  # lone surrogates never come out of a tokenizer
    framed = event({"text": text})
    assert framed.encode().endswith(b"\n\n") and framed.splitlines() == [framed[:-2], ""]
    assert json.loads(framed.removeprefix("data: ")) == {"text": text}


def collect(response):
    async def run():
        return [piece async for piece in response.body_iterator]

    return asyncio.run(run())


def test_silence_is_filled_with_comments_and_nothing_is_lost():
    async def slow():
        yield "data: 1\n\n"
        await asyncio.sleep(0.35)
        yield "data: 2\n\n"

    pieces = collect(stream_response(slow(), ping_s=0.1))
    assert pieces[0] == "data: 1\n\n" and pieces[-1] == "data: 2\n\n"
    assert 2 <= pieces.count(PING) <= 3 and len(pieces) == 2 + pieces.count(PING)


@pytest.mark.parametrize(
    "error, kind",
    [
        (UsageError("bad"), "invalid_request_error"),
        (CapacityError("full"), "rate_limit_error"),
        (ValueError("secret"), "server_error"),
    ],
)
def test_a_failure_on_the_way_is_an_error_event_and_the_end(error, kind):
    async def failing():
        yield "data: 1\n\n"
        raise error

    first, last = collect(stream_response(failing(), ping_s=1))
    body = json.loads(last.removeprefix("data: "))
    assert first == "data: 1\n\n" and set(body) == {"error"} and body["error"]["type"] == kind and DONE not in last
    assert "secret" not in last, "what an unexpected exception says stays in the log"


def test_a_stream_that_is_left_closes_its_source():
    closed = []

    async def run():
        async def source():
            try:
                for i in range(100):
                    yield i
                    await asyncio.sleep(0)
            finally:
                closed.append(True)

        async def lines():
            async for item in await primed(source()):
                yield f"data: {item}\n\n"

        body = stream_response(lines(), 1).body_iterator
        assert await anext(body) == "data: 0\n\n"
        await body.aclose()
        await asyncio.sleep(0)

    asyncio.run(run())
    assert closed == [True]


def test_primed_raises_before_the_first_item_and_may_be_empty():
    async def refused():
        raise UsageError("no")
        yield

    async def empty():
        return
        yield

    async def run():
        with pytest.raises(UsageError):
            await primed(refused())
        assert [item async for item in await primed(empty())] == []

    asyncio.run(run())


# -- with the engine behind ------------------------------------------------------------------------------------------------------


@pytest.fixture()
def own(tiny_dir):
    with (
        serving(tiny_dir, ServerSettings(drain_s=5, ping_s=0.05), max_num_seqs=4) as (url, app),
        httpx.Client(base_url=url) as client,
    ):
        client.engine = app.state.context.llm
        yield client


def test_a_failing_step_ends_its_requests_and_not_the_server(own, monkeypatch):
    """The model breaks in the middle of an answer: an error event in a stream, a 500 in our shape otherwise, and then all is well again."""
    runner = own.engine.engine.core.runner
    real, steps = runner.forward, []

    def breaking(*args, **options):
        steps.append(1)
        if len(steps) == 5:
            raise RuntimeError("broken")
        return real(*args, **options)

    monkeypatch.setattr(runner, "forward", breaking)
    response = own.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert response.status_code == 200
    blocks = [b for b in response.text.strip().split("\n\n") if b != PING.strip()]
    last = json.loads(blocks[-1].removeprefix("data: "))
    assert last["error"]["type"] == "server_error" and "[DONE]" not in response.text and len(blocks) > 2
    wait_idle(own.engine)
    steps.clear()
    whole = own.post("/v1/completions", json=WRITE)
    assert (
        whole.status_code == 500 and whole.json()["error"]["type"] == "server_error" and whole.headers["x-request-id"]
    )
    wait_idle(own.engine)
    assert own.post("/v1/completions", json=WRITE).status_code == 200 and own.get("/health").status_code == 200


def test_pings_arrive_while_the_engine_is_silent(own, monkeypatch):
    runner = own.engine.engine.core.runner
    real = runner.forward

    def slow(*args, **options):
        time.sleep(0.2)
        return real(*args, **options)

    monkeypatch.setattr(runner, "forward", slow)
    text = own.post("/v1/completions", json={**WRITE, "max_tokens": 3, "stream": True}).text
    assert text.count(PING) >= 3 and text.endswith(DONE)


def test_a_disconnect_without_reading_frees_the_blocks(own):
    """A client that closes its socket right after the request, of each kind."""
    host, port = own.base_url.host, own.base_url.port
    for path, body in (
        ("/v1/chat/completions", {**CHAT, "max_tokens": 200, "stream": True}),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 200, "n": 3}),
        ("/v1/completions", {**WRITE, "max_tokens": 200, "prompt": ["a", "b", "c"], "stream": True}),
        ("/v1/completions", {**WRITE, "max_tokens": 200, "prompt": ["a", "b", "c"]}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 200, "stream": True}),
        ("/v1/embeddings", {"input": ["x " * 100] * 30}),
    ):
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        before = own.engine.stats().generation_tokens
        for _ in range(3):
            with socket.create_connection((host, port)) as raw:
                raw.sendall(head.encode() + content)
                time.sleep(0.03)
        wait_idle(own.engine)
        assert not own.engine._listeners, path
        assert own.engine.stats().generation_tokens - before < 3 * 3 * 200, "nobody reads it: generation must stop"
