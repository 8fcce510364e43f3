"""What surrounds every request: an id, the key check, the size bound. Plain ASGI, so that streams pass untouched."""

from __future__ import annotations

import hmac
import re
import uuid

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wager.serve.http.errors import as_http_error, error_response
from wager.serve.http.settings import ServerSettings

PUBLIC = {"/", "/health", "/ping", "/version", "/metrics"}
REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """Adds `x-request-id` (the client's own, if sane), checks the bearer key, refuses bodies over the limit while they arrive."""

    def __init__(self, app: ASGIApp, settings: ServerSettings):
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        started = False

        async def tagged(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id), *SECURITY_HEADERS]
            await send(message)

        if not self._authorised(scope["path"], headers.get(b"authorization", b"")):
            refusal = error_response(
                401, "the API key is missing or wrong", "invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )
            await refusal(scope, receive, tagged)
            return
        limit = self.settings.max_body_bytes
        too_large = f"the body exceeds {limit} bytes"
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            await error_response(413, too_large)(scope, receive, tagged)
            return
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limit:
                    raise HTTPException(413, too_large)  # of the kind that the framework's body reader lets through
            return message

        try:
            await self.app(scope, bounded, tagged)
        except Exception as error:  # here rather than outside, so that this answer has its request id too
            if started:
                raise
            known = as_http_error(error)
            await error_response(known.status, known.message, known.code, known.param, known.headers)(
                scope, receive, tagged
            )

    def _authorised(self, path: str, header: bytes) -> bool:
        keys = self.settings.api_keys
        if not keys or path in PUBLIC or path.startswith("/page/"):
            return True
        scheme, _, token = header.partition(b" ")
        # Every key is compared, in constant time each, so that timing tells nothing about them.
        matches = [hmac.compare_digest(token, key.encode()) for key in keys]
        return scheme.lower() == b"bearer" and any(matches)
