"""The corpus as token arrays on disk: one training stream, and one held-out stream per domain."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers

from wager.models.demo.corpus import DOMAINS, Document
from wager.models.demo.tokenizer import END_OF_TEXT


def write_streams(
    corpus: Iterable[Document], tokenizer: tokenizers.Tokenizer, out: Path, seed: int = 0
) -> dict[str, int]:
    """Tokenise everything into `out`; documents are shuffled and end with <|endoftext|>. Returns the tokens of each stream."""
    kept, held = [], {domain: [] for domain in DOMAINS}
    end = np.array([tokenizer.token_to_id(END_OF_TEXT)], dtype=np.uint16)
    documents = list(corpus)
    for document, encoding in zip(documents, tokenizer.encode_batch_fast([d.text for d in documents]), strict=True):
        ids = np.concatenate((np.array(encoding.ids, dtype=np.uint16), end))
        (held[document.domain] if document.held_out else kept).append(ids)
    order = np.random.default_rng(seed).permutation(len(kept))
    sizes = {"train": _save(out / "train.npy", [kept[i] for i in order])}
    for domain, parts in held.items():
        if parts:
            sizes[domain] = _save(out / f"heldout-{domain}.npy", parts)
    return sizes


def _save(path: Path, parts: list[np.ndarray]) -> int:
    stream = np.concatenate(parts)
    np.save(path, stream)
    return len(stream)


class Batches:
    """Windows of the training stream, every one seen once an epoch in a new order; rank r of n takes every n-th."""

    def __init__(self, file: Path, window: int, rank: int = 0, ranks: int = 1, seed: int = 0):
        self._stream = np.load(file, mmap_mode="r")
        self._window, self._rank, self._ranks, self._seed = window, rank, ranks, seed
        self.windows = (len(self._stream) - 1) // window
        if self.windows < ranks:
            raise ValueError(f"{file} holds {len(self._stream)} tokens, fewer than {ranks} windows of {window}")

    def window(self, number: int) -> np.ndarray:
        """The number-th window of this rank, [window + 1] tokens: inputs and their successors."""
        epoch, place = divmod(number * self._ranks + self._rank, self.windows)
        start = int(np.random.default_rng((self._seed, epoch)).permutation(self.windows)[place]) * self._window
        return self._stream[start : start + self._window + 1].astype(np.int64)
