"""The public face: `LLM` for scripts, `AsyncLLM` for servers. Names follow vLLM's where it has them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from wager.errors import CapacityError, UsageError, WagerError
from wager.serve.build import Engine, build_engine
from wager.serve.config import EngineConfig
from wager.serve.frontend import Frontend, Prompt, as_prompts, per_prompt
from wager.serve.generation import Generation
from wager.serve.observe import Observer
from wager.serve.outputs import EmbeddingOutput, RequestOutput
from wager.serve.params import OutputKind, SamplingParams, default_params

log = logging.getLogger(__name__)


class LLM:
    """Offline generation in this process.

    Args are the fields of EngineConfig, e.g. `LLM("demo", dtype="auto", max_num_seqs=64, enable_prefix_caching=True)`.
    """

    def __init__(self, model: str = "demo", *, observers: Sequence[Observer] = (), **options: Any):
        self.engine = build_engine(EngineConfig(model=model, **options), observers)
        self.frontend = Frontend(self.engine)
        self._ids = itertools.count()

    def get_tokenizer(self):
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The checkpoint's own generation defaults."""
        return default_params(self.engine.generation_defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        priority: Sequence[int] | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Complete every prompt (text or token ids); outputs come in the order of the prompts.

        Raises UsageError before anything runs when a prompt or parameter is wrong, naming it.
        """
        batch = as_prompts(prompts)
        params = per_prompt(sampling_params or self.get_default_sampling_params(), len(batch))
        generations = [
            self.frontend.make(
                prompt,
                replace(p, output_kind=OutputKind.FINAL_ONLY),
                f"llm-{next(self._ids)}",
                adapter=adapter,
                priority=priority[i] if priority else 0,
            )
            for i, (prompt, p) in enumerate(zip(batch, params, strict=True))
        ]
        outputs = self._run(generations, progress)
        return [outputs[g.request_id] for g in generations]

    def chat(
        self,
        messages: list[dict] | list[list[dict]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: list[dict] | None = None,
        adapter: str | None = None,
        progress: bool = False,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, rendered with the checkpoint's chat template."""
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise UsageError("chat needs a tokenizer: drop skip_tokenizer_init", param="messages")
        conversations: list[Any] = messages if messages and isinstance(messages[0], list) else [messages]
        rendered = [tokenizer.render_chat(c, tools=tools, **template_options) for c in conversations]
        prompts: list[Prompt] = [tokenizer.encode(text, add_special_tokens=False) for text in rendered]
        outputs = self.generate(prompts, sampling_params, adapter=adapter, progress=progress)
        for output, text in zip(outputs, rendered, strict=True):
            output.prompt = text
        return outputs

    def embed(self, prompts: Prompt | Sequence[Prompt], *, adapter: str | None = None) -> list[EmbeddingOutput]:
        """L2-normalised float32 vectors pooled from the last hidden states."""
        generations = [
            self.frontend.make_embedding(prompt, f"llm-{next(self._ids)}", adapter) for prompt in as_prompts(prompts)
        ]
        outputs = self._run(generations, progress=False)
        return [outputs[g.request_id] for g in generations]

    def load_adapter(self, name: str, path: str) -> None:
        self.frontend.load_adapter(name, path)

    def unload_adapter(self, name: str) -> None:
        self.frontend.unload_adapter(name)

    def _run(self, generations: list[Generation], progress: bool) -> dict[str, Any]:
        from wager.serve.progress import generation_progress

        outputs: dict[str, Any] = {}
        for generation in generations:
            self.frontend.submit(generation)
        with generation_progress(len(generations), enabled=progress) as advance:
            while len(outputs) < len(generations):
                for generation, output in self.frontend.step():
                    outputs[generation.request_id] = output
                    advance(output)
        failed = next((o for o in outputs.values() if getattr(o, "error", None)), None)
        if failed is not None:
            raise WagerError(f"request {failed.request_id}: {failed.error}")
        return outputs


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for health checks and the live panel."""

    running: int
    waiting: int
    kv_usage: float
    prefix_queries: int
    prefix_hits: int
    prompt_tokens: int
    generation_tokens: int
    preemptions: int
    free_blocks: int
    total_blocks: int


class AsyncLLM:
    """The engine on a thread of its own, for asyncio callers. Construction loads the model and blocks.

    Every public coroutine may be awaited from any event loop. `observers` are called on the engine's thread.
    """

    def __init__(
        self,
        model: str = "demo",
        *,
        served_model_name: str | None = None,
        observers: Sequence[Observer] = (),
        engine: Engine | None = None,
        **options: Any,
    ):
        """engine: one that was built elsewhere, e.g. over several processes; `options` are its own then."""
        self.engine = engine or build_engine(EngineConfig(model=model, **options), observers)
        self.frontend = Frontend(self.engine)
        self.served_name = served_model_name or model
        self.max_model_len = self.engine.max_model_len
        self.tokenizer = self.engine.tokenizer
        self.generation_defaults = self.engine.generation_defaults
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listeners: dict[str, _Listener] = {}
        self._accepting = True
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="wager-engine", daemon=True)
        self._thread.start()

    # -- requests ----------------------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Stream outputs of one request; what arrives between two reads is handed over one by one, in order.

        Raises UsageError (bad request) or CapacityError (queue full, shutting down) before the first item. Closing the iterator aborts.
        """
        generation = self.frontend.make(
            prompt, params, request_id, priority=priority, adapter=adapter, cache_salt=cache_salt
        )
        async for output in self._stream(generation):
            yield output

    async def embed(self, prompt: Prompt, request_id: str, *, adapter: str | None = None) -> EmbeddingOutput:
        """One L2-normalised vector pooled from the last hidden states."""
        async for output in self._stream(self.frontend.make_embedding(prompt, request_id, adapter)):
            if isinstance(output, EmbeddingOutput):
                return output
            if output.error:
                raise WagerError(output.error)
        raise WagerError(f"request {request_id} ended without an embedding")

    async def _stream(self, generation: Generation) -> AsyncIterator[Any]:
        if not self._accepting:
            raise CapacityError("the server is shutting down and takes no new requests", retry_after_s=5.0)
        grammars, constraint = self.engine.grammars, generation.params.structured_outputs
        if grammars is not None and constraint is not None:
            # Shielded: others may wait for the same constraint when this caller gives up.
            await asyncio.shield(
                asyncio.wrap_future(grammars.submit(constraint))
            )  # a malformed constraint is refused before anything is queued
        listener = _Listener(asyncio.get_running_loop())
        try:
            await self._call(lambda: self._submit(generation, listener))
            while True:
                output = await listener.queue.get()
                if isinstance(output, Exception):
                    raise output
                yield output
                if isinstance(output, EmbeddingOutput) or output.finished:
                    return
        finally:
            if not generation.finished:
                self._commands.put(lambda: self._abandon(generation))

    async def abort(self, request_id: str) -> None:
        await self._call(lambda: self._abort(request_id))

    # -- adapters, cache, life cycle ---------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> dict[str, str]:
        """Loaded adapters: name to directory."""
        return {name: str(adapter.path) for name, adapter in self.engine.core.adapters.items()}

    async def load_adapter(self, name: str, path: str) -> None:
        await self._call(lambda: self.frontend.load_adapter(name, path))

    async def unload_adapter(self, name: str) -> None:
        """Requests that run with the adapter finish first come: unloading waits for none, it refuses while any is live."""
        await self._call(lambda: self.frontend.unload_adapter(name))

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False while requests hold blocks."""
        return await self._call(self.engine.core.runner.blocks.reset_prefix_cache)

    def stats(self) -> EngineStats:
        core = self.engine.core
        blocks = core.runner.blocks
        return EngineStats(
            running=core.scheduler.num_running,
            waiting=core.scheduler.num_waiting,
            kv_usage=blocks.usage,
            prefix_queries=blocks.prefix_queries,
            prefix_hits=blocks.prefix_hits,
            prompt_tokens=core.prompt_tokens_total,
            generation_tokens=core.generation_tokens_total,
            preemptions=core.preemptions_total,
            free_blocks=blocks.num_free_blocks,
            total_blocks=blocks.num_blocks,
        )

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Take no new requests, let the running ones finish for up to `drain_s` seconds, abort the rest, stop the thread."""
        self._accepting = False
        deadline = time.monotonic() + drain_s
        while self.frontend.generations and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self.alive:
            await self._call(self._abort_all)
            self._stopping.set()
            self._commands.put(lambda: None)
            await asyncio.to_thread(self._thread.join)

    # -- the engine's thread -----------------------------------------------------------------------------------------------------

    async def _call(self, function: Callable[[], Any]) -> Any:
        """Run a function between two steps on the engine's thread."""
        result: Future = Future()

        def command() -> None:
            if not result.set_running_or_notify_cancel():
                return  # the caller gave up before its turn came
            try:
                result.set_result(function())
            except Exception as error:
                result.set_exception(error)

        self._commands.put(command)
        return await asyncio.wrap_future(result)

    def _loop(self) -> None:
        while not self._stopping.is_set():
            self._run_commands(wait=not self.engine.core.has_work)
            if self.engine.core.has_work:
                self._step()

    def _run_commands(self, wait: bool) -> None:
        try:
            self._commands.get(block=wait)()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            return

    def _step(self) -> None:
        try:
            outputs = self.frontend.step()
        except Exception as error:
            log.exception("an engine step failed; its requests are ended")
            self._abort_all(WagerError(f"the engine failed on a step: {error!r}"))
            return
        self._deliver([(g.request_id, output) for g, output in outputs])

    def _deliver(self, outputs: list[tuple[str, Any]]) -> None:
        """Hand a step's outputs over with one wake-up per event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Listener, Any]]] = {}
        for request_id, output in outputs:
            listener = self._listeners.get(request_id)
            if listener is not None:
                by_loop.setdefault(listener.loop, []).append((listener, output))
        for request_id, _ in outputs:  # only now: siblings that end in one step bring several outputs for one listener
            if request_id not in self.frontend.generations:
                self._listeners.pop(request_id, None)
        for loop, items in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, items)
            except RuntimeError:  # the caller's loop is closed; its requests are aborted by their iterators
                log.warning("an event loop closed with %d outputs undelivered", len(items))

    def _submit(self, generation: Generation, listener: _Listener) -> None:
        scheduler, max_queue = self.engine.core.scheduler, self.engine.config.max_queue
        room = max_queue + scheduler.config.max_num_seqs - scheduler.num_running - scheduler.num_waiting
        if len(generation.requests) > room:
            raise CapacityError(f"the queue is full ({max_queue} requests may wait); retry later", retry_after_s=1.0)
        self.frontend.submit(generation)
        self._listeners[generation.request_id] = listener

    def _abandon(self, generation: Generation) -> None:
        """Abort what its caller no longer reads; it may never have been accepted, or another one may bear the same id."""
        if self.frontend.generations.get(generation.request_id) is generation:
            self._abort(generation.request_id)

    def _abort(self, request_id: str) -> None:
        generation = self.frontend.abort(request_id)
        if generation is not None:
            self._deliver([(request_id, generation.output(generation.continuations, delta=True))])

    def _abort_all(self, error: Exception | None = None) -> None:
        for request_id in list(self.frontend.generations):
            generation = self.frontend.abort(request_id)
            if generation is not None:
                self._deliver([(request_id, error or generation.output(generation.continuations, delta=True))])


class _Listener:
    """Where one request's outputs go."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.queue: asyncio.Queue = asyncio.Queue()


def _put_all(items: list[tuple[_Listener, Any]]) -> None:
    for listener, output in items:
        listener.queue.put_nowait(output)
