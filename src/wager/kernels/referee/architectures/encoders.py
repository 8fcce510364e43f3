"""Encoders of images, and of images beside text: SigLIP 2, DINOv3, Swin V2, Qwen2-VL."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wager.kernels.referee import operators as op
from wager.kernels.referee.architectures.parts import MLP, Attention, Block, GatedMLP, Patches, floats

WIDTH = 96


class VisionTransformer(nn.Module):
    def __init__(self, patch: int, blocks: list[nn.Module], norm: type[op.Operator] = op.LayerNorm):
        super().__init__()
        self.patches, self.blocks, self.norm = Patches(3, WIDTH, patch), nn.ModuleList(blocks), norm(WIDTH)  # pyright: ignore

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class WindowAttention(nn.Module):
    """Swin V2 (arXiv 2111.09883): cosine attention inside windows with a learned bias, shifted by half a window."""

    def __init__(self, width: int, heads: int, side: int, window: int, shift: int):
        super().__init__()
        self.heads, self.side, self.window, self.shift = heads, side, window, shift
        self.qkv, self.out, self.unit = op.Linear(width, 3 * width, True), op.Linear(width, width, True), op.L2Norm()
        self.softmax, self.scale = op.Softmax(), nn.Parameter(torch.full((heads, 1, 1), 10.0))
        self.bias = nn.Parameter(torch.randn(heads, window**2, window**2))

    def forward(self, x: Tensor) -> Tensor:
        B, _, D = x.shape
        w, side = self.window, int(x.shape[1] ** 0.5)
        grid = x.view(B, side, side, D).roll((-self.shift, -self.shift), (1, 2))
        windows = grid.unflatten(2, (-1, w)).unflatten(1, (-1, w)).transpose(2, 3).reshape(-1, w * w, D)
        q, k, v = self.qkv(windows).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.softmax(self.unit(q) @ self.unit(k).transpose(-1, -2) * self.scale + self.bias)
        made = self.out((weights @ v).transpose(1, 2).flatten(2))
        grid = made.view(B, side // w, side // w, w, w, D).transpose(2, 3).reshape(B, side, side, D)
        return grid.roll((self.shift, self.shift), (1, 2)).view_as(x)


class QwenVL(nn.Module):
    """Vision blocks, four patches merged into one token, then a language model over image and text tokens."""

    def __init__(self):
        super().__init__()
        self.patches = Patches(3, WIDTH, 7)
        self.vision = nn.ModuleList(
            Block(WIDTH, Attention(WIDTH, 4, 4, "full"), MLP(WIDTH, 4 * WIDTH, op.QuickGELU()), op.LayerNorm)
            for _ in range(2)
        )
        self.merge = MLP(4 * WIDTH, 4 * WIDTH, op.GELU())
        self.embed, self.shrink = op.Embedding(512, WIDTH), op.Linear(4 * WIDTH, WIDTH)
        self.blocks = nn.ModuleList(
            Block(WIDTH, Attention(WIDTH, 4, 2, bias=True), GatedMLP(WIDTH, 256)) for _ in range(2)
        )
        self.norm, self.head = op.RMSNorm(WIDTH), op.Linear(WIDTH, 512)

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        x = self.patches(image)
        for block in self.vision:
            x = block(x)
        merged = self.shrink(self.merge(x.unflatten(1, (-1, 4)).flatten(2)))
        x = torch.cat((merged, self.embed(ids)), 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _vl_inputs(g: torch.Generator, held: bool) -> tuple[Tensor, ...]:
    side, n = (28, 7) if held else (56, 12)
    return torch.randn(1, 3, side, side, generator=g), torch.randint(512, (1, n), generator=g)


ENTRIES = {
    "siglip2": (
        lambda: VisionTransformer(8, [Block(WIDTH, Attention(WIDTH, 4, 4, "full", False, bias=True), MLP(WIDTH, 384, op.GELU("tanh")), op.LayerNorm) for _ in range(2)]),
        floats((2, 3, 48, 48), (1, 3, 40, 40)),
    ),
    "dinov3": (
        lambda: VisionTransformer(8, [Block(WIDTH, Attention(WIDTH, 4, 4, "full"), GatedMLP(WIDTH, 256), op.LayerNorm) for _ in range(2)]),
        floats((2, 3, 48, 48), (1, 3, 32, 32)),
    ),
    "swinv2": (
        lambda: VisionTransformer(4, [Block(WIDTH, WindowAttention(WIDTH, 4, 12, 4, shift), MLP(WIDTH, 384, op.GELU()), op.LayerNorm) for shift in (0, 2)]),
        floats((2, 3, 48, 48), (1, 3, 32, 32)),
    ),
    "qwen2_vl": (QwenVL, _vl_inputs),
}  # fmt: skip
