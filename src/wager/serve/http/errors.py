"""Every failure leaves the server in one shape: {"error": {message, type, param, code}} with the status clients expect."""

from __future__ import annotations

import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from wager.errors import CapacityError, CheckpointError, UsageError, WagerError

log = logging.getLogger(__name__)

TYPES = {401: "invalid_request_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
CODES = {429: "rate_limit_exceeded", 503: "unavailable"}


class HTTPError(Exception):
    """An answer with a status of its own."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers or {}


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}}


def error_response(
    status: int, message: str, code: str | None = None, param: str | None = None, headers: dict | None = None
) -> JSONResponse:
    return JSONResponse(error_body(status, message, code, param), status_code=status, headers=headers)


def as_http_error(error: Exception) -> HTTPError:
    """What an exception of the engine means to a client."""
    if isinstance(error, HTTPError):
        return error
    if isinstance(error, UsageError):
        return HTTPError(
            404 if error.code == "model_not_found" else 400, str(error), code=error.code, param=error.param
        )
    if isinstance(error, CheckpointError):
        return HTTPError(400, str(error))
    if isinstance(error, CapacityError):
        wait = math.ceil(error.retry_after_s or 1)
        status = 503 if "shutting down" in str(error) else 429
        return HTTPError(status, str(error), headers={"Retry-After": str(wait)})
    if isinstance(error, WagerError):
        return HTTPError(500, str(error))
    log.exception("unexpected error while serving a request", exc_info=error)
    return HTTPError(500, "an internal error occurred; the server's log has its trace")


def install(app: FastAPI) -> None:
    """Route every kind of exception to the one shape."""

    async def on_known(_: Request, error: Exception) -> JSONResponse:
        known = as_http_error(error)
        return error_response(known.status, known.message, known.code, known.param, known.headers)

    async def on_validation(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        message, param = describe_validation(error)
        return error_response(400, message, param=param)

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        messages = {
            404: f"unknown route {request.url.path}",
            405: f"{request.method} is not allowed on {request.url.path}",
        }
        return error_response(
            error.status_code, messages.get(error.status_code, str(error.detail)), headers=dict(error.headers or {})
        )

    for kind in (HTTPError, WagerError, Exception):
        app.add_exception_handler(kind, on_known)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)


def describe_validation(error: RequestValidationError) -> tuple[str, str | None]:
    """The first problem of a body, naming the field and the value's type."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}", None
    path = [str(part) for part in first["loc"] if part != "body"]
    fields = [p for p in path if not p.startswith(("list[", "function-", "constrained-", "tagged-union"))]
    where = ".".join(fields)
    return f"{where or 'body'}: {first['msg']}", fields[0] if fields else None
