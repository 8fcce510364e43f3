"""The drafter's side of speculation, as the engine sees it, and what several drafters share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from wager.serve.request import Request
from wager.serve.sampling.rng import derive_seed, few_uniforms
from wager.serve.token_tree import TokenTree

DRAFT_STREAM = 0x5DEECE66D  # separates a request's drafting numbers from those it samples with


class Drafter(Protocol):
    """Proposes token trees. Drafters see requests and tokens only; what they must know about past steps they keep by request id.

    Attributes:
        num_tokens: most nodes of a proposed tree.
        max_depth: most tokens of a root path.
    """

    num_tokens: int
    max_depth: int

    def propose(
        self, requests: Sequence[Request], nodes: Sequence[int], depths: Sequence[int]
    ) -> list[TokenTree | None]:
        """One tree per request with at most nodes[i] nodes and depth depths[i]; None where there is no guess."""
        ...

    def committed(self, request: Request, path: Sequence[int]) -> None:
        """The target accepted these nodes of the last proposal; request.token_ids already holds them and one more."""
        ...

    def remove(self, request: Request) -> None:
        """The request has ended."""
        ...


@runtime_checkable
class SizedDrafter(Protocol):
    """A drafter whose trees are smaller at some batch sizes: what it does not need is left to prompts that wait."""

    def room(self, batch: int) -> int:
        """Most nodes of a tree it proposes now to one of `batch` requests."""
        ...


@runtime_checkable
class TimedDrafter(Protocol):
    """A drafter that wants to know how long steps take that verify its trees."""

    def timed(self, batch: int, step_ms: float) -> None:
        """A step in which each of `batch` requests had a tree of this drafter took `step_ms`."""
        ...


def noise(seed: int, num_tokens: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for drafting after `num_tokens` tokens: the same whatever else is in the batch."""
    return few_uniforms(derive_seed(seed ^ DRAFT_STREAM, num_tokens + 1), count)


SEARCHED = 4  # tokens up to which repeated searches for the largest beat torch's selection


def top_tokens(logits_LW: np.ndarray, count: int) -> np.ndarray:
    """int64 [L, count]: each row's most likely tokens, likeliest first. `logits_LW` is left as it is."""
    count = min(count, logits_LW.shape[1])
    if count > SEARCHED:
        return torch.from_numpy(logits_LW).topk(count, -1).indices.numpy()
    rows, found = np.arange(len(logits_LW)), np.empty((len(logits_LW), count), np.int64)
    for k in range(count):
        if k == 1:
            logits_LW = logits_LW.copy()
        if k:
            logits_LW[rows, found[:, k - 1]] = -np.inf
        found[:, k] = logits_LW.argmax(-1)
    return found


def softmax(logits_W: np.ndarray, temperature: float) -> np.ndarray:
    """float64 [W]."""
    scores = logits_W.astype(np.float64)
    scores -= scores.max()
    scores /= temperature
    np.exp(scores, out=scores)
    scores /= scores.sum()
    return scores


def confidence(logits_W: np.ndarray, best: int) -> float:
    """The probability of the most likely token, `best`, at temperature 1."""
    scores = logits_W - logits_W[best]
    return 1.0 / float(np.exp(scores, out=scores).sum())


def guess_law(logits_W: np.ndarray, temperature: float) -> np.ndarray:
    """float64 [W]: a draft's softmax with exponentials in float32. Any law will do for guesses, as long as they are drawn from it."""
    scores = logits_W - logits_W.max()
    scores *= 1 / temperature
    law_W = np.exp(scores, out=scores).astype(np.float64)
    law_W /= law_W.sum()
    return law_W
