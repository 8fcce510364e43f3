"""The tokenizer inside a GGUF file, rebuilt with the `tokenizers` library.

Two kinds are read: byte-level BPE ("gpt2") with the splitting rule that `tokenizer.ggml.pre` names, and SentencePiece-like ones ("llama"),
whose merges are those of every token into two others, in the order of the tokens' scores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from wager.errors import CheckpointError
from wager.models.formats.gguf import GGUFCheckpoint

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # how text is cut before merges, by the name of tokenizer.ggml.pre; None: GPT-2's own rule
    "gpt-2": None, "default": None, "gpt2": None,
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe"), _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL),
}  # fmt: skip


def read_tokenizer(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any], dict[str, Any]]:
    """(tokenizer, what tokenizer_config.json would say, what generation_config.json would say). Raises CheckpointError naming an unknown kind."""
    file = GGUFCheckpoint(path)
    tokens = file.field("tokenizer.ggml.tokens")
    kind = file.field("tokenizer.ggml.model")
    if not tokens or kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{path} has a tokenizer of kind {kind!r}; gpt2 and llama are read: name a tokenizer directory with tokenizer=..., or pass "
            "token ids with skip_tokenizer_init=True"
        )
    types = file.field("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    backend = (_byte_level if kind == "gpt2" else _sentence_piece)(file, tokens, types)
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, y in zip(tokens, types, strict=True) if y == CONTROL]
    )
    backend.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t, y in zip(tokens, types, strict=True) if y == USER]
    )
    named = {name: file.field(f"tokenizer.ggml.{key}_token_id") for name, key in _NAMED.items()}
    config: dict[str, Any] = {
        name: tokens[int(i)] for name, i in named.items() if i is not None and 0 <= int(i) < len(tokens)
    }
    template = file.field("tokenizer.chat_template")
    if template:
        config["chat_template"] = template
    _post_process(backend, file, tokens, kind, config)
    return backend, config, file.generation_config()


_NAMED = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def _byte_level(file: GGUFCheckpoint, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    split = file.field("tokenizer.ggml.pre", "default")
    if split not in SPLITS:
        raise CheckpointError(
            f"{file.path} cuts text by the rule {split!r}, which is not known ({', '.join(SPLITS)} are); name a tokenizer directory with tokenizer=..."
        )
    merges = [tuple(m.split(" ", 1)) for m in file.field("tokenizer.ggml.merges") or []]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges="llama" in split))
    if SPLITS[split] is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLITS[split]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(file: GGUFCheckpoint, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    scores = file.field("tokenizer.ggml.scores")
    if not scores:
        raise CheckpointError(f"{file.path} lacks tokenizer.ggml.scores; convert it again")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges: list[tuple[float, int, int, str, str]] = []
    for token, kind in zip(tokens, types, strict=True):
        if kind not in (NORMAL, USER):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[vocabulary[token]], vocabulary[left], vocabulary[right], left, right))
    merges.sort(key=lambda m: m[:3])
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    fallback = BYTE in types
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, [m[3:] for m in merges], unk_token=unknown, fuse_unk=True, byte_fallback=fallback)
    )
    prefix = file.field("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*undo, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return backend


def _post_process(
    backend: tokenizers.Tokenizer, file: GGUFCheckpoint, tokens: list[str], kind: str, config: dict[str, Any]
) -> None:
    """Beginning and end tokens around every text, where the file asks for them."""
    begin = file.field("tokenizer.ggml.add_bos_token", kind == "llama") and config.get("bos_token")
    end = file.field("tokenizer.ggml.add_eos_token", False) and config.get("eos_token")
    around = [(t, backend.token_to_id(t)) for t in (begin, end) if t]
    if around:
        single = " ".join(filter(None, [begin or "", "$A", end or ""]))
        pair = f"{single} " + " ".join(filter(None, [f"{begin}:1" if begin else "", "$B:1", f"{end}:1" if end else ""]))
        backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=around)
