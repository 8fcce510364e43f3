"""Streaming text: for any tokens and any way they arrive, the pieces add up to the whole, and stop strings never show."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serve.text.tokenizers_for_tests import make
from wager.serve.params import SamplingParams
from wager.serve.text.detokenize import Detokenizer, StopFinder

KINDS = ["byte-level", "sentencepiece"]
TEXT = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("abth e😀👍🏽é́你\u200d")), max_size=30
)
CUTS = st.lists(st.integers(1, 5), min_size=1, max_size=6)


def pieces(tokens, cuts):
    """The tokens in groups of the given sizes, over and over: what steps with and without accepted guesses deliver."""
    at, turn = 0, 0
    while at < len(tokens):
        size = cuts[turn % len(cuts)]
        yield tokens[at : at + size]
        at, turn = at + size, turn + 1


def stream(tokenizer, tokens, cuts, prompt=(5,), **params):
    """(pieces of text, stop string met, tokens used)."""
    detokenizer, shown, used = Detokenizer(tokenizer, list(prompt), SamplingParams(max_tokens=None, **params)), [], 0
    for group in pieces(tokens, cuts):
        delta = detokenizer.push(group)
        shown.append(delta.text)
        used += delta.tokens_used
        if delta.stop is not None:
            return shown, delta.stop, used
    return [*shown, detokenizer.finish()], None, used


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT, prompt=TEXT, cuts=CUTS, skip=st.booleans())
def test_pieces_of_any_text_add_up(kind, text, prompt, cuts, skip):
    tokenizer = make(kind)
    prompt_ids = tokenizer.encode(prompt or "a")
    tokens = (
        tokenizer.encode(prompt + text)[len(tokenizer.encode(prompt)) :]
        if kind == "byte-level"
        else tokenizer.encode(text)
    )
    shown, stop, used = stream(tokenizer, tokens, cuts, prompt_ids, skip_special_tokens=skip)
    whole = (
        tokenizer.decode(tokens, skip)
        if kind == "byte-level"
        else tokenizer.decode([*prompt_ids, *tokens], skip)[len(tokenizer.decode(prompt_ids, skip)) :]
    )
    assert "".join(shown) == whole and stop is None and used == len(tokens)


@given(data=st.data(), cuts=CUTS, skip=st.booleans())
def test_pieces_of_arbitrary_byte_level_tokens_add_up(data, cuts, skip):
    """Also tokens that no text encodes to: halves of characters, specials in the middle, ids of the padding."""
    tokenizer = make("byte-level")
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=25))
    shown, _, _ = stream(tokenizer, tokens, cuts, skip_special_tokens=skip)
    skipped = tokenizer.special_ids if skip else ()
    assert "".join(shown) == b"".join(tokenizer.token_bytes(t) for t in tokens if t not in skipped).decode(
        "utf-8", "replace"
    )


@given(data=st.data(), cuts=CUTS, skip=st.booleans())
def test_pieces_of_byte_fallback_tokens_add_up(data, cuts, skip):
    """Any tokens between runs of bytes that are characters; that decoder judges a run of bytes as a whole, so no stream can show a broken
    one as it does."""
    tokenizer = make("sentencepiece")
    single = st.integers(259, tokenizer.vocab_size - 1).map(lambda t: [t])
    parts = data.draw(st.lists(st.one_of(single, TEXT.map(tokenizer.encode), st.just([2])), max_size=12))
    tokens = [token for part in parts for token in part]
    prompt = tokenizer.encode("the")
    shown, _, _ = stream(tokenizer, tokens, cuts, prompt, skip_special_tokens=skip)
    assert "".join(shown) == tokenizer.decode([*prompt, *tokens], skip)[len("the") :]


def test_characters_show_when_complete_and_not_before():
    tokenizer = make("byte-level")
    tokens = tokenizer.encode("a\U0001f9ffb")
    shown, _, _ = stream(tokenizer, tokens, [1])
    assert "".join(shown) == "a\U0001f9ffb" and not any("\ufffd" in piece for piece in shown)
    assert shown[0] == "a" and shown[1] == ""
    assert "".join(stream(tokenizer, tokens[:2], [1])[0]) == "a\ufffd"


def test_the_first_word_keeps_its_space():
    tokenizer = make("sentencepiece")
    prompt, answer = tokenizer.encode("The"), tokenizer.encode("the a")
    assert "".join(stream(tokenizer, answer, [1], prompt)[0]) == " the a"


# -- stop strings --------------------------------------------------------------------------------------------------------------------


def expected_stop(text, stops, include):
    """The earliest stop string, the longest of those that begin there."""
    found = [(text.find(s), -len(s), s) for s in stops if s in text]
    if not found:
        return text, None
    at, _, stop = min(found)
    return text[: at + len(stop)] if include else text[:at], stop


@given(
    text=st.text("ab c", max_size=30), stops=st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3), include=st.booleans(),
    cuts=CUTS,
)  # fmt: skip
def test_stop_finder_cut_by_cut_equals_search_in_the_whole(text, stops, include, cuts):
    finder, shown = StopFinder(tuple(stops), include), ""
    for piece in pieces(text, cuts):
        safe, stop = finder.push(piece)
        shown += safe
        if stop is not None:
            break
        assert text.startswith(shown)
    else:
        shown, stop = shown + finder.finish(), None
    reached = text if stop is None else text[: text.find(stop) + len(stop)]
    if stop is None:
        assert shown == text and not any(s in text for s in stops)
    else:
        assert stop in stops and not any(s in shown[: len(shown) - (len(stop) if include else 0)] for s in stops)
        assert reached.startswith(shown)
    if all(cut == 1 for cut in cuts) or len(stops) == 1:
        want, wanted_stop = expected_stop(text, stops, include)
        if len(stops) == 1:
            assert (shown, stop) == (want, wanted_stop)


@pytest.mark.parametrize("kind", KINDS)
@given(
    text=st.text("the uo,.é😀", max_size=25),
    start=st.integers(0, 24),
    length=st.integers(1, 6),
    cuts=CUTS,
    include=st.booleans(),
)
def test_stop_strings_across_token_borders_never_leak(kind, text, start, length, cuts, include):
    tokenizer = make(kind)
    tokens, prompt = tokenizer.encode(text), tokenizer.encode("The")
    whole = "".join(stream(tokenizer, tokens, [1], prompt)[0])
    stop = whole[start : start + length]
    if not stop:
        return
    shown, met, used = stream(tokenizer, tokens, cuts, prompt, stop=stop, include_stop_str_in_output=include)
    assert met == stop and "".join(shown) == expected_stop(whole, [stop], include)[0]
    if not include:
        assert stop not in "".join(shown)
    needed = "".join(stream(tokenizer, tokens[:used], [1], prompt)[0])
    assert stop in needed, "the tokens counted as used hold the stop string"
    assert (
        stop not in "".join(stream(tokenizer, tokens[: used - 1], [1], prompt)[0]).removesuffix("\ufffd")
        or kind == "sentencepiece"
    )


def test_a_possible_beginning_is_held_back_and_released():
    finder = StopFinder(("STOP",), False)
    assert [finder.push(p)[0] for p in ("a", "S", "T", "x", "ST")] == ["a", "", "", "STx", ""]
    assert finder.finish() == "ST"


def test_stop_at_the_first_token_gives_empty_text():
    tokenizer = make("byte-level")
    assert stream(tokenizer, tokenizer.encode("hello"), [5], stop="h") == ([""], "h", 1)


def test_stops_before_min_tokens_do_not_count():
    tokenizer = make("byte-level")
    tokens = tokenizer.encode("a,a,a,a")
    shown, met, used = stream(tokenizer, tokens, [1], stop=",", min_tokens=3)
    assert met == "," and "".join(shown) == "a,a" and used == 4


def test_a_stop_completed_by_the_last_held_character_does_not_show():
    tokenizer = make("byte-level")
    half = tokenizer.encode("x\U0001f9ff")[:2]
    assert "".join(stream(tokenizer, half, [1], stop="x\ufffd")[0]) == ""
