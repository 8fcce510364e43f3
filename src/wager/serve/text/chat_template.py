"""Chat templates: the checkpoint's Jinja program turns a conversation into prompt text, in a sandbox that cannot reach the machine."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from wager.errors import CheckpointError, UsageError

# What a template's own mistakes raise; a failure of the machine (MemoryError) is not among them.
TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
)


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks what the model wrote, for training masks; when serving it is only its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template, and its variant for tools where the checkpoint has one."""

    def __init__(self, source: str, tool_source: str | None = None):
        environment = _environment()
        try:
            self._plain = environment.from_string(source)
            self._tools = environment.from_string(tool_source) if tool_source else self._plain
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"the chat template does not parse: line {error.lineno}: {error.message}") from None

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Prompt text. With `continue_final_message` the text ends inside the last message, so that the model goes on with it."""
        if continue_final_message and add_generation_prompt:
            raise UsageError("add_generation_prompt and continue_final_message exclude each other", param="messages")
        if continue_final_message and not messages:
            raise UsageError("there is no message to continue", param="messages")
        normalised = [normalise_message(m) for m in messages]
        template = self._tools if tools else self._plain
        try:
            text = template.render(
                messages=normalised, tools=tools or None, add_generation_prompt=add_generation_prompt, **variables
            )
        except TEMPLATE_FAILURES as error:
            raise UsageError(f"the chat template refuses these messages: {error}", param="messages") from None
        return _cut_after(text, normalised[-1]["content"]) if continue_final_message else text


def find_template(path: Path, config: dict[str, Any], override: str | None) -> ChatTemplate | None:
    """From the override (file or text), chat_template.jinja, or tokenizer_config.json (a text or a list of named ones)."""
    if override is not None:
        file = Path(override)
        try:
            return ChatTemplate(file.read_text(encoding="utf-8") if file.is_file() else override)
        except OSError:  # a template text may be longer than a file name can be
            return ChatTemplate(override)
    if (path / "chat_template.jinja").is_file():
        return ChatTemplate((path / "chat_template.jinja").read_text(encoding="utf-8"))
    given = config.get("chat_template")
    if isinstance(given, list):
        named = {entry["name"]: entry["template"] for entry in given}
        return ChatTemplate(named.get("default") or next(iter(named.values())), named.get("tool_use"))
    return ChatTemplate(given) if given else None


def normalise_message(message: dict[str, Any]) -> dict[str, Any]:
    """What templates expect: content as one string, tool-call arguments as objects, `developer` as `system`."""
    clean = dict(message)
    if clean.get("role") == "developer":
        clean["role"] = "system"
    content = clean.get("content")
    if isinstance(content, list):
        content = "".join(_part_text(part) for part in content)
    clean["content"] = "" if content is None else content
    if clean.get("tool_calls"):
        clean["tool_calls"] = [_with_object_arguments(call) for call in clean["tool_calls"]]
    else:
        clean.pop("tool_calls", None)
    return clean


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if part.get("type") in ("text", "input_text", "output_text", "refusal"):
        text = part.get("refusal" if part["type"] == "refusal" else "text")
        if isinstance(text, str):
            return text
        raise UsageError(f"a content part of type {part['type']!r} needs its text as a string", param="messages")
    raise UsageError(f"content parts of type {part.get('type')!r} are not supported; send text", param="messages")


def _with_object_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            raise UsageError(f"tool call arguments are not JSON: {arguments[:80]!r}", param="messages") from None
    return {**call, "function": function}


def _cut_after(text: str, content: str) -> str:
    """Drop what the template put after the last message's content; white space at its end stays if the template kept it."""
    end = text.rfind(content.strip())
    if end < 0:
        raise UsageError(
            "the chat template does not show the final message, so it cannot be continued", param="messages"
        )
    whole = content.lstrip()
    return text[: end + len(whole if text.startswith(whole, end) else content.strip())]


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda fmt: datetime.now().strftime(fmt)
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
