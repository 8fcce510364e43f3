"""Tool calls in generated text: each model family writes them its own way, clients want them structured, and as they come.

One incremental scanner serves all formats: text outside calls is content, a call's name is reported as soon as it is known, its arguments
as they grow, exactly as the model wrote them. What turns out not to be a call is content; nothing is lost.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from wager.serve.text.overlap import overlap

ARGUMENT_KEYS = ("arguments", "parameters")


@dataclass(frozen=True)
class ToolDelta:
    """News of call number `index`: its name (once, first), or a further piece of its JSON arguments."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: str


Event = str | ToolDelta


class ToolStream(Protocol):
    """`push` takes new text and returns events (content or call news) in order; `finish` says that no more text comes."""

    def push(self, text: str) -> list[Event]: ...

    def finish(self) -> list[Event]: ...


@dataclass(frozen=True)
class JsonFormat:
    """Calls are JSON objects with a name and arguments. `trigger` opens a run of calls ("" at the very beginning of the text only),
    `between` are characters that may stand around the objects of a run, `closer` ends it."""

    trigger: str
    between: str
    closer: str = ""


HERMES = JsonFormat("<tool_call>", " \n\r\t", "</tool_call>")
LLAMA3 = JsonFormat("", "; \n\r\t")
MISTRAL = JsonFormat("[TOOL_CALLS]", "[], \n\r\t")
REQUIRED = JsonFormat("", "[], \n\r\t")


class JsonToolStream:
    """Calls written as JSON objects, in the given format."""

    def __init__(self, fmt: JsonFormat, leading_tags: Sequence[str] = ()):
        self._format, self._leading_tags = fmt, tuple(leading_tags)
        self._pending = ""  # unread text
        self._raw = ""  # text since the trigger that would become content if no call comes of it
        self._inside = fmt.trigger == ""
        self._begun = False
        self._call: _CallScanner | None = None
        self._calls = 0

    def push(self, text: str) -> list[Event]:
        self._pending += text
        events: list[Event] = []
        while self._advance(events):
            pass
        return _joined(events)

    def finish(self) -> list[Event]:
        events: list[Event] = []
        if self._call is not None and self._call.name_sent:
            self._pending = self._raw = ""
        rest = self._raw + self._pending
        between_calls = self._calls and not self._call and not rest.strip(self._format.between)
        if rest and not between_calls and rest.strip() != self._format.closer:
            events.append(rest)
        self._pending = self._raw = ""
        return events

    def _advance(self, events: list[Event]) -> bool:
        """Read some of the pending text; False when more is needed first."""
        if not self._pending:
            return False
        if self._call is not None:
            return self._read_call(events)
        return self._read_between(events) if self._inside else self._read_content(events)

    def _read_content(self, events: list[Event]) -> bool:
        trigger, text = self._format.trigger, self._pending
        if not trigger:
            events.append(text)
            self._pending = ""
            return False
        at = text.find(trigger)
        if at >= 0:
            if text[:at].strip() or not self._calls:
                events.append(text[:at])
            self._pending, self._raw, self._inside = text[at + len(trigger) :], trigger, True
            return True
        cut = len(text) - overlap(text, trigger)
        shown, self._pending = text[:cut], text[cut:]
        if shown.strip() or not self._calls:
            events.append(shown)
        elif shown:
            self._pending = shown + self._pending  # white space between calls: keep until something follows
        return False

    def _read_between(self, events: list[Event]) -> bool:
        text = self._pending
        if not self._begun and not self._format.trigger:
            tag = next((t for t in self._leading_tags if text.startswith(t)), None)
            if tag is not None:
                self._raw, self._pending, self._begun = tag, text[len(tag) :], True
                return bool(self._pending)
            if any(t.startswith(text) for t in self._leading_tags):
                return False
        closer = self._format.closer
        if closer and text.startswith(closer):
            self._pending, self._raw, self._inside = text[len(closer) :], "", False
            return True
        if closer and closer.startswith(text):
            return False
        if text[0] == "{":
            self._call = _CallScanner()
            return True
        if text[0] in self._format.between:
            self._raw += text[0]
            self._pending = text[1:]
            return True
        events.append(self._raw)  # not a call after all
        self._raw, self._inside = "", False
        return True

    def _read_call(self, events: list[Event]) -> bool:
        call = self._call
        assert call is not None
        used = call.feed(self._pending)
        self._raw += self._pending[:used]
        self._pending = self._pending[used:]
        self._begun = True
        if call.name is not None and call.arguments is not None and not call.failed:
            if not call.name_sent:
                call.name_sent = True
                events.append(ToolDelta(self._calls, name=call.name))
            fresh = call.arguments[call.sent :]
            if fresh:
                call.sent += len(fresh)
                events.append(ToolDelta(self._calls, arguments=fresh))
        if not (call.done or call.failed):
            return False
        self._end_call(call, events)
        return True

    def _end_call(self, call: _CallScanner, events: list[Event]) -> None:
        if call.done and call.name is not None and not call.name_sent:
            events.append(ToolDelta(self._calls, name=call.name))
            events.append(ToolDelta(self._calls, arguments="{}"))
            call.name_sent = True
        if call.name_sent:
            self._calls += 1
            self._raw = ""
        else:
            events.append(self._raw)
            self._raw, self._inside = "", False
        self._call = None


