"""OLMo 2 (arXiv 2501.00656): norms after the branches instead of before, and over whole query and key projections.

Shape legend: T tokens, D hidden, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wager import kernels
from wager.models.base import Adapters, Attend
from wager.models.layers import GatedMLP, Linear, RMSNorm
from wager.models.llama import Llama, LlamaConfig


class Olmo2Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int, dtype: torch.dtype | None):
        super().__init__()
        self.layer, self.config = layer, config
        prefix, c = f"model.layers.{layer}", config
        attention, width, eps = f"{prefix}.self_attn", c.hidden_size, c.rms_norm_eps
        query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        parts = [(f"{attention}.q_proj", query), (f"{attention}.k_proj", key), (f"{attention}.v_proj", key)]
        self.qkv = Linear(width, parts, c.qkv_bias, dtype)
        self.q_norm = RMSNorm(f"{attention}.q_norm", query, eps, dtype=dtype)
        self.k_norm = RMSNorm(f"{attention}.k_norm", key, eps, dtype=dtype)
        self.output = Linear(query, [(f"{attention}.o_proj", width)], c.output_bias, dtype)
        self.attention_norm = RMSNorm(f"{prefix}.post_attention_layernorm", width, eps, dtype=dtype)
        self.mlp = GatedMLP(f"{prefix}.mlp", width, c.intermediate_size, c.hidden_act, dtype)
        self.mlp_norm = RMSNorm(f"{prefix}.post_feedforward_layernorm", width, eps, dtype=dtype)

    def forward(
        self,
        x_TD: Tensor,
        residual_TD: Tensor | None,
        angles: tuple[Tensor, Tensor],
        attend: Attend,
        adapters: Adapters | None,
    ) -> tuple[Tensor, Tensor]:
        """As Llama's block: (branch not yet added, residual). The branch here is already normed."""
        input_TD = x_TD if residual_TD is None else residual_TD + x_TD
        T, c = input_TD.shape[0], self.config
        query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        q, k, v = self.qkv(input_TD, adapters).split((query, key, key), dim=-1)
        q_THK = kernels.apply_rope(self.q_norm(q).view(T, -1, c.head_dim), *angles)
        k_TGK = kernels.apply_rope(self.k_norm(k).view(T, -1, c.head_dim), *angles)
        attended = attend(self.layer, q_THK, k_TGK, v.reshape(T, -1, c.head_dim)).flatten(1)
        middle_TD = input_TD + self.attention_norm(self.output(attended, adapters))
        return self.mlp_norm(self.mlp(middle_TD, adapters)), middle_TD


class Olmo2(Llama):
    def make_block(self, layer: int, dtype: torch.dtype | None) -> nn.Module:
        return Olmo2Block(self.config, layer, dtype)
