"""GGUF files of random weights, written with the `gguf` package: for comparisons with llama.cpp and for tests of our reader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BYTE_TOKENS = 256


def llama_config(
    hidden: int, layers: int, heads: int, kv_heads: int, width: int, vocab: int, **more: Any
) -> dict[str, Any]:
    """The fields of config.json that a file needs."""
    return {
        "arch": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": width, "vocab_size": vocab, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "head_dim": hidden // heads, **more,
    }  # fmt: skip


LLAMA_100M = llama_config(768, 12, 12, 4, 2048, 32000)
LLAMA_500M = llama_config(1536, 20, 12, 4, 4096, 32000)


def tensors(config: dict[str, Any], rng: np.random.Generator, std: float = 0.02) -> Iterator[tuple[str, np.ndarray]]:
    """(GGUF name, float32 values) of every tensor of a Llama-like model; one-dimensional ones are norms and biases."""
    hidden, width, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    normal = lambda *shape: (rng.standard_normal(shape, dtype=np.float32) * std).astype(np.float32)
    norm = lambda size: (1 + 0.1 * rng.standard_normal(size, dtype=np.float32)).astype(np.float32)
    yield "token_embd.weight", normal(config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        block = f"blk.{i}"
        yield f"{block}.attn_norm.weight", norm(hidden)
        for name, rows in (("attn_q", query), ("attn_k", key), ("attn_v", key)):
            yield f"{block}.{name}.weight", normal(rows, hidden)
            if config["arch"] == "qwen2":
                yield f"{block}.{name}.bias", normal(rows)
        if config["arch"] == "qwen3":
            yield f"{block}.attn_q_norm.weight", norm(head)
            yield f"{block}.attn_k_norm.weight", norm(head)
        yield f"{block}.attn_output.weight", normal(hidden, query)
        yield f"{block}.ffn_norm.weight", norm(hidden)
        yield f"{block}.ffn_gate.weight", normal(width, hidden)
        yield f"{block}.ffn_up.weight", normal(width, hidden)
        yield f"{block}.ffn_down.weight", normal(hidden, width)
    yield "output_norm.weight", norm(hidden)
    if not config.get("tied"):
        yield "output.weight", normal(config["vocab_size"], hidden)


def random_blocks(kind: str, rows: int, inputs: int, rng: np.random.Generator, std: float = 0.02) -> np.ndarray:
    """Random K-quant blocks [rows, bytes] whose values are about `std`; the package does not quantise to them."""
    size, scale_at = {"Q4_K": (144, (0, 2)), "Q6_K": (210, (208,))}[kind]
    blocks = rng.integers(0, 256, (rows, inputs // 256, size), dtype=np.uint8)
    for at in scale_at:
        d = (std / (32 * 8 if kind == "Q4_K" else 64 * 16) * (0.5 + rng.random(blocks.shape[:2]))).astype(np.float16)
        blocks[..., at : at + 2] = d[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def write(
    path: Path, config: dict[str, Any], kind: str, seed: int = 0, std: float = 0.02, kinds: dict[str, str] | None = None
) -> Path:
    """A file whose matrices are of `kind`; `kinds` says otherwise for tensors whose name ends so."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    rng = np.random.default_rng(seed)
    writer = GGUFWriter(str(path), config["arch"])
    _metadata(writer, config)
    for name, values in tensors(config, rng, std):
        wanted = next((k for end, k in (kinds or {}).items() if name.endswith(end)), kind)
        wanted = "F32" if values.ndim == 1 else wanted
        of = GGMLQuantizationType[wanted]
        if wanted in ("Q4_K", "Q6_K"):
            writer.add_tensor(name, random_blocks(wanted, values.shape[0], values.shape[1], rng, std), raw_dtype=of)
        elif wanted in ("F32", "F16"):
            writer.add_tensor(name, values.astype(np.float32 if wanted == "F32" else np.float16))
        else:
            writer.add_tensor(name, quantize(values, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    _tokenizer(writer, config["vocab_size"])


def _tokenizer(writer: Any, vocab: int) -> None:
    """A SentencePiece-like vocabulary: three special tokens, the bytes, and names."""
    special = ["<unk>", "<s>", "</s>"][:vocab]
    bytes_ = [f"<0x{b:02X}>" for b in range(BYTE_TOKENS)][: vocab - len(special)]
    words = [f"▁w{i}" for i in range(vocab - len(special) - len(bytes_))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(special + bytes_ + words)
    writer.add_token_scores([0.0] * (len(special) + len(bytes_)) + [-float(i + 1) for i in range(len(words))])
    writer.add_token_types([2, 3, 3][: len(special)] + [6] * len(bytes_) + [1] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
