"""What a user decides about an engine, in one frozen record."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from wager.errors import UsageError

POLICIES = ("fcfs", "priority", "longest-prefix", "deadline")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "fp8")
LOAD_FORMATS = ("auto", "dummy")


METHODS = ("draft_model", "sequoia", "specinfer", "specexec", "suffix", "ngram")
NEED_DRAFT = ("draft_model", "sequoia", "specinfer", "specexec")
# vLLM's and SGLang's names for the same things
SPECULATIVE_ALIASES = {
    "model": "draft",
    "suffix_decoding_max_tree_depth": "suffix_max_depth",
    "suffix_decoding_max_cached_requests": "suffix_max_cached_requests",
    "suffix_decoding_max_spec_factor": "suffix_max_spec_factor",
    "suffix_decoding_max_spec_offset": "suffix_max_spec_offset",
    "suffix_decoding_min_token_prob": "suffix_min_token_prob",
    "prompt_lookup_max": "ngram_max",
    "prompt_lookup_min": "ngram_min",
}


@dataclass(frozen=True)
class SpeculativeConfig:
    """One method of speculation and its knobs.

    Attributes:
        method: draft_model (greedy chain), sequoia, specinfer, specexec, suffix or ngram.
        draft: the draft model: "demo-draft", a directory or a hub id. For suffix it is optional and drafts where matches are weak.
        drafts: several draft models, for specinfer.
        draft_quantization: how the draft models' weights are kept, as `quantization` says it for the target; None: as the target's.
        draft_vocabulary: the draft models only guess among so many tokens, those that byte-pair merges made first; a smaller head
            is a cheaper draft, and tokens it cannot guess come from the target. None: all.
        num_speculative_tokens: most guesses of a chain, a suffix draft or a look-up.
        disable_by_batch_size: no guesses while more than this many requests are running.
        auto: switch drafting off, per request and batch size, where measured times say that it does not pay.
        tree: for sequoia "auto", or a file written by `wager speculate plan`, or a list of parents (-1 is the root).
        max_tree_size, max_depth, max_branch: bounds of trees (nodes with the root, levels of guesses, children of a node).
        expansion: for specinfer, children per node at each step.
        verify: for specinfer "mss" (multi-step speculative sampling) or "naive" (match the target's sample).
        budget, beams, branch_width, decay: for specexec, nodes of the tree, nodes expanded per draft pass, children considered per
            node, and the factor on a child's score.
        draft_temperature: for specexec, at which the draft's probabilities are read (1: as the paper); None: found while serving.
        suffix_*: depth of the trees, limits of the cache, draft length = factor * match length + offset, least probability of a
            drafted token, tree instead of path, score below which a draft model takes over (default: its chain length), cache file.
        ngram_min, ngram_max: lengths of the n-grams looked up.
    """

    method: str = "draft_model"
    draft: str | None = None
    drafts: tuple[str, ...] = ()
    draft_quantization: str | None = None
    draft_vocabulary: int | None = None
    num_speculative_tokens: int | None = None
    disable_by_batch_size: int | None = None
    auto: bool = True
    tree: str | tuple[int, ...] = "auto"
    max_tree_size: int = 64
    max_depth: int = 16
    max_branch: int = 16
    expansion: tuple[int, ...] = (1, 1, 3, 1, 1, 1, 1, 1)
    verify: str = "mss"
    budget: int = 128
    beams: int = 32
    branch_width: int = 8
    decay: float = 0.95
    draft_temperature: float | None = None
    suffix_max_depth: int = 24
    suffix_max_cached_tokens: int = 1_000_000
    suffix_max_cached_requests: int = 10_000
    suffix_max_spec_factor: float = 1.0
    suffix_max_spec_offset: float = 0.0
    suffix_min_token_prob: float = 0.1
    suffix_tree: bool = False
    suffix_share_running: bool = True
    suffix_hybrid_threshold: float | None = None
    suffix_cache_file: str | None = None
    ngram_min: int = 1
    ngram_max: int = 4

    @staticmethod
    def parse(value: Any) -> tuple[SpeculativeConfig, ...]:
        """One configuration or several (requests choose by `speculative_method`; the first is the default); a dict may use vLLM's names."""
        if value is None:
            return ()
        if isinstance(value, (list, tuple)):
            return tuple(config for item in value for config in SpeculativeConfig.parse(item))
        if isinstance(value, SpeculativeConfig):
            return (value,)
        given: dict[str, Any] = {SPECULATIVE_ALIASES.get(str(name), str(name)): v for name, v in dict(value).items()}
        unknown = sorted(set(given) - set(SpeculativeConfig.__dataclass_fields__))
        if unknown:
            raise UsageError(
                f"speculative_config does not know {', '.join(unknown)}; it takes "
                f"{', '.join(SpeculativeConfig.__dataclass_fields__)}",
                param="speculative_config",
            )
        for name in ("drafts", "expansion", "tree"):
            if isinstance(given.get(name), list):
                given[name] = tuple(given[name])
        return (SpeculativeConfig(**given),)

    def __post_init__(self):
        if self.method not in METHODS:
            raise self._error(f"method {self.method!r} is unknown; use one of {', '.join(METHODS)}")
        if self.method in NEED_DRAFT and not self.draft_models:
            raise self._error(f'method {self.method} needs a draft model, e.g. "draft": "demo-draft"')
        if len(self.draft_models) > 1 and self.method != "specinfer":
            raise self._error(f"only specinfer takes several draft models, not {self.method}")
        for name in (
            "num_speculative_tokens",
            "max_depth",
            "max_branch",
            "budget",
            "beams",
            "branch_width",
            "ngram_min",
        ):
            check_integer(name, getattr(self, name), 1, "speculative_config")
        check_integer("max_tree_size", self.max_tree_size, 2, "speculative_config")
        check_integer("draft_vocabulary", self.draft_vocabulary, 1, "speculative_config")
        for name in ("draft_quantization", "draft_vocabulary"):
            if getattr(self, name) is not None and not self.draft_models:
                raise self._error(f"{name} {getattr(self, name)!r} needs a draft model")
        _check_quantization(self.draft_quantization)
        check_integer("disable_by_batch_size", self.disable_by_batch_size, 0, "speculative_config")
        if not self.expansion or min(self.expansion) < 1:
            raise self._error(f"expansion must be a list of numbers from 1 on, got {list(self.expansion)}")
        if self.verify not in ("mss", "naive"):
            raise self._error(f"verify must be mss or naive, got {self.verify!r}")
        if not 0 < self.decay <= 1:
            raise self._error(f"decay must lie in (0, 1], got {self.decay}")
        if self.draft_temperature is not None and not 0 < self.draft_temperature < math.inf:
            raise self._error(f"draft_temperature must be above 0, got {self.draft_temperature}")
        if self.ngram_max < self.ngram_min:
            raise self._error(f"ngram_max {self.ngram_max} is below ngram_min {self.ngram_min}")

    @staticmethod
    def _error(message: str) -> UsageError:
        return UsageError(f"speculative_config: {message}", param="speculative_config")

    @property
    def draft_models(self) -> tuple[str, ...]:
        return ((self.draft,) if self.draft else ()) + self.drafts

    @property
    def chain_tokens(self) -> int:
        """num_speculative_tokens, or the method's own default."""
        return self.num_speculative_tokens or (16 if self.method in ("suffix", "ngram") else 4)


@dataclass(frozen=True)
class EngineConfig:
    """Everything the engine needs to start.

    Attributes:
        model: "demo", "demo-draft", a directory in Hugging Face layout, or a hub id.
        max_model_len: longest prompt plus output in tokens; None takes the checkpoint's limit.
        max_num_seqs: requests that may run at once. None: 128 on a CPU, 256 on a GPU.
        max_num_batched_tokens: tokens of one step. None: 512 on a CPU, 4096 on a GPU.
        load_format: "auto", the checkpoint as it lies there, or "dummy": random weights of the shapes in config.json, the only file that is
            read (with a tokenizer's, unless skip_tokenizer_init); drafts likewise. For measuring speed.
        kv_cache_dtype: "auto", the weights' own, or "fp8": keys and values rounded to e4m3, on a CPU.
        kv_cache_memory: bytes for the KV pools, or "auto": what max_num_seqs full-length requests could use, at most 30 % of free memory.
        kv_offload_memory: bytes of a second tier in the host's memory ("2GB"): cached blocks that the KV pools give up go there, and come back
            when a prompt begins with them or a preempted request resumes. None: evicted blocks are computed again.
        max_queue: requests that may wait; one more is refused with CapacityError.
        long_prefill_threshold: most prompt tokens of one request in one step, 0 is no limit.
        pooling: how embeddings are made from hidden states, "mean" or "last".
        max_loras: adapters that may be loaded at once; 0 turns adapters off.
        offload_layers: decoder layers of the model held in memory at a time, the others are streamed from offload_file (default: a
            temporary file), no faster than offload_bytes_per_s; 0 holds the whole model.
        tensor_parallel_size: processes that the model's layers are divided over, on a CPU.
        offload_memory: the same as a budget in bytes ("2GB"): as many layers are held as fit; all of them if they do.
        speculative_config: a SpeculativeConfig, a dict of its fields, or a list of them; kept as a tuple.
    """

    model: str = "demo"
    tokenizer: str | None = None
    dtype: str = "auto"
    load_format: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_dtype: str = "auto"
    kv_cache_memory: int | str = "auto"
    kv_offload_memory: int | str | None = None
    block_size: int = 16
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"
    long_prefill_threshold: int = 0
    max_queue: int = 1024
    speculative_config: Any = None
    tensor_parallel_size: int = 1
    offload_layers: int = 0
    offload_memory: int | str | None = None
    offload_file: str | None = None
    offload_bytes_per_s: float | None = None
    skip_tokenizer_init: bool = False
    chat_template: str | None = None
    pooling: str = "mean"
    max_loras: int = 8
    seed: int = 0
    device: str = "auto"
    lora_modules: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "speculative_config", SpeculativeConfig.parse(self.speculative_config))
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPES)}", param="dtype")
        _check_quantization(self.quantization)
        if self.load_format not in LOAD_FORMATS:
            raise UsageError(
                f"load_format {self.load_format!r} is unknown; use one of {', '.join(LOAD_FORMATS)}",
                param="load_format",
            )
        if self.load_format == "dummy" and self.tensor_parallel_size > 1:
            raise UsageError(
                f'load_format "dummy" and tensor_parallel_size {self.tensor_parallel_size} do not go together; drop one of them',
                param="load_format",
            )
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise UsageError(
                f"kv_cache_dtype {self.kv_cache_dtype!r} is unknown; use one of {', '.join(KV_CACHE_DTYPES)}",
                param="kv_cache_dtype",
            )
        if self.pooling not in ("mean", "last"):
            raise UsageError(f"pooling {self.pooling!r} is unknown; use mean or last", param="pooling")
        if self.scheduling_policy not in POLICIES:
            raise UsageError(
                f"scheduling policy {self.scheduling_policy!r} is unknown; use one of {', '.join(POLICIES)}",
                param="scheduling_policy",
            )
        sizes = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "max_queue")
        for name in (*sizes, "tensor_parallel_size"):
            check_integer(name, getattr(self, name), 1, name)
        for name in ("long_prefill_threshold", "max_loras", "offload_layers"):
            check_integer(name, getattr(self, name), 0, name)
        if isinstance(self.kv_cache_memory, str) and self.kv_cache_memory != "auto":
            object.__setattr__(self, "kv_cache_memory", parse_bytes(self.kv_cache_memory))
        for name in ("offload_memory", "kv_offload_memory"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, parse_bytes(value))
            check_integer(name, getattr(self, name), 1, name)
        if self.kv_offload_memory is not None and not self.enable_prefix_caching:
            raise UsageError(
                f"kv_offload_memory {self.kv_offload_memory} keeps cached blocks: it needs enable_prefix_caching",
                param="kv_offload_memory",
            )
        self._check_offload()
        if self.kv_cache_memory != "auto":
            check_integer("kv_cache_memory", self.kv_cache_memory, 1, "kv_cache_memory")

    @property
    def offloads(self) -> bool:
        return bool(self.offload_layers) or self.offload_memory is not None

    def _check_offload(self) -> None:
        if self.tensor_parallel_size > 1 and (self.offloads or self.lora_modules):
            other = "offloaded weights" if self.offloads else "adapters"
            raise UsageError(
                f"tensor_parallel_size {self.tensor_parallel_size} and {other} do not go together; drop one of them",
                param="tensor_parallel_size",
            )
        if self.offload_layers and self.offload_memory is not None:
            raise UsageError(
                f"give offload_layers {self.offload_layers} or offload_memory {self.offload_memory}, not both",
                param="offload_memory",
            )
        rate = self.offload_bytes_per_s
        if rate is not None and not rate > 0:
            raise UsageError(f"offload_bytes_per_s must be above 0, got {rate}", param="offload_bytes_per_s")
        for name in ("offload_file", "offload_bytes_per_s"):
            if getattr(self, name) is not None and not self.offloads:
                raise UsageError(
                    f"{name} {getattr(self, name)!r} needs offload_memory (or offload_layers): nothing is streamed without it",
                    param=name,
                )


def _check_quantization(mode: str | None) -> None:
    if mode is not None:
        from wager.kernels.quantize import check_mode

        check_mode(mode)


def check_integer(name: str, value: Any, low: int, param: str) -> None:
    """None is allowed. Raises UsageError naming the value."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UsageError(f"{name} must be a whole number, got {value!r}", param=param)
    if value < low:
        raise UsageError(f"{name} must be at least {low}, got {value}", param=param)


def parse_bytes(text: str) -> int:
    """ "512MiB", "2GB", "1073741824" → bytes. Raises UsageError naming the text."""
    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
    lowered = text.strip().lower().removesuffix("b")
    number = lowered.rstrip("kmgi")
    try:
        return int(float(number) * units[lowered[len(number) :]])
    except (ValueError, KeyError, OverflowError):
        raise UsageError(f"cannot read {text!r} as a size in bytes; write e.g. 512MiB or 2GB") from None
