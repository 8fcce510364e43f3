"""What the demo is trained on, its vocabulary and its chat format."""

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wager.models.demo import corpus
from wager.models.demo.chats import generated_chats
from wager.models.demo.corpus import Document, documents
from wager.models.demo.dataset import Batches, write_streams
from wager.models.demo.tokenizer import CHAT_TEMPLATE, SPECIAL, VISIBLE, render, train_tokenizer
from wager.serve.text.chat_template import ChatTemplate
from wager.serve.text.tools import tool_stream


@pytest.fixture(scope="module")
def few_documents(tmp_path_factory):
    wiki = tmp_path_factory.mktemp("data")
    (wiki / "wikitext2").mkdir()
    lines = [" = First = ", " A @-@ B , c . ", " = = Part = = ", " <unk> text ", " = Second = ", " More text . "]
    (wiki / "wikitext2" / "valid.txt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        files = [f for f in corpus.library_files() if f.stem in ("json", "textwrap", "bisect", "heapq", "keyword")]
        patch.setattr(corpus, "library_files", lambda: files)
        return list(documents(wiki, chats=300))


@pytest.fixture(scope="module")
def tokenizer(few_documents):
    return train_tokenizer((d.text for d in few_documents), 700)


def test_every_domain_has_documents_and_splits_are_repeatable(few_documents):
    assert {d.domain for d in few_documents} == set(corpus.DOMAINS)
    assert [d.held_out for d in few_documents] == [Document(d.domain, d.name, d.text).held_out for d in few_documents]
    held = sum(d.held_out for d in few_documents)
    assert 0 < held < len(few_documents) / 8


def test_the_library_is_read_without_tests_and_third_parties():
    names = [str(f) for f in corpus.library_files()]
    assert any(n.endswith("asyncio/events.py") for n in names)
    assert not any("site-packages" in n or "/test/" in n or "/idlelib/" in n for n in names)


def test_wikitext_marks_are_undone(few_documents):
    first = next(d.text for d in few_documents if d.domain == "wiki")
    assert "A-B, c." in first and "## Part ##" in first and "<unk>" not in first and "Second" not in first


@given(st.text())
def test_the_vocabulary_round_trips_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_vocabulary_size_and_special_tokens(tokenizer):
    assert tokenizer.get_vocab_size() == 700
    assert [tokenizer.token_to_id(t) for t in SPECIAL] == [0, 1, 2]
    for text in (*SPECIAL, *VISIBLE):
        assert len(tokenizer.encode(text).ids) == 1


def test_training_text_is_what_the_server_renders():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "s": "é<>"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi & <b>"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "ok"},
    ]
    served = ChatTemplate(CHAT_TEMPLATE)
    for given_tools in (None, tools):
        assert served.render(messages, given_tools, add_generation_prompt=False) == render(messages, given_tools)
    assert served.render(messages).endswith("<|im_start|>assistant\n")


def test_generated_tool_calls_are_read_back_by_the_hermes_parser():
    calls = 0
    for chat in generated_chats(400):
        for turn in chat.split("<|im_start|>assistant\n")[1:]:
            text = turn.split("<|im_end|>")[0]
            if text.startswith("<tool_call>"):
                stream = tool_stream("hermes")
                events = [*stream.push(text), *stream.finish()]
                assert any(getattr(e, "name", None) for e in events), text
                calls += 1
            elif text.startswith(("{", "[{")):
                json.loads(text)
    assert calls > 20
    assert list(generated_chats(20)) == list(generated_chats(20))


def test_streams_hold_every_document_once(tmp_path, few_documents, tokenizer):
    sizes = write_streams(few_documents, tokenizer, tmp_path)
    train = np.load(tmp_path / "train.npy")
    assert len(train) == sizes["train"]
    assert (train == 0).sum() == sum(not d.held_out for d in few_documents)
    kept = {
        tokenizer.decode(part.tolist(), skip_special_tokens=False)
        for part in np.split(train, np.flatnonzero(train == 0) + 1)
        if len(part)
    }
    assert {d.text + "<|endoftext|>" for d in few_documents if not d.held_out} <= kept


@pytest.mark.parametrize("ranks", [1, 3])
def test_an_epoch_shows_every_window_once(tmp_path, ranks):
    np.save(tmp_path / "s.npy", np.arange(101, dtype=np.uint16))
    batches = [Batches(tmp_path / "s.npy", 10, rank, ranks) for rank in range(ranks)]
    windows = [batches[n % ranks].window(n // ranks) for n in range(10)]
    assert sorted(int(w[0]) for w in windows) == list(range(0, 100, 10))
    assert all((np.diff(w) == 1).all() and len(w) == 11 for w in windows)
    later = [int(batches[n % ranks].window(n // ranks)[0]) for n in range(10, 20)]
    assert sorted(later) == list(range(0, 100, 10)) and later != [int(w[0]) for w in windows]


def test_a_stream_that_is_too_short_is_refused(tmp_path):
    np.save(tmp_path / "s.npy", np.arange(5, dtype=np.uint16))
    with pytest.raises(ValueError, match="fewer than"):
        Batches(tmp_path / "s.npy", 10)


def test_skills_are_answered_rightly():
    from wager.models.demo import chats

    rng = random.Random(3)
    for _ in range(50):
        question, answer = chats._add(rng)
        a, word, b = question.removeprefix("What is ").removesuffix("?").split()
        value = {"plus": int(a) + int(b), "times": int(a) * int(b), "minus": int(a) - int(b)}[word]
        assert answer.endswith(f"is {value}.")
