"""Builds an engine from its configuration: checkpoint, memory plan, pools, scheduler, sampler, draft."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from wager import kernels
from wager.errors import CapacityError, UsageError
from wager.models import demo
from wager.models.base import Model
from wager.models.loader import LoadedModel, load_model
from wager.native.memory import keep_freed_memory
from wager.serve.cache.block_manager import BlockManager
from wager.serve.cache.pool import KVPool, groups_for
from wager.serve.config import EngineConfig, SpeculativeConfig
from wager.serve.core import EngineCore
from wager.serve.features import check_conflicts, enabled_features
from wager.serve.lora import load_adapter
from wager.serve.observe import Observer
from wager.serve.offload import LayerRing, layers_within
from wager.serve.parallel.tensor import Shard, Team, TensorParallelRunner, load_shard
from wager.serve.runner import ModelRunner
from wager.serve.sampling.grammar import GrammarCompiler
from wager.serve.sampling.sampler import Sampler
from wager.serve.schedule.continuous import ContinuousScheduler, SchedulerConfig
from wager.serve.speculate.draft_engine import DraftModel
from wager.serve.speculate.methods import DrafterFactory, build_speculator
from wager.serve.speculate.small_head import shrink_head
from wager.serve.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

FREE_MEMORY_SHARE = 0.3  # of what is free, for the KV pools, unless the user names a size


@dataclass
class Engine:
    """A core ready to step, and what its callers need to make requests."""

    core: EngineCore
    config: EngineConfig
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    tokenizer: Tokenizer | None
    grammars: GrammarCompiler | None
    generation_defaults: dict
    path: Path


@dataclass(frozen=True)
class Limits:
    """The configuration's automatic values, decided."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


def build_engine(config: EngineConfig, observers: Sequence[Observer] = ()) -> Engine:
    """Load everything. Raises CheckpointError, UsageError or CapacityError with the remedy."""
    check_conflicts(enabled_features(config))
    device = pick_device(config.device)
    keep_freed_memory()
    loaded, team = load_target(config, device)
    stream_layers(loaded.model, config)
    limits = decide_limits(config, loaded.model, device)
    tokenizer = None if config.skip_tokenizer_init else load_tokenizer(config, loaded)
    runner = build_runner(loaded.model, config, limits, device, config.kv_offload_memory)
    if team is not None:
        runner = TensorParallelRunner(runner, team)
    scheduler = ContinuousScheduler(
        SchedulerConfig(
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            long_prefill_threshold=config.long_prefill_threshold,
            policy=config.scheduling_policy,
        ),
        runner.blocks,
    )
    sampler = Sampler(loaded.model.vocab_size, device, np.random.default_rng(config.seed))
    factory = DrafterFactory(
        runner,
        lambda name, own: build_draft(name, own, config, limits, loaded.model, device),
        sampler,
        limits.max_model_len,
    )
    core = EngineCore(
        runner,
        scheduler,
        sampler,
        speculator=build_speculator(config.speculative_config, factory),
        observers=observers,
    )
    for name, path in config.lora_modules.items():
        core.adapters[name] = load_adapter(Path(path), loaded.model)
    gc.collect()
    gc.freeze()  # what was built lives as long as the engine: the collector need not walk it again while tokens wait
    eos = set(tokenizer.eos_token_ids if tokenizer else ()) | _eos_ids(loaded)
    return Engine(
        core=core,
        config=config,
        max_model_len=limits.max_model_len,
        vocab_size=loaded.model.vocab_size,
        eos_token_ids=frozenset(eos),
        tokenizer=tokenizer,
        grammars=GrammarCompiler(tokenizer, loaded.model.vocab_size) if tokenizer else None,
        generation_defaults=dict(loaded.generation_config),
        path=Path(loaded.path),
    )


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N", param="device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"device {name!r} was asked for but torch sees no CUDA device; use device='cpu'", param="device"
        )
    return device


def load_target(config: EngineConfig, device: torch.device) -> tuple[LoadedModel, Team | None]:
    """The model that is served: whole, or this process's slice and the team that holds the others."""
    if config.tensor_parallel_size == 1:
        return load_served_model(config.model, config, device), None
    if device.type != "cpu":
        raise UsageError(
            f"tensor_parallel_size {config.tensor_parallel_size} splits a model over CPU processes: use device='cpu'",
            param="tensor_parallel_size",
        )
    name = demo.path(config.model) if demo.is_demo(config.model) else config.model
    load_shard(
        name, config.dtype, Shard(0, config.tensor_parallel_size)
    )  # what is wrong with it is said before processes start
    team = Team(name, config.dtype, config.tensor_parallel_size, config.quantization)
    return load_shard(name, config.dtype, team.shard, config.quantization), team


def load_served_model(
    name: str,
    config: EngineConfig,
    device: torch.device,
    quantization: str | None = None,
    head_rows: int | None = None,
) -> LoadedModel:
    """Load and prepack a checkpoint; the shipped pair goes by its names. quantization, head_rows: of a draft model."""
    path = str(demo.path(name)) if demo.is_demo(name) else name
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    quantization = quantization or config.quantization
    whole = head_rows is None  # a head is cut before it is packed
    loaded = load_model(
        path,
        dtype=dtype,
        device=device,
        packed=whole,
        quantization=quantization if whole else None,
        load_format=config.load_format,
    )
    loaded.model.requires_grad_(False)
    if head_rows is not None:
        shrink_head(loaded.model, head_rows)
        loaded.model.prepack(quantization or kernels.usual_mode(loaded.model.dtype, device))
    return loaded


