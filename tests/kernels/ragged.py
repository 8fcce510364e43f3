"""Starts of spans, as a batch holds them."""

import torch
from torch import Tensor


def ragged_starts(lengths: list[int]) -> Tensor:
    """int32 [len + 1] running sums starting at 0."""
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, out=starts[1:])
    return starts
