"""Everything that is not generation: models, health, metrics, tokens, adapters, features, the live panel."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from wager import __version__
from wager.errors import UsageError
from wager.serve.http.context import ServerContext, context_of
from wager.serve.http.errors import HTTPError, error_response
from wager.serve.http.schemas import AdapterBody, DetokenizeBody, TokenizeBody

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The served model and the loaded adapters."""
    context = context_of(request)
    llm = context.engine()
    return {"object": "list", "data": [_card(context, name) for name in (llm.served_name, *llm.adapters)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    context = context_of(request)
    context.resolve(name)
    return _card(context, name)


def _card(context: ServerContext, name: str) -> dict[str, Any]:
    llm = context.engine()
    adapter = llm.adapters.get(name)
    return {
        "id": name,
        "object": "model",
        "created": int(context.started),
        "owned_by": "wager",
        "root": adapter or llm.served_name,
        "parent": llm.served_name if adapter else None,
        "max_model_len": llm.max_model_len,
        "demonstration": llm.engine.config.model in ("demo", "demo-draft"),
    }


@router.get("/health")
async def health(request: Request) -> Response:
    """200 when requests are served; 503 with the reason while loading, failed or stopping."""
    context_of(request).engine()
    return JSONResponse({"status": "ready"})


@router.get("/ping")
@router.post("/ping")
async def ping(request: Request) -> Response:
    return await health(request)


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    context = context_of(request)
    return PlainTextResponse(context.metrics.render(context.llm), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/stats")
async def stats(request: Request) -> dict[str, Any]:
    """What the live panel shows: engine state, the last step, speculation so far."""
    context = context_of(request)
    llm, seen = context.engine(), context.metrics
    return {
        **asdict(llm.stats()),
        "max_num_seqs": llm.engine.core.scheduler.config.max_num_seqs,
        "steps": seen.steps,
        "last_step": None if seen.last is None else asdict(seen.last),
        "drafts": seen.drafts,
        "draft_tokens": seen.draft_tokens,
        "accepted_tokens": seen.accepted_tokens,
    }


@router.get("/v1/features")
async def features() -> dict[str, Any]:
    """The engine's feature registry."""
    from wager.serve.features import as_json

    return {"object": "list", "data": as_json()}


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request) -> dict[str, Any]:
    """Token ids of a prompt or of a rendered conversation."""
    llm, _, _ = context_of(request).resolve(body.model)
    if llm.tokenizer is None or (body.prompt is None) == (body.messages is None):
        raise UsageError("give either prompt or messages, to a server that has a tokenizer", param="prompt")
    if body.messages is not None:
        messages = [m.model_dump(exclude_none=True) for m in body.messages]
        text = llm.tokenizer.render_chat(messages, add_generation_prompt=body.add_generation_prompt)
        token_ids = llm.tokenizer.encode(text, add_special_tokens=False)
    else:
        token_ids = llm.tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
    return {"tokens": token_ids, "count": len(token_ids), "max_model_len": llm.max_model_len}


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request) -> dict[str, Any]:
    llm, _, _ = context_of(request).resolve(body.model)
    if llm.tokenizer is None:
        raise UsageError("this server runs without a tokenizer", param="tokens")
    return {"prompt": llm.tokenizer.decode(body.tokens, skip_special_tokens=False)}


@router.post("/v1/load_lora_adapter")
async def load_adapter(body: AdapterBody, request: Request) -> Response:
    """Load a PEFT adapter from a directory on the server under a name that requests may use as their model."""
    llm = context_of(request).engine()
    if not body.lora_path:
        raise UsageError("lora_path is required", param="lora_path")
    if body.lora_name == llm.served_name:
        raise UsageError(f"lora_name {body.lora_name!r} is the served model's name", param="lora_name")
    await llm.load_adapter(body.lora_name, body.lora_path)
    return PlainTextResponse(f"adapter {body.lora_name} loaded")


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(body: AdapterBody, request: Request) -> Response:
    await context_of(request).engine().unload_adapter(body.lora_name)
    return PlainTextResponse(f"adapter {body.lora_name} unloaded")


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(request: Request) -> Response:
    """Forget cached prefixes; 409 while requests are running."""
    context = context_of(request)
    if not context.settings.enable_dev_endpoints:
        raise HTTPError(404, "development endpoints are off")
    if not await context.engine().reset_prefix_cache():
        return error_response(409, "requests are running; retry when the engine is idle")
    return JSONResponse({"status": "ok"})
