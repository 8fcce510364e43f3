"""Every exception class of the `openai` package that a user of the server may meet, and that none of them is its InternalServerError."""

import socket

import openai
import pytest
from openai import OpenAI

from tests.serve.http.conftest import KEY, serving, wait_idle
from wager.serve.http.settings import ServerSettings

ASK = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Count from one to ten."}],
    "temperature": 0,
    "max_tokens": 12,
}
WRITE = {"model": "tiny", "prompt": "Once upon", "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def client(url):
    with OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=600) as made:
        yield made


def test_bad_requests(client):
    wrong = [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 7}, "top_p"),
        ({"n": 0}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "messages"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "bad"}}}}, "response_format"),
    ]
    for change, param in wrong:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{**ASK, **change})
        assert caught.value.type == "invalid_request_error" and caught.value.param == param, change
        assert caught.value.request_id and caught.value.body["message"]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**ASK, "max_tokens": 10**6})
    assert caught.value.code == "context_length_exceeded" and "256" in caught.value.message
    # A stream that is refused has a status, not an error inside a 200.
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**{**ASK, "temperature": -1}, stream=True)
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="tiny", input="x", dimensions=3)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**WRITE, suffix="end")


def test_authentication_and_not_found(client, url):
    for key in ("wrong", KEY + "x", KEY[:-1], "none"):
        headers = {"Authorization": f"Bearer {key}"}
        with pytest.raises(openai.AuthenticationError) as caught:
            client.with_options(default_headers=headers).models.list()
        assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**{**ASK, "model": "nope"})
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no/such/model")
    with pytest.raises(openai.NotFoundError):
        client.moderations.create(input="x")  # a route we do not have


def test_conflict_while_requests_run(client, url, engine):
    with client.chat.completions.create(
        **{**ASK, "max_tokens": 200}, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
        with pytest.raises(openai.ConflictError):
            client.with_options(base_url=url).post("/reset_prefix_cache", cast_to=object)
    wait_idle(engine)
    assert client.with_options(base_url=url).post("/reset_prefix_cache", cast_to=object) == {"status": "ok"}


@pytest.fixture(scope="module")
def narrow(tiny_dir):
    """One request at a time, one may wait."""
    with serving(tiny_dir, ServerSettings(drain_s=5), max_num_seqs=1, max_queue=1) as running:
        yield running


def test_a_full_queue_is_a_rate_limit_and_a_retry_succeeds(narrow):
    url, app = narrow
    long = {**ASK, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        first = client.chat.completions.create(**long, stream=True)
        next(iter(first))
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(**{**ASK, "n": 2})  # two at once do not fit into the one waiting place
        error = caught.value
        assert (
            error.type == "rate_limit_error"
            and error.code == "rate_limit_exceeded"
            and "queue is full" in error.message
        )
        assert int(error.response.headers["retry-after"]) >= 1
        first.close()
        assert client.with_options(max_retries=2).chat.completions.create(**ASK).choices
    wait_idle(app.state.context.llm)


def test_connection_errors_are_not_server_errors(client):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(openai.APITimeoutError):
            client.with_options(base_url=url, timeout=0.2).models.list()
    with pytest.raises(openai.APIConnectionError):
        client.with_options(base_url="http://127.0.0.1:9/v1").models.list()
