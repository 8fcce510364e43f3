"""Mixture of experts: rows are sorted by the expert they go to, each expert that is hit runs once over its rows.

Shape legend: T tokens, D hidden, E experts, C experts chosen per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wager import kernels
from wager.kernels.reference_data import experts as experts_one_by_one
from wager.models.base import Adapters
from wager.models.layers import GatedMLP

Route = Callable[
    [Tensor], tuple[Tensor, Tensor]
]  # router logits float32 [T, E] -> (weights [T, C], expert numbers [T, C])


class Router(nn.Module):
    """Scores of the experts, in float32 whatever the weights' dtype."""

    def __init__(self, name: str, hidden: int, num_experts: int, dtype: torch.dtype | None):
        super().__init__()
        self.parts = [(name, num_experts)]
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, dtype=dtype))

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD.float(), self.weight.float())


class SparseMLP(nn.Module):
    """Weighted sum of the chosen experts' outputs, plus what `shared` makes of every token."""

    asks_the_device = True  # how many rows each expert gets

    def __init__(self, router: Router, experts: list[GatedMLP], route: Route, shared: nn.Module | None = None):
        super().__init__()
        self.router, self.experts, self.route, self.shared = router, nn.ModuleList(experts), route, shared
        self.grouped: tuple[Callable[..., Tensor] | None] | None = None

    def forward(self, x_TD: Tensor, adapters: Adapters | None = None) -> Tensor:
        weights_TC, experts_TC = self.route(self.router(x_TD))
        start_TD = torch.zeros_like(x_TD) if self.shared is None else self.shared(x_TD, adapters)
        if (fused := self.fused(x_TD)) is not None:
            return fused(x_TD, weights_TC, experts_TC, start_TD)
        return experts_one_by_one(x_TD, weights_TC, experts_TC, start_TD, list(self.experts))

    def fused(self, x_TD: Tensor) -> Callable[..., Tensor] | None:
        """All experts as one kernel, where they are prepacked; the bits are the same."""
        experts: list[Any] = list(self.experts)
        if experts[0].gate_up.packed is None or x_TD.requires_grad:
            return None
        if self.grouped is None:
            pairs = [(e.gate_up.packed, e.down.packed) for e in experts]
            self.grouped = (kernels.pack_experts(pairs, experts[0].activation),)
        return self.grouped[0]


def softmax_route(num_chosen: int, normalise: bool, scale: float = 1.0) -> Route:
    """The most likely experts under a softmax, their probabilities optionally renormalised."""

    def route(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        weights, experts = logits_TE.softmax(-1).topk(num_chosen, dim=-1)
        if normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * scale, experts

    return route


def keep_best_groups(scores_TE: Tensor, num_groups: int, kept_groups: int, members: int) -> Tensor:
    """Mask [T, E] of the experts in the `kept_groups` groups whose `members` best scores add up highest."""
    T, E = scores_TE.shape
    grouped = scores_TE.view(T, num_groups, E // num_groups)
    totals = grouped.topk(min(members, E // num_groups), dim=-1).values.sum(-1)
    best = totals.topk(kept_groups, dim=-1).indices
    mask = torch.zeros_like(totals, dtype=torch.bool).scatter_(1, best, True)
    return mask[:, :, None].expand(-1, -1, E // num_groups).reshape(T, E)
