"""A Llama over many sequences of one length as plain tensor code: for training on a GPU, and to let a model continue many texts at once.

The same weights and the same function as `Llama.forward`, laid out so that torch can compile one block for all layers, and so that a step
of decoding needs nothing from the host.

Shape legend: B sequences, S tokens of each, D hidden, H query heads, G key/value heads, K head width, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from wager.errors import UsageError
from wager.models.llama import Block, Llama, LlamaConfig

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
BlockWeights = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
BlockForward = Callable[[Tensor, Tensor, Tensor, BlockWeights, tuple[int, int, int], float], Tensor]


def causal(q_BHSK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> Tensor:
    """One fused call for all sequences."""
    return F.scaled_dot_product_attention(
        q_BHSK, k_BGSK, v_BGSK, is_causal=True, enable_gqa=q_BHSK.shape[1] != k_BGSK.shape[1]
    )


def block(
    x_BSD: Tensor, cos_SR: Tensor, sin_SR: Tensor, weights: BlockWeights, shape: tuple[int, int, int], eps: float,
    attend: Attention = causal,
) -> Tensor:  # fmt: skip
    """One layer in x's dtype, the residual stream included. `shape` is (H, G, K)."""
    (first, qkv, output, second, gate_up, down), (heads, kv_heads, width) = (w.to(x_BSD.dtype) for w in weights), shape
    sequences, length, hidden = x_BSD.shape
    joined = F.linear(F.rms_norm(x_BSD, (hidden,), first, eps), qkv).view(
        sequences, length, heads + 2 * kv_heads, width
    )
    q, k, v = joined.transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
    attended = attend(rotated(q, cos_SR, sin_SR), rotated(k, cos_SR, sin_SR), v)
    x_BSD = x_BSD + F.linear(attended.transpose(1, 2).reshape(sequences, length, heads * width), output)
    gate, up = F.linear(F.rms_norm(x_BSD, (hidden,), second, eps), gate_up).chunk(2, -1)
    return x_BSD + F.linear(F.silu(gate) * up, down)


