"""Linear attention and state spaces: Mamba, Mamba-2, GLA, RetNet, RWKV-7, Qwen3-Next, Jamba."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wager.kernels.referee import operators as op
from wager.kernels.referee import recurrent
from wager.kernels.referee.architectures.language import Experts
from wager.kernels.referee.architectures.parts import Attention, Block, GatedMLP, LanguageModel, tokens

VOCABULARY, WIDTH, HEADS = 512, 96, 4
INPUTS = tokens(VOCABULARY, (2, 20), (1, 13))


class Mamba(nn.Module):
    def __init__(self, width: int, state: int = 16, rank: int = 8):
        super().__init__()
        inner = 2 * width
        self.sizes = (rank, state, state)
        self.split, self.conv = op.Linear(width, 2 * inner), op.CausalConv1d(inner)
        self.parameters_of_x, self.step = op.Linear(inner, rank + 2 * state), op.Linear(rank, inner, True)
        self.scan, self.act, self.out = recurrent.SelectiveScan(inner, state), op.SiLU(), op.Linear(inner, width)

    def forward(self, u: Tensor) -> Tensor:
        x, gate = self.split(u).chunk(2, -1)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        low, b, c = self.parameters_of_x(x).split(self.sizes, -1)
        dt = nn.functional.softplus(self.step(low))
        return self.out(self.scan(x, dt, b, c) * self.act(gate))


class Mamba2(nn.Module):
    def __init__(self, width: int, heads: int = 6, state: int = 16):
        super().__init__()
        inner = 2 * width
        self.heads, self.sizes = heads, (inner, inner, state, state, heads)
        self.split, self.conv = op.Linear(width, sum(self.sizes)), op.CausalConv1d(inner + 2 * state)
        self.scan, self.act = recurrent.StateSpaceDual(heads), op.SiLU()
        self.norm, self.out = op.RMSNorm(inner), op.Linear(inner, width)

    def forward(self, u: Tensor) -> Tensor:
        gate, x, b, c, dt = self.split(u).split(self.sizes, -1)
        mixed = self.conv(torch.cat((x, b, c), -1).transpose(1, 2)).transpose(1, 2)
        x, b, c = mixed.split(self.sizes[1:4], -1)
        y = self.scan(x.unflatten(-1, (self.heads, -1)), nn.functional.softplus(dt), b, c).flatten(2)
        return self.out(self.norm(y * self.act(gate)))


class Heads(nn.Module):
    """Projections to heads, a recurrence, a normed and gated output. `kind`: gla, retention, delta or rwkv."""

    def __init__(self, width: int, heads: int, kind: str):
        super().__init__()
        self.heads, self.kind, size = heads, kind, width // heads
        extra = {"gla": width, "retention": 0, "delta": 2 * heads, "rwkv": 3 * width}[kind]
        self.project, self.extra = op.Linear(width, 4 * width), op.Linear(width, extra, True) if extra else None
        self.core = {
            "gla": lambda: recurrent.GatedLinearAttention(size**-0.5), "retention": lambda: recurrent.Retention(heads, size**-0.5),
            "delta": recurrent.GatedDeltaRule, "rwkv": recurrent.GeneralisedDeltaRule,
        }[kind]()  # fmt: skip
        self.unit = op.L2Norm() if kind in ("delta", "rwkv") else None
        self.sigmoid, self.act = op.Sigmoid(), op.SiLU()
        self.norm = op.GroupNorm(heads, width) if kind in ("rwkv", "retention") else op.RMSNorm(size)
        self.out = op.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, u: Tensor) -> Tensor:
        q, k, v, gate = self.project(u).chunk(4, -1)
        q, k, v = map(self.split, (q, k, v))
        if self.unit is not None:
            q, k = self.unit(q), self.unit(k)
        y = self.run(u, q, k, v).transpose(1, 2)
        if isinstance(self.norm, op.GroupNorm):
            y = self.norm(y.flatten(2).flatten(0, 1)).view(u.shape)
        else:
            y = self.norm(y).flatten(2)
        return self.out(y * self.act(gate))

    def run(self, u: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.extra is None:
            return self.core(q, k, v)
        extra = self.sigmoid(self.extra(u))
        if self.kind == "gla":
            return self.core(q, k, v, self.split(extra) ** (1 / 16))
        if self.kind == "delta":
            gate, beta = extra.transpose(1, 2).chunk(2, 1)
            return self.core(q, k, v, gate, beta)
        w, rate, amount = extra.chunk(3, -1)
        return self.core(q, self.split(0.5 + 0.5 * w), k * self.split(amount), v, -k, k * self.split(rate))


class ChannelMix(nn.Module):
    """RWKV's: squared relu."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.act, self.down = op.Linear(width, 3 * width), op.ReLU(), op.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)).square())


class Residual(nn.Module):
    def __init__(self, width: int, mix: nn.Module):
        super().__init__()
        self.norm, self.mix = op.RMSNorm(width), mix

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(x))


def _language(*blocks, norm: type[op.Operator] = op.RMSNorm):
    return lambda: LanguageModel(VOCABULARY, WIDTH, [block() for block in blocks], norm)


def _heads(kind: str, mlp=lambda: GatedMLP(WIDTH, 256), norm: type[op.Operator] = op.RMSNorm):
    return lambda: Block(WIDTH, Heads(WIDTH, HEADS, kind), mlp(), norm)


ENTRIES = {
    "mamba": (_language(lambda: Residual(WIDTH, Mamba(WIDTH)), lambda: Residual(WIDTH, Mamba(WIDTH))), INPUTS),
    "mamba2": (_language(lambda: Residual(WIDTH, Mamba2(WIDTH)), lambda: Residual(WIDTH, Mamba2(WIDTH))), INPUTS),
    "gla": (_language(_heads("gla"), _heads("gla")), INPUTS),
    "retnet": (_language(_heads("retention"), _heads("retention")), INPUTS),
    "rwkv7": (_language(_heads("rwkv", lambda: ChannelMix(WIDTH), op.LayerNorm), norm=op.LayerNorm), INPUTS),
    "qwen3_next": (
        _language(
            _heads("delta", lambda: Experts(WIDTH, 64, 8, 2, shared=True)),
            lambda: Block(WIDTH, Attention(WIDTH, HEADS, 2, head_norm=True), Experts(WIDTH, 64, 8, 2, shared=True)),
        ),
        INPUTS,
    ),
    "jamba": (
        _language(
            lambda: Block(WIDTH, Mamba(WIDTH), GatedMLP(WIDTH, 192)),
            lambda: Block(WIDTH, Attention(WIDTH, HEADS, 2, rotary=False), Experts(WIDTH, 96, 8, 2)),
        ),
        INPUTS,
    ),
}  # fmt: skip
