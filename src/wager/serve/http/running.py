"""Running engine requests on behalf of a client that may leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request

from wager.errors import WagerError
from wager.serve.http.errors import HTTPError
from wager.serve.outputs import RequestOutput

T = TypeVar("T")


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPError(499, "the client closed the connection")
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def final(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    """The last output of a request. Raises WagerError when it failed on the way."""
    last = None
    async with aclosing(outputs) as stream:  # type: ignore[type-var]
        async for output in stream:
            last = checked(output)
    assert last is not None
    return last


def checked(output: RequestOutput) -> RequestOutput:
    if output.error:
        raise WagerError(output.error)
    return output


async def all_of(streams: Sequence[AsyncIterator[RequestOutput]]) -> list[RequestOutput]:
    """Final outputs of several requests; when one fails the others are aborted."""
    tasks = [asyncio.ensure_future(final(s)) for s in streams]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def merged(streams: Sequence[AsyncIterator[RequestOutput]]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """(stream number, output) of several requests as they come; all are aborted when the reader stops."""
    ready: asyncio.Queue = asyncio.Queue()

    async def forward(number: int, stream: AsyncIterator[RequestOutput]) -> None:
        try:
            async with aclosing(stream) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    ready.put_nowait((number, checked(output)))
            ready.put_nowait(None)
        except Exception as error:
            ready.put_nowait(error)

    tasks = [asyncio.ensure_future(forward(i, s)) for i, s in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            item = await ready.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
