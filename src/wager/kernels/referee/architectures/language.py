"""Dense and mixture-of-experts language models: Llama, Gemma, BitNet b1.58, Mixtral, gpt-oss, DeepSeek."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wager.kernels.referee import operators as op
from wager.kernels.referee import recurrent
from wager.kernels.referee.architectures.parts import Attention, Block, GatedMLP, LanguageModel, angles, tokens

VOCABULARY, WIDTH = 512, 128
INPUTS = tokens(VOCABULARY, (2, 24), (3, 17))


class Experts(nn.Module):
    """Rows sorted by expert, grouped products, weighted sum; `shared` sees every row."""

    def __init__(self, width: int, wide: int, experts: int, chosen: int, shared: bool = False):
        super().__init__()
        self.chosen = chosen
        self.router, self.route = op.Linear(width, experts), recurrent.TopKSoftmax(chosen)
        self.gate_up, self.act = recurrent.GroupedGemm(experts, width, 2 * wide), op.SiluAndMul()
        self.down = recurrent.GroupedGemm(experts, wide, width)
        self.shared = GatedMLP(width, wide) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights = self.route(self.router(flat))
        experts = weights.topk(self.chosen, -1).indices
        order = experts.flatten().argsort(stable=True)
        rows = order // self.chosen
        offsets = torch.bincount(experts.flatten(), minlength=weights.shape[1]).cumsum(0)
        made = self.down(self.act(self.gate_up(flat[rows], offsets)), offsets)
        share = weights.gather(1, experts).flatten()[order]
        out = torch.zeros_like(flat).index_add(0, rows, made * share[:, None]).view_as(x)
        return out if self.shared is None else out + self.shared(x)


class LatentAttention(nn.Module):
    """DeepSeek's: keys and values from one low-rank latent, a rotated part shared by all heads."""

    def __init__(self, width: int, heads: int, rank: int, plain: int, rotated: int):
        super().__init__()
        self.heads, self.rank, self.plain, self.rotated = heads, rank, plain, rotated
        self.query, self.latent = op.Linear(width, heads * (plain + rotated)), op.Linear(width, rank + rotated)
        self.norm, self.expand = op.RMSNorm(rank), op.Linear(rank, heads * 2 * plain)
        self.rope, self.attend = op.RotaryEmbedding(), op.DenseAttention((plain + rotated) ** -0.5, True)
        self.out = op.Linear(heads * plain, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        cos, sin = angles(torch.arange(T).repeat(B), self.rotated)
        q = self.query(x).view(B * T, self.heads, -1)
        latent, shared = self.latent(x).split((self.rank, self.rotated), -1)
        k, v = self.expand(self.norm(latent)).view(B * T, self.heads, -1).chunk(2, -1)
        q_turned = self.rope(q[..., self.plain :], cos, sin)
        k_turned = self.rope(shared.reshape(B * T, 1, -1), cos, sin).expand(-1, self.heads, -1)
        q, k = torch.cat((q[..., : self.plain], q_turned), -1), torch.cat((k, k_turned), -1)
        v = nn.functional.pad(v, (0, self.rotated))
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        made = self.attend(q, k, v)[..., : self.plain]
        return self.out(made.transpose(1, 2).reshape(B, T, -1))


def _model(mix, mlp, layers: int = 2):
    return lambda: LanguageModel(VOCABULARY, WIDTH, [Block(WIDTH, mix(), mlp()) for _ in range(layers)])


ENTRIES = {
    "llama": (_model(lambda: Attention(WIDTH, 4, 2), lambda: GatedMLP(WIDTH, 352)), INPUTS),
    "gemma4": (
        _model(lambda: Attention(WIDTH, 4, 1, head_norm=True), lambda: GatedMLP(WIDTH, 256, op.GeluAndMul)),
        INPUTS,
    ),
    "bitnet": (_model(lambda: Attention(WIDTH, 4, 4), lambda: GatedMLP(WIDTH, 320, op.SquaredReluAndMul)), INPUTS),
    "mixtral": (_model(lambda: Attention(WIDTH, 4, 2), lambda: Experts(WIDTH, 160, 8, 2)), INPUTS),
    "gpt_oss": (_model(lambda: Attention(WIDTH, 8, 2, "sink", bias=True), lambda: Experts(WIDTH, 128, 16, 4)), INPUTS),
    "deepseek": (
        _model(lambda: LatentAttention(WIDTH, 4, 48, 32, 16), lambda: Experts(WIDTH, 96, 12, 3, shared=True)),
        INPUTS,
    ),
}
