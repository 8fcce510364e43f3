"""Prompt look-up: the continuation of the latest earlier occurrence of the last few tokens. The simplest guesser that needs no model.

Verified by sample-and-match, so the output is that of plain decoding, seed for seed.
"""

from __future__ import annotations

from collections.abc import Sequence

from wager.serve.request import Request
from wager.serve.token_tree import TokenTree


class NGramIndex:
    """Where each n-gram of a growing text ended last, for n in [shortest, longest]."""

    def __init__(self, shortest: int, longest: int):
        self.shortest, self.longest = shortest, longest
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """n-grams that end at the text's last token are entered with the token after it: a look-up finds earlier ones."""
        for token in tokens:
            end = len(self.tokens)
            for n in range(self.shortest, min(self.longest, end) + 1):
                self._ends[tuple(self.tokens[end - n : end])] = end
            self.tokens.append(token)

    def continuation(self, count: int) -> list[int]:
        """Up to `count` tokens that followed the longest suffix that occurred before."""
        for n in range(min(self.longest, len(self.tokens)), self.shortest - 1, -1):
            end = self._ends.get(tuple(self.tokens[-n:]))
            if end is not None:
                return self.tokens[end : end + count]
        return []


class NGramDrafter:
    """Drafts chains of up to `num_tokens` tokens by prompt look-up."""

    def __init__(self, num_tokens: int, shortest: int = 1, longest: int = 4):
        self.num_tokens = self.max_depth = num_tokens
        self.shortest, self.longest = shortest, longest
        self._texts: dict[str, NGramIndex] = {}

    def propose(
        self, requests: Sequence[Request], nodes: Sequence[int], depths: Sequence[int]
    ) -> list[TokenTree | None]:
        trees: list[TokenTree | None] = []
        for request, n, d in zip(requests, nodes, depths, strict=True):
            index = self._texts.get(request.id)
            if index is None:
                index = self._texts[request.id] = NGramIndex(self.shortest, self.longest)
            index.extend(request.token_ids[len(index.tokens) :])
            guess = index.continuation(min(self.num_tokens, n, d))
            trees.append(TokenTree.chain(guess) if guess else None)
        return trees

    def committed(self, request: Request, path: Sequence[int]) -> None:
        """New tokens are taken in with the next draft."""

    def remove(self, request: Request) -> None:
        self._texts.pop(request.id, None)
