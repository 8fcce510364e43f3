"""Which tool-call format a model writes, and what makes it call a tool."""

from __future__ import annotations

from typing import Any

from wager.errors import UsageError
from wager.serve.params import StructuredOutputs
from wager.serve.text.tool_streams import (
    HERMES,
    LLAMA3,
    MISTRAL,
    REQUIRED,
    JsonToolStream,
    NamedToolStream,
    PythonicToolStream,
    ToolStream,
)

MAX_SAFE_INTEGER = 2**53 - 1
MAX_FORCED_CALLS = 8

PARSERS = {
    "hermes": lambda: JsonToolStream(HERMES),
    "qwen": lambda: JsonToolStream(HERMES),
    "llama3_json": lambda: JsonToolStream(LLAMA3, leading_tags=("<|python_tag|>",)),
    "mistral": lambda: JsonToolStream(MISTRAL),
    "pythonic": PythonicToolStream,
}


def tool_stream(parser: str) -> ToolStream:
    """A fresh stream for `tool_choice: auto`. Raises UsageError naming the known parsers."""
    if parser not in PARSERS:
        raise UsageError(
            f"tool-call parser {parser!r} is unknown; use one of {', '.join(PARSERS)}", param="tool_call_parser"
        )
    return PARSERS[parser]()


def forced_stream(tool_choice: str | dict[str, Any]) -> ToolStream:
    """The stream for output constrained by `forced_constraint`."""
    return (
        NamedToolStream(tool_choice["function"]["name"]) if isinstance(tool_choice, dict) else JsonToolStream(REQUIRED)
    )


def forced_constraint(
    tools: list[dict[str, Any]], tool_choice: str | dict[str, Any], max_calls: int = MAX_FORCED_CALLS
) -> StructuredOutputs:
    """What makes the model call a tool: for a named one its arguments, for "required" a list of at most `max_calls` calls."""
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    if isinstance(tool_choice, dict):
        name = tool_choice["function"]["name"]
        if name not in functions:
            raise UsageError(f"tool_choice names {name!r}, which is not among the tools", param="tool_choice")
        return StructuredOutputs(json=_parameters(functions[name]))
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": _parameters(function)},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name, function in functions.items()
    ]
    return StructuredOutputs(json={"type": "array", "minItems": 1, "maxItems": max_calls, "items": {"anyOf": calls}})


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    return _bounded_integers(function.get("parameters")) or {
        "type": "object",
        "properties": {},
        "additionalProperties": False,
    }


def _bounded_integers(schema: Any) -> Any:
    """The schema with unbounded integers held to what every JSON reader can represent (RFC 7493), so that digits come to an end."""
    if isinstance(schema, list):
        return [_bounded_integers(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {k: v if k in ("enum", "const", "default", "examples") else _bounded_integers(v) for k, v in schema.items()}
    bounds = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "enum", "const"}
    if schema.get("type") == "integer" and not bounds & set(schema):
        return {**inner, "minimum": -MAX_SAFE_INTEGER, "maximum": MAX_SAFE_INTEGER}
    return inner
