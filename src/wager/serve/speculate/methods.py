"""Builds the drafters that a configuration names."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

from wager.errors import UsageError
from wager.serve.config import SpeculativeConfig
from wager.serve.runner import ModelRunner
from wager.serve.sampling.sampler import Sampler
from wager.serve.speculate.draft_engine import DraftModel
from wager.serve.speculate.draft_model import ModelChainDrafter
from wager.serve.speculate.drafter import Drafter
from wager.serve.speculate.hardware_profile import HardwareProfile, measure_profile
from wager.serve.speculate.ngram import NGramDrafter
from wager.serve.speculate.sequoia import SequoiaDrafter
from wager.serve.speculate.specexec import SpecExecDrafter
from wager.serve.speculate.specinfer import SpecInferDrafter
from wager.serve.speculate.speculator import Speculator
from wager.serve.speculate.suffix import HybridDrafter, SuffixCache, SuffixDrafter
from wager.serve.speculate.suffix_tree import DraftLimits
from wager.serve.speculate.tree_choice import TreeChoice
from wager.serve.speculate.tree_plan import GrowMap

QUICK_CONTEXT = 64
PROFILE_S = 3.0  # per model, at most a round more: with streamed weights every pass is slow
SAMPLING_MS = 0.3  # a drafted step's work outside the models, until measured


class DrafterFactory:
    """Makes drafters over shared draft models: methods that name the same model, kept in the same way, use one copy of it.

    load_draft: (name, configuration) → draft model, loaded and checked against the target.
    """

    def __init__(
        self,
        target: ModelRunner,
        load_draft: Callable[[str, SpeculativeConfig], DraftModel],
        sampler: Sampler,
        max_context: int,
    ):
        self.target, self.load_draft, self.sampler, self.max_context = target, load_draft, sampler, max_context
        self._drafts: dict[tuple[str, str | None, int | None], DraftModel] = {}

    def draft(self, name: str, config: SpeculativeConfig) -> DraftModel:
        key = (name, config.draft_quantization, config.draft_vocabulary)
        if key not in self._drafts:
            self._drafts[key] = self.load_draft(name, config)
        return self._drafts[key]

    def make(self, config: SpeculativeConfig) -> Drafter:
        makers = {
            "draft_model": self._chain,
            "sequoia": self._sequoia,
            "specinfer": self._specinfer,
            "specexec": self._specexec,
            "suffix": self._suffix,
            "ngram": lambda c: NGramDrafter(c.chain_tokens, c.ngram_min, c.ngram_max),
        }
        return makers[config.method](config)

    def _chain(self, config: SpeculativeConfig) -> ModelChainDrafter:
        return ModelChainDrafter(
            self.draft(config.draft_models[0], config), config.num_speculative_tokens or 4, self.sampler
        )

    def _sequoia(self, config: SpeculativeConfig) -> SequoiaDrafter:
        draft = self.draft(config.draft_models[0], config)
        width = min(config.max_branch, draft.runner.model.vocab_size)
        fixed, profile = None, None
        if config.tree == "auto":
            profile = self._quick_profile(draft, config)
        elif isinstance(config.tree, str):
            fixed = GrowMap.load(config.tree)
        else:
            fixed = GrowMap.from_parents(config.tree)
        if fixed is not None and max(map(len, fixed.children)) > draft.runner.model.vocab_size:
            raise UsageError("a node of the token tree has more children than the vocabulary tokens", param="tree")
        choice = TreeChoice(fixed, profile, config.max_tree_size, config.max_depth, width)
        return SequoiaDrafter(draft, choice, self.sampler)

    def _quick_profile(self, draft: DraftModel, config: SpeculativeConfig) -> HardwareProfile:
        sizes = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if n <= max(config.max_tree_size, 2)]
        context = min(QUICK_CONTEXT, max(1, self.max_context // 2))
        room = min(runner.blocks.num_free_blocks * runner.blocks.block_size for runner in (self.target, draft.runner))
        sizes = [n for n in sizes if context + n + 1 <= room] or [1]
        per_sequence = context + max(sizes) + 1 + self.target.blocks.block_size
        batches = [b for b in (1, 4, 16) if b * per_sequence <= room] or [1]
        return measure_profile(
            self.target, draft, sizes=sizes, batches=batches, context_tokens=context, repeats=3,
            overhead_ms=SAMPLING_MS, budget_s=PROFILE_S,
        )  # fmt: skip

    def _specinfer(self, config: SpeculativeConfig) -> SpecInferDrafter:
        drafts = [self.draft(name, config) for name in config.draft_models]
        return SpecInferDrafter(drafts, config.expansion, self.sampler, config.verify == "naive")

    def _specexec(self, config: SpeculativeConfig) -> SpecExecDrafter:
        return SpecExecDrafter(
            self.draft(config.draft_models[0], config), self.sampler, config.budget, config.beams, config.max_depth,
            config.branch_width, config.decay, config.draft_temperature,
        )  # fmt: skip

    def _suffix(self, config: SpeculativeConfig) -> SuffixDrafter | HybridDrafter:
        cache = SuffixCache(config.suffix_max_depth, config.suffix_max_cached_tokens, config.suffix_max_cached_requests)
        limits = DraftLimits(
            config.chain_tokens, config.suffix_max_spec_factor, config.suffix_max_spec_offset, config.suffix_min_token_prob,
            config.suffix_tree,
        )  # fmt: skip
        file = Path(config.suffix_cache_file) if config.suffix_cache_file else None
        suffix = SuffixDrafter(cache, limits, config.suffix_share_running, file)
        if file is not None:
            _save_at_exit(suffix)
        if not config.draft_models:
            return suffix
        chain = ModelChainDrafter(self.draft(config.draft_models[0], config), 4, self.sampler)
        threshold = config.suffix_hybrid_threshold
        return HybridDrafter(suffix, chain, chain.num_tokens if threshold is None else threshold)


def _save_at_exit(suffix: SuffixDrafter) -> None:
    reference = weakref.ref(suffix)

    def save() -> None:
        alive = reference()
        if alive is not None:
            alive.save()

    atexit.register(save)


def build_speculator(configs: Sequence[SpeculativeConfig], factory: DrafterFactory) -> Speculator | None:
    """The engine's speculation; None when none is configured. Raises UsageError when a method is named twice."""
    if not configs:
        return None
    names = [config.method for config in configs]
    if len(set(names)) < len(names):
        raise UsageError(f"speculative_config names a method twice: {', '.join(names)}", param="speculative_config")
    limits = [c.disable_by_batch_size for c in configs if c.disable_by_batch_size is not None]
    drafters = {config.method: factory.make(config) for config in configs}
    gated = [config.method for config in configs if config.auto]
    return Speculator(drafters, gated, min(limits) if limits else None)
