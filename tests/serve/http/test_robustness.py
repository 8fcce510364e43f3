"""The server under load and under abuse: nothing is lost, nothing is mixed up, limits hold, keys are checked."""

import asyncio
import hmac
import json
import threading

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.serve import soak
from tests.serve.http.conftest import KEY, listening, serving, wait_idle
from wager.serve.http.app import create_app
from wager.serve.http.server import server_config
from wager.serve.http.settings import ServerSettings
from wager.serve.llm import AsyncLLM

STREAMS, LEAVERS = 200, 150  # benchmarks/serve/soak.py runs the full size for minutes


@pytest.fixture(scope="module")
def crowded(tiny_dir):
    """A pool of KV blocks that holds only some of the requests that may run, so that requests are preempted all the time."""
    options = dict(max_num_seqs=32, block_size=4, kv_cache_memory=400_000, max_num_batched_tokens=128)
    with serving(tiny_dir, ServerSettings(drain_s=5), **options) as running:
        yield running


async def crowd(url, engine, streams, leavers):
    rng = np.random.default_rng(0)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    load, left = soak.Tally(), soak.Tally()
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=600) as client:
        questions = [await soak.alone(client, "tiny", q) for q in soak.make_questions(rng, 24, 400)]
        asked = [soak.ask(client, "tiny", soak.pick(rng, questions), load) for _ in range(streams)]
        leave = [
            soak.ask(client, "tiny", soak.pick(rng, questions), left, int(rng.integers(0, 12))) for _ in range(leavers)
        ]
        vanish = [vanish_unanswered(client, soak.pick(rng, questions), rng.random() / 4) for _ in range(leavers // 3)]
        await asyncio.gather(*asked, *leave, *vanish)
        await asyncio.to_thread(wait_idle, engine)
        again = soak.Tally()
        for question in questions[:4]:
            await soak.ask(client, "tiny", question, again)
    return load, left, again


def test_idle_connections_last_longer_here_than_in_clients():
    """Otherwise the server closes a connection while a client sends its next request on it."""
    assert server_config(None).timeout_keep_alive > 2 * httpx.Limits().keepalive_expiry


async def vanish_unanswered(client, question, after_s):
    """A client that asks for a whole answer and goes away before it comes."""
    try:
        async with asyncio.timeout(after_s):
            await client.post("/v1/completions", json=soak.body("tiny", question, stream=False))
    except TimeoutError:
        pass


def test_many_streams_and_disconnects_lose_nothing_and_mix_nothing(crowded):
    url, app = crowded
    engine = app.state.context.llm
    load, left, again = asyncio.run(crowd(url, engine, STREAMS, LEAVERS))
    assert load.finished == STREAMS and left.finished + left.left == LEAVERS and left.left > LEAVERS / 2
    for tally in (load, left, again):
        assert tally.wrong == [] and tally.errors == []
    stats = engine.stats()
    assert stats.preemptions > 0, "the pool was meant to be too small"
    assert stats.free_blocks == stats.total_blocks and stats.running == stats.waiting == 0


def test_a_full_queue_refuses_and_serves_on(tiny_dir):
    with serving(tiny_dir, ServerSettings(drain_s=5), max_num_seqs=1, max_queue=2) as (url, app):
        body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 60, "ignore_eos": True, "temperature": 0}

        async def flood():
            async with httpx.AsyncClient(base_url=url, timeout=600) as client:
                return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(30)))

        answers = asyncio.run(flood())
        statuses = [a.status_code for a in answers]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 3
        for answer in answers:
            if answer.status_code == 429:
                error = answer.json()["error"]
                assert error["type"] == "rate_limit_error" and int(answer.headers["retry-after"]) >= 1
        assert len({a.json()["choices"][0]["text"] for a in answers if a.status_code == 200}) == 1
        too_many = httpx.post(
            f"{url}/v1/completions", json={**body, "n": 4}
        )  # never fits: still told to the client, as 429
        assert too_many.status_code == 429
        wait_idle(app.state.context.llm)


# -- limits ----------------------------------------------------------------------------------------------------------------------


def test_bodies_over_the_limit_get_413_however_they_arrive(tiny_dir):
    limit = 20_000
    with serving(tiny_dir, ServerSettings(max_body_bytes=limit, drain_s=5)) as (url, _):
        frame = json.dumps({"model": "tiny", "prompt": [5], "max_tokens": 1, "user": "%s"})

        def body(size):
            return (frame % ("x" * (size - len(frame) + 2))).encode()

        def pieces(data):
            yield from (data[i : i + 3000] for i in range(0, len(data), 3000))

        post = lambda content: httpx.post(
            f"{url}/v1/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert len(body(limit)) == limit
        for accepted in (body(limit), pieces(body(limit))):
            assert post(accepted).status_code == 200
        for refused in (body(limit + 1), pieces(body(limit + 1)), pieces(body(20 * limit))):
            answer = post(refused)
            assert answer.status_code == 413 and str(limit) in answer.json()["error"]["message"], answer.text
            assert answer.headers["x-request-id"]


def test_choices_of_one_request_are_bounded(http):
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 129}),
        ("/v1/completions", {"prompt": "x", "n": 129}),
        ("/v1/completions", {"prompt": ["x"] * 65, "n": 2}),
        ("/v1/embeddings", {"input": ["x"] * 129}),
    ):
        answer = http.post(path, json=body)
        assert answer.status_code == 400 and "128" in answer.json()["error"]["message"]


# -- keys ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tiny_dir):
    with serving(tiny_dir, ServerSettings(api_keys=("first-key", "zweiter-schlüssel"), drain_s=5)) as (url, _):
        yield url


