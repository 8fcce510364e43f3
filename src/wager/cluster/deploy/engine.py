"""An engine whose model runs in other processes: the same scheduler, sampler and text handling over a pipeline of stages."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from wager.cluster.deploy.process import Launcher
from wager.cluster.deploy.replica import Replica
from wager.errors import CapacityError, UsageError, WagerError
from wager.models.config import read_json
from wager.models.loader import LoadedModel
from wager.serve.build import FREE_MEMORY_SHARE, Engine, decide_limits, free_memory_bytes, load_tokenizer
from wager.serve.cache.block_manager import BlockManager
from wager.serve.cache.pool import KVPool, groups_for
from wager.serve.config import EngineConfig
from wager.serve.core import EngineCore, Progress
from wager.serve.frontend import Frontend
from wager.serve.generation import Generation
from wager.serve.llm import AsyncLLM
from wager.serve.observe import Observer
from wager.serve.outputs import RequestOutput
from wager.serve.parallel.pipeline import KVLost, PipelineRunner
from wager.serve.parallel.stage import StageSpec, skeleton
from wager.serve.request import Request, Status
from wager.serve.sampling.grammar import GrammarCompiler
from wager.serve.sampling.sampler import Sampler
from wager.serve.schedule.continuous import ContinuousScheduler, SchedulerConfig

log = logging.getLogger(__name__)

NOT_DEPLOYED = ("speculative_config", "offload_layers", "lora_modules")


class DeployedCore(EngineCore):
    """An engine core whose keys and values may vanish in the middle of a step; what was generated stays generated."""

    tokens_computed_again = 0

    def step(self) -> list[Progress]:
        self._failures: list[Progress] = []
        try:
            return super().step()
        except KVLost:
            self.start_again()
            return self._failures

    def start_again(self) -> None:
        """Every running request gives up its blocks and waits: its tokens, prompt and output, are computed again."""
        scheduler, blocks = self.scheduler, self.runner.blocks
        while scheduler.running:
            request = scheduler.running.pop()
            self.tokens_computed_again += request.num_computed_tokens
            blocks.free(request.id)
            request.status, request.num_computed_tokens = Status.WAITING, 0
            request.metrics.num_preemptions += 1
            scheduler.waiting.appendleft(request)
        blocks.take_copies()
        blocks.reset_prefix_cache()

    def remaining_steps(self) -> int:
        """Most tokens that a running request may still generate."""
        return max((r.max_total_tokens - r.num_tokens for r in self.scheduler.running), default=0)

    def _fail(self, request: Request, reason: str) -> Progress:
        done = super()._fail(request, reason)
        self._failures.append(done)
        return done


def stage_layers(layers: int, stages: int) -> list[tuple[int, int]]:
    """As equal as whole layers allow. Raises UsageError when there are more stages than layers."""
    if not 1 <= stages <= layers:
        raise UsageError(f"{stages} stages for a model of {layers} layers: give from 1 to {layers}")
    return [(i * layers // stages, (i + 1) * layers // stages) for i in range(stages)]


def deploy_engine(
    config: EngineConfig,
    stages: Sequence[tuple[int, int]],
    launcher: Launcher,
    name: str = "a",
    resources: Sequence[str | None] | None = None,
    micro_batches: int | None = None,
    threads: int | None = None,
    observers: Sequence[Observer] = (),
    forget: bool = False,
) -> tuple[Engine, Replica]:
    """Start the stages [first, last) and put an engine over them. Raises UsageError for options that a pipeline does not serve."""
    for option in NOT_DEPLOYED:
        if getattr(config, option):
            raise UsageError(f"{option} is not served by a pipeline of processes; drop it", param=option)
    if config.device not in ("auto", "cpu"):
        raise UsageError(f"device {config.device!r}: stages run on CPUs; use device='cpu'", param="device")
    model, raw, path = skeleton(config.model, config.dtype)
    _check_cover(stages, len(model.attention))
    limits = decide_limits(config, model, torch.device("cpu"))
    num_blocks = _num_blocks(config, limits, model)
    groups = groups_for(model.attention)
    blocks = BlockManager(groups, num_blocks, config.block_size, config.enable_prefix_caching)
    each = threads or max(1, (os.cpu_count() or 1) // len(stages))
    specs = [
        StageSpec(config.model, first, last, num_blocks, config.block_size, config.dtype, config.quantization, each)
        for first, last in stages
    ]
    replica = Replica(name, specs, list(resources or [None] * len(specs)), launcher, forget)
    runner = PipelineRunner(
        model, blocks, replica.start(), replica.recover, micro_batches or len(specs), replica.before_step
    )
    replica.runner = runner
    scheduler = ContinuousScheduler(
        SchedulerConfig(
            limits.max_num_seqs, limits.max_num_batched_tokens, config.long_prefill_threshold, config.scheduling_policy
        ),
        blocks,
    )
    sampler = Sampler(model.vocab_size, "cpu", np.random.default_rng(config.seed))
    core = DeployedCore(runner, scheduler, sampler, observers=observers)
    runner.wants_hidden = lambda batch: any(core.requests[s.seq].needs_every_prompt_row for s in batch.spans)
    replica.remaining_steps = core.remaining_steps
    loaded = LoadedModel(model, raw, read_json(path / "generation_config.json", required=False), path)
    tokenizer = None if config.skip_tokenizer_init else load_tokenizer(config, loaded)
    eos = set(tokenizer.eos_token_ids if tokenizer else ())
    named = loaded.generation_config.get("eos_token_id", raw.get("eos_token_id"))
    eos |= set() if named is None else {named} if isinstance(named, int) else set(named)
    return Engine(
        core=core,
        config=config,
        max_model_len=limits.max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=frozenset(eos),
        tokenizer=tokenizer,
        grammars=GrammarCompiler(tokenizer, model.vocab_size) if tokenizer else None,
        generation_defaults=dict(loaded.generation_config),
        path=path,
    ), replica


class DeployedLLM(AsyncLLM):
    """AsyncLLM over a replica; moves of stages happen between steps, also while it is idle."""

    def __init__(self, engine: Engine, replica: Replica, served_model_name: str | None = None):
        self.replica = replica
        super().__init__(engine.config.model, served_model_name=served_model_name, engine=engine)
        replica.poke = self._poke

    def _poke(self, function: Any) -> None:
        def between_steps() -> None:
            try:
                function()
            except KVLost:
                self.engine.core.start_again()  # type: ignore[attr-defined]
            except WagerError:
                log.exception("replica %s could not be moved; the next request tries again", self.replica.name)

        self._commands.put(between_steps)

    async def shutdown(self, drain_s: float = 0.0) -> None:
        await super().shutdown(drain_s)
        self.replica.close()


def run_all(
    engine: Engine, prompts: Sequence[Any], params: Sequence[Any], on_output: Any = None
) -> list[RequestOutput]:
    """Complete prompts on this thread, e.g. to compare a pipeline with one process; outputs in order. on_output: sees each as it comes."""
    frontend = Frontend(engine)
    made: list[Generation] = [
        frontend.make(p, q, f"run-{i}") for i, (p, q) in enumerate(zip(prompts, params, strict=True))
    ]
    last: dict[str, Any] = {}
    for one in made:
        frontend.submit(one)
    while engine.core.has_work:
        for generation, output in frontend.step():
            last[generation.request_id] = output
            if on_output is not None:
                on_output(output)
    return [last[one.request_id] for one in made]


def _check_cover(stages: Sequence[tuple[int, int]], layers: int) -> None:
    at = 0
    for first, last in stages:
        if first != at or last <= first:
            raise UsageError(
                f"the stage of layers [{first}, {last}) does not begin where the stage before ends, at layer {at}"
            )
        at = last
    if at != layers:
        raise UsageError(f"the stages hold layers up to {at}, the model has {layers}")


def _num_blocks(config: EngineConfig, limits: Any, model: Any) -> int:
    per_block = KVPool.bytes_per_block(model.attention, config.block_size, model.dtype)
    wanted = limits.max_num_seqs * -(-limits.max_model_len // config.block_size)
    if config.kv_cache_memory == "auto":
        room = int(FREE_MEMORY_SHARE * free_memory_bytes(torch.device("cpu")))
    else:
        room = int(config.kv_cache_memory)
    if room < per_block:
        raise CapacityError(
            f"kv_cache_memory of {config.kv_cache_memory} holds no block of {config.block_size} tokens ({per_block} bytes); raise it"
        )
    return min(wanted, room // per_block)
