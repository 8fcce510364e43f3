"""A draft model whose output head knows the first tokens of the vocabulary only.

The head is half of a small draft model's weights, and most guesses come from a small part of the vocabulary (FR-Spec, arXiv 2502.14856).
Byte-pair merges are made in the order of their frequency, so the first ids stand for the frequent tokens. Exactness is the verifier's:
the law that guesses are drawn from is the one it is told, with probability zero for the tokens left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wager.errors import UsageError
from wager.models.base import Adapters, Model
from wager.models.layers import Linear


class SmallHead(nn.Module):
    """Logits of the first rows of a head; minus infinity for the others."""

    def __init__(self, head: Linear, rows: int):
        super().__init__()
        self.width = head.weight.shape[0]
        self.inner = Linear(head.in_features, [(head.parts[0][0], rows)], head.bias is not None, head.weight.dtype)
        with torch.no_grad():
            self.inner.weight = nn.Parameter(head.weight[:rows].clone(), requires_grad=False)
            if head.bias is not None:
                self.inner.bias = nn.Parameter(head.bias[:rows].clone(), requires_grad=False)

    def forward(self, x_TD: Tensor, adapters: Adapters | None = None) -> Tensor:
        known = self.inner(x_TD, adapters)
        y_TW = known.new_full((len(known), self.width), -torch.inf)
        y_TW[:, : known.shape[1]] = known
        return y_TW


def shrink_head(model: Model, rows: int) -> None:
    """Leave the model's head its first rows; before its weights are packed. Raises UsageError when it has no plain head or fewer rows."""
    head = getattr(model, "head", None)
    if not isinstance(head, Linear):
        raise UsageError("draft_vocabulary: this draft model's head cannot be cut", param="speculative_config")
    if rows >= head.weight.shape[0]:
        raise UsageError(
            f"draft_vocabulary {rows} leaves nothing out of the {head.weight.shape[0]} tokens; give less or drop it",
            param="speculative_config",
        )
    model.head = SmallHead(head, rows)  # type: ignore[assignment]
