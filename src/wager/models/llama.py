"""Llama and the families that differ from it by a flag: Mistral (window), Qwen2 (qkv bias), Qwen3 (norms on queries and keys).

Sources: Llama (arXiv 2302.13971, 2407.21783), Mistral 7B (arXiv 2310.06825), Qwen2 (arXiv 2407.10671), Qwen3 (arXiv 2505.09388).
Shape legend: T tokens, D hidden, H query heads, G key/value heads, K head width, R rows of logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wager import kernels
from wager.models.base import Adapters, Attend, AttentionSpec, Model, RotatingAttend
from wager.models.config import layer_windows, need, rope_scaling, rope_theta, rotary_dim
from wager.models.layers import Embedding, GatedMLP, Linear, RMSNorm, init_weights, split_heads
from wager.models.rope import Rope, RopeConfig


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of config.json that matter. `windows` has one entry per layer; None is full attention."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    hidden_act: str = "silu"
    rotary_dim: int | None = None

    @classmethod
    def from_checkpoint(cls, raw: dict[str, Any]) -> LlamaConfig:
        """From config.json of any family this module serves."""
        kind = raw.get("model_type", "llama")
        heads = need(raw, "num_attention_heads")
        windowed = kind == "mistral" or raw.get("use_sliding_window", False)
        return cls(
            vocab_size=need(raw, "vocab_size"),
            hidden_size=need(raw, "hidden_size"),
            intermediate_size=need(raw, "intermediate_size"),
            num_hidden_layers=need(raw, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            max_position_embeddings=raw.get("max_position_embeddings") or 2048,
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=rope_theta(raw),
            rope_scaling=rope_scaling(raw),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2" or bool(raw.get("attention_bias", False)),
            output_bias=kind != "qwen2" and bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
            windows=layer_windows(raw, raw.get("sliding_window") if windowed else None),
            hidden_act=raw.get("hidden_act", "silu"),
            rotary_dim=rotary_dim(raw, raw.get("head_dim") or raw["hidden_size"] // heads),
        )

    @property
    def window_of_layer(self) -> tuple[int | None, ...]:
        return self.windows or (None,) * self.num_hidden_layers

    @property
    def rope(self) -> RopeConfig:
        return RopeConfig(
            self.rotary_dim or self.head_dim, self.rope_theta, self.rope_scaling, self.max_position_embeddings
        )


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int, dtype: torch.dtype | None):
        super().__init__()
        self.layer, self.config = layer, config
        prefix, c = f"model.layers.{layer}.self_attn", config
        query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        parts = [(f"{prefix}.q_proj", query), (f"{prefix}.k_proj", key), (f"{prefix}.v_proj", key)]
        self.qkv = Linear(c.hidden_size, parts, c.qkv_bias, dtype)
        self.output = Linear(query, [(f"{prefix}.o_proj", c.hidden_size)], c.output_bias, dtype)
        self.q_norm = RMSNorm(f"{prefix}.q_norm", c.head_dim, c.rms_norm_eps, dtype=dtype) if c.qk_norm else None
        self.k_norm = RMSNorm(f"{prefix}.k_norm", c.head_dim, c.rms_norm_eps, dtype=dtype) if c.qk_norm else None

    def forward(self, x_TD: Tensor, angles: tuple[Tensor, Tensor], attend: Attend, adapters: Adapters | None) -> Tensor:
        c = self.config
        q_THK, k_TGK, v_TGK = split_heads(
            self.qkv(x_TD, adapters), c.num_attention_heads, c.num_key_value_heads, c.head_dim
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_THK, k_TGK = self.q_norm(q_THK), self.k_norm(k_TGK)
        return self.output(attend_rotated(attend, self.layer, q_THK, k_TGK, v_TGK, angles).flatten(1), adapters)


def attend_rotated(
    attend: Attend, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, angles: tuple[Tensor, Tensor]
) -> Tensor:
    """Attention after rotation, which an `attend` may take on itself."""
    rotating: RotatingAttend | None = getattr(attend, "rotating", None)
    if rotating is not None:
        return rotating(layer, q_THK, k_TGK, v_TGK, *angles)
    return attend(layer, kernels.apply_rope(q_THK, *angles), kernels.apply_rope(k_TGK, *angles), v_TGK)


class Block(nn.Module):
    """`mlp` replaces the gated MLP; mixtures of experts do."""

    def __init__(self, config: LlamaConfig, layer: int, dtype: torch.dtype | None, mlp: nn.Module | None = None):
        super().__init__()
        prefix, width, eps = f"model.layers.{layer}", config.hidden_size, config.rms_norm_eps
        self.input_norm = RMSNorm(f"{prefix}.input_layernorm", width, eps, dtype=dtype)
        self.attention = Attention(config, layer, dtype)
        self.post_norm = RMSNorm(f"{prefix}.post_attention_layernorm", width, eps, dtype=dtype)
        self.mlp = mlp or GatedMLP(
            f"{prefix}.mlp", width, config.intermediate_size, config.hidden_act, dtype, config.mlp_bias
        )

        self.halves: tuple[kernels.BlockInput | None, kernels.BlockOutput | None] | None = None
        self.whole: tuple[Any] | None = None

    def forward(
        self,
        x_TD: Tensor,
        residual_TD: Tensor | None,
        angles: tuple[Tensor, Tensor],
        attend: Attend,
        adapters: Adapters | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Takes and returns (branch output not yet added, residual): each norm adds the branch before it. No residual: it is added."""
        if adapters is None and (whole := self.of_one_token(x_TD)) is not None:
            c, stream_TD = self.attention.config, x_TD if residual_TD is None else residual_TD + x_TD
            heads = split_heads(whole.inputs(stream_TD), c.num_attention_heads, c.num_key_value_heads, c.head_dim)
            attended_TX = attend_rotated(attend, self.attention.layer, *heads, angles).flatten(1)
            return whole.outputs(attended_TX, stream_TD), None
        first, second = self.fused(x_TD) if adapters is None else (None, None)
        if first is not None:
            q_THK, k_TGK, v_TGK, residual_TD = first(x_TD, residual_TD, *angles)
            attended_TX = attend(self.attention.layer, q_THK, k_TGK, v_TGK).flatten(1)
            if second is not None:
                return second(attended_TX, residual_TD)
            attended_TD = self.attention.output(attended_TX)
        else:
            if residual_TD is None:
                normed, residual_TD = self.input_norm(x_TD), x_TD
            else:
                normed, residual_TD = self.input_norm.add(x_TD, residual_TD)
            attended_TD = self.attention(normed, angles, attend, adapters)
        normed, residual_TD = self.post_norm.add(attended_TD, residual_TD)
        return self.mlp(normed, adapters), residual_TD

    def of_one_token(self, x_TD: Tensor) -> Any:
        """The block over one token of a GPU, its products fused with norms, gate and residuals; None where that does not apply."""
        if x_TD.shape[0] != 1 or x_TD.device.type == "cpu" or x_TD.requires_grad:
            return None
        if self.whole is None:
            attention, mlp, made = self.attention, self.mlp, None
            if type(self) is Block and type(mlp) is GatedMLP and attention.q_norm is None:
                norms = [kernels.Norm(m.weight, m.eps, m.offset) for m in (self.input_norm, self.post_norm)]
                qkv, output, gate_up, down = (
                    m.packed for m in (attention.qkv, attention.output, mlp.gate_up, mlp.down)
                )
                made = kernels.one_token_block(norms[0], qkv, output, norms[1], gate_up, down, mlp.activation)
            self.whole = (made,)
        return self.whole[0]

    def fused(self, x_TD: Tensor) -> tuple[kernels.BlockInput | None, kernels.BlockOutput | None]:
        """The halves around attention as single kernels, where prepacked weights and the activations allow it; the bits are the same."""
        qkv = self.attention.qkv.packed
        if qkv is None or x_TD.dtype != torch.float32 or x_TD.device.type != "cpu" or x_TD.requires_grad:
            return None, None
        if self.halves is None:
            c, attention, mlp, second = self.attention.config, self.attention, self.mlp, None
            norm = lambda module: kernels.Norm(module.weight, module.eps, module.offset)
            q_norm, k_norm = (None if m is None else norm(m) for m in (attention.q_norm, attention.k_norm))
            shape = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
            first = kernels.block_input(norm(self.input_norm), qkv, q_norm, k_norm, *shape)
            if type(mlp) is GatedMLP:
                second = kernels.block_output(
                    attention.output.packed, norm(self.post_norm), mlp.gate_up.packed, mlp.down.packed, mlp.activation
                )
            self.halves = first, second
        return self.halves


