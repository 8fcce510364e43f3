"""Plain attention for training and tests: no cache, whole sequences, differentiable.

Shape legend: T tokens, H query heads, G key/value heads, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wager.models.base import Attend, AttentionSpec, Model


def causal_attention(model: Model, lengths: Sequence[int] | None = None) -> Attend:
    """Full causal attention over sequences packed one after another (`lengths` adds up to T; None: one sequence).

    Equal lengths without window or cap run as one batched call of torch's fused attention.
    """

    def attend(layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor | None) -> Tensor:
        spec = model.attention[layer]
        v = k_TGK[..., : spec.value_dim] if v_TGV is None else v_TGV
        sizes = [q_THK.shape[0]] if lengths is None else list(lengths)
        plain = spec.softcap is None and (spec.window is None or max(sizes) <= spec.window)
        if plain and len(set(sizes)) == 1:
            return _fused(q_THK, k_TGK, v, spec, len(sizes))
        parts = zip(q_THK.split(sizes), k_TGK.split(sizes), v.split(sizes), strict=True)
        return torch.cat([_masked(q, k, v, spec) for q, k, v in parts])

    return attend


def _fused(q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, spec: AttentionSpec, sequences: int) -> Tensor:
    def batched(x: Tensor) -> Tensor:
        heads = x.view(sequences, -1, *x.shape[1:]).transpose(1, 2)
        return heads.repeat_interleave(spec.num_heads // x.shape[1], dim=1)

    out = F.scaled_dot_product_attention(
        batched(q_THK), batched(k_TGK), batched(v_TGV), is_causal=True, scale=spec.scale
    )
    return out.transpose(1, 2).flatten(0, 1)


def _masked(q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, spec: AttentionSpec) -> Tensor:
    repeat = spec.num_heads // spec.num_kv_heads
    k, v = k_TGK.repeat_interleave(repeat, dim=1), v_TGV.repeat_interleave(repeat, dim=1)
    scores = torch.einsum("thk,shk->hts", q_THK.float(), k.float()) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    distance = torch.arange(len(q_THK), device=q_THK.device)
    distance = distance[:, None] - distance[None, :]
    hidden = distance < 0
    if spec.window is not None:
        hidden = hidden | (distance >= spec.window)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hts,shv->thv", weights, v.float()).to(q_THK.dtype)
