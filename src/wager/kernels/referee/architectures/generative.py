"""Image, video and audio: FLUX (double-stream transformer), SDXL (U-Net), Whisper (encoder and decoder)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wager.kernels.referee import operators as op
from wager.kernels.referee.architectures.parts import MLP, Attention, Block, floats

WIDTH = 96


class DoubleStream(nn.Module):
    """Text and image tokens with weights of their own attend jointly; shifts and scales come from the time step."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.modulate, self.act = nn.ModuleList(op.Linear(width, 6 * width, True) for _ in range(2)), op.SiLU()
        self.norms = nn.ModuleList(op.LayerNorm(width) for _ in range(4))
        self.qkv = nn.ModuleList(op.Linear(width, 3 * width, True) for _ in range(2))
        self.head_norms = nn.ModuleList(op.RMSNorm(self.size) for _ in range(4))
        self.out = nn.ModuleList(op.Linear(width, width, True) for _ in range(2))
        self.mlps = nn.ModuleList(MLP(width, 4 * width, op.GELU("tanh")) for _ in range(2))
        self.attend = op.DenseAttention(self.size**-0.5)

    def forward(self, streams: list[Tensor], time: Tensor) -> list[Tensor]:
        shifts = [m(self.act(time))[:, None].chunk(6, -1) for m in self.modulate]
        q, k, v = [], [], []
        for s, x in enumerate(streams):
            heads = self.qkv[s](self.norms[s](x) * (1 + shifts[s][1]) + shifts[s][0]).unflatten(
                -1, (3, self.heads, self.size)
            )
            q.append(self.head_norms[2 * s](heads[:, :, 0]))
            k.append(self.head_norms[2 * s + 1](heads[:, :, 1]))
            v.append(heads[:, :, 2])
        joined = self.attend(*(torch.cat(t, 1).transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)
        out = []
        for s, part in enumerate(joined.split([x.shape[1] for x in streams], 1)):
            x = streams[s] + shifts[s][2] * self.out[s](part)
            out.append(x + shifts[s][5] * self.mlps[s](self.norms[2 + s](x) * (1 + shifts[s][4]) + shifts[s][3]))
        return out


class Flux(nn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.step = op.SinusoidalEmbedding(64), MLP(64, WIDTH, op.SiLU())
        self.widen, self.image, self.text = (
            op.Linear(WIDTH, WIDTH),
            op.Linear(16, WIDTH, True),
            op.Linear(48, WIDTH, True),
        )
        self.embed = op.Linear(64, WIDTH, True)
        self.blocks, self.out = nn.ModuleList(DoubleStream(WIDTH, 4) for _ in range(2)), op.Linear(WIDTH, 16, True)

    def forward(self, image: Tensor, text: Tensor, time: Tensor) -> Tensor:
        step = self.widen(self.embed(self.step(self.time(time))))
        streams = [self.image(image), self.text(text)]
        for block in self.blocks:
            streams = block(streams, step)
        return self.out(streams[0])


def _flux_inputs(g: torch.Generator, held: bool) -> tuple[Tensor, ...]:
    n, t = (30, 9) if held else (64, 16)
    return torch.randn(1, n, 16, generator=g), torch.randn(1, t, 48, generator=g), torch.rand(1, generator=g) * 1000


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.norms = nn.ModuleList(op.GroupNorm(8, channels) for _ in range(2))
        self.convs = nn.ModuleList(op.Conv2d(channels, channels, 3, 1, 1) for _ in range(2))
        self.act, self.step = op.SiLU(), op.Linear(width, channels, True)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.convs[0](self.act(self.norms[0](x))) + self.step(self.act(time))[..., None, None]
        return x + self.convs[1](self.act(self.norms[1](h)))


class CrossAttention(nn.Module):
    def __init__(self, width: int, context: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = (
            op.Linear(width, width),
            op.Linear(context, 2 * width),
            op.Linear(width, width, True),
        )
        self.attend = op.DenseAttention((width // heads) ** -0.5)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        k, v = self.kv(context).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), k, v))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Unet(nn.Module):
    """One level down and up, attention in the middle."""

    def __init__(self, channels: int = 48, context: int = 64):
        super().__init__()
        self.time, self.step = op.SinusoidalEmbedding(64), op.Linear(64, WIDTH, True)
        self.enter, self.down = op.Conv2d(4, channels, 3, 1, 1), op.Conv2d(channels, channels, 3, 2, 1)
        self.blocks = nn.ModuleList(ResnetBlock(channels, WIDTH) for _ in range(3))
        self.norm, self.cross = op.LayerNorm(channels), CrossAttention(channels, context, 4)
        self.up, self.after, self.leave = (
            op.Upsample(),
            op.Conv2d(channels, channels, 3, 1, 1),
            op.Conv2d(channels, 4, 3, 1, 1),
        )

    def forward(self, x: Tensor, context: Tensor, time: Tensor) -> Tensor:
        step = self.step(self.time(time))
        skip = self.blocks[0](self.enter(x), step)
        low = self.blocks[1](self.down(skip), step)
        flat = low.flatten(2).transpose(1, 2)
        low = (flat + self.cross(self.norm(flat), context)).transpose(1, 2).view_as(low)
        return self.leave(self.blocks[2](self.after(self.up(low)) + skip, step))


def _unet_inputs(g: torch.Generator, held: bool) -> tuple[Tensor, ...]:
    side, t = (12, 5) if held else (16, 8)
    return (
        torch.randn(2, 4, side, side, generator=g),
        torch.randn(2, t, 64, generator=g),
        torch.rand(2, generator=g) * 1000,
    )


class Whisper(nn.Module):
    """The audio encoder: two convolutions over mel frames, then a plain transformer."""

    def __init__(self, mels: int = 40):
        super().__init__()
        self.convs = nn.ModuleList((op.Conv1d(mels, WIDTH, 3, 1, 1), op.Conv1d(WIDTH, WIDTH, 3, 2, 1)))
        self.act = op.GELU()
        self.blocks = nn.ModuleList(
            Block(
                WIDTH, Attention(WIDTH, 4, 4, "full", False, bias=True), MLP(WIDTH, 4 * WIDTH, op.GELU()), op.LayerNorm
            )
            for _ in range(2)
        )
        self.norm = op.LayerNorm(WIDTH)

    def forward(self, mel: Tensor) -> Tensor:
        for conv in self.convs:
            mel = self.act(conv(mel))
        x = mel.transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


ENTRIES = {
    "flux": (Flux, _flux_inputs),
    "sdxl": (Unet, _unet_inputs),
    "whisper": (Whisper, floats((1, 40, 100), (2, 40, 62))),
}
