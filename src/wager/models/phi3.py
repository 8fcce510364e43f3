"""Phi-3 (arXiv 2404.14219): Llama with fused checkpoint tensors, partial rotary embedding and LongRoPE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wager.models.llama import Llama, LlamaConfig


class Phi3(Llama):
    """The checkpoint stores q, k, v as one tensor and gate, up as another, in the order we stack them anyway."""

    @classmethod
    def from_checkpoint(cls, raw: dict[str, Any], dtype: torch.dtype) -> Phi3:
        config = LlamaConfig.from_checkpoint(raw)
        return cls(replace(config, windows=(raw.get("sliding_window"),) * config.num_hidden_layers), dtype)

    def checkpoint_tensor(self, name: str, checkpoint: Any) -> Tensor:
        c = self.config
        query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        slices = {
            "self_attn.q_proj": ("self_attn.qkv_proj", 0, query),
            "self_attn.k_proj": ("self_attn.qkv_proj", query, key),
            "self_attn.v_proj": ("self_attn.qkv_proj", query + key, key),
            "mlp.gate_proj": ("mlp.gate_up_proj", 0, c.intermediate_size),
            "mlp.up_proj": ("mlp.gate_up_proj", c.intermediate_size, c.intermediate_size),
        }
        for ours, (theirs, start, rows) in slices.items():
            if f".{ours}." in name:
                return checkpoint.tensor(name.replace(ours, theirs))[start : start + rows]
        return checkpoint.tensor(name)
