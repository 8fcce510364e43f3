"""uvicorn, but a stop signal first drains: running requests finish, new ones are told 503, and the process ends with status 0.

A model that cannot be loaded ends it too, with the error.
"""

from __future__ import annotations

import asyncio
import socket
from types import FrameType
from typing import Any

import uvicorn

from wager.serve.http.context import ServerContext

# Longer than clients keep idle connections (httpx, and so openai: 5 s): none closes just as it is used again.
KEEP_ALIVE_S = 75


def server_config(app: Any, **options: Any) -> uvicorn.Config:
    """How every server of ours listens."""
    return uvicorn.Config(app, log_level="warning", lifespan="on", timeout_keep_alive=KEEP_ALIVE_S, **options)


class DrainingServer(uvicorn.Server):
    """The listener stays open during the drain, so that clients and load balancers get an answer instead of a refused connection.

    A second signal stops at once.
    """

    def __init__(self, config: uvicorn.Config, context: ServerContext):
        super().__init__(config)
        self._context = context
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._context.draining:
            super().handle_exit(sig, frame)
        self._context.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Every 0.1 s; True ends the server."""
        if self._context.draining and self._drain is None:
            self._drain = asyncio.create_task(self._context.stop())
        drained = self._drain is not None and self._drain.done()
        return await super().on_tick(counter) or drained or self._context.failure is not None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run(sockets)
        if self._context.failure is not None:
            raise self._context.failure
