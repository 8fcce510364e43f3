"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm before each branch, biases everywhere, weights stored transposed.

Shape legend: T tokens, D hidden, H heads, K head width, R rows of logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wager.errors import CheckpointError
from wager.models.base import Adapters, Attend, AttentionSpec, Model
from wager.models.config import need
from wager.models.layers import MLP, Embedding, LayerNorm, Linear, split_heads

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


class GPT2Block(nn.Module):
    def __init__(
        self, layer: int, hidden: int, heads: int, width: int, eps: float, activation: str, dtype: torch.dtype | None
    ):
        super().__init__()
        self.layer, self.heads = layer, heads
        prefix = f"h.{layer}"
        self.norm_attention = LayerNorm(f"{prefix}.ln_1", hidden, eps, dtype=dtype)
        self.qkv = Linear(hidden, [(f"{prefix}.attn.c_attn", 3 * hidden)], True, dtype)
        self.output = Linear(hidden, [(f"{prefix}.attn.c_proj", hidden)], True, dtype)
        self.norm_mlp = LayerNorm(f"{prefix}.ln_2", hidden, eps, dtype=dtype)
        self.mlp = MLP(f"{prefix}.mlp.c_fc", f"{prefix}.mlp.c_proj", hidden, width, activation, dtype)

    def forward(self, x_TD: Tensor, attend: Attend, adapters: Adapters | None) -> Tensor:
        qkv = self.qkv(self.norm_attention(x_TD), adapters)
        q, k, v = split_heads(qkv, self.heads, self.heads, x_TD.shape[1] // self.heads)
        x_TD = x_TD + self.output(attend(self.layer, q, k, v).flatten(1), adapters)
        return x_TD + self.mlp(self.norm_mlp(x_TD), adapters)


class GPT2(Model):
    """See the module's docstring."""

    def __init__(self, raw: dict[str, Any], dtype: torch.dtype | None = None):
        super().__init__()
        hidden, heads, layers = need(raw, "n_embd"), need(raw, "n_head"), need(raw, "n_layer")
        eps, activation = raw.get("layer_norm_epsilon", 1e-5), raw.get("activation_function", "gelu_new")
        if activation not in ("gelu_new", "gelu_pytorch_tanh", "gelu"):
            raise CheckpointError(f"GPT-2 with activation {activation!r} is not supported; use gelu_new or gelu")
        if raw.get("scale_attn_by_inverse_layer_idx"):
            raise CheckpointError("GPT-2 with scale_attn_by_inverse_layer_idx is not supported")
        self.vocab_size, self.hidden_size = need(raw, "vocab_size"), hidden
        self.max_positions = need(raw, "n_positions")
        scale = (hidden // heads) ** -0.5 if raw.get("scale_attn_weights", True) else 1.0
        self.attention = (AttentionSpec(heads, heads, hidden // heads, hidden // heads, scale),) * layers
        self.embed = Embedding("wte", self.vocab_size, hidden, dtype)
        self.embed_positions = Embedding("wpe", self.max_positions, hidden, dtype)
        width = raw.get("n_inner") or 4 * hidden
        self.layers = nn.ModuleList(GPT2Block(i, hidden, heads, width, eps, activation, dtype) for i in range(layers))
        self.norm = LayerNorm("ln_f", hidden, eps, dtype=dtype)
        self.head = Linear(hidden, [("lm_head", self.vocab_size)], dtype=dtype)
        if raw.get("tie_word_embeddings", True):
            self.head.weight = self.embed.weight

    @classmethod
    def from_checkpoint(cls, raw: dict[str, Any], dtype: torch.dtype) -> GPT2:
        return cls(raw, dtype)

    def checkpoint_tensor(self, name: str, checkpoint: Any) -> Tensor:
        """Files name tensors with or without the leading `transformer.`; linears are stored as [input, output]."""
        prefixed = f"transformer.{name}"
        tensor = checkpoint.tensor(prefixed if prefixed in checkpoint else name)
        return tensor.T if name.endswith(TRANSPOSED) else tensor

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, attend: Attend, adapters: Adapters | None = None
    ) -> Tensor:
        x_TD = self.embed(tokens_T) + self.embed_positions(positions_T)
        for block in self.layers:
            x_TD = block(x_TD, attend, adapters)
        return self.norm(x_TD)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return self.head(hidden_RD).float()
