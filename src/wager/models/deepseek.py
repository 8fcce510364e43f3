"""DeepSeek-V2 (arXiv 2405.04434) and V3 (arXiv 2412.19437): latent attention and mixtures of many small experts.

Latent attention in its absorbed form: the cache holds one vector per token (a compressed latent and a small rotary part), shared by all
heads. Each head's key projection is folded into its query and its value projection into its output, so attention runs over the latents.

Shape legend: T tokens, D hidden, H heads, N width without rotation, R rotary width, C latent width, V value width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wager import kernels
from wager.models.base import Adapters, Attend, AttentionSpec, Model
from wager.models.config import need, rope_scaling, rope_theta
from wager.models.experts import Route, Router, SparseMLP, keep_best_groups, softmax_route
from wager.models.layers import Embedding, GatedMLP, Linear, RMSNorm
from wager.models.rope import Rope, RopeConfig, yarn_mscale


@dataclass(frozen=True)
class DeepseekConfig:
    """The fields of config.json that matter; `raw` keeps those of the experts, read where they are used."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_heads: int
    query_rank: int | None
    latent: int
    plain: int
    rotary: int
    value: int
    eps: float
    attention_bias: bool
    rope: RopeConfig
    interleaved: bool
    version3: bool
    raw: dict[str, Any] = field(repr=False)

    @classmethod
    def from_checkpoint(cls, raw: dict[str, Any]) -> DeepseekConfig:
        rotary, longest = need(raw, "qk_rope_head_dim"), need(raw, "max_position_embeddings")
        return cls(
            vocab_size=need(raw, "vocab_size"),
            hidden_size=need(raw, "hidden_size"),
            intermediate_size=need(raw, "intermediate_size"),
            num_hidden_layers=need(raw, "num_hidden_layers"),
            num_heads=need(raw, "num_attention_heads"),
            query_rank=raw.get("q_lora_rank"),
            latent=need(raw, "kv_lora_rank"),
            plain=need(raw, "qk_nope_head_dim"),
            rotary=rotary,
            value=need(raw, "v_head_dim"),
            eps=raw.get("rms_norm_eps", 1e-6),
            attention_bias=bool(raw.get("attention_bias")),
            rope=RopeConfig(rotary, rope_theta(raw), rope_scaling(raw), longest),
            interleaved=bool(raw.get("rope_interleave", True)),
            version3=raw.get("model_type") == "deepseek_v3",
            raw=raw,
        )

    @property
    def score_scale(self) -> float:
        scale, scaling = (self.plain + self.rotary) ** -0.5, self.rope.scaling
        if self.rope.kind != "default" and scaling.get("mscale_all_dim"):
            scale *= yarn_mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2
        return scale