def test_any_key_opens_and_nothing_else_does(guarded):
    def status(header):
        headers = {} if header is None else {"Authorization": header.encode()}
        return httpx.get(f"{guarded}/v1/models", headers=headers).status_code

    for accepted in ("Bearer first-key", "bearer first-key", "Bearer zweiter-schlüssel"):
        assert status(accepted) == 200
    for refused in (
        None,
        "",
        "Bearer",
        "Bearer first-ke",
        "Bearer first-keyy",
        "Basic first-key",
        "first-key",
        "Bearer ключ",
    ):
        assert status(refused) == 401, refused
    answer = httpx.get(f"{guarded}/v1/models")
    assert answer.json()["error"]["code"] == "invalid_api_key" and answer.headers["www-authenticate"] == "Bearer"


def test_only_the_page_and_the_probes_are_public(guarded):
    for path in ("/", "/page/main.js", "/health", "/ping", "/version", "/metrics"):
        assert httpx.get(guarded + path).status_code == 200, path
    for path in ("/v1/models", "/stats", "/openapi.json", "/v1/features", "/page", "/no/such/route"):
        assert httpx.get(guarded + path).status_code == 401, path
    for path in ("/v1/chat/completions", "/tokenize", "/v1/load_lora_adapter", "/reset_prefix_cache"):
        assert httpx.post(guarded + path, json={}).status_code == 401, path
    # The check comes before the body is read or parsed.
    assert httpx.post(f"{guarded}/v1/completions", content=b"{oops").status_code == 401
    raw = httpx.Client(base_url=guarded)
    assert raw.get("/page/../v1/models").status_code in (401, 404)
    assert raw.get("/page/%2e%2e/%2e%2e/settings.py").status_code == 404


def test_every_key_is_compared_in_constant_time_whatever_matched(guarded, monkeypatch):
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    for token in ("first-key", "wrong"):
        compared.clear()
        httpx.get(f"{guarded}/v1/models", headers={"Authorization": f"Bearer {token}"})
        assert [b.decode() for _, b in compared] == ["first-key", "zweiter-schlüssel"]


# -- loading ---------------------------------------------------------------------------------------------------------------------


def test_health_tells_loading_from_ready(tiny_dir):
    may_load = threading.Event()

    def load(metrics):
        assert may_load.wait(30)
        return AsyncLLM(str(tiny_dir), served_model_name="tiny", observers=[metrics])

    announced = []

    def announce(llm):  # who starts when this is printed must be answered
        announced.append(app.state.context.engine() is llm)
        return "ready: tiny"

    app = create_app(load, ServerSettings(drain_s=1), announce)
    with listening(app) as (url, _):
        try:
            for path in ("/health", "/ping", "/v1/models", "/stats"):
                answer = httpx.get(url + path)
                assert answer.status_code == 503 and "still loading" in answer.json()["error"]["message"], path
                assert int(answer.headers["retry-after"]) >= 1
            refused = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503 and refused.json()["error"]["type"] == "server_error"
            assert httpx.get(url).status_code == httpx.get(f"{url}/metrics").status_code == 200
        finally:
            may_load.set()
        for _ in range(500):
            if httpx.get(f"{url}/health").status_code == 200:
                break
        assert httpx.get(f"{url}/health").json() == {"status": "ready"}
        assert announced == [True]
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_health_says_why_loading_failed(tmp_path):
    def load(metrics):
        return AsyncLLM(str(tmp_path), observers=[metrics])

    with listening(create_app(load, ServerSettings())) as (url, _):
        for _ in range(500):
            message = httpx.get(f"{url}/health").json()["error"]["message"]
            if "still loading" not in message:
                break
        assert httpx.get(f"{url}/health").status_code == 503 and str(tmp_path) in message


# -- text ------------------------------------------------------------------------------------------------------------------------

NO_SURROGATES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=24)
EMOJI = st.text("\x85\u2028\u2029\x0b\x1c😀👍🏽👩‍👩‍👧e\u0301\u200d\ufffd🇩🇪ñ你мa \n", min_size=1, max_size=16)


def streamed_text(http, path, body):
    chunks = []
    with http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line[6:]))
    assert not any("error" in c for c in chunks), chunks[-1]
    choices = [c for chunk in chunks for c in chunk["choices"]]
    pieces = [c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices]
    return "".join(pieces), choices[-1]["finish_reason"]


def test_streamed_text_is_the_whole_text_for_any_unicode(http):
    @given(st.one_of(NO_SURROGATES, EMOJI), st.booleans())
    def property_(text, chat):
        """The model is made to say exactly this text; its characters fall apart into byte tokens."""
        ask = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": "x"}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        body = {**ask, "guided_choice": [text], "max_tokens": 150, "temperature": 1, "seed": 3}
        choice = http.post(path, json=body).json()["choices"][0]
        whole = choice["message"]["content"] if chat else choice["text"]
        assert whole == text and streamed_text(http, path, body) == (text, choice["finish_reason"])

    property_()


def test_streamed_text_is_the_whole_text_for_random_bytes_and_stop_strings(http):
    @given(
        st.integers(0, 2**31),
        st.lists(st.sampled_from(["e", "or", "\ufffd", " t", "*d", "}\x05", "né"]), max_size=3, unique=True),
    )
    def property_(seed, stop):
        """Random tokens make broken UTF-8, and stop strings start in one token and end in another."""
        body = {"prompt": [seed % 300 + 5], "max_tokens": 40, "temperature": 2, "seed": seed, "stop": stop}
        choice = http.post("/v1/completions", json=body).json()["choices"][0]
        assert streamed_text(http, "/v1/completions", body) == (choice["text"], choice["finish_reason"])
        assert not any(s in choice["text"] for s in stop)

    property_()
    assert http.headers["Authorization"] == f"Bearer {KEY}"
