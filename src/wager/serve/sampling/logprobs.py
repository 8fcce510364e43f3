"""Log-probabilities as callers see them: of the model's own distribution, before any sampling parameter.

Shape legend: L rows, W vocabulary, N alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wager.serve.outputs import Logprob, TokenLogprobs


def token_logprobs(logits_LW: Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """For each row the given token and its `counts[row]` most likely ones (-1: all), with ranks (1 is the most likely)."""
    if not len(token_ids):
        return []
    logprobs_LW = logits_LW.log_softmax(-1, dtype=torch.float32)
    chosen = torch.as_tensor(token_ids, device=logits_LW.device)[:, None]
    chosen_L = logprobs_LW.gather(1, chosen)
    ranks = ((logprobs_LW > chosen_L).sum(-1) + 1).tolist()
    vocabulary = logits_LW.shape[1]
    widths = [vocabulary if count < 0 else min(count, vocabulary) for count in counts]
    top = logprobs_LW.topk(max(widths), dim=-1)
    values, indices = top.values.tolist(), top.indices.tolist()
    rows = []
    for row, (token, width) in enumerate(zip(token_ids, widths, strict=True)):
        entry = {int(token): Logprob(float(chosen_L[row]), ranks[row])}
        for rank in range(width):
            entry.setdefault(indices[row][rank], Logprob(values[row][rank], rank + 1))
        rows.append(entry)
    return rows
