"""CUDA graphs of decode steps: the launches of a whole model as one, replayed over buffers that keep their place.

Only batches in which every span is one plain token qualify: then shapes depend on the number of tokens alone, which is rounded up to a
bucket, and on the width of the block tables, rounded likewise. Added rows write no keys (slot -1) and attend to block 0, whose values reach
no row that is read. Everything else runs without a graph.

Shape legend: T tokens, R spans, B blocks of a table row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wager.serve.batch import Batch, KVTables

BUCKETS = (1, 2, 4, 8, *range(16, 257, 16))


def bucket_of(tokens: int) -> int | None:
    """The smallest bucket that holds so many tokens; None above the largest."""
    return next((b for b in BUCKETS if b >= tokens), None)


def width_bucket(width: int) -> int:
    """Tables grow with their requests: the next power of two, so that a request meets few widths in its life."""
    return 1 << max(0, width - 1).bit_length()


def qualifies(batch: Batch) -> bool:
    """Whether each span is one token that sees its whole past, without adapters."""
    plain = batch.mask_TP is None and batch.adapters is None
    return plain and 0 < batch.num_tokens == len(batch.spans) and bucket_of(batch.num_tokens) is not None


def padded(batch: Batch, rows: int) -> Batch:
    """The batch with spans of one token added up to `rows`, and tables widened to their bucket."""
    more, device = rows - batch.num_tokens, batch.tokens_T.device

    def longer(x: Tensor, value: int) -> Tensor:
        return torch.cat((x, x.new_full((more, *x.shape[1:]), value)))

    def tables(group: KVTables) -> KVTables:
        width = width_bucket(group.tables_RB.shape[1])
        wide = torch.nn.functional.pad(group.tables_RB, (0, width - group.tables_RB.shape[1]), value=-1)
        return KVTables(longer(group.slots_T, -1), longer(wide, 0))

    return replace(
        batch,
        tokens_T=longer(batch.tokens_T, 0),
        positions_T=longer(batch.positions_T, 0),
        span_starts=torch.arange(rows + 1, dtype=torch.int32, device=device),
        contexts_R=longer(batch.contexts_R, 0),
        groups=tuple(tables(g) for g in batch.groups),
    )


def _buffers(batch: Batch) -> list[Tensor]:
    """What a replay reads; span starts never change within a bucket."""
    fixed = [batch.tokens_T, batch.positions_T, batch.contexts_R]
    return fixed + [t for g in batch.groups for t in (g.slots_T, g.tables_RB)]


@dataclass
class Recording:
    """The batch whose buffers a graph reads, its output, and how to run it again."""

    batch: Batch
    hidden_TD: Tensor
    replay: Callable[[], None]

    def run(self, batch: Batch) -> Tensor:
        for place, value in zip(_buffers(self.batch), _buffers(batch), strict=True):
            place.copy_(value)
        self.replay()
        return self.hidden_TD


class DecodeGraphs:
    """`graphs(batch)`: the hidden rows of a decode step. `record(forward, batch)` captures a forward; a test can give its own."""

    def __init__(
        self,
        forward: Callable[[Batch], Tensor],
        record: Callable[[Callable[[Batch], Tensor], Batch], Recording] | None = None,
    ):
        self.forward, self.record = forward, record or record_cuda
        self.recordings: dict[tuple[int, ...], Recording] = {}

    def __call__(self, batch: Batch) -> Tensor:
        if not qualifies(batch):
            return self.forward(batch)
        rows = bucket_of(batch.num_tokens)
        assert rows is not None
        whole = padded(batch, rows)
        key = (rows, *(g.tables_RB.shape[1] for g in whole.groups))
        if key not in self.recordings:
            self.recordings[key] = self.record(self.forward, whole)
        return self.recordings[key].run(whole)[: batch.num_tokens]


def record_cuda(forward: Callable[[Batch], Tensor], batch: Batch) -> Recording:
    """Capture `forward`; warm-up on a side stream first, as captures need. Keys are written where the batch says, which is where they go."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            forward(batch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden_TD = forward(batch)
    return Recording(batch, hidden_TD, graph.replay)
