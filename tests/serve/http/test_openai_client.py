"""The real `openai` package against a real server: what its users call."""

import json

import httpx
import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.serve.http.conftest import KEY, wait_idle

COUNT = [{"role": "user", "content": "Count from one to ten."}]
ASK = {"model": "tiny", "messages": COUNT, "temperature": 0, "max_tokens": 12}
WRITE = {"model": "tiny", "prompt": "Once upon", "temperature": 0, "max_tokens": 12}


class Person(BaseModel):
    name: str
    age: int
    tags: list[str]


@pytest.fixture(scope="module")
def client(url):
    with OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=600) as made:
        yield made


@pytest.fixture(scope="module")
def closer(closing):
    """A client of the model that ends what it begins."""
    with OpenAI(base_url=f"{closing[0]}/v1", api_key=KEY, max_retries=0, timeout=600) as made:
        yield made


def text_of(chunks, choice=0):
    return "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == choice)


# -- chat and completions --------------------------------------------------------------------------------------------------------


def test_chat_whole_and_streamed_agree(client):
    whole = client.chat.completions.create(**ASK)
    choice = whole.choices[0]
    assert whole.object == "chat.completion" and whole.id.startswith("chatcmpl-") and whole.model == "tiny"
    assert choice.message.role == "assistant" and choice.message.content and choice.message.tool_calls is None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and text_of(chunks) == choice.message.content
    assert {c.id for c in chunks} == {chunks[0].id} and {c.created for c in chunks} == {chunks[0].created}
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == [choice.finish_reason]
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1) and chunks[-1].choices == []
    last = chunks[-1].usage
    assert (last.prompt_tokens, last.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def ending(client, **asked):
    """ASK with a stop string from the middle of its answer: the package's helpers refuse answers that were cut at max_tokens."""
    return {**ASK, **asked, "stop": client.chat.completions.create(**ASK).choices[0].message.content[4:6]}


def test_the_stream_helper_assembles_the_answer(client):
    asked = ending(client)
    with client.chat.completions.stream(**asked) as stream:
        said = "".join(e.delta for e in stream if e.type == "content.delta")
        message = stream.get_final_completion().choices[0].message
    assert message.content == said == client.chat.completions.create(**asked).choices[0].message.content


def test_several_choices_whole_and_streamed(client):
    ask = {**ASK, "n": 3, "temperature": 1, "seed": 5, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**ask)
    assert [c.index for c in whole.choices] == [0, 1, 2] and whole.usage.completion_tokens == 36
    texts = [c.message.content for c in whole.choices]
    assert len(set(texts)) == 3
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert [text_of(chunks, i) for i in range(3)] == texts
    ends = [c.index for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert sorted(ends) == [0, 1, 2]


def test_chat_logprobs(client):
    ask = {**ASK, "logprobs": True, "top_logprobs": 3, "extra_body": {"ignore_eos": True}}
    choice = client.chat.completions.create(**ask).choices[0]
    content = choice.logprobs.content
    assert len(content) == 12 and all(len(entry.top_logprobs) == 3 for entry in content)
    for entry in content:  # greedy: the chosen token is the first alternative
        assert entry.logprob <= 0 and entry.token == entry.top_logprobs[0].token
        assert sorted((t.logprob for t in entry.top_logprobs), reverse=True) == [t.logprob for t in entry.top_logprobs]
    raw = b"".join(bytes(entry.bytes) for entry in content)
    assert raw.decode(errors="replace") == choice.message.content
    chunks = client.chat.completions.create(**ask, stream=True)
    streamed = [e for chunk in chunks for c in chunk.choices if c.logprobs for e in c.logprobs.content]
    assert [e.token for e in streamed] == [e.token for e in content]
    assert [e.logprob for e in streamed] == pytest.approx([e.logprob for e in content], abs=1e-4)


def test_completions_forms_of_prompt_and_streams(client):
    whole = client.completions.create(**WRITE)
    chunks = list(client.completions.create(**WRITE, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    several = client.completions.create(**{**WRITE, "prompt": ["Once upon", "Once"], "n": 2})
    assert [c.index for c in several.choices] == [0, 1, 2, 3] and several.choices[1].text == whole.choices[0].text
    ids = [[5, 6, 7], [8, 9]]
    assert len(client.completions.create(**{**WRITE, "prompt": ids}).choices) == 2
    assert len(client.completions.create(**{**WRITE, "prompt": ids[0]}).choices) == 1


def test_completion_echo_and_logprobs(client):
    asked = {**WRITE, "echo": True, "logprobs": 2, "max_tokens": 4, "extra_body": {"ignore_eos": True}}
    choice = client.completions.create(**asked).choices[0]
    found = choice.logprobs
    assert choice.text.startswith("Once upon") and found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == len(found.top_logprobs)
    assert all(value <= 0 for value in found.token_logprobs[1:]) and all(
        2 <= len(t) <= 3 for t in found.top_logprobs[1:]
    )


async def test_async_client(url):
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        whole = await client.chat.completions.create(**ASK)
        stream = await client.chat.completions.create(**ASK, stream=True)
        chunks = [chunk async for chunk in stream]
        assert text_of(chunks) == whole.choices[0].message.content
        stop = whole.choices[0].message.content[4:6]
        async with client.chat.completions.stream(**ASK, stop=stop) as helper:
            final = await helper.get_final_completion()
        assert final.choices[0].message.content == whole.choices[0].message.content.split(stop)[0]
        assert [m.id async for m in client.models.list()] == ["tiny"]


def test_leaving_a_stream_frees_the_engine(client, engine):
    with client.chat.completions.create(
        **{**ASK, "max_tokens": 200}, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    wait_idle(engine)


def test_models(client):
    assert [m.id for m in client.models.list()] == ["tiny"]
    model = client.models.retrieve("tiny")
    assert model.object == "model" and model.owned_by == "wager" and model.created > 0


# -- tools and structured outputs ------------------------------------------------------------------------------------------------


def tool(name):
    parameters = {
        "type": "object",
        "properties": {"x": {"type": "integer"}, "s": {"type": "string"}},
        "required": ["x", "s"],
    }
    return {"type": "function", "function": {"name": name, "parameters": {**parameters, "additionalProperties": False}}}


TOOLS = [tool("add"), tool("look_up")]
NAMED = {"type": "function", "function": {"name": "look_up"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 7, "s": "né"}}\n</tool_call>'
TWO = f"{CALL}\n{CALL}"


def calling(choice, **more):
    return {
        "model": "tiny",
        "messages": COUNT,
        "max_tokens": 160,
        "temperature": 1,
        "seed": 2,
        "tools": TOOLS,
        "tool_choice": choice,
        **more,
    }


def saying(text, **more):
    """An auto-mode request whose model says exactly this text, which the parser then reads."""
    return calling("auto", **{**more, "extra_body": {"guided_choice": [text]}})


def assembled(chunks):
    """Tool calls out of their deltas, with the shape that clients insist on checked on the way."""
    calls = {}
    for chunk in chunks:
        for choice in chunk.choices:
            for piece in choice.delta.tool_calls or ():
                if piece.index not in calls:
                    assert piece.id and piece.type == "function" and piece.function.name
                    assert piece.function.arguments == ""
                    calls[piece.index] = [piece.function.name, ""]
                else:
                    assert piece.id is None and piece.type is None and piece.function.name is None
                    calls[piece.index][1] += piece.function.arguments
    return [tuple(call) for _, call in sorted(calls.items())]


@pytest.mark.parametrize(
    "choice, names", [("required", {"add", "look_up"}), (NAMED, {"look_up"})], ids=["required", "named"]
)
def test_forced_tools_whole_and_streamed(closer, choice, names):
    whole = closer.chat.completions.create(**calling(choice)).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    for call in whole.message.tool_calls:
        arguments = json.loads(call.function.arguments)
        assert call.type == "function" and call.id.startswith("call-") and call.function.name in names
        assert isinstance(arguments["x"], int) and isinstance(arguments["s"], str)
    chunks = list(closer.chat.completions.create(**calling(choice), stream=True))
    assert assembled(chunks) == [(c.function.name, c.function.arguments) for c in whole.message.tool_calls]
    last = chunks[-1].choices[0]
    assert last.finish_reason == "tool_calls" and last.delta.tool_calls is None and last.delta.content is None


def test_auto_tools_are_parsed_from_the_text(closer):
    whole = closer.chat.completions.create(**saying(CALL)).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    (call,) = whole.message.tool_calls
    assert call.function.name == "add" and json.loads(call.function.arguments) == {"x": 7, "s": "né"}
    chunks = list(closer.chat.completions.create(**saying(CALL), stream=True))
    assert assembled(chunks) == [("add", call.function.arguments)] and text_of(chunks) == ""
    pieces = [p for c in chunks for choice in c.choices for p in choice.delta.tool_calls or ()]
    assert len(pieces) > 4, "arguments must stream in pieces"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_auto_without_a_call_is_content(closer):
    for text in ("No tool is needed.", "<tool_call>oops"):
        whole = closer.chat.completions.create(**saying(text)).choices[0]
        assert whole.message.content == text and whole.message.tool_calls is None and whole.finish_reason == "stop"
        assert text_of(closer.chat.completions.create(**saying(text), stream=True)) == text


@pytest.mark.parametrize("stream", [False, True])
def test_parallel_tool_calls_can_be_refused(closer, stream):
    def calls(**asked):
        if stream:
            chunks = list(closer.chat.completions.create(**asked, stream=True))
            assert chunks[-1].choices[0].finish_reason == "tool_calls"
            return assembled(chunks)
        return closer.chat.completions.create(**asked).choices[0].message.tool_calls

    assert len(calls(**saying(TWO))) == 2
    assert len(calls(**saying(TWO, parallel_tool_calls=True))) == 2
    assert len(calls(**saying(TWO, parallel_tool_calls=False))) == 1
    # Calls of no-argument tools are short, so that a model that may write several does.
    bare = [{"type": "function", "function": {"name": "go"}}]
    many = {**calling("required", max_tokens=220), "tools": bare, "extra_body": {"logit_bias": comma_bias(closer)}}
    assert len(calls(**many)) > 1
    assert len(calls(**many, parallel_tool_calls=False)) == 1


def comma_bias(client):
    """Make "," far likelier than "]"."""
    base = str(client.base_url).removesuffix("/v1/")
    tokens = {
        t: httpx.post(f"{base}/tokenize", json={"prompt": t}, headers={"Authorization": f"Bearer {KEY}"}).json()
        for t in ",]"
    }
    return {str(tokens[","]["tokens"][0]): 40, str(tokens["]"]["tokens"][0]): -40}


def test_tool_results_go_back(closer):
    call = {"id": "call-1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages = [
        *COUNT,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "3"},
    ]
    assert closer.chat.completions.create(model="tiny", messages=messages, max_tokens=3).choices


@pytest.mark.parametrize("face", ["chat", "beta"])
def test_parse_into_a_pydantic_model(closer, face):
    chat = closer.chat if face == "chat" else closer.beta.chat
    answer = chat.completions.parse(model="tiny", messages=COUNT, response_format=Person, max_tokens=200, seed=1)
    person = answer.choices[0].message.parsed
    assert isinstance(person, Person) and isinstance(person.age, int)
    with chat.completions.stream(
        model="tiny", messages=COUNT, response_format=Person, max_tokens=200, seed=1
    ) as stream:
        streamed = stream.get_final_completion().choices[0].message.parsed
    assert streamed == person


def test_parse_tool_arguments_and_a_cut_answer(closer):
    strict = [openai.pydantic_function_tool(Person)]
    asked = {"model": "tiny", "messages": COUNT, "seed": 1, "tools": strict, "tool_choice": "required"}
    answer = closer.chat.completions.parse(**asked, max_tokens=230, extra_body={"parallel_tool_calls": False})
    assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, Person)
    with pytest.raises(openai.LengthFinishReasonError):
        closer.chat.completions.parse(model="tiny", messages=COUNT, response_format=Person, max_tokens=3)


# -- embeddings and responses ----------------------------------------------------------------------------------------------------


def test_embeddings_in_both_encodings(client):
    texts = ["one two three", "Größe 😀"]
    packed = client.embeddings.create(model="tiny", input=texts)  # the package asks for base64 and unpacks it
    plain = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    assert [d.index for d in plain.data] == [0, 1] and len(plain.data[0].embedding) == 64
    np.testing.assert_allclose([d.embedding for d in packed.data], [d.embedding for d in plain.data], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(plain.data[0].embedding), 1, atol=1e-5)
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > 0
    one = client.embeddings.create(model="tiny", input=[5, 6, 7])
    assert len(one.data) == 1 and len(client.embeddings.create(model="tiny", input=[[5, 6, 7], [8]]).data) == 2


def test_responses_whole_and_streamed(client):
    asked = {"model": "tiny", "input": "Count from one to ten.", "temperature": 0, "max_output_tokens": 10}
    chat = client.chat.completions.create(**{**ASK, "max_tokens": 10}).choices[0].message.content
    whole = client.responses.create(**asked)
    assert whole.output_text == chat and whole.id.startswith("resp-") and whole.usage.output_tokens <= 10
    events = list(client.responses.create(**asked, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == chat
    assert events[0].type == "response.created" and events[-1].response.output_text == chat
    assert events[-1].type == f"response.{whole.status}" and events[-1].response.usage == whole.usage
    with client.responses.stream(**{**asked, "instructions": "Be brief."}) as stream:
        final = list(stream)[-1].response
    assert final.output_text and final.usage.input_tokens > whole.usage.input_tokens
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"


def test_responses_with_tools_and_formats(closer):
    tools = [{"type": "function", "name": "add", "strict": True, "parameters": tool("add")["function"]["parameters"]}]
    asked = {"model": "tiny", "input": "Add.", "tools": tools, "tool_choice": "required", "max_output_tokens": 160}
    asked |= {"parallel_tool_calls": False, "temperature": 0.1}
    answer = closer.responses.create(**asked)
    (call,) = [item for item in answer.output if item.type == "function_call"]
    assert call.name == "add" and isinstance(json.loads(call.arguments)["x"], int)
    assert answer.parallel_tool_calls is False and answer.tools[0].name == "add"
    with closer.responses.stream(**asked) as stream:
        events = list(stream)
    streamed = [e for e in events if e.type == "response.function_call_arguments.delta"]
    done = next(e for e in events if e.type == "response.function_call_arguments.done")
    assert "".join(e.delta for e in streamed) == done.arguments and json.loads(done.arguments)
    final = events[-1].response
    assert [i.type for i in final.output] == ["function_call"] and final.output[0].arguments == done.arguments
    added = [e for e in events if e.type == "response.output_item.added"]
    assert [e.item.id for e in added] == [i.id for i in final.output]
    parsed = closer.responses.parse(model="tiny", input="Who?", text_format=Person, max_output_tokens=200)
    assert isinstance(parsed.output_parsed, Person)


def test_responses_conversation_items(client):
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "What is 1+2?"}]},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "3"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Three."}]},
        {"role": "user", "content": "Sure?"},
    ]
    assert client.responses.create(model="tiny", input=items, max_output_tokens=3).output_text
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="tiny", input="And then?", previous_response_id="resp-1")
