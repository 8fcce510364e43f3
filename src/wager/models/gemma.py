"""Gemma 2 (arXiv 2408.00118) and Gemma 3 text models (arXiv 2503.19786).

Norms around both branches with weights stored as offsets from one, embeddings scaled by sqrt(D), local and global layers, logit caps
(Gemma 2), norms on queries and keys and a rotary base per kind of layer (Gemma 3).

Shape legend: T tokens, D hidden, H query heads, G key/value heads, K head width, R rows of logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wager import kernels
from wager.models.base import Adapters, Attend, AttentionSpec, Model
from wager.models.config import layer_windows, need, rope_scaling
from wager.models.layers import Embedding, GatedMLP, Linear, RMSNorm, split_heads
from wager.models.rope import Rope, RopeConfig


@dataclass(frozen=True)
class GemmaConfig:
    """The fields of config.json that matter. ropes: one per layer kind; kinds: the kind of each layer."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    score_scale: float
    windows: tuple[int | None, ...]
    ropes: dict[str, RopeConfig]
    kinds: tuple[str, ...]
    qk_norm: bool
    attention_bias: bool
    score_cap: float | None
    logit_cap: float | None

    @classmethod
    def from_checkpoint(cls, raw: dict[str, Any]) -> GemmaConfig:
        head_dim = need(raw, "head_dim")
        layers = need(raw, "num_hidden_layers")
        gemma3 = raw.get("model_type", "").startswith("gemma3")
        pattern = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or (6 if gemma3 else 2)
        kinds = raw.get("layer_types") or [
            "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)
        ]
        return cls(
            vocab_size=need(raw, "vocab_size"),
            hidden_size=need(raw, "hidden_size"),
            intermediate_size=need(raw, "intermediate_size"),
            num_attention_heads=need(raw, "num_attention_heads"),
            num_key_value_heads=need(raw, "num_key_value_heads"),
            head_dim=head_dim,
            max_position_embeddings=need(raw, "max_position_embeddings"),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            score_scale=need(raw, "query_pre_attn_scalar") ** -0.5,
            windows=layer_windows({**raw, "layer_types": kinds}, raw.get("sliding_window")),
            ropes=_ropes(raw, head_dim, gemma3),
            kinds=tuple(kinds),
            qk_norm=gemma3,
            attention_bias=bool(raw.get("attention_bias")),
            score_cap=raw.get("attn_logit_softcapping"),
            logit_cap=raw.get("final_logit_softcapping"),
        )


def _ropes(raw: dict[str, Any], head_dim: int, gemma3: bool) -> dict[str, RopeConfig]:
    """Per layer kind, from the nested form (rope_parameters by kind) or the older flat fields."""
    longest = need(raw, "max_position_embeddings")
    nested = raw.get("rope_parameters") or {}
    if "full_attention" in nested:
        return {kind: RopeConfig(head_dim, p["rope_theta"], p, longest) for kind, p in nested.items()}
    scaling = rope_scaling(raw)
    base = float(scaling.get("rope_theta") or raw.get("rope_theta") or (1e6 if gemma3 else 1e4))
    whole = RopeConfig(head_dim, base, scaling, longest)
    local = RopeConfig(head_dim, float(raw.get("rope_local_base_freq") or 1e4), {}, longest) if gemma3 else whole
    return {"full_attention": whole, "sliding_attention": local}


class GemmaBlock(nn.Module):
    def __init__(self, config: GemmaConfig, layer: int, dtype: torch.dtype | None):
        super().__init__()
        self.layer, self.config, self.kind = layer, config, config.kinds[layer]
        prefix, c = f"model.layers.{layer}", config
        attention, width = f"{prefix}.self_attn", c.hidden_size

        def norm(name: str, size: int = width) -> RMSNorm:
            return RMSNorm(f"{prefix}.{name}", size, c.rms_norm_eps, offset=1.0, dtype=dtype)

        query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        parts = [(f"{attention}.q_proj", query), (f"{attention}.k_proj", key), (f"{attention}.v_proj", key)]
        self.qkv = Linear(width, parts, c.attention_bias, dtype)
        self.output = Linear(query, [(f"{attention}.o_proj", width)], c.attention_bias, dtype)
        self.q_norm = norm("self_attn.q_norm", c.head_dim) if c.qk_norm else None
        self.k_norm = norm("self_attn.k_norm", c.head_dim) if c.qk_norm else None
        self.before_attention, self.after_attention = norm("input_layernorm"), norm("post_attention_layernorm")
        self.before_mlp, self.after_mlp = norm("pre_feedforward_layernorm"), norm("post_feedforward_layernorm")
        self.mlp = GatedMLP(f"{prefix}.mlp", width, c.intermediate_size, "gelu_tanh", dtype)

    def forward(
        self, x_TD: Tensor, angles: dict[str, tuple[Tensor, Tensor]], attend: Attend, adapters: Adapters | None
    ) -> Tensor:
        c = self.config
        qkv = self.qkv(self.before_attention(x_TD), adapters)
        q_THK, k_TGK, v_TGK = split_heads(qkv, c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_THK, k_TGK = self.q_norm(q_THK), self.k_norm(k_TGK)
        turn = angles[self.kind]
        q_THK, k_TGK = kernels.apply_rope(q_THK, *turn), kernels.apply_rope(k_TGK, *turn)
        attended = self.output(attend(self.layer, q_THK, k_TGK, v_TGK).flatten(1), adapters)
        middle, x_TD = self.before_mlp.add(self.after_attention(attended), x_TD)
        return x_TD + self.after_mlp(self.mlp(middle, adapters))


class Gemma(Model):
    """See the module's docstring."""

    def __init__(self, config: GemmaConfig, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.max_positions = config.max_position_embeddings
        self.attention = tuple(
            AttentionSpec(
                config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.head_dim,
                config.score_scale, window, config.score_cap,
            )
            for window in config.windows
        )  # fmt: skip
        self.embed = Embedding("model.embed_tokens", config.vocab_size, config.hidden_size, dtype)
        self.ropes = nn.ModuleDict({kind: Rope(rope) for kind, rope in config.ropes.items()})
        self.layers = nn.ModuleList(GemmaBlock(config, layer, dtype) for layer in range(len(config.windows)))
        self.norm = RMSNorm("model.norm", config.hidden_size, config.rms_norm_eps, offset=1.0, dtype=dtype)
        self.head = Linear(config.hidden_size, [("lm_head", config.vocab_size)], dtype=dtype)
        self.head.weight = self.embed.weight  # always tied

    @classmethod
    def from_checkpoint(cls, raw: dict[str, Any], dtype: torch.dtype) -> Gemma:
        return cls(GemmaConfig.from_checkpoint(raw), dtype)

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, attend: Attend, adapters: Adapters | None = None
    ) -> Tensor:
        angles = {kind: rope(positions_T) for kind, rope in self.ropes.items()}
        # The factor is rounded to the weights' dtype, as the models were trained.
        scale = torch.tensor(self.config.hidden_size**0.5, dtype=self.dtype).item()
        x_TD = self.embed(tokens_T) * scale
        for block in self.layers:
            x_TD = block(x_TD, angles, attend, adapters)
        return self.norm(x_TD)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        logits, cap = self.head(hidden_RD).float(), self.config.logit_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)
