"""Server-sent events: framing, keep-alive comments, and failures after the headers are gone."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse

from wager.serve.http.errors import as_http_error, error_body

log = logging.getLogger(__name__)

DONE = "data: [DONE]\n\n"
PING = ": ping\n\n"


# Unicode's other line ends: legal in JSON, but many clients split a stream with str.splitlines, which breaks at them.
LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def event(payload: dict[str, Any], name: str | None = None) -> str:
    """One event on one line, whatever way the reader splits lines."""
    data = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    for char, escaped in LINE_ENDS.items():
        data = data.replace(char, escaped)
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {data}\n\n"


async def primed(items: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Wait for the first item, so that what can fail fails while a status can still be sent; then replay it."""
    iterator = items.__aiter__()
    try:
        first = await iterator.__anext__()
    except StopAsyncIteration:

        async def nothing() -> AsyncIterator[Any]:
            return
            yield

        return nothing()

    async def replay() -> AsyncIterator[Any]:
        try:
            yield first
            async for item in iterator:
                yield item
        finally:
            await iterator.aclose()  # type: ignore[attr-defined]

    return replay()


def stream_response(lines: AsyncIterator[str], ping_s: float) -> StreamingResponse:
    """Stream lines, with comments during silence. A failure on the way becomes an error event and ends the stream."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_guarded(lines, ping_s), media_type="text/event-stream", headers=headers)


async def _guarded(lines: AsyncIterator[str], ping_s: float) -> AsyncIterator[str]:
    iterator = lines.__aiter__()
    pending: asyncio.Task | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(iterator.__anext__())
            done, _ = await asyncio.wait({pending}, timeout=ping_s)
            if not done:
                yield PING
                continue
            finished, pending = pending, None
            try:
                line = finished.result()
            except StopAsyncIteration:
                return
            yield line
    except Exception as error:
        known = as_http_error(error)
        yield event(error_body(known.status, known.message, known.code, known.param))
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
        await iterator.aclose()  # type: ignore[attr-defined]
