"""Judged operators of linear attention, mixtures of experts, recommendation and scenes. Conventions as in `operators`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from wager.kernels.referee.operators import Operator


class SelectiveScan(Operator):
    """Mamba's recurrence (arXiv 2312.00752): h = exp(dt A) h + dt B x, y = C h + D x, over [B, T, C] with states [C, N]."""

    def __init__(self, channels: int, state: int):
        super().__init__()
        self.log_a = nn.Parameter(torch.log(torch.arange(1, state + 1).float()).repeat(channels, 1))
        self.skip = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        decay = torch.exp(dt[..., None] * -torch.exp(self.log_a))
        push = (dt * x)[..., None] * b[:, :, None, :]
        h, out = torch.zeros_like(push[:, 0]), []
        for t in range(x.shape[1]):
            h = decay[:, t] * h + push[:, t]
            out.append((h * c[:, t, None, :]).sum(-1))
        return torch.stack(out, 1) + self.skip * x


class StateSpaceDual(Operator):
    """Mamba-2 (arXiv 2405.21060) in its quadratic form: (C Bᵀ * decay) (dt x), one decay rate per head, [B, T, H, K]."""

    def __init__(self, heads: int):
        super().__init__()
        self.log_a = nn.Parameter(torch.log(torch.linspace(1, 4, heads)))

    def forward(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        total = torch.cumsum(dt * -torch.exp(self.log_a), 1)
        gap = (total[:, :, None] - total[:, None, :]).permute(0, 3, 1, 2)
        T = x.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        weight = (c @ b.transpose(1, 2))[:, None] * torch.exp(gap.masked_fill(~causal, -torch.inf))
        return (weight @ (dt[..., None] * x).transpose(1, 2)).transpose(1, 2)


class Retention(Operator):
    """RetNet's parallel form (arXiv 2307.08621): (q kᵀ * decay^(i - j)) v with a fixed decay per head, [B, H, T, K]."""

    def __init__(self, heads: int, scale: float):
        super().__init__()
        self.log_decay = nn.Parameter(torch.log1p(-(2.0 ** -(5 + torch.arange(heads).float()))))
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2], device=q.device)
        gap = (at[:, None] - at[None, :]).to(q.dtype)
        decay = torch.exp(self.log_decay[:, None, None] * gap.clamp_min(0)) * (gap >= 0)
        return (q @ k.transpose(-1, -2) * self.scale * decay) @ v


class GatedLinearAttention(Operator):
    """GLA's recurrence (arXiv 2312.06635): S = diag(g) S + kᵀ v, y = q S, gates in (0, 1), [B, H, T, K]."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        state, out = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), []
        for t in range(q.shape[2]):
            state = gate[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
            out.append((q[:, :, t, None, :] * self.scale) @ state)
        return torch.cat(out, 2)


class GatedDeltaRule(Operator):
    """Gated DeltaNet (arXiv 2412.06464): S = g (I - b k kᵀ) S + b k vᵀ, y = q S; g and b per head and token, [B, H, T, K]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor) -> Tensor:
        state, out = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), []
        for t in range(q.shape[2]):
            key, rate = k[:, :, t], beta[:, :, t, None]
            state = gate[:, :, t, None, None] * state
            known = (key[..., None, :] @ state)[..., 0, :]
            state = state + key[..., None] * (rate * (v[:, :, t] - known))[..., None, :]
            out.append(q[:, :, t, None, :] @ state)
        return torch.cat(out, 2)


