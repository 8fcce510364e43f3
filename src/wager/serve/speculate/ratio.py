"""Accept rules that compare the target's distribution with the one the guesses were drawn from. All are exact: the committed token has
the target's distribution, whatever the drafts' distributions are, provided the guesses were drawn from them as stated.

- `without_replacement` (Sequoia, arXiv 2402.12374): children are draws without replacement from one distribution, in sampling order.
- `independent` (SpecInfer's multi-step speculative sampling, arXiv 2305.09781): children are independent draws, each from a distribution
  of its own; a token drawn twice counts twice.

Wrong in ways that are easy to overlook, and refuted by the tests: children taken as the most likely tokens instead of drawn, children
sorted after the draw, equal draws tried once.

Shape legend: W vocabulary. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FEW = 1e-6  # share of a distribution below which what is left of it is summed anew instead of subtracted


def without_replacement(
    target_W: np.ndarray, draft_W: np.ndarray, tokens: Sequence[int], uniforms: np.ndarray
) -> tuple[int | None, int]:
    """Try `tokens` in order. Returns (index of the accepted one or None, token to commit).

    uniforms: one number in [0, 1) per token and one more, for the residual.
    """
    residual, draft = target_W, draft_W
    seen: list[int] = []
    for i, token in enumerate(tokens):
        if uniforms[i] * draft[token] < residual[token]:
            return i, token
        seen.append(token)
        residual = _minus(residual, draft, seen, target_W)
        draft = _without(draft, seen)
    return None, draw(residual, uniforms[len(tokens)])


def independent(
    target_W: np.ndarray, drafts_W: Sequence[np.ndarray], tokens: Sequence[int], uniforms: np.ndarray
) -> tuple[int | None, int]:
    """Try candidates, candidate i drawn from drafts_W[i], in a random order. Returns (index of the accepted one or None, token).

    uniforms: two numbers per candidate (which one, accept) and one more for the residual. Candidates from one and the same distribution
    are exchangeable, so trying them in the order in which they were drawn is as good as a random one; only the drafters are shuffled.
    """
    residual = target_W
    left = list(range(len(tokens)))
    step = 0
    while left:
        i = left.pop(int(uniforms[2 * step] * len(left)))
        if uniforms[2 * step + 1] * drafts_W[i][tokens[i]] < residual[tokens[i]]:
            return i, tokens[i]
        residual = _minus(residual, drafts_W[i], [tokens[i]], target_W)
        step += 1
    return None, draw(residual, uniforms[2 * len(tokens)])


def _minus(residual: np.ndarray, draft: np.ndarray, seen: Sequence[int], target_W: np.ndarray) -> np.ndarray:
    """normalise(max(residual - draft, 0)). Rounding can leave nothing: then the two were equal up to rounding and a rejection had
    probability 0; the target without the rejected tokens stands in."""
    rest = np.maximum(residual - draft, 0.0)
    total = rest.sum()
    if total > 0:
        return rest / total
    rest = target_W.copy()
    rest[list(seen)] = 0.0
    total = rest.sum()
    return rest / total if total > 0 else target_W


def _without(draft: np.ndarray, seen: Sequence[int]) -> np.ndarray:
    """The distribution of the next draw: what is left, renormalised; uniform over the other tokens once nothing is left."""
    rest = draft.copy()
    rest[list(seen)] = 0.0
    total = rest.sum()
    if total <= 0:
        rest = np.ones_like(draft)
        rest[list(seen)] = 0.0
        total = rest.sum()
    return rest / total if total > 0 else rest


def draw(weights_W: np.ndarray, uniform: float) -> int:
    """The token at which the cumulated weights exceed `uniform` of their sum; never one without weight."""
    edges = np.cumsum(weights_W)
    index = int(np.searchsorted(edges, uniform * edges[-1], side="right"))
    if index < len(weights_W) and weights_W[index] > 0:
        return index
    return int(np.flatnonzero(weights_W)[-1])


def draw_without_replacement(draft_W: np.ndarray, count: int, uniforms: np.ndarray) -> list[int]:
    """The first `count` distinct tokens of sequential draws (fewer when the vocabulary has no more); the drawing side of the rule.

    One running sum serves all draws: a draw among what is left is a point of the sum with the seen tokens' pieces cut out.
    """
    edges = np.cumsum(draft_W)
    left, seen = float(edges[-1]), []
    for i in range(min(count, len(draft_W))):
        token = -1
        if left > FEW * edges[-1]:
            point = float(uniforms[i]) * left
            for other in sorted(seen):
                if edges[other] - draft_W[other] > point:
                    break
                point += draft_W[other]
            token = int(np.searchsorted(edges, point, side="right"))
        if not 0 <= token < len(draft_W) or token in seen or draft_W[token] <= 0:  # rounding, or nothing is left
            token = draw(_without(draft_W, seen) if seen else draft_W, uniforms[i])
        seen.append(token)
        left -= float(draft_W[token])
    return seen