class Llama(Model):
    """See the module's docstring. Weights are uninitialised unless a generator is given or a checkpoint is loaded."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype | None = None, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.max_positions = config.max_position_embeddings
        self.attention = tuple(
            AttentionSpec(
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                config.head_dim,
                config.head_dim**-0.5,
                window,
            )
            for window in config.window_of_layer
        )
        self.embed = Embedding("model.embed_tokens", config.vocab_size, config.hidden_size, dtype)
        self.rope = Rope(config.rope)
        self.layers = nn.ModuleList(self.make_block(layer, dtype) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm("model.norm", config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.head = Linear(config.hidden_size, [("lm_head", config.vocab_size)], dtype=dtype)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight
        if generator is not None:
            init_weights(self, 0.02, generator)

    def make_block(self, layer: int, dtype: torch.dtype | None) -> nn.Module:
        """A family that differs in its blocks builds its own."""
        return Block(self.config, layer, dtype)

    @classmethod
    def from_checkpoint(cls, raw: dict[str, Any], dtype: torch.dtype) -> Llama:
        return cls(LlamaConfig.from_checkpoint(raw), dtype)

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, attend: Attend, adapters: Adapters | None = None
    ) -> Tensor:
        angles = self.rope(positions_T)
        x_TD, residual_TD = self.embed(tokens_T), None
        for block in self.layers:
            x_TD, residual_TD = block(x_TD, residual_TD, angles, attend, adapters)
        return self.norm(x_TD) if residual_TD is None else self.norm.add(x_TD, residual_TD)[0]

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return self.head(hidden_RD).float()
