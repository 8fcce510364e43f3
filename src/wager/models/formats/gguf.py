"""GGUF files (llama.cpp's) as checkpoints: metadata becomes a config.json, tensors go by their Hugging Face names.

F32, F16, BF16, Q8_0, Q4_0, Q4_K and Q6_K are read; the `gguf` package parses. Tensors are views of the mapped file until they are packed.
llama.cpp stores Llama's query and key rows interleaved for its rotation, and Gemma's norms with the one added; both are undone here.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wager.errors import CheckpointError
from wager.kernels.quantize import QuantizedWeight
from wager.models.formats import blocks

log = logging.getLogger(__name__)

ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
OF_BLOCK = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up", "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GGUFCheckpoint:
    """A GGUF file's metadata and tensors. Raises CheckpointError for a missing `gguf` package, a damaged file or an unknown architecture."""

    def __init__(self, path: Path):
        self.path = path
        try:
            from gguf import GGUFReader
        except ImportError:
            raise CheckpointError(f"{path} needs the gguf package: pip install 'wager[gguf]'") from None
        try:
            self._reader = GGUFReader(path)
            self._tensors = {t.name: t for t in self._reader.tensors}
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise CheckpointError(f"{path} is no readable GGUF file: {error}; download it again") from None
        self.kind = self.field("general.architecture")
        if self.kind not in ARCHITECTURES:
            raise CheckpointError(
                f"{path} is of architecture {self.kind!r}; GGUF files are read for {', '.join(ARCHITECTURES)}: "
                "use the model's safetensors checkpoint"
            )
        if "token_embd.weight" not in self._tensors:
            raise CheckpointError(f"{path} has no tensor 'token_embd.weight'; download it again")
        self._warned: set[str] = set()

    def field(self, key: str, default: Any = None) -> Any:
        """A value of the metadata."""
        found = self._reader.fields.get(key)
        return default if found is None else found.contents()

    def own(self, key: str, default: Any = None) -> Any:
        """A value under the architecture's name."""
        return self.field(f"{self.kind}.{key}", default)

    def need(self, key: str) -> Any:
        value = self.own(key)
        if value is None:
            raise CheckpointError(f"{self.path} lacks the field {self.kind}.{key}; convert it again")
        return value

    def __contains__(self, name: str) -> bool:
        return self._name(name) in self._tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def raw_tensor(self, name: str) -> np.ndarray | None:
        """A float tensor by its GGUF name; None if there is none."""
        return None if name not in self._tensors else np.asarray(self._tensors[name].data, dtype=np.float32)

    def tensor(self, name: str) -> Tensor | QuantizedWeight:
        """A tensor by its Hugging Face name, quantised ones in their codes. Raises CheckpointError naming a missing tensor or a block type."""
        theirs = self._name(name)
        if theirs not in self._tensors:
            raise CheckpointError(f"tensor {theirs!r} ({name}) is missing from {self.path}")
        found = self._tensors[theirs]
        kind = found.tensor_type.name
        if kind in PLAIN:
            shape = [int(n) for n in reversed(found.shape)]
            values = torch.from_numpy(np.array(found.data, copy=True)).view(PLAIN[kind]).reshape(shape)
        elif kind in blocks.BLOCK_BYTES:
            values = blocks.decode(kind, np.asarray(found.data).reshape(int(found.shape[-1]), -1))
            self._say(kind)
        else:
            raise CheckpointError(
                f"tensor {theirs!r} of {self.path} is {kind}, which is not read; use a file in "
                f"{', '.join([*PLAIN, *blocks.BLOCK_BYTES])}"
            )
        return self._as_trained(name, values)

    def _say(self, kind: str) -> None:
        if kind in blocks.INEXACT and kind not in self._warned:
            self._warned.add(kind)
            log.info("%s: %s", self.path.name, blocks.INEXACT[kind])

    def _name(self, name: str) -> str:
        stem, _, suffix = name.rpartition(".")
        if stem in WHOLE:
            return f"{WHOLE[stem]}.{suffix}"
        parts = stem.split(".", 3)
        if len(parts) != 4 or parts[:2] != ["model", "layers"]:
            return name
        gemma = self.kind.startswith("gemma")
        second = {"post_attention_layernorm": "post_attention_norm" if gemma else "ffn_norm"}
        inner = {**OF_BLOCK, **second}.get(parts[3], parts[3])
        return f"blk.{parts[2]}.{inner}.{suffix}"

    def _as_trained(self, name: str, values: Any) -> Any:
        """Undo what the converter did to Llama's query and key rows and to Gemma's norms."""
        if self.kind == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = self.need("attention.head_count")
            if ".k_proj." in name:
                heads = self.own("attention.head_count_kv", heads)
            rows = torch.arange(values.shape[0]).view(heads, -1, 2).transpose(1, 2).reshape(-1)
            return values[rows]
        if self.kind.startswith("gemma") and "norm" in name:
            return values.float() - 1
        return values

    def __enter__(self) -> GGUFCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        """The file stays mapped while tensors refer to it."""

    def config(self) -> dict[str, Any]:
        """What config.json would say."""
        model_type, architecture = ARCHITECTURES[self.kind]
        heads, hidden = self.need("attention.head_count"), self.need("embedding_length")
        if isinstance(heads, list) or isinstance(self.own("attention.head_count_kv"), list):
            raise CheckpointError(f"{self.path} has layers with different numbers of heads, which is not supported")
        head_dim = self.own("attention.key_length", hidden // heads)
        raw = {
            "architectures": [architecture],
            "model_type": model_type,
            "vocab_size": int(self._tensors["token_embd.weight"].shape[-1]),
            "hidden_size": hidden,
            "intermediate_size": self.need("feed_forward_length"),
            "num_hidden_layers": self.need("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.own("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": self.need("context_length"),
            "rms_norm_eps": self.need("attention.layer_norm_rms_epsilon"),
            "rope_theta": self.own("rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": "blk.0.attn_q.bias" in self._tensors and "blk.0.attn_output.bias" in self._tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self._tensors,
            "hidden_act": "gelu_pytorch_tanh" if self.kind.startswith("gemma") else "silu",
            "dtype": "bfloat16",
        }
        turned = self.own("rope.dimension_count", head_dim)
        if turned != head_dim:
            raw["partial_rotary_factor"] = turned / head_dim
        if self.own("attention.sliding_window"):
            raw["sliding_window"] = self.own("attention.sliding_window")
        return raw | (self._gemma(raw) if self.kind.startswith("gemma") else {})

    def _gemma(self, raw: dict[str, Any]) -> dict[str, Any]:
        # The largest models of both generations scale scores by hidden / heads; files do not say so.
        largest = raw["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[self.kind]
        return {
            "query_pre_attn_scalar": raw["hidden_size"] // raw["num_attention_heads"] if largest else raw["head_dim"],
            "attn_logit_softcapping": self.own("attn_logit_softcapping"),
            "final_logit_softcapping": self.own("final_logit_softcapping"),
        }

    def _rope_scaling(self) -> dict[str, Any]:
        """Stretched rotation: by rule (linear, yarn), or by a factor per pair that the file lists (Llama 3, LongRoPE)."""
        original = self.own("rope.scaling.original_context_length", self.need("context_length"))
        same, longer, shorter = (
            self.raw_tensor(f"{n}.weight") for n in ("rope_freqs", "rope_factors_long", "rope_factors_short")
        )
        if same is not None:
            longer = shorter = same
        if longer is not None and shorter is not None:
            factor = 1.0 if same is not None else self.own("rope.scaling.attn_factor", 1.0)
            return {
                "rope_type": "longrope", "long_factor": longer.tolist(), "short_factor": shorter.tolist(),
                "attention_factor": factor, "original_max_position_embeddings": original,
            }  # fmt: skip
        kind = self.own("rope.scaling.type", "none")
        if kind == "none":
            return {}
        if kind not in ("linear", "yarn"):
            raise CheckpointError(f"{self.path} stretches its rotation by {kind!r}; linear and yarn are supported")
        return {
            "rope_type": kind,
            "factor": self.need("rope.scaling.factor"),
            "original_max_position_embeddings": original,
        }

    def generation_config(self) -> dict[str, Any]:
        """The tokens that end a generation."""
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        ids = [self.field(f"tokenizer.ggml.{key}") for key in keys]
        return (
            {"eos_token_id": sorted({int(i) for i in ids if i is not None})} if any(i is not None for i in ids) else {}
        )
