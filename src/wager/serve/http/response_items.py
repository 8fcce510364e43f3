"""The output items of a response (reasoning, message, function call) and the events that announce them, out of chat deltas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from wager.serve.http.context import new_id

Payload = dict[str, Any]


class ItemWriter:
    """`push` takes one chat delta, `finish` ends the answer; both return the events to send. `done` are the finished items.

    White space before a call is no message, so it is held back until more text or the end shows what it is.
    """

    def __init__(self):
        self.done: list[dict[str, Any]] = []
        self._item: dict[str, Any] | None = None
        self._text = ""
        self._blank = ""

    def push(self, delta: dict[str, Any]) -> Iterator[Payload]:
        if delta.get("reasoning_content"):
            yield from self._grow("reasoning", delta["reasoning_content"])
        if delta.get("content"):
            text = self._blank + delta["content"]
            self._blank = ""
            if text.strip() or self._is("message"):
                yield from self._grow("message", text)
            else:
                self._blank = text
        for piece in delta.get("tool_calls") or ():
            self._blank = ""
            if "id" in piece:
                yield from self._close()
                call = {"call_id": piece["id"], "name": piece["function"]["name"], "arguments": ""}
                yield from self._open({"type": "function_call", "id": new_id("fc"), **call})
            if piece["function"]["arguments"]:
                yield from self._grow("function_call", piece["function"]["arguments"])

    def finish(self) -> Iterator[Payload]:
        if self._blank or (self._item is None and not self.done):
            yield from self._grow("message", self._blank)
        yield from self._close()

    def _is(self, kind: str) -> bool:
        return self._item is not None and self._item["type"] == kind

    @property
    def _where(self) -> dict[str, Any]:
        """Addresses the open item's part."""
        assert self._item is not None
        base = {"item_id": self._item["id"], "output_index": len(self.done)}
        part = {"message": {"content_index": 0}, "reasoning": {"summary_index": 0}}
        return {**base, **part.get(self._item["type"], {})}

    def _open(self, item: dict[str, Any]) -> Iterator[Payload]:
        self._item, self._text = item, ""
        shown = {**item, "status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": len(self.done), "item": shown}
        if item["type"] == "message":
            yield {"type": "response.content_part.added", **self._where, "part": _text_part("")}
        if item["type"] == "reasoning":
            yield {"type": "response.reasoning_summary_part.added", **self._where, "part": _summary_part("")}

    def _grow(self, kind: str, text: str) -> Iterator[Payload]:
        if not self._is(kind):
            yield from self._close()
            if kind == "message":
                yield from self._open({"type": kind, "id": new_id("msg"), "role": "assistant", "content": []})
            else:
                yield from self._open({"type": kind, "id": new_id("rs"), "summary": []})
        self._text += text
        names = {
            "message": "output_text",
            "reasoning": "reasoning_summary_text",
            "function_call": "function_call_arguments",
        }
        if text:
            yield {
                "type": f"response.{names[kind]}.delta",
                **self._where,
                "delta": text,
                **({"logprobs": []} if kind == "message" else {}),
            }

    def _close(self) -> Iterator[Payload]:
        item, text = self._item, self._text
        if item is None:
            return
        done = {**item, "status": "completed"}
        if item["type"] == "message":
            yield {"type": "response.output_text.done", **self._where, "text": text, "logprobs": []}
            yield {"type": "response.content_part.done", **self._where, "part": _text_part(text)}
            done["content"] = [_text_part(text)]
        elif item["type"] == "reasoning":
            yield {"type": "response.reasoning_summary_text.done", **self._where, "text": text}
            yield {"type": "response.reasoning_summary_part.done", **self._where, "part": _summary_part(text)}
            done["summary"] = [_summary_part(text)]
        else:
            yield {
                "type": "response.function_call_arguments.done",
                **self._where,
                "name": item["name"],
                "arguments": text,
            }
            done["arguments"] = text
        yield {"type": "response.output_item.done", "output_index": len(self.done), "item": done}
        self.done.append(done)
        self._item = None


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}


def _summary_part(text: str) -> dict[str, Any]:
    return {"type": "summary_text", "text": text}
