"""A schemathesis check: every answer of 400 and above is `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import schemathesis  # pyright: ignore[reportMissingImports]

FIELDS = {"message", "type", "param", "code"}


@schemathesis.check
def error_shape(ctx, response, case) -> None:
    if response.status_code < 400:
        return
    try:
        error = response.json()["error"]
    except Exception as problem:
        raise AssertionError(
            f"HTTP {response.status_code} without an error object: {response.text[:200]!r} ({problem})"
        ) from None
    missing = FIELDS - set(error)
    assert not missing, f"HTTP {response.status_code}: the error lacks {sorted(missing)}: {error}"
    assert isinstance(error["message"], str) and error["message"], (
        f"HTTP {response.status_code}: the error says nothing: {error}"
    )
