"""Malformed bodies on every POST route of our own OpenAPI: a 4xx in the one error shape, never a 5xx.

Bodies are made from the routes' schemas: a valid one is damaged in one place (a wrong type, an extreme number, strange text, nesting), or
is no object, no JSON or no UTF-8 at all. benchmarks/serve/fuzz_api.py does the same at length with schemathesis.
"""

import json

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.http.conftest import serving, wait_idle
from wager.serve.http.settings import ServerSettings

FIELDS = {"message", "type", "param", "code"}
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
VALID = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/embeddings": {"input": "x"},
    "/v1/responses": {"input": "x", "max_output_tokens": 1},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "/no/such/directory"},
    "/v1/unload_lora_adapter": {"lora_name": "a"},
}
WITHOUT_BODY = {"/ping", "/reset_prefix_cache"}

ODD_TEXT = st.sampled_from(
    ["", "\0", "\ud800", "x" * 300, "😀", "null", "../../etc/passwd", "<|im_end|>", "tiny", "text", "json_schema"]
)
ODD_NUMBERS = st.sampled_from(
    [-1, 0, 0.5, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, float("nan"), float("inf"), -0.0]
)
LEAVES = st.one_of(st.none(), st.booleans(), ODD_NUMBERS, ODD_TEXT, st.integers(), st.text(max_size=8))
KEYS = st.sampled_from(["type", "name", "function", "parameters", "role", "content", "text", "schema", "json_schema", "json", "regex", "choice", "0", "-1", "x"])  # fmt: skip
JUNK = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)


@pytest.fixture(scope="module")
def client(tiny_dir):
    with (
        serving(tiny_dir, ServerSettings(drain_s=5), max_num_seqs=8) as (url, app),
        httpx.Client(base_url=url, timeout=600) as made,
    ):
        made.app = app
        yield made


@pytest.fixture(scope="module")
def spec(client):
    return client.get("/openapi.json").json()


def properties(spec, path):
    """The body fields that a route declares."""
    schema = spec["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return sorted(spec["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]["properties"])


def check(answer, sent):
    assert answer.status_code < 500, (answer.status_code, answer.text, sent)
    assert "x-request-id" in answer.headers
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert set(answer.json()) == {"error"} and set(error) == FIELDS, error
        assert isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str)
        assert error["param"] is None or isinstance(error["param"], str)
    elif answer.headers["content-type"].startswith("text/event-stream"):
        for line in answer.text.split("\n"):
            assert not line.startswith('data: {"error"'), (line, sent)
    return answer


def post(client, path, content):
    return check(client.post(path, content=content, headers={"Content-Type": "application/json"}), content)


def test_every_post_route_is_covered(spec):
    posts = {path for path, methods in spec["paths"].items() if "post" in methods}
    assert posts == set(VALID) | WITHOUT_BODY


@pytest.mark.parametrize("path", VALID)
def test_no_body_is_answered_with_5xx(client, spec, path):
    names = properties(spec, path)
    damaged = st.tuples(st.sampled_from(names), JUNK).map(lambda change: {**VALID[path], change[0]: change[1]})
    several = st.dictionaries(st.sampled_from(names), JUNK, max_size=4).map(lambda change: {**VALID[path], **change})
    missing = st.sampled_from(sorted(VALID[path])).map(lambda name: {k: v for k, v in VALID[path].items() if k != name})

    @settings(max_examples=2 * settings.default.max_examples)
    @given(st.one_of(damaged, damaged, several, missing, JUNK))
    def property_(body):
        post(client, path, json.dumps(body).encode())

    property_()
    post(client, path, json.dumps(VALID[path]).encode())
    wait_idle(client.app.state.context.llm)


@pytest.mark.parametrize("path", VALID)
def test_what_is_no_object_is_a_400(client, path):
    deep = b"[" * 5000 + b"]" * 5000
    long_number = b'{"max_tokens": ' + b"9" * 5000 + b', "messages": [], "prompt": 1, "input": 1}'
    for content in (
        b"",
        b"{",
        b"nope",
        b"\xff\xfe",
        b'{"a": "\xff"}',
        b"[1]",
        b'"x"',
        b"7",
        b"null",
        b"NaN",
        deep,
        long_number,
        b'{"a":' * 5000,
    ):
        answer = post(client, path, content)
        assert answer.status_code in (400, 404), (content[:40], answer.status_code, answer.text)


def test_other_content_types(client):
    body = json.dumps(VALID["/v1/completions"]).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = check(client.post("/v1/completions", content=body, headers={"Content-Type": kind}), kind)
        assert answer.status_code in (200, 400, 415)


@given(st.one_of(st.binary(max_size=40), JUNK.map(lambda value: json.dumps(value).encode())))
def test_routes_without_a_body_ignore_one(client, content):
    for path in WITHOUT_BODY:
        assert post(client, path, content).status_code in (200, 409)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
def test_wrong_methods(client, method):
    answer = client.request(method, "/v1/chat/completions")
    assert answer.status_code == 405 and "POST" in answer.headers["allow"]
    if method != "HEAD":
        check(answer, method)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/%00",
        "/v1/models/" + "x" * 2000,
        "/v1/models/a%2fb",
        "/v1",
        "/v1/chat/completions/",
        "/page/none.js",
        "/%ff",
    ],
)
def test_wrong_paths(client, path):
    assert check(client.get(path), path).status_code in (404, 405)


# What fuzzing found once, or what is easily got wrong, always runs.
WRONG_CHAT = [
    {"messages": "x"},
    {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {"messages": [{"role": "assistant", "tool_calls": [{}]}, {"role": "user", "content": "x"}], "tools": [{}]},
    {"temperature": "hot"},
    {"temperature": -1e-9},
    {"max_tokens": 0},
    {"max_tokens": 2**70},
    {"n": 10**9},
    {"seed": 2**64},
    {"stop": [""]},
    {"logit_bias": {"a": 1}},
    {"logit_bias": {"5": 1000}},
    {"logit_bias": {"-5": 1}},
    {"logit_bias": {"99999999999999999999": 1}},
    {"allowed_token_ids": []},
    {"tool_choice": "required"},
    {"tool_choice": {"type": "function"}},
    {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [{"type": "function", "function": {"name": "f"}}]},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}], "tool_choice": "required"},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "poem"}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://example.com/schema"}}}},
    {"guided_regex": "("},
    {"guided_grammar": "root ::= nothing"},
    {"guided_choice": [1]},
    {"guided_json": "{"},
    {"structured_outputs": {"regex": 5}},
    {"structured_outputs": {"regex": "a", "choice": ["b"]}},
    {"structured_outputs": {"choice": [[]]}},
    {"stream_options": {"include_usage": True}},
    {"logprobs": True, "top_logprobs": 100},
    {"chat_template_kwargs": {"add_generation_prompt": {}, "messages": 1}, "messages": []},
    {"prompt_logprobs": -1},
    {"truncate_prompt_tokens": 0},
    {"bad_words": [1]},
]  # fmt: skip


@pytest.mark.parametrize("change", WRONG_CHAT, ids=lambda c: json.dumps(c)[:60])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_wrong_values_are_400_also_for_streams(client, change, stream):
    body = {**CHAT, **change} | ({"stream": True} if stream and "stream_options" not in change else {})
    assert post(client, "/v1/chat/completions", json.dumps(body).encode()).status_code == 400, body
