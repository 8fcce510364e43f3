"""Write the model of the serving benchmarks: Llama layout, 100 M random parameters, bfloat16, with a byte-level BPE tokenizer.

    python -m benchmarks.serve.llama_100m DIRECTORY [--tiny]

Random weights cost the same time as trained ones. The tokenizer's merges are made up, so that ids decode to text of ordinary length.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

FULL = dict(
    vocab_size=32_000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
TINY = FULL | dict(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
LONGEST_TOKEN = 8


def ensure(directory: Path, tiny: bool = False) -> Path:
    """The checkpoint at `directory`, written if it is not there."""
    if not (directory / "tokenizer.json").exists():
        write_checkpoint(directory, TINY if tiny else FULL)
        write_tokenizer(directory, (TINY if tiny else FULL)["vocab_size"])
    return directory


def write_checkpoint(directory: Path, shape: dict, seed: int = 0) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=None, eos_token_id=0))
    model.bfloat16().save_pretrained(directory)


def write_tokenizer(directory: Path, vocab_size: int, seed: int = 0) -> None:
    """Byte-level BPE: the 256 bytes, an end token with id 0, and random merges of known tokens up to `vocab_size`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    rng = np.random.default_rng(seed)
    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    known, merges = set(tokens), []
    while len(tokens) < vocab_size:
        left, right = (tokens[i] for i in rng.integers(1, len(tokens), 2))
        if len(left + right) <= LONGEST_TOKEN and left + right not in known:
            merges.append((left, right))
            tokens.append(left + right)
            known.add(left + right)
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a toy of the same layout")
    chosen = parser.parse_args()
    print(ensure(chosen.directory, chosen.tiny))
