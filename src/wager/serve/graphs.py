"""CUDA graphs of decode steps: the launches of a whole model as one, replayed over buffers that keep their place.

Only batches in which every span is one plain token qualify: then shapes depend on the number of tokens alone, which is rounded up to a
bucket, and on the width of the block tables, rounded likewise. Added rows write no keys (slot -1) and attend to block 0, whose values reach
no row that is read. Everything else runs without a graph.

A step's arrays are laid out in one block of pinned memory and reach the device in one copy, at the place where the graph of their bucket
reads them. The graph ends with the logits, so that beside the replay a step launches little more than the choice of tokens.

Shape legend: T tokens, R spans, B blocks of a table row, D hidden size, W vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wager.serve.batch import Batch, KVTables, Span

log = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, *range(16, 257, 16))
NARROWEST = 16  # blocks of a table
ALIGN = 16  # bytes, for the kernels' wide loads
Table = tuple[np.ndarray, np.ndarray]  # int64 [T] slots, int32 [R, B] block numbers
Record = Callable[[Callable[[Batch], tuple[Tensor, Tensor]], Batch], "Recording"]


def bucket_of(tokens: int) -> int | None:
    """The smallest bucket that holds so many tokens; None above the largest."""
    return next((b for b in BUCKETS if b >= tokens), None)


def width_bucket(width: int) -> int:
    """Tables grow with their requests: the next power of two, so that a request meets few widths in its life."""
    return max(NARROWEST, 1 << max(0, width - 1).bit_length())


@dataclass(frozen=True)
class Recording:
    """What a graph leaves behind, and how to run it again over its batch."""

    hidden_TD: Tensor
    logits_TW: Tensor
    replay: Callable[[], Any]


class Stage:
    """The arrays of one bucket, on the host and on the device, and the batch made of those on the device."""

    def __init__(self, rows: int, widths: Sequence[int], device: torch.device):
        tables = [part for width in widths for part in ((torch.int64, (rows,)), (torch.int32, (rows, width)))]
        fields = [(torch.int64, (rows,)), (torch.int64, (rows,)), (torch.int32, (rows,)), *tables]
        places, size = [], 0
        for dtype, shape in fields:
            places.append(size)
            size += -(-dtype.itemsize * int(np.prod(shape)) // ALIGN) * ALIGN
        self.on_gpu = device.type == "cuda"
        self.host = torch.zeros(size, dtype=torch.uint8, pin_memory=self.on_gpu)
        self.there = torch.zeros(size, dtype=torch.uint8, device=device)
        self.copied = torch.cuda.Event() if self.on_gpu else None

        def views(block: Tensor) -> list[Tensor]:
            spots = zip(fields, places, strict=True)
            return [block[p : p + t.itemsize * int(np.prod(s))].view(t).view(s) for (t, s), p in spots]

        self.arrays = [view.numpy() for view in views(self.host)]
        tokens, positions, contexts, *rest = views(self.there)
        every_row = torch.arange(rows + 1, dtype=torch.int32, device=device)
        groups = tuple(KVTables(rest[i], rest[i + 1]) for i in range(0, len(rest), 2))
        rows_T = torch.arange(rows, device=device)
        self.batch = Batch((), tokens, positions, every_row, contexts, groups, rows_T, spans_T=every_row[:rows])

    def fill(self, tokens: np.ndarray, contexts: np.ndarray, tables: Sequence[Table]) -> None:
        """Lay the step's values out and send them; rows beyond them are made harmless."""
        if self.copied is not None:
            self.copied.synchronize()  # the last copy may not have read the host's block yet
        count = len(tokens)
        wide_tokens, positions, wide_contexts, *rest = self.arrays
        for place, values in ((wide_tokens, tokens), (positions, contexts), (wide_contexts, contexts)):
            place[:count], place[count:] = values, 0
        for i, (slots, rows) in enumerate(tables):
            wide_slots, wide_rows = rest[2 * i], rest[2 * i + 1]
            wide_slots[:count], wide_slots[count:] = slots, -1
            wide_rows[:count, : rows.shape[1]], wide_rows[:count, rows.shape[1] :] = rows, -1
            wide_rows[count:] = 0
        self.there.copy_(self.host, non_blocking=True)
        if self.copied is not None:
            self.copied.record()


