"""Counted suffix trees over growing token sequences, in C++ (`cpp/suffix_tree.h`), as Python objects.

Appending a token costs O(depth), proposing O(depth) plus the tokens read, removing a sequence O(its length times depth). Nothing here is
thread-safe: a tree and everything that looks at it belong to one thread. (Source: SuffixDecoding, arXiv 2411.04975.)
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wager.errors import UsageError, WagerError
from wager.native import build

SOURCE = Path(__file__).parent / "cpp" / "suffix_tree.cpp"
MAX_DEPTH = 1024

_P, _I, _F = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
_SIGNATURES = {
    "wager_suffix_new": (_P, (_I,)),
    "wager_suffix_free": (None, (_P,)),
    "wager_suffix_open": (_I, (_P,)),
    "wager_suffix_remove": (None, (_P, _I)),
    "wager_suffix_check": (_I, (_P,)),
    "wager_suffix_append": (None, (_P, _I, _P, _I)),
    "wager_suffix_count": (_I, (_P, _P, _I)),
    "wager_suffix_stats": (None, (_P, _P)),
    "wager_matcher_new": (_P, (_P,)),
    "wager_matcher_free": (None, (_P,)),
    "wager_suffix_extend": (None, (_P, _I, _P, _I, _P, _I)),
    "wager_suffix_speculate": (_I, (_P,)),
}


@cache
def library() -> ctypes.CDLL:
    """The compiled trees. Raises BuildError when this machine has no compiler: there is no slower form."""
    lib = build.load("wager_suffix", [SOURCE])
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class _Limits(ctypes.Structure):
    _fields_ = [("tokens", _I), ("factor", _F), ("offset", _F), ("min_probability", _F), ("branch", _I)]


class _Query(ctypes.Structure):
    _fields_ = [
        ("own", _P), ("matcher", _P), ("own_seq", _I), ("seq", _I), ("local", _I), ("limits", _Limits), ("tokens", _P), ("parents", _P),
        ("probabilities", _P), ("score", _F), ("match", _I), ("from_shared", _I),
    ]  # fmt: skip


@dataclass(frozen=True)
class DraftLimits:
    """How far a draft may go.

    A match of m tokens may draft min(max_tokens, floor(factor * m + offset)) tokens, each with an estimated probability of at least
    min_probability. branch: draft a tree (likeliest tokens first) instead of the likeliest path.
    """

    max_tokens: int = 16
    factor: float = 1.0
    offset: float = 0.0
    min_probability: float = 0.1
    branch: bool = False

    def __post_init__(self):
        if self.max_tokens < 1 or self.factor < 0 or not 0 <= self.min_probability <= 1:
            raise UsageError(
                f"suffix drafts need max_tokens >= 1, factor >= 0 and a probability in [0, 1], got {self}",
                param="speculative_config",
            )


class SuffixDraft(NamedTuple):
    """tokens, parents (-1: follows the context), estimated probability of each being reached; score is their sum."""

    tokens: np.ndarray
    parents: np.ndarray
    probabilities: np.ndarray
    score: float
    match_length: int
    from_shared: bool


class SuffixTree:
    """One tree over any number of sequences. `depth` bounds the substrings it knows."""

    def __init__(self, depth: int):
        if not 1 <= depth <= MAX_DEPTH:
            raise UsageError(f"suffix tree depth must lie in [1, {MAX_DEPTH}], got {depth}", param="speculative_config")
        self.depth = depth
        self._lib = library()
        self.handle = self._lib.wager_suffix_new(depth)

    def __del__(self):
        handle = getattr(self, "handle", None)
        if handle:
            self._lib.wager_suffix_free(handle)

    def open(self) -> int:
        """A new empty sequence."""
        return self._lib.wager_suffix_open(self.handle)

    def append(self, sequence: int, tokens: Sequence[int] | np.ndarray) -> None:
        ids = np.ascontiguousarray(tokens, dtype=np.int32)
        self._lib.wager_suffix_append(self.handle, sequence, ids.ctypes.data, len(ids))

    def remove(self, sequence: int) -> None:
        """Forget a sequence; its number may be used again. Nothing may be growing it."""
        self._lib.wager_suffix_remove(self.handle, sequence)

    def count(self, tokens: Sequence[int] | np.ndarray) -> int:
        """How often this string (up to the depth) occurs."""
        ids = np.ascontiguousarray(tokens, dtype=np.int32)
        return self._lib.wager_suffix_count(self.handle, ids.ctypes.data, len(ids))

    def check(self) -> None:
        """Walk the whole tree; raises WagerError naming the first rule of the structure that does not hold."""
        broken = self._lib.wager_suffix_check(self.handle)
        if broken:
            raise WagerError(f"the suffix tree breaks rule {broken} of its structure (see Tree::check)")

    def _stats(self) -> np.ndarray:
        out = np.zeros(3, np.int64)
        self._lib.wager_suffix_stats(self.handle, out.ctypes.data)
        return out

    @property
    def num_nodes(self) -> int:
        return int(self._stats()[0])

    @property
    def num_tokens(self) -> int:
        return int(self._stats()[1])

    @property
    def nbytes(self) -> int:
        return int(self._stats()[2])


class SuffixSession:
    """One running request: a tree of its own text and its place in the shared tree.

    shared: the tree of outputs, None for none. share: whether this request's output goes into the shared tree while it is generated.
    """

    def __init__(self, depth: int, shared: SuffixTree | None, share: bool = True):
        self._lib = library()
        self.own, self.shared = SuffixTree(depth), shared
        self.own_sequence = self.own.open()
        self.sequence = shared.open() if shared is not None and share else -1
        self._matcher = self._lib.wager_matcher_new(shared.handle) if shared is not None else None
        self._query = _Query(self.own.handle, self._matcher, self.own_sequence, self.sequence)
        self._asked = ctypes.byref(self._query)
        self._limits: DraftLimits | None = None
        self._new = np.zeros(64, np.int32)
        self._new_at = self._new.ctypes.data

    def __del__(self):
        if getattr(self, "_matcher", None):
            self._lib.wager_matcher_free(self._matcher)

    def extend(self, tokens: Sequence[int], output: bool) -> None:
        """New tokens of the text; those of the output also go into the shared tree."""
        count = len(tokens)
        if count > len(self._new):
            self._new = np.zeros(count, np.int32)
            self._new_at = self._new.ctypes.data
        self._new[:count] = tokens
        sequence = self.sequence if output else -1
        self._lib.wager_suffix_extend(self.own.handle, self.own_sequence, self._matcher, sequence, self._new_at, count)

    def speculate(self, limits: DraftLimits, local: bool = True) -> SuffixDraft:
        """The draft with the highest expected number of accepted tokens under the counts; it may be empty. local: look into the
        request's own tree too."""
        query = self._query
        if limits is not self._limits:
            self._limit(limits)
        query.local = local
        count = self._lib.wager_suffix_speculate(self._asked)
        return SuffixDraft(
            self._tokens[:count].copy(), self._parents[:count].copy(), self._probabilities[:count].copy(), query.score, query.match,
            bool(query.from_shared),
        )  # fmt: skip

    def _limit(self, limits: DraftLimits) -> None:
        """Limits hold for many drafts: hand them over once, and make room for what they allow."""
        room = limits.max_tokens
        self._tokens, self._parents = np.zeros(room, np.int64), np.zeros(room, np.int32)
        self._probabilities = np.zeros(room, np.float32)
        query = self._query
        query.tokens, query.parents, query.probabilities = (
            array.ctypes.data for array in (self._tokens, self._parents, self._probabilities)
        )
        query.limits = _Limits(room, limits.factor, limits.offset, limits.min_probability, int(limits.branch))
        self._limits = limits
