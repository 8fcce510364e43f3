"""Tool-call and reasoning streams: however the text is cut, the same calls come out and nothing is lost."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serve.text.whole_answers import collect, parse_tools, split_reasoning
from wager.errors import UsageError
from wager.serve.text.reasoning import ReasoningStream
from wager.serve.text.tool_streams import NamedToolStream, ToolDelta
from wager.serve.text.tools import forced_constraint, forced_stream, tool_stream

CASES = {
    "hermes": [
        ('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', "", [("f", {"x": 1})]),
        (
            'Let me see. <tool_call>{"name": "f", "arguments": {"s": "a } \\" b"}}</tool_call>\n<tool_call>{"name": "g", "arguments": {}}</tool_call>',
            "Let me see. ",
            [("f", {"s": 'a } " b'}), ("g", {})],
        ),
        ("no call at all < here", "no call at all < here", []),
        ("<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
        ('<tool_call>{"arguments": {"x": [1, {"y": 2}]}, "name": "f"}</tool_call>', "", [("f", {"x": [1, {"y": 2}]})]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", {})]),
        (
            '<tool_call>{"name": 7, "arguments": {}}</tool_call>',
            '<tool_call>{"name": 7, "arguments": {}}</tool_call>',
            [],
        ),
    ],
    "llama3_json": [
        ('{"name": "f", "parameters": {"x": "é😀"}}', "", [("f", {"x": "é😀"})]),
        (
            '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"a": 1}}',
            "",
            [("f", {}), ("g", {"a": 1})],
        ),
        ("plain {text}", "plain {text}", []),
        ('{"answer": 42}', '{"answer": 42}', []),
    ],
    "mistral": [
        (
            '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]',
            "",
            [("f", {"x": 1}), ("g", {})],
        ),
        ("hello [TOOL", "hello [TOOL", []),
    ],
    "pythonic": [
        ("[f(x=1, y='a'), g()]", "", [("f", {"x": 1, "y": "a"}), ("g", {})]),
        ("[1, 2]", "[1, 2]", []),
        ("hi [f()]", "hi [f()]", []),
    ],
}
FLAT = [(parser, *case) for parser, cases in CASES.items() for case in cases]


def calls_of(calls):
    return [(c.name, json.loads(c.arguments)) for c in calls]


@pytest.mark.parametrize(("parser", "text", "content", "calls"), FLAT)
def test_whole_text(parser, text, content, calls):
    found_content, found = parse_tools(tool_stream(parser), text)
    assert (found_content, calls_of(found)) == (content, calls)


@pytest.mark.parametrize(("parser", "text", "content", "calls"), FLAT)
def test_every_cut_gives_the_same(parser, text, content, calls):
    for first in range(len(text) + 1):
        for second in (first, min(first + 3, len(text))):
            stream = tool_stream(parser)
            events = (
                stream.push(text[:first])
                + stream.push(text[first:second])
                + stream.push(text[second:])
                + stream.finish()
            )
            found_content, found = collect(events)
            assert (found_content, calls_of(found)) == (content, calls), (first, second)
    stream = tool_stream(parser)
    events = [e for char in text for e in stream.push(char)] + stream.finish()
    assert (collect(events)[0], calls_of(collect(events)[1])) == (content, calls)


def test_names_come_first_and_arguments_grow():
    stream = tool_stream("hermes")
    events = [
        e for char in '<tool_call>{"name": "f", "arguments": {"x": 12345}}</tool_call>' for e in stream.push(char)
    ]
    assert events[0] == ToolDelta(0, name="f") and all(e.name is None for e in events[1:])
    assert len(events) > 5


@given(st.text(max_size=60))
def test_text_without_calls_is_content(text):
    for parser in CASES:
        content, calls = parse_tools(tool_stream(parser), text)
        assert calls or content == text


def test_forced_choices():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    assert forced_constraint(tools, {"type": "function", "function": {"name": "f"}}).json == {"type": "object"}
    assert "anyOf" in json.dumps(forced_constraint(tools, "required").json)
    with pytest.raises(UsageError, match="'g'"):
        forced_constraint(tools, {"type": "function", "function": {"name": "g"}})
    content, calls = parse_tools(
        forced_stream("required"), '[{"name":"f","parameters":{"x":1}},{"name":"f","parameters":{}}]'
    )
    assert content == "" and calls_of(calls) == [("f", {"x": 1}), ("f", {})]
    assert parse_tools(NamedToolStream("f"), '{"x":1}')[1][0].arguments == '{"x":1}'
    with pytest.raises(UsageError, match="unknown"):
        tool_stream("nope")


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>hmm</think>\n\nyes", False, "hmm", "yes"),
        ("hmm</think>yes", True, "hmm", "yes"),
        ("just an answer", False, "", "just an answer"),
        ("<think>never closed", False, "never closed", ""),
        ("<thin", False, "", "<thin"),
        ("  lead", False, "", "  lead"),
    ],
)
def test_reasoning_splits_the_same_at_every_cut(text, opened, reasoning, content):
    whole = split_reasoning(ReasoningStream(opened), text)
    assert (whole.reasoning, whole.content) == (reasoning, content)
    for cut in range(len(text) + 1):
        stream = ReasoningStream(opened)
        parts = [stream.push(text[:cut]), stream.push(text[cut:]), stream.finish()]
        assert ("".join(p.reasoning for p in parts), "".join(p.content for p in parts)) == (reasoning, content), cut