class DecodeGraphs:
    """Makes batches of decode steps (`stage`), runs them (`graphs(batch)`: the hidden rows) and keeps the logits that came with them.

    `record(compute, batch)` captures `compute(batch) -> (hidden, logits)`; a test can give its own.
    """

    def __init__(
        self,
        forward: Callable[[Batch], Tensor],
        head: Callable[[Tensor], Tensor],
        device: torch.device,
        record: Record | None = None,
    ):
        self.forward, self.head, self.device = forward, head, device
        self.record: Record = record or CudaRecorder()
        self.stages: dict[tuple[int, ...], Stage] = {}
        self.recordings: dict[tuple[int, ...], Recording] = {}
        self.works = True
        self._made: tuple[Tensor, Tensor, Tensor] | None = None

    def stage(
        self, spans: tuple[Span, ...], tokens: np.ndarray, contexts: np.ndarray, tables: Sequence[Table]
    ) -> Batch | None:
        """The batch of a step in which every span is one token; None where there are too many or each step runs by itself.

        It is valid until the next one of its bucket is made.
        """
        rows = bucket_of(len(spans))
        if rows is None or not self.works:
            return None
        key = (rows, *(width_bucket(table.shape[1]) for _, table in tables))
        if key not in self.stages:
            self.stages[key] = Stage(rows, key[1:], self.device)
        stage, count = self.stages[key], len(spans)
        stage.fill(tokens, contexts, tables)
        whole = stage.batch
        wanted = [i for i, span in enumerate(spans) if span.logit_rows]
        chosen = whole.logit_rows_L[:count]
        return replace(
            whole,
            spans=spans,
            tokens_T=whole.tokens_T[:count],
            positions_T=whole.positions_T[:count],
            span_starts=whole.span_starts[: count + 1],
            contexts_R=whole.contexts_R[:count],
            groups=tuple(KVTables(g.slots_T[:count], g.tables_RB[:count]) for g in whole.groups),
            logit_rows_L=chosen if len(wanted) == count else torch.tensor(wanted, dtype=torch.int64).to(self.device),
            spans_T=None if whole.spans_T is None else whole.spans_T[:count],
            staged=whole,
        )

    def __call__(self, batch: Batch) -> Tensor:
        whole = batch.staged
        self._made = None
        if whole is None or not self.works:
            return self.forward(batch)
        key = (whole.num_tokens, *(g.tables_RB.shape[1] for g in whole.groups))
        if key not in self.recordings:
            try:
                self.recordings[key] = self.record(lambda b: self._compute(b), whole)
            except RuntimeError as error:
                self.works = False
                log.warning("decode steps of this model run without CUDA graphs and slower: %s", error)
                return self.forward(batch)
        recording = self.recordings[key]
        recording.replay()
        hidden_TD = recording.hidden_TD[: batch.num_tokens]
        self._made = (hidden_TD, batch.logit_rows_L, recording.logits_TW[: batch.num_tokens])
        return hidden_TD

    def logits(self, hidden_TD: Tensor, rows_L: Tensor) -> Tensor | None:
        """The logits of the last replay, if these are its hidden rows and all of them are wanted in order."""
        made = self._made
        every = made is not None and hidden_TD is made[0] and rows_L is made[1] and len(rows_L) == len(hidden_TD)
        return made[2] if made is not None and every else None

    def _compute(self, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden_TD = self.forward(batch)
        return hidden_TD, self.head(hidden_TD)


class CudaRecorder:
    """Captures with one pool of memory for all graphs: they run one at a time, and what one leaves is read before the next runs."""

    def __init__(self):
        self.pool: Any = None

    def __call__(self, compute: Callable[[Batch], tuple[Tensor, Tensor]], batch: Batch) -> Recording:
        """A first run on a side stream, as captures need: kernels are compiled then. It writes keys where the batch says, as the replay does."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute(batch)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            hidden_TD, logits_TW = compute(batch)
        return Recording(hidden_TD, logits_TW, graph.replay)
