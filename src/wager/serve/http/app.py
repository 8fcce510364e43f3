"""Puts the server together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

from wager import __version__
from wager.serve.http import admin, chat, completions, embeddings, errors, responses
from wager.serve.http.context import ServerContext
from wager.serve.http.metrics import ServerMetrics
from wager.serve.http.middleware import Guard
from wager.serve.http.settings import ServerSettings
from wager.serve.llm import AsyncLLM

PAGE = Path(__file__).parent / "page"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(
    load: Callable[[ServerMetrics], AsyncLLM],
    settings: ServerSettings | None = None,
    announce: Callable[[AsyncLLM], str] | None = None,
) -> FastAPI:
    """The ASGI application. `load` builds the engine with the server's metrics as an observer; it runs once, on a thread.

    `announce`: what to print of the engine once requests are served.
    """
    settings = settings or ServerSettings()
    context = ServerContext(load, settings, announce)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(context.start())
        try:
            yield
        finally:
            await asyncio.gather(loading, return_exceptions=True)
            await context.stop()

    app = FastAPI(
        title="wager", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.context = context
    errors.install(app)
    for module in (chat, completions, embeddings, responses, admin):
        app.include_router(module.router)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        html = (PAGE / "index.html").read_text(encoding="utf-8")
        return HTMLResponse(html, headers={"Content-Security-Policy": PAGE_POLICY})

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    app.add_middleware(Guard, settings=settings)  # type: ignore[arg-type]
    return app
