"""Splits a reasoning model's answer into what it thought and what it says."""

from __future__ import annotations

from dataclasses import dataclass

from wager.errors import UsageError
from wager.serve.text.overlap import overlap

OPEN, CLOSE = "<think>", "</think>"
PARSERS = ("deepseek_r1", "qwen3")


@dataclass(frozen=True)
class Split:
    reasoning: str
    content: str


class ReasoningStream:
    """Incremental split at <think> … </think>. `opened`: the prompt already ended with the opening tag."""

    def __init__(self, opened: bool):
        self._thinking, self._begun = opened, opened
        self._closed = False
        self._pending = ""

    def push(self, text: str) -> Split:
        self._pending += text
        reasoning = content = ""
        if not self._begun:
            stripped = self._pending.lstrip()
            if OPEN.startswith(stripped[: len(OPEN)]) and len(stripped) < len(OPEN):
                return Split("", "")  # perhaps an opening tag, or white space before one
            self._begun = True
            if stripped.startswith(OPEN):
                self._thinking, self._pending = True, stripped[len(OPEN) :]
        if self._thinking:
            at = self._pending.find(CLOSE)
            if at < 0:
                cut = len(self._pending) - overlap(self._pending, CLOSE)
                reasoning, self._pending = self._pending[:cut], self._pending[cut:]
                return Split(reasoning, "")
            reasoning, self._pending = self._pending[:at], self._pending[at + len(CLOSE) :]
            self._thinking, self._closed = False, True
        if self._closed:
            self._pending = self._pending.lstrip("\n")
            self._closed = not self._pending
        content, self._pending = self._pending, ""
        return Split(reasoning, content)

    def finish(self) -> Split:
        rest, self._pending = self._pending, ""
        return Split(rest, "") if self._thinking else Split("", rest)


def reasoning_stream(parser: str, prompt: str) -> ReasoningStream:
    """A fresh stream after `prompt`. Raises UsageError naming the known parsers."""
    if parser not in PARSERS:
        raise UsageError(
            f"reasoning parser {parser!r} is unknown; use one of {', '.join(PARSERS)}", param="reasoning_parser"
        )
    return ReasoningStream(opened=prompt.rstrip().endswith(OPEN))