class _CallScanner:
    """Reads one JSON object character by character, watching for its name and arguments members."""

    def __init__(self):
        self.name: str | None = None
        self.arguments: str | None = None
        self.done = self.failed = self.name_sent = False
        self.sent = 0
        self._depth, self._in_string, self._escaped = 0, False, False
        self._key: str | None = None
        self._value_begun = False
        self._piece = ""

    def feed(self, text: str) -> int:
        """Consume up to the object's end; returns how many characters that was."""
        for used, char in enumerate(text, 1):
            self._step(char)
            if self.done or self.failed:
                return used
        return len(text)

    def _step(self, char: str) -> None:
        if self._in_string:
            self._piece += char
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
        elif self._depth == 1 and char in ":,}":
            self._member_boundary(char)
            return
        else:
            self._structure(char)
        if self._depth >= 1 and self._key in ARGUMENT_KEYS and self._value_begun:
            self.arguments = self._piece

    def _structure(self, char: str) -> None:
        if char in "{[":
            self._depth += 1
            if self._depth == 1:
                return
        elif char in "}]":
            self._depth -= 1
        elif char == '"':
            self._in_string = True
        if char.isspace() and not self._piece:
            return
        self._piece += char
        self._value_begun = self._key is not None

    def _member_boundary(self, char: str) -> None:
        piece = self._piece.strip()
        if char == ":" and self._key is None:
            self._key = self._text(piece)
        else:
            if self._key == "name":
                self.name = self._text(piece)
            elif self._key in ARGUMENT_KEYS:
                self.arguments = piece
            self._key = None
            if char == "}":
                self._depth, self.done = 0, True
        self._piece, self._value_begun = "", False

    def _text(self, piece: str) -> str | None:
        try:
            value = json.loads(piece)
        except ValueError:
            self.failed = True
            return None
        if not isinstance(value, str):
            self.failed = True
            return None
        return value


class PythonicToolStream:
    """Calls written as a Python list of calls, `[f(x=1), g()]`; known when the list is complete."""

    def __init__(self):
        self._text = ""
        self._is_content = False

    def push(self, text: str) -> list[Event]:
        self._text += text
        self._is_content = self._is_content or self._text.lstrip()[:1] not in ("[", "")
        if not self._is_content:
            return []
        shown, self._text = self._text, ""
        return [shown] if shown else []

    def finish(self) -> list[Event]:
        calls = _python_calls(self._text)
        if calls is None:
            return [self._text] if self._text else []
        events: list[Event] = []
        for index, call in enumerate(calls):
            events += [ToolDelta(index, name=call.name), ToolDelta(index, arguments=call.arguments)]
        return events


def _python_calls(text: str) -> list[ToolCall] | None:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        calls = []
        for node in tree.elts:
            if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
                return None
            arguments = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
            calls.append(ToolCall(ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False)))
        return calls
    except (SyntaxError, ValueError, TypeError):
        return None


class NamedToolStream:
    """The whole text is the arguments of one known tool (tool_choice names it)."""

    def __init__(self, name: str):
        self._name: str | None = name

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        if self._name is not None:
            events.append(ToolDelta(0, name=self._name))
            self._name = None
        return [*events, ToolDelta(0, arguments=text)] if text else events

    def finish(self) -> list[Event]:
        return []


def _joined(events: list[Event]) -> list[Event]:
    """Merge neighbouring content, drop empty pieces."""
    merged: list[Event] = []
    for event in events:
        if isinstance(event, str):
            if not event:
                continue
            if merged and isinstance(merged[-1], str):
                merged[-1] += event
                continue
        merged.append(event)
    return merged
