"""GPT-NeoX and Pythia (arXiv 2204.06745, 2304.01373): both branches in parallel, partial rotary embedding, queries, keys and values
interleaved per head.

Shape legend: T tokens, D hidden, H heads, K head width, R rows of logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wager import kernels
from wager.models.base import Adapters, Attend, AttentionSpec, Model
from wager.models.config import need, rope_scaling, rope_theta, rotary_dim
from wager.models.layers import MLP, Embedding, LayerNorm, Linear
from wager.models.rope import Rope, RopeConfig


class NeoXBlock(nn.Module):
    def __init__(self, layer: int, raw: dict[str, Any], dtype: torch.dtype | None):
        super().__init__()
        self.layer, self.heads = layer, need(raw, "num_attention_heads")
        self.parallel = bool(raw.get("use_parallel_residual", True))
        hidden, eps, bias = need(raw, "hidden_size"), raw.get("layer_norm_eps", 1e-5), raw.get("attention_bias", True)
        prefix = f"gpt_neox.layers.{layer}"
        self.norm_attention = LayerNorm(f"{prefix}.input_layernorm", hidden, eps, dtype=dtype)
        self.norm_mlp = LayerNorm(f"{prefix}.post_attention_layernorm", hidden, eps, dtype=dtype)
        self.qkv = Linear(hidden, [(f"{prefix}.attention.query_key_value", 3 * hidden)], bias, dtype)
        self.output = Linear(hidden, [(f"{prefix}.attention.dense", hidden)], bias, dtype)
        activation, width = raw.get("hidden_act", "gelu"), need(raw, "intermediate_size")
        self.mlp = MLP(f"{prefix}.mlp.dense_h_to_4h", f"{prefix}.mlp.dense_4h_to_h", hidden, width, activation, dtype)

    def forward(self, x_TD: Tensor, angles: tuple[Tensor, Tensor], attend: Attend, adapters: Adapters | None) -> Tensor:
        heads = self.qkv(self.norm_attention(x_TD), adapters).view(x_TD.shape[0], self.heads, -1)
        q, k, v = heads.chunk(3, dim=-1)
        q, k = kernels.apply_rope(q, *angles), kernels.apply_rope(k, *angles)
        attended = self.output(attend(self.layer, q, k, v.contiguous()).flatten(1), adapters)
        if self.parallel:
            return x_TD + attended + self.mlp(self.norm_mlp(x_TD), adapters)
        x_TD = x_TD + attended
        return x_TD + self.mlp(self.norm_mlp(x_TD), adapters)


class GPTNeoX(Model):
    """See the module's docstring."""

    def __init__(self, raw: dict[str, Any], dtype: torch.dtype | None = None):
        super().__init__()
        hidden, heads, layers = (
            need(raw, "hidden_size"),
            need(raw, "num_attention_heads"),
            need(raw, "num_hidden_layers"),
        )
        head_dim = hidden // heads
        self.vocab_size, self.hidden_size = need(raw, "vocab_size"), hidden
        self.max_positions = need(raw, "max_position_embeddings")
        self.attention = (AttentionSpec(heads, heads, head_dim, head_dim, head_dim**-0.5),) * layers
        self.embed = Embedding("gpt_neox.embed_in", self.vocab_size, hidden, dtype)
        theta = rope_theta(raw, float(raw.get("rotary_emb_base") or 10000.0))
        turned = rotary_dim({"partial_rotary_factor": 0.25, **raw}, head_dim)
        self.rope = Rope(RopeConfig(turned, theta, rope_scaling(raw), self.max_positions))
        self.layers = nn.ModuleList(NeoXBlock(layer, raw, dtype) for layer in range(layers))
        self.norm = LayerNorm("gpt_neox.final_layer_norm", hidden, raw.get("layer_norm_eps", 1e-5), dtype=dtype)
        self.head = Linear(hidden, [("embed_out", self.vocab_size)], dtype=dtype)
        if raw.get("tie_word_embeddings"):
            self.head.weight = self.embed.weight

    @classmethod
    def from_checkpoint(cls, raw: dict[str, Any], dtype: torch.dtype) -> GPTNeoX:
        return cls(raw, dtype)

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, attend: Attend, adapters: Adapters | None = None
    ) -> Tensor:
        angles = self.rope(positions_T)
        x_TD = self.embed(tokens_T)
        for block in self.layers:
            x_TD = block(x_TD, angles, attend, adapters)
        return self.norm(x_TD)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return self.head(hidden_RD).float()
