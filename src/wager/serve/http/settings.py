"""What an operator decides about the HTTP server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """api_keys: any of them is accepted; none turns authentication off. max_body_bytes, max_choices: bounds of one request.
    drain_s: how long a stopping server lets running requests finish. ping_s: silence after which a stream gets a comment line."""

    api_keys: tuple[str, ...] = ()
    tool_call_parser: str = "hermes"
    reasoning_parser: str | None = None
    max_body_bytes: int = 16 * 2**20
    max_choices: int = 128
    drain_s: float = 30.0
    ping_s: float = 10.0
    enable_dev_endpoints: bool = True