def stream_layers(model: Model, config: EngineConfig) -> LayerRing | None:
    """Put the model's layers on disk if the configuration says so; the ring lives in the model's hooks."""
    slots = config.offload_layers
    if config.offload_memory is not None:
        slots = layers_within(model, int(config.offload_memory))
    if not slots:
        return None
    file = Path(config.offload_file) if config.offload_file else None
    return LayerRing(model, slots, file, config.offload_bytes_per_s)


def load_tokenizer(config: EngineConfig, loaded: LoadedModel) -> Tokenizer:
    path = config.tokenizer or loaded.path
    return Tokenizer.load(
        demo.path(path) if isinstance(path, str) and demo.is_demo(path) else Path(path), config.chat_template
    )


def decide_limits(config: EngineConfig, model: Model, device: torch.device) -> Limits:
    on_gpu = device.type == "cuda"
    longest = model.max_positions
    if config.max_model_len is not None and config.max_model_len > longest:
        raise UsageError(
            f"max_model_len {config.max_model_len} exceeds the {longest} positions of the checkpoint; lower it",
            param="max_model_len",
        )
    return Limits(
        max_model_len=config.max_model_len or longest,
        max_num_seqs=config.max_num_seqs or (256 if on_gpu else 128),
        max_num_batched_tokens=config.max_num_batched_tokens
        or max(4096 if on_gpu else 512, _largest_tree(config) + 64),
    )


def build_runner(
    model: Model, config: EngineConfig, limits: Limits, device: torch.device, offload_bytes: int | str | None = None
) -> ModelRunner:
    """Size the KV pools, and the tier behind them if any, and put the model over them."""
    dtype = kv_dtype(config, model, device)
    groups = groups_for(model.attention)
    per_block = KVPool.bytes_per_block(model.attention, config.block_size, dtype)
    per_sequence = -(-limits.max_model_len // config.block_size)
    wanted = limits.max_num_seqs * per_sequence
    if config.kv_cache_memory == "auto":
        num_blocks = min(wanted, int(FREE_MEMORY_SHARE * free_memory_bytes(device)) // per_block)
    else:
        num_blocks = min(wanted, int(config.kv_cache_memory) // per_block)
    if num_blocks < 1:
        raise CapacityError(
            f"kv_cache_memory of {config.kv_cache_memory} holds no block of {config.block_size} tokens ({per_block} bytes); raise it"
        )
    if num_blocks < per_sequence:
        log.warning(
            "the KV cache holds %d tokens, fewer than max_model_len %d: longer requests will be refused when they outgrow it",
            num_blocks * config.block_size,
            limits.max_model_len,
        )
    num_host_blocks = int(offload_bytes or 0) // per_block
    if offload_bytes is not None and num_host_blocks < 1:
        raise CapacityError(
            f"kv_offload_memory of {offload_bytes} holds no block of {config.block_size} tokens ({per_block} bytes); raise it"
        )
    blocks = BlockManager(groups, num_blocks, config.block_size, config.enable_prefix_caching, num_host_blocks)
    pool = KVPool(model.attention, groups, num_blocks, config.block_size, dtype, device, num_host_blocks)
    return ModelRunner(model, pool, blocks)


def kv_dtype(config: EngineConfig, model: Model, device: torch.device) -> torch.dtype:
    if config.kv_cache_dtype == "auto":
        return model.dtype
    if device.type != "cpu":
        raise UsageError(
            f"kv_cache_dtype {config.kv_cache_dtype!r} is served on CPUs; use auto on {device.type}",
            param="kv_cache_dtype",
        )
    return torch.float8_e4m3fn


def build_draft(
    name: str,
    own: SpeculativeConfig,
    config: EngineConfig,
    limits: Limits,
    target: Model,
    device: torch.device,
) -> DraftModel:
    """The draft shares the target's vocabulary; its pool holds as many tokens as the target's may."""
    loaded = load_served_model(name, config, device, own.draft_quantization, own.draft_vocabulary)
    if loaded.model.vocab_size != target.vocab_size:
        raise UsageError(
            f"draft {name!r} has {loaded.model.vocab_size} tokens, the target {target.vocab_size}: "
            "a draft must share the target's vocabulary",
            param="speculative_config",
        )
    positions = min(limits.max_model_len, loaded.model.max_positions)
    draft_limits = Limits(positions, limits.max_num_seqs, limits.max_num_batched_tokens)
    runner = build_runner(loaded.model, config, draft_limits, device)
    return DraftModel(runner, limits.max_num_batched_tokens, positions)


def free_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as info:
            fields = dict(line.split(":", 1) for line in info)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _largest_tree(config: EngineConfig) -> int:
    return max((c.budget for c in config.speculative_config if c.method == "specexec"), default=0)


def _eos_ids(loaded: LoadedModel) -> set[int]:
    eos = loaded.generation_config.get("eos_token_id", getattr(loaded.config, "eos_token_id", None))
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
