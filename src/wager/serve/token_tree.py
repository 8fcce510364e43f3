"""A tree of guessed tokens hanging below the last committed token. A chain and the empty tree are trees.

Nodes are numbered parents first; the root (the last committed token, whose KV is not yet in the cache) is not stored: its number
is -1 in `parents`. In a batch the tree of n nodes takes n + 1 rows, the root first, so node i is row i + 1 of its span.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TokenTree:
    """Flat arrays over n nodes.

    tokens: int64 [n]. parents: int32 [n], parents[i] < i, -1 is the root. draft: whatever the verifier of this kind of tree needs
    about the distributions the tokens were drawn from (None for deterministic guesses).
    """

    tokens: np.ndarray
    parents: np.ndarray
    draft: Any = None

    def __post_init__(self):
        if len(self.tokens) != len(self.parents) or np.any(self.parents >= np.arange(len(self.parents))):
            raise ValueError("a token tree lists parents before children, one parent per token")

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def chain(tokens: list[int] | np.ndarray, draft: Any = None) -> TokenTree:
        """A tree without branches: each token is the child of the one before it."""
        tokens = np.asarray(tokens, dtype=np.int64)
        return TokenTree(tokens, np.arange(-1, len(tokens) - 1, dtype=np.int32), draft)

    @property
    def is_chain(self) -> bool:
        return bool(np.all(self.parents == np.arange(-1, len(self) - 1)))

    def depths(self) -> np.ndarray:
        """int32 [n]: children of the root have depth 1."""
        return depths_of(self.parents)

    def path(self, node: int) -> list[int]:
        """Node numbers from below the root down to `node`, inclusive; empty for -1."""
        steps: list[int] = []
        while node >= 0:
            steps.append(node)
            node = int(self.parents[node])
        return steps[::-1]

    def visible(self) -> np.ndarray:
        """bool [n, n]: node i sees node j, that is, j is i or one of its ancestors."""
        return visible_of(self.parents)

    def children(self) -> list[list[int]]:
        """Row-indexed children: entry 0 lists the root's children, entry i + 1 those of node i, in proposal order."""
        lists: list[list[int]] = [[] for _ in range(len(self) + 1)]
        for i, parent in enumerate(self.parents):
            lists[parent + 1].append(i)
        return lists


def depths_of(parents: np.ndarray) -> np.ndarray:
    """int32 [n] depths of a tree given by its parents (-1: the root)."""
    depth = np.ones(len(parents), dtype=np.int32)
    above = parents
    while True:
        inner = above >= 0
        if not inner.any():
            return depth
        depth += inner
        above = np.where(inner, parents[above], -1)


def visible_of(parents: np.ndarray) -> np.ndarray:
    """bool [n, n]: which nodes each node sees (itself and its ancestors)."""
    n = len(parents)
    seen = np.zeros((n, n), bool)
    own = np.arange(n)
    above = own
    while len(own):
        seen[own, above] = True
        above = parents[above]
        own, above = own[above >= 0], above[above >= 0]
    return seen


def pack_bits(rows: np.ndarray, words: int) -> np.ndarray:
    """uint64 [n, words] from bool [n, m]: bit j % 64 of word j // 64 is column j."""
    packed = np.packbits(rows, axis=1, bitorder="little")
    padded = np.zeros((len(rows), words * 8), np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded.view(np.uint64)
