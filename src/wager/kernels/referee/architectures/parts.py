"""Blocks that several architectures share, made of judged operators only.

Shape legend: B batch, T tokens, D width, H heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from wager.kernels.referee import operators as op


def tokens(vocabulary: int, main: tuple[int, int], held_out: tuple[int, int]):
    """Inputs of a language model: ids [B, T]."""

    def make(generator: Generator, held: bool) -> tuple[Tensor, ...]:
        return (torch.randint(vocabulary, held_out if held else main, generator=generator),)

    return make


def floats(main: tuple[int, ...], held_out: tuple[int, ...]):
    """One float input."""

    def make(generator: Generator, held: bool) -> tuple[Tensor, ...]:
        return (torch.randn(held_out if held else main, generator=generator),)

    return make


def angles(positions_T: Tensor, rotary: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    rates = base ** (-torch.arange(0, rotary, 2, dtype=torch.float32) / rotary)
    at = positions_T.float()[:, None] * rates
    return at.cos(), at.sin()


class Attention(nn.Module):
    """Fused qkv, optional norms on heads, rotation, grouped heads. `kind`: causal, full or sink."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        kind: str = "causal",
        rotary: bool = True,
        head_norm: bool = False,
        bias: bool = False,
    ):
        super().__init__()
        self.heads, self.kv_heads, self.size, self.rotary = heads, kv_heads, width // heads, rotary
        self.qkv = op.Linear(width, (heads + 2 * kv_heads) * self.size, bias)
        self.out = op.Linear(width, width, bias)
        self.rope = op.RotaryEmbedding() if rotary else None
        self.norms = nn.ModuleList(op.RMSNorm(self.size) for _ in range(2)) if head_norm else None
        scale = self.size**-0.5
        self.attend = op.SinkAttention(heads, scale) if kind == "sink" else op.DenseAttention(scale, kind == "causal")

    def forward(self, x_BTD: Tensor, bias: Tensor | None = None) -> Tensor:
        B, T, D = x_BTD.shape
        heads = self.qkv(x_BTD).view(B, T, -1, self.size)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), 2)
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        if self.rope is not None:
            cos, sin = angles(torch.arange(T).repeat(B), self.size)
            q, k = (self.rope(t.reshape(B * T, -1, self.size), cos, sin).view(B, T, -1, self.size) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        made = self.attend(q, k, v) if bias is None else self.attend(q, k, v, bias)
        return self.out(made.transpose(1, 2).reshape(B, T, D))


class GatedMLP(nn.Module):
    def __init__(self, width: int, wide: int, activation: type[op.Operator] = op.SiluAndMul):
        super().__init__()
        self.gate_up, self.act, self.down = op.Linear(width, 2 * wide), activation(), op.Linear(wide, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate_up(x)))


class MLP(nn.Module):
    def __init__(self, width: int, wide: int, activation: op.Operator):
        super().__init__()
        self.up, self.act, self.down = op.Linear(width, wide, True), activation, op.Linear(wide, width, True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """x + mix(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, mix: nn.Module, mlp: nn.Module, norm: type[op.Operator] = op.RMSNorm):
        super().__init__()
        self.mix, self.mlp = mix, mlp
        self.norms = nn.ModuleList(norm(width) for _ in range(2))  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int, width: int, blocks: list[nn.Module], norm: type[op.Operator] = op.RMSNorm):
        super().__init__()
        self.embed, self.blocks = op.Embedding(vocabulary, width), nn.ModuleList(blocks)
        self.norm, self.head = norm(width), op.Linear(width, vocabulary)  # pyright: ignore

    def forward(self, ids_BT: Tensor) -> Tensor:
        x = self.embed(ids_BT)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Patches(nn.Module):
    """An image [B, C, Y, X] as tokens [B, T, D]."""

    def __init__(self, channels: int, width: int, size: int):
        super().__init__()
        self.project = op.Conv2d(channels, width, size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).flatten(2).transpose(1, 2)