class LatentProjection(nn.Module):
    """The per-head projections out of the latent: `key_HNC` folds into queries, `value_HVC` into outputs."""

    def __init__(self, name: str, config: DeepseekConfig, dtype: torch.dtype | None):
        super().__init__()
        self.config = config
        rows = config.num_heads * (config.plain + config.value)
        self.parts = [(name, rows)]
        self.weight = nn.Parameter(torch.empty(rows, config.latent, dtype=dtype))

    def split(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        heads = self.weight.to(dtype).view(self.config.num_heads, self.config.plain + self.config.value, -1)
        return heads[:, : self.config.plain], heads[:, self.config.plain :]


class LatentAttention(nn.Module):
    def __init__(self, config: DeepseekConfig, layer: int, dtype: torch.dtype | None):
        super().__init__()
        self.layer, self.config, c = layer, config, config
        prefix = f"model.layers.{layer}.self_attn"
        query = c.num_heads * (c.plain + c.rotary)
        if c.query_rank is None:
            self.query_down, self.query_norm = None, None
            self.query = Linear(c.hidden_size, [(f"{prefix}.q_proj", query)], dtype=dtype)
        else:
            self.query_down = Linear(c.hidden_size, [(f"{prefix}.q_a_proj", c.query_rank)], c.attention_bias, dtype)
            self.query_norm = RMSNorm(f"{prefix}.q_a_layernorm", c.query_rank, 1e-6, dtype=dtype)
            self.query = Linear(c.query_rank, [(f"{prefix}.q_b_proj", query)], dtype=dtype)
        compressed = [(f"{prefix}.kv_a_proj_with_mqa", c.latent + c.rotary)]
        self.compress = Linear(c.hidden_size, compressed, c.attention_bias, dtype)
        self.latent_norm = RMSNorm(f"{prefix}.kv_a_layernorm", c.latent, 1e-6, dtype=dtype)
        self.expand = LatentProjection(f"{prefix}.kv_b_proj", c, dtype)
        self.output = Linear(c.num_heads * c.value, [(f"{prefix}.o_proj", c.hidden_size)], c.attention_bias, dtype)

    def forward(self, x_TD: Tensor, angles: tuple[Tensor, Tensor], attend: Attend, adapters: Adapters | None) -> Tensor:
        c, T = self.config, x_TD.shape[0]
        narrow = x_TD
        if self.query_down is not None and self.query_norm is not None:
            narrow = self.query_norm(self.query_down(x_TD, adapters))
        q_THN, q_THR = self.query(narrow, adapters).view(T, c.num_heads, -1).split((c.plain, c.rotary), dim=-1)
        latent_TC, k_TR = self.compress(x_TD, adapters).split((c.latent, c.rotary), dim=-1)
        q_THR = kernels.apply_rope(q_THR, *angles, interleaved=c.interleaved)
        k_T1R = kernels.apply_rope(k_TR[:, None], *angles, interleaved=c.interleaved)
        key_HNC, value_HVC = self.expand.split(x_TD.dtype)
        q_THC = torch.einsum("thn,hnc->thc", q_THN, key_HNC)
        keys = torch.cat((self.latent_norm(latent_TC)[:, None], k_T1R), dim=-1)
        latent_THC = attend(self.layer, torch.cat((q_THC, q_THR), dim=-1), keys, None)
        out_THV = torch.einsum("thc,hvc->thv", latent_THC, value_HVC)
        return self.output(out_THV.flatten(1), adapters)


class DeepseekBlock(nn.Module):
    def __init__(self, config: DeepseekConfig, layer: int, dtype: torch.dtype | None):
        super().__init__()
        prefix = f"model.layers.{layer}"
        self.input_norm = RMSNorm(f"{prefix}.input_layernorm", config.hidden_size, config.eps, dtype=dtype)
        self.attention = LatentAttention(config, layer, dtype)
        self.post_norm = RMSNorm(f"{prefix}.post_attention_layernorm", config.hidden_size, config.eps, dtype=dtype)
        self.mlp = make_mlp(config, layer, dtype)

    def forward(
        self,
        x_TD: Tensor,
        residual_TD: Tensor | None,
        angles: tuple[Tensor, Tensor],
        attend: Attend,
        adapters: Adapters | None,
    ) -> tuple[Tensor, Tensor]:
        if residual_TD is None:
            normed, residual_TD = self.input_norm(x_TD), x_TD
        else:
            normed, residual_TD = self.input_norm.add(x_TD, residual_TD)
        normed, residual_TD = self.post_norm.add(self.attention(normed, angles, attend, adapters), residual_TD)
        return self.mlp(normed, adapters), residual_TD


def make_mlp(config: DeepseekConfig, layer: int, dtype: torch.dtype | None) -> nn.Module:
    """Dense in the first layers, experts with a shared one after that."""
    raw, prefix = config.raw, f"model.layers.{layer}.mlp"
    if layer < (raw.get("first_k_dense_replace") or 0):
        return GatedMLP(prefix, config.hidden_size, config.intermediate_size, "silu", dtype)
    width, count = need(raw, "moe_intermediate_size"), need(raw, "n_routed_experts")
    experts = [GatedMLP(f"{prefix}.experts.{e}", config.hidden_size, width, "silu", dtype) for e in range(count)]
    shared = None
    if raw.get("n_shared_experts"):
        shared = GatedMLP(
            f"{prefix}.shared_experts", config.hidden_size, width * raw["n_shared_experts"], "silu", dtype
        )
    router = BiasedRouter(f"{prefix}.gate", config.hidden_size, count, dtype) if config.version3 else None
    if router is not None:
        return SparseMLP(router, experts, sigmoid_route(raw, router), shared)
    return SparseMLP(Router(f"{prefix}.gate", config.hidden_size, count, dtype), experts, grouped_route(raw), shared)


class BiasedRouter(Router):
    """V3's router: a bias, learned apart from the loss, steers the choice but not the weights."""

    def __init__(self, name: str, hidden: int, num_experts: int, dtype: torch.dtype | None):
        super().__init__(name, hidden, num_experts, dtype)
        self.e_score_correction_bias = nn.Parameter(torch.zeros(num_experts, dtype=torch.float32), requires_grad=False)


def grouped_route(raw: dict[str, Any]) -> Route:
    """V2: softmax scores, optionally only within the best groups of experts."""
    chosen, scale = need(raw, "num_experts_per_tok"), raw.get("routed_scaling_factor", 1.0)
    if raw.get("topk_method", "greedy") == "greedy":
        return softmax_route(chosen, normalise=False, scale=scale)

    def route(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits_TE.softmax(-1)
        kept = keep_best_groups(scores, need(raw, "n_group"), need(raw, "topk_group"), members=1)
        weights, experts = scores.masked_fill(~kept, 0.0).topk(chosen, dim=-1)
        return weights * scale, experts

    return route


def sigmoid_route(raw: dict[str, Any], router: BiasedRouter) -> Route:
    """V3: sigmoid scores plus the router's bias choose, the bare scores weigh."""
    chosen, scale = need(raw, "num_experts_per_tok"), raw.get("routed_scaling_factor", 1.0)

    def route(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits_TE.sigmoid()
        biased = scores + router.e_score_correction_bias
        kept = keep_best_groups(biased, need(raw, "n_group"), need(raw, "topk_group"), members=2)
        experts = biased.masked_fill(~kept, -torch.inf).topk(chosen, dim=-1).indices
        weights = scores.gather(1, experts)
        if raw.get("norm_topk_prob"):
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * scale, experts

    return route


class Deepseek(Model):
    """See the module's docstring."""

    def __init__(self, config: DeepseekConfig, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.max_positions = config.rope.max_positions
        spec = AttentionSpec(
            config.num_heads, 1, config.latent + config.rotary, config.latent, config.score_scale, value_from_key=True
        )
        self.attention = (spec,) * config.num_hidden_layers
        self.embed = Embedding("model.embed_tokens", config.vocab_size, config.hidden_size, dtype)
        self.rope = Rope(config.rope)
        self.layers = nn.ModuleList(DeepseekBlock(config, layer, dtype) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm("model.norm", config.hidden_size, config.eps, dtype=dtype)
        self.head = Linear(config.hidden_size, [("lm_head", config.vocab_size)], dtype=dtype)
        if config.raw.get("tie_word_embeddings"):
            self.head.weight = self.embed.weight

    @classmethod
    def from_checkpoint(cls, raw: dict[str, Any], dtype: torch.dtype) -> Deepseek:
        return cls(DeepseekConfig.from_checkpoint(raw), dtype)

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, attend: Attend, adapters: Adapters | None = None
    ) -> Tensor:
        angles = self.rope(positions_T)
        x_TD, residual_TD = self.embed(tokens_T), None
        for block in self.layers:
            x_TD, residual_TD = block(x_TD, residual_TD, angles, attend, adapters)
        assert residual_TD is not None
        return self.norm.add(x_TD, residual_TD)[0]

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return self.head(hidden_RD).float()
