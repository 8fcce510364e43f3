"""The tokenizer's own rules: one beginning of text, every end of text, bytes of each token."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serve.text.tokenizers_for_tests import make, save
from wager.errors import CheckpointError, UsageError
from wager.serve.text.tokenizer import Tokenizer

KINDS = ["byte-level", "sentencepiece"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(text=TEXT)
def test_byte_level_text_comes_back_and_token_bytes_add_up(text):
    tokenizer = make("byte-level")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.byte_level


@given(text=TEXT)
def test_byte_fallback_text_comes_back(text):
    tokenizer = make("sentencepiece")
    if "▁" not in text:  # that character is the tokenizer's own name for a space
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == (b" " + text.encode() if text else b"")
    assert not tokenizer.byte_level


def test_bytes_of_unfinished_characters_and_of_padding_ids():
    tokenizer = make("byte-level")
    ids = tokenizer.encode("\U0001f9ff")
    assert len(ids) > 1 and tokenizer.token_text(ids[0]) == "\ufffd"
    assert tokenizer.token_bytes(100_000) == b"" and tokenizer.decode([*ids, 100_000]) == "\U0001f9ff"
    assert tokenizer.token_bytes(tokenizer.encode("<tool>")[0]) == b"<tool>"


def test_the_beginning_of_text_is_added_once(tmp_path):
    from tokenizers.processors import TemplateProcessing

    backend = make("byte-level")._backend
    bos = backend.token_to_id("<bos>")
    twin = type(backend).from_str(backend.to_str())
    twin.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    twin.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<bos>"}, "eos_token": "<eos>"}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("hi")[0] == bos and tokenizer.encode("hi").count(bos) == 1
    assert tokenizer.encode("<bos>hi") == tokenizer.encode("hi")
    assert bos not in tokenizer.encode("hi", add_special_tokens=False)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ('{"eos_token": "<eos>"}', None, {"<eos>"}),
        ('{"eos_token": {"content": "<eos>"}}', '{"eos_token_id": 1}', {"<eos>", "<bos>"}),
        ("{}", '{"eos_token_id": [0, 1]}', {"<eos>", "<bos>"}),
        ("{}", "{}", set()),
        ('{"eos_token": null}', '{"eos_token_id": null}', set()),
    ],
)
def test_every_listed_end_of_text_counts(tmp_path, config, generation, expected):
    tokenizer = Tokenizer.load(save("byte-level", tmp_path, config, generation))
    assert tokenizer.eos_token_ids == {tokenizer._backend.token_to_id(t) for t in expected}


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    backend = make("byte-level")._backend
    twin = type(backend).from_str(backend.to_str())
    twin.enable_truncation(4)
    twin.enable_padding(length=50)
    twin.save(str(tmp_path / "tokenizer.json"))
    text = "The quick brown fox jumps"
    assert Tokenizer.load(tmp_path).encode(text) == make("byte-level").encode(text)


def test_unreadable_directories_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer.json is missing.*skip_tokenizer_init"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="SentencePiece"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_chat_without_a_template_is_refused():
    with pytest.raises(UsageError, match="--chat-template"):
        make("byte-level").render_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_transformers(tmp_path, kind):
    from transformers import PreTrainedTokenizerFast

    save(kind, tmp_path, json.dumps({"eos_token": "<eos>"}))
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    ours = Tokenizer.load(tmp_path)
    for text in ("The quick fox, the end.", " lead <eos> tail", "Größe 你好 😀", "a  b\n\n\tc"):
        assert ours.encode(text) == theirs(text).input_ids
        for skip in (True, False):
            assert ours.decode(ours.encode(text), skip) == theirs.decode(ours.encode(text), skip_special_tokens=skip)
    assert ours.vocab_size == len(theirs)
