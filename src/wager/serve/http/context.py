"""What every endpoint needs: the engine once it is loaded, the settings, and how names map to models."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi import Request

from wager.serve.http.errors import HTTPError
from wager.serve.http.metrics import ServerMetrics
from wager.serve.http.settings import ServerSettings
from wager.serve.llm import AsyncLLM

log = logging.getLogger(__name__)


@dataclass
class ServerContext:
    """`load` builds the engine (blocking); it runs on a thread while /health says that loading goes on. What `announce` says of the engine is
    printed once requests are served.
    """

    load: Callable[[ServerMetrics], AsyncLLM]
    settings: ServerSettings
    announce: Callable[[AsyncLLM], str] | None = None
    metrics: ServerMetrics = field(default_factory=ServerMetrics)
    started: float = field(default_factory=time.time)
    llm: AsyncLLM | None = None
    failure: Exception | None = None
    draining: bool = False

    async def start(self) -> None:
        try:
            llm = await asyncio.to_thread(self.load, self.metrics)
            self.metrics.describe(llm)
            self.llm = llm
            if self.announce is not None:
                print(self.announce(llm), flush=True)
        except Exception as error:
            log.error("the model could not be loaded: %s", error)
            self.failure = error

    async def stop(self) -> None:
        self.draining = True
        if self.llm is not None:
            await self.llm.shutdown(self.settings.drain_s)

    def engine(self) -> AsyncLLM:
        """Raises 503 while the model is loading, failed to load, or the server is stopping."""
        if self.draining:
            raise HTTPError(503, "the server is shutting down", headers={"Retry-After": "5"})
        if self.failure is not None:
            raise HTTPError(503, f"the model could not be loaded: {self.failure}")
        if self.llm is None:
            raise HTTPError(503, "the model is still loading", headers={"Retry-After": "2"})
        if not self.llm.alive:
            raise HTTPError(503, "the engine has stopped; restart the server")
        return self.llm

    def resolve(self, name: str | None) -> tuple[AsyncLLM, str, str | None]:
        """(engine, name to echo, adapter) of a requested model; a missing name means the served one."""
        llm = self.engine()
        if name is None or name == llm.served_name:
            return llm, llm.served_name, None
        if name in llm.adapters:
            return llm, name, name
        raise HTTPError(
            404,
            f"the model {name!r} does not exist; this server has {llm.served_name!r}",
            code="model_not_found",
            param="model",
        )


def context_of(request: Request) -> ServerContext:
    return request.app.state.context


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
