"""Two tokenizers of the kinds found in checkpoints, trained on a few lines: byte-level BPE, and SentencePiece-like with byte fallback."""

from functools import cache
from pathlib import Path

from tests.serve.conftest import CORPUS
from wager.serve.text.tokenizer import Tokenizer


def byte_level():
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=["<eos>", "<bos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["<tool>"])
    return backend


def sentencepiece_like():
    """Llama 2's layout: ▁ for spaces, <0xNN> for bytes outside the vocabulary, the first space stripped."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    pieces = ["<unk>", "<bos>", "<eos>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyzTH,.!"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("o", "u"), ("T", "he"), ("▁", "The"), ("▁", "H")]
    pieces += ["".join(pair) for pair in merges] + ["é", "你"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<bos>", "<eos>"])
    return backend


@cache
def make(kind: str) -> Tokenizer:
    backend = byte_level() if kind == "byte-level" else sentencepiece_like()
    return Tokenizer(
        backend, {"eos_token": "<eos>", "bos_token": "<bos>"}, frozenset({backend.token_to_id("<eos>")}), None
    )


def save(kind: str, directory: Path, config: str = "{}", generation: str | None = None) -> Path:
    make(kind)._backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(config)
    if generation is not None:
        (directory / "generation_config.json").write_text(generation)
    return directory
