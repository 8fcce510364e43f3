"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from wager.errors import UsageError
from wager.serve.http.context import context_of, new_id
from wager.serve.http.running import while_connected
from wager.serve.http.schemas import EmbeddingBody
from wager.serve.outputs import EmbeddingOutput

router = APIRouter()


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingBody, request: Request) -> dict[str, Any]:
    """L2-normalised vectors, as floats or base64 of little-endian float32."""
    context = context_of(request)
    llm, model, adapter = context.resolve(body.model)
    if body.dimensions is not None:
        raise UsageError("dimensions is not supported: this model's embeddings have one size", param="dimensions")
    inputs = body.inputs()
    if len(inputs) > context.settings.max_choices:
        raise UsageError(
            f"at most {context.settings.max_choices} inputs in one request, got {len(inputs)}", param="input"
        )
    for text in inputs:
        llm.frontend.tokenize(text)
    tasks = [asyncio.ensure_future(llm.embed(text, new_id("embd"), adapter=adapter)) for text in inputs]
    try:
        outputs = await while_connected(request, _gather(tasks))
    finally:
        for task in tasks:
            task.cancel()
    tokens = sum(len(o.prompt_token_ids) for o in outputs)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": _encoded(o.embedding, body.encoding_format)}
            for i, o in enumerate(outputs)
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


async def _gather(tasks: Sequence[asyncio.Future[EmbeddingOutput]]) -> list[EmbeddingOutput]:
    return await asyncio.gather(*tasks)


def _encoded(vector: np.ndarray, encoding: str) -> str | list[float]:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
