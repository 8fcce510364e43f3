"""SuffixDecoding: drafts from counted suffix trees over the request's own text and over earlier outputs (arXiv 2411.04975).

For a user: `{"method": "suffix"}` speeds up text that repeats itself or what was generated before (agents, code edits, SQL templates)
without a draft model, at microseconds per token; where nothing repeats it drafts nothing. With a draft model as well ("draft"), the
model drafts where the match is weak.

Two trees: one of the request's prompt and output, one of all outputs, the running ones included. For each length of match the counts
give the likeliest continuation and how many of its tokens to expect; the best expectation is drafted. Requests with different adapters
or cache salts never see one another's text. Exact: verification is sample-and-match, seed for seed.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from wager.errors import UsageError
from wager.serve.request import Request
from wager.serve.speculate.draft_model import ModelChainDrafter
from wager.serve.speculate.suffix_tree import DraftLimits, SuffixDraft, SuffixSession, SuffixTree
from wager.serve.token_tree import TokenTree

Namespace = tuple[str | None, str | None]  # adapter, cache salt


@dataclass
class _Shared:
    """The tree of outputs of one namespace and its finished sequences, oldest first."""

    tree: SuffixTree
    finished: OrderedDict[int, int] = field(default_factory=OrderedDict)  # sequence → length


class SuffixCache:
    """Outputs of earlier and running requests. Bounded by tokens and by requests, oldest evicted first; -1 is no limit, max_requests 0
    keeps nothing, not even running outputs."""

    def __init__(self, depth: int, max_tokens: int = 1_000_000, max_requests: int = 10_000):
        self.depth, self.max_tokens, self.max_requests = depth, max_tokens, max_requests
        self.namespaces: dict[Namespace, _Shared] = {}
        self._order: OrderedDict[tuple[Namespace, int], int] = OrderedDict()
        self.num_tokens = 0  # of finished outputs
        self._texts: dict[tuple[Namespace, int], np.ndarray] = {}

    def tree(self, namespace: Namespace) -> SuffixTree | None:
        if self.max_requests == 0:
            return None
        return self.namespaces.setdefault(namespace, _Shared(SuffixTree(self.depth))).tree

    def finish(self, namespace: Namespace, sequence: int, tokens: Sequence[int]) -> None:
        """An output is complete (it is in the tree already); keep it, evicting the oldest beyond the limits."""
        key = (namespace, sequence)
        if not tokens:
            self.namespaces[namespace].tree.remove(sequence)
            return
        self._order[key] = len(tokens)
        self._texts[key] = np.asarray(tokens, dtype=np.int32)
        self.num_tokens += len(tokens)
        while len(self._order) > 1 and self._over():
            self._evict(next(iter(self._order)))

    def _over(self) -> bool:
        return (0 <= self.max_tokens < self.num_tokens) or (0 <= self.max_requests < len(self._order))

    def _evict(self, key: tuple[Namespace, int]) -> None:
        namespace, sequence = key
        self.num_tokens -= self._order.pop(key)
        del self._texts[key]
        self.namespaces[namespace].tree.remove(sequence)

    def add(self, tokens: Sequence[int], namespace: Namespace = (None, None)) -> None:
        """Warm up with a text, as if it had been generated."""
        tree = self.tree(namespace)
        if tree is not None and len(tokens):
            sequence = tree.open()
            tree.append(sequence, tokens)
            self.finish(namespace, sequence, list(tokens))

    def save(self, path: str | Path) -> None:
        """Write the finished outputs, oldest first, whole or not at all."""
        temporary = Path(f"{path}.tmp.npz")
        names = [f"{adapter or ''}\0{salt or ''}" for (adapter, salt), _ in self._order]
        texts = [self._texts[key] for key in self._order]
        lengths = np.array([len(t) for t in texts], np.int64)
        flat = np.concatenate(texts) if texts else np.zeros(0, np.int32)
        np.savez_compressed(temporary, tokens=flat, lengths=lengths, namespaces=np.array(names, dtype=str))
        temporary.replace(path)

    def load(self, path: str | Path) -> int:
        """Read what `save` wrote; returns the number of outputs. Raises UsageError for anything else."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                tokens, lengths, names = stored["tokens"], stored["lengths"], stored["namespaces"]
            if int(lengths.sum()) != len(tokens) or len(names) != len(lengths):
                raise ValueError("lengths do not add up")
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"cannot read the suffix cache {path}: {error}; delete it to start anew") from None
        at = 0
        for length, name in zip(lengths.tolist(), names.tolist(), strict=True):
            adapter, _, salt = name.partition("\0")
            self.add(tokens[at : at + length].tolist(), (adapter or None, salt or None))
            at += length
        return len(lengths)


