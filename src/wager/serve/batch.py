"""One step of the model: spans of tokens of many requests in one ragged batch.

Shape legend: T tokens of the batch, R spans, B blocks of the longest table, L rows whose logits are wanted, P words of a mask row.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from wager.models.base import Adapters
from wager.serve.token_tree import TokenTree


@dataclass(frozen=True)
class Span:
    """Consecutive rows [start, start + length) of the batch that belong to the sequence `seq` of the block manager.

    Row i of a prefill chunk or decode token sits at position context + i. With a `tree`, the last len(tree) + 1 rows are the
    committed token and the guessed nodes below it, at positions context + length - len(tree) - 1 + depth.
    `logit_rows` rows of the batch's logits starting at `logit_start` are this span's, its last rows in order.
    """

    seq: str
    start: int
    length: int
    context: int
    tree: TokenTree | None = None
    logit_start: int = 0
    logit_rows: int = 0


@dataclass(frozen=True)
class KVTables:
    """Where one group of layers finds its keys and values.

    slots_T: int64, the pool row each batch token writes (-1 writes nothing). tables_RB: int32 block numbers of each span's request,
    padded with -1; position p of the request lives in pool row table[p // block_size] * block_size + p % block_size.
    """

    slots_T: Tensor
    tables_RB: Tensor


@dataclass(frozen=True)
class Batch:
    """Arrays the model runner consumes.

    tokens_T, positions_T: int64. span_starts: int32 [R + 1]. contexts_R: int32, cached tokens before each span; every row of a span sees
    them all (within the layer's window). mask_TP: int64 words, bit j of a row says it sees row j of its own span; None means causal for
    all spans. logit_rows_L: int64 rows of the batch, grouped by span. groups: one KVTables per KV group. spans_T: int32, the span
    of each token, where a GPU needs it. staged: the padded batch of which this is a part and which a CUDA graph reads.
    """

    spans: tuple[Span, ...]
    tokens_T: Tensor
    positions_T: Tensor
    span_starts: Tensor
    contexts_R: Tensor
    groups: tuple[KVTables, ...]
    logit_rows_L: Tensor
    mask_TP: Tensor | None = None
    adapters: Adapters | None = None
    spans_T: Tensor | None = None
    staged: Batch | None = None

    @property
    def num_tokens(self) -> int:
        return self.tokens_T.shape[0]