def rotated(x_BHSK: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
    """Rotary embedding in the half layout, computed in float32."""
    a, b = x_BHSK.float().chunk(2, -1)
    return torch.cat((a * cos_SR - b * sin_SR, b * cos_SR + a * sin_SR), -1).to(x_BHSK.dtype)


def shape_of(config: LlamaConfig) -> tuple[int, int, int]:
    """(H, G, K). Raises UsageError for a model that is more than a plain Llama."""
    extras = (config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm, any(config.window_of_layer))
    if any(extras) or config.hidden_act != "silu" or config.rotary_dim not in (None, config.head_dim):
        raise UsageError("batched passes are written for plain Llamas: no biases, windows or query and key norms, silu")
    return config.num_attention_heads, config.num_key_value_heads, config.head_dim


def weights_of(layer: Block) -> BlockWeights:
    attention, mlp = layer.attention, layer.mlp
    gate_up, down = mlp.get_submodule("gate_up"), mlp.get_submodule("down")
    return (
        layer.input_norm.weight, attention.qkv.weight, attention.output.weight, layer.post_norm.weight,
        gate_up.get_parameter("weight"), down.get_parameter("weight"),
    )  # fmt: skip


def hidden_of(model: Llama, tokens_BS: Tensor, dtype: torch.dtype, layer_forward: BlockForward = block) -> Tensor:
    """Hidden rows [B, S, D] after the last norm, differentiable."""
    shape, eps = shape_of(model.config), model.config.rms_norm_eps
    x_BSD = F.embedding(tokens_BS, model.embed.weight).to(dtype)
    cos_SR, sin_SR = model.rope(torch.arange(tokens_BS.shape[1], device=tokens_BS.device))
    for layer in model.layers:
        x_BSD = layer_forward(x_BSD, cos_SR, sin_SR, weights_of(layer), shape, eps)  # type: ignore[arg-type]
    return F.rms_norm(x_BSD, (model.hidden_size,), model.norm.weight.to(dtype), eps)


def logits_of(model: Llama, hidden: Tensor) -> Tensor:
    """float32 logits."""
    return F.linear(hidden, model.head.weight.to(hidden.dtype)).float()


class Continuer:
    """Continues B texts of one length at once to S tokens, each at its own temperature.

    Keys and values of all S places are kept in one buffer; places that are not there yet are hidden. Gumbel noise times the temperature
    on the logits: the largest is a sample, and the favourite at temperature 0.
    """

    def __init__(
        self, model: Llama, temperatures_B: Tensor, length: int, dtype: torch.dtype, generator: torch.Generator
    ):
        self.model, self.dtype, self.generator = model, dtype, generator
        self.shape, device = shape_of(model.config), temperatures_B.device
        _, kv_heads, width = self.shape
        self.temperatures_B1 = temperatures_B[:, None]
        rows = len(temperatures_B)
        self.weights = [[w.detach().to(dtype) for w in weights_of(layer)] for layer in model.layers]  # type: ignore[arg-type]
        self.embedding_WD = model.embed.weight.detach().to(dtype)
        self.head_WD = model.head.weight.detach().to(dtype)
        self.norm_D = model.norm.weight.detach().to(dtype)
        self.cos_SR, self.sin_SR = (t.detach() for t in model.rope(torch.arange(length, device=device)))
        self.kv = torch.zeros((len(model.layers), 2, rows, kv_heads, length, width), dtype=dtype, device=device)
        self.tokens_BS = torch.zeros((rows, length), dtype=torch.long, device=device)
        self.places_S = torch.arange(length, device=device)
        self.place_1 = torch.zeros(1, dtype=torch.long, device=device)

    @torch.no_grad()
    def __call__(self, prompts_BL: Tensor) -> Tensor:
        """Token ids [B, S], prompts first; they have two tokens or more."""
        given = prompts_BL.shape[1]
        if not 2 <= given < len(self.places_S):
            raise UsageError(f"prompts of 2 to {len(self.places_S) - 1} tokens can be continued, not of {given}")
        self.tokens_BS.zero_()
        self.tokens_BS[:, :given] = prompts_BL
        self._prefill(given - 1)
        self.place_1.fill_(given - 1)
        for _ in range(given, len(self.places_S)):
            self._step()
        return self.tokens_BS.clone()

    def _prefill(self, count: int) -> None:
        """Keys and values of the first `count` places."""

        def keeping(layer: int) -> Attention:
            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                self.kv[layer, 0, :, :, :count], self.kv[layer, 1, :, :, :count] = k, v
                return causal(q, k, v)

            return attend

        self._layers(self.tokens_BS[:, :count], self.cos_SR[:count], self.sin_SR[:count], keeping)

    def _step(self) -> None:
        """Read the token at `place_1`, write its successor, move on. Nothing here depends on the host."""
        visible_S = self.places_S <= self.place_1

        def cached(layer: int) -> Attention:
            def attend(q_BHSK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> Tensor:
                keys, values = self.kv[layer, 0], self.kv[layer, 1]
                keys.index_copy_(2, self.place_1, k_BGSK)
                values.index_copy_(2, self.place_1, v_BGSK)
                heads, kv_heads, width = self.shape
                grouped = q_BHSK.reshape(len(q_BHSK), kv_heads, heads // kv_heads, width)
                scores = (grouped @ keys.transpose(2, 3)).float() * width**-0.5
                weights = scores.masked_fill(~visible_S, -torch.inf).softmax(-1).to(values.dtype)
                return (weights @ values).reshape(q_BHSK.shape)

            return attend

        token_B1 = self.tokens_BS.index_select(1, self.place_1)
        angles = self.cos_SR.index_select(0, self.place_1), self.sin_SR.index_select(0, self.place_1)
        logits_BW = F.linear(self._layers(token_B1, *angles, cached)[:, 0], self.head_WD).float()
        noise_BW = -torch.empty_like(logits_BW).exponential_(generator=self.generator).log()
        chosen_B = (logits_BW + self.temperatures_B1 * noise_BW).argmax(-1)
        self.place_1 += 1
        self.tokens_BS.index_copy_(1, self.place_1, chosen_B[:, None])

    def _layers(
        self, tokens_BS: Tensor, cos_SR: Tensor, sin_SR: Tensor, attention: Callable[[int], Attention]
    ) -> Tensor:
        eps = self.model.config.rms_norm_eps
        x_BSD = F.embedding(tokens_BS, self.embedding_WD)
        for number, weights in enumerate(self.weights):
            x_BSD = block(x_BSD, cos_SR, sin_SR, tuple(weights), self.shape, eps, attention(number))  # type: ignore[arg-type]
        return F.rms_norm(x_BSD, (self.model.hidden_size,), self.norm_D, eps)