@dataclass
class _Running:
    session: SuffixSession
    namespace: Namespace
    request: Request
    seen: int = 0


class SuffixDrafter:
    """Drafts of at most `limits.max_tokens` tokens; none where no match promises any."""

    def __init__(
        self, cache: SuffixCache, limits: DraftLimits, share_running: bool = True, cache_file: Path | None = None
    ):
        self.cache, self.limits, self.share_running = cache, limits, share_running
        self.num_tokens = self.max_depth = limits.max_tokens
        self._running: dict[str, _Running] = {}
        self.cache_file = cache_file
        if cache_file is not None and cache_file.exists():
            cache.load(cache_file)

    def draft(self, request: Request, nodes: int, depth: int) -> SuffixDraft:
        """The draft for one request, whose new tokens are taken in first."""
        running = self._sync(request)
        most = min(self.limits.max_tokens, nodes, depth)  # a tree of that many tokens is no deeper
        limits = self.limits
        if most < limits.max_tokens:
            limits = DraftLimits(most, limits.factor, limits.offset, limits.min_probability, limits.branch)
        return running.session.speculate(limits)

    def propose(
        self, requests: Sequence[Request], nodes: Sequence[int], depths: Sequence[int]
    ) -> list[TokenTree | None]:
        drafts = [self.draft(r, n, d) for r, n, d in zip(requests, nodes, depths, strict=True)]
        return [tree_of(draft) for draft in drafts]

    def committed(self, request: Request, path: Sequence[int]) -> None:
        """New tokens are taken in with the next draft."""

    def remove(self, request: Request) -> None:
        running = self._running.get(request.id)
        if running is None:
            return
        self._sync(request)
        del self._running[request.id]
        if running.session.shared is None:
            return
        sequence = running.session.sequence
        if sequence < 0:
            self.cache.add(request.output_token_ids, running.namespace)
        else:
            self.cache.finish(running.namespace, sequence, request.output_token_ids)

    def save(self) -> None:
        """Write the cache to its file, if it has one."""
        if self.cache_file is not None:
            os.makedirs(self.cache_file.parent, exist_ok=True)
            self.cache.save(self.cache_file)

    def _sync(self, request: Request) -> _Running:
        running = self._running.get(request.id)
        if running is None:
            namespace = (request.adapter, request.cache_salt)
            session = SuffixSession(self.cache.depth, self.cache.tree(namespace), self.share_running)
            session.extend(request.prompt_token_ids, output=False)
            running = _Running(session, namespace, request, request.num_prompt_tokens)
            self._running[request.id] = running
        if running.seen < request.num_tokens:
            running.session.extend(request.token_ids[running.seen :], output=True)
            running.seen = request.num_tokens
        return running


class HybridDrafter:
    """Suffix drafts that promise at least `threshold` tokens; else the draft model's chain (SuffixDecoding's hybrid)."""

    def __init__(self, suffix: SuffixDrafter, model: ModelChainDrafter, threshold: float):
        self.suffix, self.model, self.threshold = suffix, model, threshold
        self.num_tokens = max(suffix.num_tokens, model.num_tokens)
        self.max_depth = self.num_tokens
        self._by_model: set[str] = set()

    def propose(
        self, requests: Sequence[Request], nodes: Sequence[int], depths: Sequence[int]
    ) -> list[TokenTree | None]:
        drafts = [self.suffix.draft(r, n, d) for r, n, d in zip(requests, nodes, depths, strict=True)]
        trees = [tree_of(draft) if draft.score >= self.threshold else None for draft in drafts]
        weak = [i for i, tree in enumerate(trees) if tree is None]
        if weak:
            drafted = self.model.propose(
                [requests[i] for i in weak], [nodes[i] for i in weak], [depths[i] for i in weak]
            )
            for i, tree in zip(weak, drafted, strict=True):
                trees[i] = tree
                if tree is not None:
                    self._by_model.add(requests[i].id)
        return trees

    def committed(self, request: Request, path: Sequence[int]) -> None:
        if request.id in self._by_model:
            self._by_model.discard(request.id)
            self.model.committed(request, path)

    def remove(self, request: Request) -> None:
        self._by_model.discard(request.id)
        self.suffix.remove(request)
        self.model.remove(request)


def tree_of(draft: SuffixDraft) -> TokenTree | None:
    return TokenTree(draft.tokens, draft.parents) if len(draft.tokens) else None
