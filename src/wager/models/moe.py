"""Llama-shaped mixtures of experts: Mixtral (arXiv 2401.04088) and Qwen3-MoE (arXiv 2505.09388)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from wager.models.config import need
from wager.models.experts import Router, SparseMLP, softmax_route
from wager.models.layers import GatedMLP
from wager.models.llama import Block, Llama, LlamaConfig


class Mixtral(Llama):
    """Every layer has experts; the chosen ones' weights add up to one."""

    def __init__(self, config: LlamaConfig, raw: dict[str, Any], dtype: torch.dtype | None = None):
        self.raw = raw
        super().__init__(config, dtype)

    @classmethod
    def from_checkpoint(cls, raw: dict[str, Any], dtype: torch.dtype) -> Mixtral:
        config = LlamaConfig.from_checkpoint(raw)
        window = raw.get("sliding_window")
        return cls(replace(config, windows=(window,) * config.num_hidden_layers), raw, dtype)

    def make_block(self, layer: int, dtype: torch.dtype | None) -> nn.Module:
        config, raw = self.config, self.raw
        prefix = f"model.layers.{layer}.block_sparse_moe"
        experts = [
            GatedMLP(
                f"{prefix}.experts.{e}", config.hidden_size, config.intermediate_size, config.hidden_act, dtype,
                names=("w1", "w3", "w2"),
            )
            for e in range(need(raw, "num_local_experts"))
        ]  # fmt: skip
        router = Router(f"{prefix}.gate", config.hidden_size, len(experts), dtype)
        return Block(
            config, layer, dtype, SparseMLP(router, experts, softmax_route(need(raw, "num_experts_per_tok"), True))
        )


class Qwen3Moe(Mixtral):
    """Qwen3 with experts in all layers but those the configuration leaves dense."""

    @classmethod
    def from_checkpoint(cls, raw: dict[str, Any], dtype: torch.dtype) -> Qwen3Moe:
        return cls(replace(LlamaConfig.from_checkpoint(raw), qk_norm=True), raw, dtype)

    def make_block(self, layer: int, dtype: torch.dtype | None) -> nn.Module:
        config, raw = self.config, self.raw
        dense = layer in (raw.get("mlp_only_layers") or ()) or (layer + 1) % (raw.get("decoder_sparse_step") or 1) != 0
        if dense:
            return Block(config, layer, dtype)
        prefix = f"model.layers.{layer}.mlp"
        width = need(raw, "moe_intermediate_size")
        count = raw.get("num_experts") or need(raw, "num_local_experts")
        experts = [
            GatedMLP(f"{prefix}.experts.{e}", config.hidden_size, width, config.hidden_act, dtype) for e in range(count)
        ]
        route = softmax_route(need(raw, "num_experts_per_tok"), bool(raw.get("norm_topk_prob")))
        return Block(
            config, layer, dtype, SparseMLP(Router(f"{prefix}.gate", config.hidden_size, count, dtype), experts, route)
        )
