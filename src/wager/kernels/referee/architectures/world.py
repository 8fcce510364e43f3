"""World models: V-JEPA 2 (video encoder), Oasis (spatio-temporal diffusion transformer)."""

from __future__ import annotations

from torch import Tensor, nn

from wager.kernels.referee import operators as op
from wager.kernels.referee.architectures.parts import MLP, Attention, Block, floats

WIDTH = 96


class VideoEncoder(nn.Module):
    """Tubelets of a clip [B, C, frames, Y, X] as tokens of one transformer."""

    def __init__(self):
        super().__init__()
        self.tubelets = op.Conv3d(3, WIDTH, 4)
        self.blocks = nn.ModuleList(
            Block(WIDTH, Attention(WIDTH, 4, 4, "full", bias=True), MLP(WIDTH, 384, op.GELU()), op.LayerNorm)
            for _ in range(2)
        )
        self.norm = op.LayerNorm(WIDTH)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.tubelets(clip).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class SpaceTime(nn.Module):
    """Attention among the tokens of a frame, then causally along time at each place."""

    def __init__(self):
        super().__init__()
        self.space, self.time = Attention(WIDTH, 4, 4, "full"), Attention(WIDTH, 4, 4, "causal")
        self.norms = nn.ModuleList(op.LayerNorm(WIDTH) for _ in range(3))
        self.mlp = MLP(WIDTH, 384, op.GELU("tanh"))

    def forward(self, x_BFTD: Tensor) -> Tensor:
        B, F, T, D = x_BFTD.shape
        x = x_BFTD + self.space(self.norms[0](x_BFTD).view(B * F, T, D)).view_as(x_BFTD)
        along = self.norms[1](x).transpose(1, 2).reshape(B * T, F, D)
        x = x + self.time(along).view(B, T, F, D).transpose(1, 2)
        return x + self.mlp(self.norms[2](x))


class Oasis(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.act = op.Conv2d(4, WIDTH, 2, 2), op.SiLU()
        self.blocks, self.out = nn.ModuleList(SpaceTime() for _ in range(2)), op.Linear(WIDTH, 16, True)

    def forward(self, latents: Tensor) -> Tensor:
        B, F = latents.shape[:2]
        x = self.act(self.patches(latents.flatten(0, 1))).flatten(2).transpose(1, 2)
        x = x.view(B, F, *x.shape[1:])
        for block in self.blocks:
            x = block(x)
        return self.out(x)


ENTRIES = {
    "vjepa2": (VideoEncoder, floats((1, 3, 8, 24, 24), (1, 3, 4, 16, 16))),
    "oasis": (Oasis, floats((1, 4, 4, 12, 12), (2, 3, 4, 8, 8))),
}
