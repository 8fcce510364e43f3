"""Text of a growing token list: characters are shown once complete, stop strings never.

Byte-level tokenizers decode token by token through an incremental UTF-8 decoder. Others decode a short window twice, with and without the
new tokens, because their tokens' text depends on what stands before (merged spaces, byte fallback).
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import Protocol

from wager.serve.params import SamplingParams
from wager.serve.text.overlap import overlap
from wager.serve.text.tokenizer import Tokenizer

WINDOW = 6  # prompt tokens that give the first output token its context


@dataclass(frozen=True)
class Delta:
    """New text; the stop string met, if any; how many of the pushed tokens the text up to it needed."""

    text: str
    stop: str | None
    tokens_used: int


class Decoder(Protocol):
    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class ByteDecoder:
    """For byte-level tokenizers: concatenated output equals decoding all tokens at once."""

    def __init__(self, tokenizer: Tokenizer, skip: frozenset[int]):
        self._tokenizer, self._skip = tokenizer, skip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return "" if token_id in self._skip else self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """For any tokenizer: text of tokens [prefix, end) minus text of tokens [prefix, read)."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], skip_special: bool):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._ids = list(prompt_ids[-WINDOW:])
        self._prefix, self._read = 0, len(self._ids)

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._fresh()
        if not text or text.endswith("\ufffd"):
            return ""  # perhaps the first bytes of a character
        self._prefix, self._read = self._read, len(self._ids)
        return text

    def finish(self) -> str:
        text = self._fresh()
        self._prefix, self._read = self._read, len(self._ids)
        return text

    def _fresh(self) -> str:
        before = self._tokenizer.decode(self._ids[self._prefix : self._read], self._skip_special)
        return self._tokenizer.decode(self._ids[self._prefix :], self._skip_special)[len(before) :]


class StopFinder:
    """Finds the first of some strings in a stream, holding back what may be its beginning."""

    def __init__(self, stops: tuple[str, ...], include: bool):
        self._stops, self._include = stops, include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is safe to show, stop string met or None)."""
        if not self._stops:
            return text, None
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda hit: (hit[0], -len(hit[1])))
            shown = self._held[: at + len(stop)] if self._include else self._held[:at]
            self._held = ""
            return shown, stop
        keep = max(overlap(self._held, stop) for stop in self._stops)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, None

    def finish(self) -> str:
        shown, self._held = self._held, ""
        return shown


class Detokenizer:
    """Incremental text of one continuation."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], params: SamplingParams):
        skip = tokenizer.special_ids if params.skip_special_tokens else frozenset()
        self._decoder: Decoder = (
            ByteDecoder(tokenizer, skip)
            if tokenizer.byte_level
            else WindowDecoder(tokenizer, prompt_ids, params.skip_special_tokens)
        )
        self._stops = StopFinder(params.stop, params.include_stop_str_in_output)
        self._min_tokens, self._seen = params.min_tokens, 0

    def push(self, token_ids: list[int]) -> Delta:
        """Text that became certain with these tokens. Stop strings count from `min_tokens` tokens on."""
        shown = ""
        for used, token in enumerate(token_ids, 1):
            text = self._decoder.push(token)
            self._seen += 1
            if self._seen <= self._min_tokens:
                shown += text
                continue
            safe, stop = self._stops.push(text)
            shown += safe
            if stop is not None:
                return Delta(shown, stop, used)
        return Delta(shown, None, len(token_ids))

    def finish(self) -> str:
        """What was held back, once nothing more will come; a stop string completed by it still does not show."""
        safe, stop = self._stops.push(self._decoder.finish())
        return safe if stop is not None else safe + self._stops.finish()
