"""Reasoning and answer are told apart the same way however the text arrives, and no character is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serve.text.whole_answers import split_reasoning
from wager.errors import UsageError
from wager.serve.text.reasoning import CLOSE, OPEN, ReasoningStream, reasoning_stream

PIECES = st.lists(
    st.sampled_from([OPEN, CLOSE, "<", "<th", "</think", ">", "a", " ", "\n", "é😀", "think"]), max_size=14
).map("".join)
CUTS = st.lists(st.integers(0, 90), max_size=8)


def streamed(text, cuts, opened):
    stream, edges = ReasoningStream(opened), sorted({0, len(text), *(min(c, len(text)) for c in cuts)})
    parts = [stream.push(text[a:b]) for a, b in zip(edges, edges[1:], strict=False)] + [stream.finish()]
    return "".join(p.reasoning for p in parts), "".join(p.content for p in parts)


def expected(text, opened):
    """Told in one sentence: after an opening tag (here or in the prompt) everything up to the closing tag is reasoning."""
    if not opened:
        if not text.lstrip().startswith(OPEN):
            return "", text
        text = text.lstrip()[len(OPEN) :]
    reasoning, closed, content = text.partition(CLOSE)
    return reasoning, content.lstrip("\n") if closed else ""


@given(text=PIECES, cuts=CUTS, opened=st.booleans())
def test_any_cut_gives_the_same_split(text, cuts, opened):
    whole = split_reasoning(ReasoningStream(opened), text)
    assert (whole.reasoning, whole.content) == expected(text, opened) == streamed(text, cuts, opened)
    assert streamed(text, range(len(text)), opened) == expected(text, opened)


@given(text=PIECES, cuts=CUTS, opened=st.booleans())
def test_tags_never_show_while_they_bound(text, cuts, opened):
    reasoning, content = streamed(text, cuts, opened)
    assert CLOSE not in reasoning
    if reasoning:
        assert not content.startswith("\n")


def test_nothing_is_held_longer_than_it_may_be_a_tag():
    stream = ReasoningStream(opened=True)
    assert [stream.push(p).reasoning for p in ("a", "<", "/th", "x", "</think", "!")] == [
        "a",
        "",
        "",
        "</thx",
        "",
        "</think!",
    ]
    stream = ReasoningStream(opened=False)
    assert [stream.push(p).content for p in (" ", "<", "b", "c")] == ["", "", " <b", "c"]


def test_the_prompt_may_have_opened_the_thought():
    for parser in ("deepseek_r1", "qwen3"):
        assert split_reasoning(reasoning_stream(parser, "user: hi\n<think>\n"), "hm</think>yes").reasoning == "hm"
        assert split_reasoning(reasoning_stream(parser, "user: hi\n"), "yes").content == "yes"


def test_an_unknown_parser_names_the_known_ones():
    with pytest.raises(UsageError, match="'gpt' is unknown; use one of deepseek_r1, qwen3"):
        reasoning_stream("gpt", "")
