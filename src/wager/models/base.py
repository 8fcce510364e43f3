"""The contract between a network and whatever runs it.

A model never sees a cache, a batch or a request. It maps T tokens with explicit positions to T hidden rows and, in each
layer, hands its queries, keys and values to `attend`. The engine passes a paged attention over ragged spans with ancestor
masks, training passes plain causal attention, a sparse program wraps either of them.

Shape legend: T tokens, D hidden size, H query heads, G key/value heads, K key width of a head, V value width of a head,
R rows whose logits are wanted, W vocabulary size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionSpec:
    """What one layer needs from `attend`.

    Attributes:
        num_heads: H, query heads.
        num_kv_heads: G, key/value heads; H is a multiple of G.
        key_dim: K, width of a query and a key.
        value_dim: V, width of a value and of an output head.
        scale: factor on the scores before the softmax.
        window: sliding window in tokens, the query's own position included; None is full causal attention.
        softcap: c in c * tanh(score / c); None is no cap.
        value_from_key: the value is the first `value_dim` columns of the key (latent attention); no V pool is kept.
    """

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    value_from_key: bool = False


class Attend(Protocol):
    """Attention as the model sees it: remembers the new keys and values, returns the attended values.

    `v_TGV` is None exactly when the layer's spec says `value_from_key`.
    """

    def __call__(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor | None) -> Tensor: ...


class RotatingAttend(Protocol):
    """An `attend` that can rotate queries and keys itself, on the keys' way into its cache; it has an attribute `rotating` of this kind.

    None where it would rather be given rotated ones.
    """

    def __call__(
        self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, cos_TR: Tensor, sin_TR: Tensor
    ) -> Tensor: ...


class Adapters(Protocol):
    """Per-token low-rank updates of a batch. `name` is the linear's checkpoint path, e.g. `model.layers.0.self_attn.q_proj`.

    Adds the update to `y_TO` in place and returns it; a linear that no adapter of the batch touches is returned as it is.
    """

    def __call__(self, name: str, x_TI: Tensor, y_TO: Tensor) -> Tensor: ...


class Model(nn.Module):
    """A decoder-only network.

    Attributes:
        attention: one spec per layer, in layer order.
        vocab_size: W, rows of the output head.
        hidden_size: D.
        max_positions: longest position the checkpoint is meant for.
    """

    attention: tuple[AttentionSpec, ...]
    vocab_size: int
    hidden_size: int
    max_positions: int

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, attend: Attend, adapters: Adapters | None = None
    ) -> Tensor:
        """Hidden rows after the final norm, [T, D]. `tokens_T` and `positions_T` are int64."""
        raise NotImplementedError

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """float32 logits [R, W], with the family's scaling and cap applied."""
        raise NotImplementedError

    @classmethod
    def from_checkpoint(cls, raw: dict[str, Any], dtype: torch.dtype) -> Model:
        """An empty model for a config.json, its weights to be filled in."""
        raise NotImplementedError

    def checkpoint_tensor(self, name: str, checkpoint: Any) -> Tensor:
        """The tensor that belongs to our parameter `name` (a path plus ".weight" or ".bias").

        `checkpoint.tensor(name)` reads one; families whose files use other names or layouts translate here.
        """
        return checkpoint.tensor(name)

    def prepack(self, quantization: str | None = None) -> None:
        """Hand every linear's weight to the kernels, one tensor at a time. The model cannot be trained afterwards."""
        for module in self.modules():
            prepack = getattr(module, "prepack", None)
            if module is not self and prepack is not None:
                prepack(quantization)

    @property
    def asks_the_device(self) -> bool:
        """Whether a forward waits for numbers from the device, as no CUDA graph can; modules say so by an attribute of this name."""
        return any(getattr(m, "asks_the_device", False) for m in self.modules() if m is not self)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, in which keys and values are cached too."""
        return next(iter(self.parameters())).dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters())).device
