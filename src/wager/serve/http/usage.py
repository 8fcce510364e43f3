"""Token counts and log-probabilities as the OpenAI API shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wager.serve.outputs import TokenLogprobs
from wager.serve.text.tokenizer import Tokenizer

FINGERPRINT = "wager"
LOWEST_LOGPROB = -9999.0  # JSON has no infinity


def usage(
    prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0, reasoning_tokens: int = 0
) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; one that is no valid text on its own is spelled in bytes, so that different tokens keep different names."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(value: float) -> float:
    return max(value, LOWEST_LOGPROB)


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], entries: Sequence[TokenLogprobs], top: int
) -> dict[str, Any]:
    """The `logprobs` object of a chat choice."""

    def item(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_name(tokenizer, token_id),
            "logprob": finite(logprob),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = []
    for token_id, entry in zip(token_ids, entries, strict=False):
        best = sorted(entry.items(), key=lambda pair: pair[1].rank or 0)[:top]
        alternatives = [item(t, value.logprob) for t, value in best]
        content.append({**item(token_id, entry[token_id].logprob), "top_logprobs": alternatives})
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None], top: int, offset: int
) -> tuple[dict[str, Any], int]:
    """The `logprobs` object of a completion choice, and the text offset after its last token."""
    names = [token_name(tokenizer, t) for t in token_ids]
    offsets = []
    for token_id in token_ids:
        offsets.append(offset)
        offset += len(tokenizer.token_text(token_id))
    values = [None if e is None else finite(e[t].logprob) for t, e in zip(token_ids, entries, strict=False)]
    tops = [
        None
        if entry is None
        else {
            token_name(tokenizer, t): finite(v.logprob)
            for t, v in sorted(entry.items(), key=lambda pair: pair[1].rank or 0)
            if t == token_id or (v.rank or 0) <= top
        }
        for token_id, entry in zip(token_ids, entries, strict=False)
    ]
    return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}, offset
