"""`wager serve`, `wager chat`, `wager generate`."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Annotated, Any

import typer

from wager.errors import UsageError

app = typer.Typer(help="Serve a model over the OpenAI API, chat with it, or generate from the command line.")

Model = Annotated[str, typer.Argument(help="demo, a directory in Hugging Face layout, or a hub id")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")]
LoadFormat = Annotated[
    str, typer.Option(help="auto, or dummy: random weights of the shapes in config.json, to measure speed")
]
Quantization = Annotated[str | None, typer.Option(help="quantise weights while loading")]
MaxLen = Annotated[int | None, typer.Option(help="longest prompt plus output, in tokens")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Speculative = Annotated[
    str | None,
    typer.Option(
        help='JSON, e.g. \'{"method": "sequoia", "draft": "demo-draft"}\', or a list: requests choose by "speculative_method"'
    ),
]
OffloadMemory = Annotated[
    str | None, typer.Option(help="hold at most so much of the model's layers, e.g. 2GB, and stream them from disk")
]
OffloadFile = Annotated[str | None, typer.Option(help="where streamed layers lie; default: a temporary file")]
OffloadRate = Annotated[float | None, typer.Option(help="stream no faster than so many bytes per second")]


@app.command()
def serve(
    model: Model = "demo",
    host: Annotated[
        str, typer.Option(help="address to listen on; the default is reachable from this machine only")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free port")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(help="accepted bearer key; may be repeated; also WAGER_API_KEY")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="the name clients use")] = None,
    dtype: Dtype = "auto",
    load_format: LoadFormat = "auto",
    quantization: Quantization = None,
    max_model_len: MaxLen = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="requests that run at once")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="tokens of one engine step")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, or fp8: half the memory of bfloat16, rounded")] = "auto",
    kv_cache_memory: Annotated[str, typer.Option(help="size of the KV cache, e.g. 2GB")] = "auto",
    kv_offload_memory: Annotated[
        str | None, typer.Option(help="host memory for cached blocks that the KV cache gives up, e.g. 2GB")
    ] = None,
    block_size: Annotated[int, typer.Option(help="tokens of a KV block")] = 16,
    enable_prefix_caching: Annotated[bool, typer.Option(help="reuse the KV of shared beginnings")] = True,
    scheduling_policy: Annotated[str, typer.Option(help="fcfs, priority, deadline or longest-prefix")] = "fcfs",
    long_prefill_threshold: Annotated[
        int, typer.Option(help="most prompt tokens of one request in a step; 0 is no limit")
    ] = 0,
    max_queue: Annotated[int, typer.Option(help="requests that may wait; more get 429")] = 1024,
    chat_template: Annotated[str | None, typer.Option(help="a Jinja file that replaces the model's own")] = None,
    tool_call_parser: Annotated[str, typer.Option(help="hermes, qwen, llama3_json, mistral or pythonic")] = "hermes",
    reasoning_parser: Annotated[
        str | None, typer.Option(help="deepseek_r1 or qwen3: split <think> from answers")
    ] = None,
    lora: Annotated[list[str] | None, typer.Option(help="name=directory of a PEFT adapter; may be repeated")] = None,
    max_loras: Annotated[int, typer.Option(help="adapters that may be loaded at once")] = 8,
    speculative_config: Speculative = None,
    tensor_parallel_size: Annotated[int, typer.Option(help="processes that the model is divided over, on a CPU")] = 1,
    offload_memory: OffloadMemory = None,
    offload_file: OffloadFile = None,
    offload_bytes_per_s: OffloadRate = None,
    step_log: Annotated[str | None, typer.Option(help="write one JSON line per engine step to this file")] = None,
    seed: Annotated[int, typer.Option(help="seeds requests that bring no seed")] = 0,
    device: Device = "auto",
    drain: Annotated[float, typer.Option(help="seconds that running requests get after SIGTERM")] = 30.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error")] = "info",
) -> None:
    """Serve MODEL over the OpenAI API, with a chat page at /."""
    given = dict(locals())  # an option that is a field of EngineConfig goes there under its own name
    from wager.serve.config import EngineConfig
    from wager.serve.http.settings import ServerSettings
    from wager.serve.text.reasoning import reasoning_stream
    from wager.serve.text.tools import tool_stream

    tool_stream(tool_call_parser)
    if reasoning_parser is not None:
        reasoning_stream(reasoning_parser, "")
    keys = tuple(api_key or ()) or tuple(filter(None, [os.environ.get("WAGER_API_KEY")]))
    engine = {
        name: value for name, value in given.items() if name in EngineConfig.__dataclass_fields__ and name != "model"
    }
    engine["lora_modules"] = dict(_named_path(item) for item in lora or ())
    engine["speculative_config"] = _json_option(speculative_config, "speculative-config")
    settings = ServerSettings(
        api_keys=keys, tool_call_parser=tool_call_parser, reasoning_parser=reasoning_parser, drain_s=drain
    )
    run_server(model, served_model_name, engine, settings, host, port, step_log, log_level)


def run_server(
    model: str,
    served_model_name: str | None,
    engine: dict[str, Any],
    settings: Any,
    host: str,
    port: int,
    step_log: str | None,
    log_level: str,
) -> None:
    """Listen at once, load behind /health, stop gracefully on SIGTERM or SIGINT."""
    from wager.serve.config import EngineConfig
    from wager.serve.http.metrics import ServerMetrics
    from wager.serve.llm import AsyncLLM

    EngineConfig(model=model, **engine)  # a wrong option fails here, before anything listens

    def load(metrics: ServerMetrics) -> AsyncLLM:
        observers: list[Any] = [metrics]
        if step_log is not None:
            from wager.serve.step_cost import StepLog

            observers.append(StepLog(step_log))
        return AsyncLLM(model, served_model_name=served_model_name, observers=observers, **engine)

    def announce(llm: AsyncLLM) -> str:
        note = " (a small demonstration model: expect fluent nonsense)" if model in ("demo", "demo-draft") else ""
        return f"ready: {llm.served_name}{note}, context {llm.max_model_len} tokens"

    listen(load, announce, model, settings, host, port, log_level)


def listen(load: Any, announce: Any, model: str, settings: Any, host: str, port: int, log_level: str) -> None:
    """Serve what `load` (given the server's metrics) returns: an AsyncLLM or what has its face. `announce(it)` is printed once it answers."""
    import signal
    import socket

    from wager.serve.http.app import create_app
    from wager.serve.http.server import DrainingServer, server_config

    logging.basicConfig(level=log_level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port} is no port; use one from 1 to 65535, or 0 for any that is free")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the server, which drains, takes over
    address = f"http://{host}:{listener.getsockname()[1]}"
    print(f"wager: chat page {address}/  OpenAI API {address}/v1  (loading {model} …)", flush=True)
    if host not in ("127.0.0.1", "localhost", "::1") and not settings.api_keys:
        print(
            "warning: listening beyond this machine without --api-key: anyone who reaches the port may use it",
            flush=True,
        )
    app = create_app(load, settings, announce)
    config = server_config(app, timeout_graceful_shutdown=int(settings.drain_s) + 5)
    DrainingServer(config, app.state.context).run(sockets=[listener])


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="the text to continue; - reads standard input")],
    model: Annotated[str, typer.Option(help="demo, a directory, or a hub id")] = "demo",
    max_tokens: Annotated[int, typer.Option(help="most tokens to generate")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.7,
    top_p: Annotated[float, typer.Option(help="nucleus mass")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="make the answer repeatable")] = None,
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    max_model_len: MaxLen = None,
    speculative_config: Speculative = None,
    offload_memory: OffloadMemory = None,
    device: Device = "auto",
) -> None:
    """Continue PROMPT once, in this process, and print the text."""
    from wager.serve.llm import LLM
    from wager.serve.params import SamplingParams

    text = sys.stdin.read() if prompt == "-" else prompt
    llm = LLM(
        model,
        dtype=dtype,
        quantization=quantization,
        max_model_len=max_model_len,
        speculative_config=_json_option(speculative_config, "speculative-config"),
        offload_memory=offload_memory,
        device=device,
        max_num_seqs=1,
    )
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    print(llm.generate(text, params)[0].outputs[0].text)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="what to load when no --url is given")] = "demo",
    url: Annotated[str | None, typer.Option(help="base URL of a running server, e.g. http://127.0.0.1:8000/v1")] = None,
    api_key: Annotated[str | None, typer.Option(help="bearer key of that server; also WAGER_API_KEY")] = None,
    system: Annotated[str | None, typer.Option(help="system prompt")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.7,
    max_tokens: Annotated[int | None, typer.Option(help="most tokens of an answer")] = None,
) -> None:
    """Chat in the terminal; answers stream. /reset forgets the conversation, /quit or Ctrl-D leaves."""
    from wager.serve.terminal_chat import LocalChat, RemoteChat, run_chat

    key = api_key or os.environ.get("WAGER_API_KEY")
    backend = RemoteChat(url, key) if url else LocalChat(model)
    run_chat(backend, system, temperature, max_tokens)


def _named_path(item: str) -> tuple[str, str]:
    name, separator, path = item.partition("=")
    if not (name and separator and path):
        raise UsageError(f"--lora takes name=directory, got {item!r}")
    return name, path


def _json_option(text: str | None, name: str) -> dict | list | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--{name} is not JSON: {error}") from None
    several = isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    if not isinstance(value, dict) and not several:
        raise UsageError(f"--{name} must be a JSON object or a list of them, got {text!r}")
    return value
