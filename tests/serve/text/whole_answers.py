"""Streams read to their end: both parts of a whole answer."""

from collections.abc import Sequence

from wager.serve.text.reasoning import ReasoningStream, Split
from wager.serve.text.tool_streams import Event, ToolCall, ToolStream


def split_reasoning(stream: ReasoningStream, text: str) -> Split:
    """Both parts of a whole answer."""
    first, last = stream.push(text), stream.finish()
    return Split(first.reasoning + last.reasoning, first.content + last.content)


def collect(events: Sequence[Event]) -> tuple[str, list[ToolCall]]:
    content, names, arguments = "", {}, {}
    for event in events:
        if isinstance(event, str):
            content += event
        elif event.name is not None:
            names[event.index] = event.name
            arguments.setdefault(event.index, "")
        else:
            arguments[event.index] += event.arguments
    return content, [ToolCall(name, arguments[i]) for i, name in sorted(names.items())]


def parse_tools(stream: ToolStream, text: str) -> tuple[str, list[ToolCall]]:
    """(content, calls) of a whole answer."""
    return collect(stream.push(text) + stream.finish())