class GeneralisedDeltaRule(Operator):
    """RWKV-7's recurrence (arXiv 2503.14456): S = S (diag(w) + aᵀ b) + vᵀ k, y = S r, [B, H, T, K]."""

    def forward(self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        state, out = r.new_zeros(*r.shape[:2], v.shape[3], r.shape[3]), []
        for t in range(r.shape[2]):
            seen = (state * a[:, :, t, None, :]).sum(-1, keepdim=True)
            state = state * w[:, :, t, None, :] + seen * b[:, :, t, None, :] + v[:, :, t, :, None] * k[:, :, t, None, :]
            out.append((state * r[:, :, t, None, :]).sum(-1))
        return torch.stack(out, 2)


class TopKSoftmax(Operator):
    """Routing weights: the k largest of softmax(logits) renormalised, zero elsewhere."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, logits: Tensor) -> Tensor:
        p = logits.softmax(-1)
        values, chosen = p.topk(self.k, -1)
        return torch.zeros_like(p).scatter(-1, chosen, values / values.sum(-1, keepdim=True))


class GroupedGemm(Operator):
    """Rows sorted by expert times their expert's matrix; offsets_E says where each expert's rows end."""

    def __init__(self, experts: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, out_features, in_features) / math.sqrt(in_features))

    def forward(self, x: Tensor, offsets_E: Tensor) -> Tensor:
        out, start = x.new_empty(x.shape[0], self.weight.shape[1]), 0
        for expert, stop in enumerate(offsets_E.tolist()):
            out[start:stop] = x[start:stop] @ self.weight[expert].T
            start = stop
        return out


class DotInteraction(Operator):
    """DLRM's pairwise products of feature vectors, strictly below the diagonal: [B, F, D] to [B, F (F - 1) / 2]."""

    def forward(self, x: Tensor) -> Tensor:
        products = x @ x.transpose(1, 2)
        i, j = torch.tril_indices(x.shape[1], x.shape[1], -1, device=x.device)
        return products[:, i, j]


class SparseMM(Operator):
    """Rows gathered over edges, weighted and summed at their targets (LightGCN's propagation)."""

    def forward(self, source: Tensor, target: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, target, x[source] * weight[:, None])


class SegmentMean(Operator):
    """Mean of each run of rows; offsets say where runs end."""

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        total = torch.cat((torch.zeros_like(x[:1]), x.cumsum(0)))
        starts = torch.cat((offsets.new_zeros(1), offsets[:-1]))
        count = (offsets - starts).clamp_min(1).to(x.dtype)
        return (total[offsets] - total[starts]) / count[:, None]


class MaxSim(Operator):
    """ColBERT's score: for every query token the best document token, summed. [Q, D] and [P, T, D] to [P]."""

    def forward(self, query: Tensor, documents: Tensor) -> Tensor:
        return (query @ documents.transpose(1, 2)).amax(-1).sum(-1)


class HashEncoding(Operator):
    """Instant-NGP's grid (arXiv 2201.05989): per level the eight corners' features, hashed, interpolated at points in [0, 1)³."""

    def __init__(self, levels: int, features: int, rows: int, base: int):
        super().__init__()
        self.table, self.base = nn.Parameter(torch.randn(levels, rows, features)), base

    def forward(self, points: Tensor) -> Tensor:
        out = []
        for level, table in enumerate(self.table):
            scaled = points * (self.base * 2**level)
            low = scaled.floor()
            part, value = scaled - low, 0.0
            for corner in range(8):
                bits = torch.tensor([corner & 1, corner >> 1 & 1, corner >> 2], device=points.device)
                at = low.long() + bits
                slot = (at[:, 0] ^ at[:, 1] * 2654435761 ^ at[:, 2] * 805459861) % table.shape[0]
                share = torch.where(bits.bool(), part, 1 - part).prod(-1, keepdim=True)
                value = value + share * table[slot]
            out.append(value)
        return torch.cat(out, -1)


class GaussianProjection(Operator):
    """3-D Gaussian splatting's step to the screen (arXiv 2308.04079): covariances from scale and quaternion, projected to 2 × 2."""

    def __init__(self, focal: float):
        super().__init__()
        self.focal = focal

    def forward(self, mean: Tensor, scale: Tensor, quaternion: Tensor) -> Tensor:
        w, x, y, z = (quaternion / quaternion.norm(dim=-1, keepdim=True)).unbind(-1)
        rows = (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y), 2 * (x * y + w * z), 1 - 2 * (x * x + z * z),
                2 * (y * z - w * x), 2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y))  # fmt: skip
        rotation = torch.stack(rows, -1).unflatten(-1, (3, 3))
        spread = rotation * scale[:, None, :]
        depth, zero = mean[:, 2], torch.zeros_like(mean[:, 2])
        jacobian = torch.stack((self.focal / depth, zero, -self.focal * mean[:, 0] / depth**2,
                                zero, self.focal / depth, -self.focal * mean[:, 1] / depth**2), -1).unflatten(-1, (2, 3))  # fmt: skip
        projected = jacobian @ spread
        return projected @ projected.transpose(1, 2)
