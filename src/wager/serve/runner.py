"""Turns spans of tokens into one ragged batch and runs the model over it.

There is no prefill path and no decode path: a prompt chunk, one decode token and a token tree differ only in the arrays built here.
The target model and every draft model have a runner of their own, each over its own pool and block manager.

Shape legend: T tokens, R spans, B blocks of a table row, P mask words, D hidden size, L rows whose logits are wanted, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wager import kernels
from wager.models.base import Adapters, Attend, Model
from wager.serve.batch import Batch, KVTables, Span
from wager.serve.cache.block_manager import BlockManager
from wager.serve.cache.pool import KVPool, groups_for
from wager.serve.graphs import DecodeGraphs, Table
from wager.serve.planned import PlannedForward, plan
from wager.serve.token_tree import TokenTree, pack_bits


@dataclass(frozen=True)
class Growth:
    """Nodes of a tree that is computed bit by bit: `cached` rows of it already follow the context in the cache.

    depths: of the new nodes, 1 for children of the last committed token. visible: bool [n, cached + n], which tree rows each node sees.
    """

    cached: int
    depths: np.ndarray
    visible: np.ndarray


@dataclass(frozen=True)
class SpanInput:
    """Tokens of sequence `seq` to compute after its first `context` cached ones; `tree` hangs below the last of `tokens`.

    logit_rows: how many of the span's last rows want logits (all tree nodes and the committed token: len(tree) + 1).
    growth: the tokens are tree nodes themselves.
    """

    seq: str
    tokens: Sequence[int]
    context: int
    tree: TokenTree | None = None
    logit_rows: int = 0
    growth: Growth | None = None

    @property
    def length(self) -> int:
        return len(self.tokens) + (0 if self.tree is None else len(self.tree))


class PagedAttend:
    """The engine's `attend`: stores the new keys and values in the pool, then attends over the request's blocks."""

    def __init__(self, model: Model, pool: KVPool, group_of_layer: Sequence[int], block_size: int, batch: Batch):
        self.model, self.pool, self.group_of_layer = model, pool, group_of_layer
        self.block_size, self.batch = block_size, batch
        self.rotating = self._rotating if batch.tokens_T.device.type == "cuda" else None

    def _rotating(
        self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, cos_TR: Tensor, sin_TR: Tensor
    ) -> Tensor:
        k_pool, v_pool = self.pool.k[layer], self.pool.v[layer]
        assert v_pool is not None, f"layer {layer} keeps its values in the keys but was given values"
        slots_T = self.batch.groups[self.group_of_layer[layer]].slots_T
        turned_THK = kernels.rope_write(q_THK, k_TGK, v_TGV, cos_TR, sin_TR, k_pool, v_pool, slots_T)
        return self._attend(layer, turned_THK, k_pool, v_pool, None)

    def __call__(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor | None) -> Tensor:
        spec = self.model.attention[layer]
        k_pool, v_pool = self.pool.k[layer], self.pool.v[layer]
        if v_TGV is None:
            v_pool = k_pool[..., : spec.value_dim]
        else:
            assert v_pool is not None, f"layer {layer} keeps its values in the keys but was given values"
        slots_T = self.batch.groups[self.group_of_layer[layer]].slots_T
        return self._attend(layer, q_THK, k_pool, v_pool, (k_TGK, v_TGV, slots_T))

    def _attend(
        self,
        layer: int,
        q_THK: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        new: tuple[Tensor, Tensor | None, Tensor] | None,
    ) -> Tensor:
        spec, batch = self.model.attention[layer], self.batch
        tables = batch.groups[self.group_of_layer[layer]]
        return kernels.paged_attention(
            q_THK,
            k_pool,
            v_pool,
            tables.tables_RB,
            batch.span_starts,
            batch.contexts_R,
            batch.positions_T,
            self.block_size,
            spec.scale,
            spec.window,
            spec.softcap,
            batch.mask_TP,
            new=new,
            spans_T=batch.spans_T,
        )


class ModelRunner:
    """Builds batches from spans and runs them. Room for the spans must have been reserved in `blocks`."""

    graphs: DecodeGraphs | None = None  # on a GPU

    def __init__(self, model: Model, pool: KVPool, blocks: BlockManager):
        self.model, self.pool, self.blocks = model, pool, blocks
        self.device = model.device
        self.group_of_layer = layer_groups(model)
        # The torch reference asks the device for lengths, which no graph can hold; the Triton forms do not.
        on_gpu = self.device.type == "cuda"
        fast = on_gpu and kernels.has_fast_form("paged_attention", torch.empty(0, device=self.device))
        if fast and not model.asks_the_device:
            self.graphs = DecodeGraphs(self._forward, model.logits, self.device)
        self._compute = self.graphs or self._forward
        self._planned: PlannedForward | None = None
        self._plans = True  # until there turns out to be none

    def build(self, inputs: Sequence[SpanInput], adapters: Callable[[Tensor], Adapters | None] | None = None) -> Batch:
        """Lay the spans out one after another. `adapters` makes the batch's adapters from its span starts."""
        lengths = np.fromiter((i.length for i in inputs), np.int64, len(inputs))
        contexts = np.fromiter((i.context for i in inputs), np.int64, len(inputs))
        starts = np.zeros(len(inputs) + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        row_of_T = np.repeat(np.arange(len(inputs)), lengths)
        local_T = np.arange(starts[-1]) - starts[row_of_T]
        cached = np.fromiter((i.growth.cached if i.growth else 0 for i in inputs), np.int64, len(inputs))
        cache_index_T = (contexts + cached)[row_of_T] + local_T
        positions_T = cache_index_T.copy()
        tokens_T = np.concatenate([part for i in inputs for part in _token_parts(i)])
        spans, logit_rows = [], []
        wanted = 0
        for i, start in zip(inputs, starts.tolist(), strict=False):
            if i.tree is not None and len(i.tree):
                first = start + len(i.tokens)
                positions_T[first : first + len(i.tree)] = i.context + len(i.tokens) - 1 + i.tree.depths()
            if i.growth is not None:
                positions_T[start : start + i.length] = i.context - 1 + i.growth.depths
            spans.append(Span(i.seq, start, i.length, i.context, i.tree, wanted, i.logit_rows))
            if i.logit_rows:
                logit_rows.append(np.arange(start + i.length - i.logit_rows, start + i.length))
                wanted += i.logit_rows
        tables = [self._tables(g, inputs, row_of_T, cache_index_T) for g in range(len(self.blocks.groups))]
        plain = all(i.length == 1 and i.tree is None and i.growth is None for i in inputs)
        if self.graphs is not None and adapters is None and plain:
            staged = self.graphs.stage(tuple(spans), tokens_T, contexts, tables)
            if staged is not None:
                return staged
        span_starts = torch.from_numpy(starts.astype(np.int32))
        rows_L = np.concatenate(logit_rows) if logit_rows else np.zeros(0, np.int64)
        mask = None
        if any(i.growth is not None or (i.tree is not None and not i.tree.is_chain) for i in inputs):
            mask = torch.from_numpy(ancestor_mask(inputs, starts).view(np.int64))
        return Batch(
            spans=tuple(spans),
            tokens_T=self._to_device(tokens_T),
            positions_T=self._to_device(positions_T),
            span_starts=span_starts.to(self.device),
            contexts_R=self._to_device(contexts.astype(np.int32)),
            groups=tuple(KVTables(self._to_device(slots), self._to_device(table)) for slots, table in tables),
            logit_rows_L=self._to_device(rows_L),
            mask_TP=None if mask is None else mask.to(self.device),
            adapters=adapters(span_starts) if adapters else None,
            spans_T=self._to_device(row_of_T.astype(np.int32)) if self.device.type == "cuda" else None,
        )

    def _tables(self, group: int, inputs: Sequence[SpanInput], row_of_T: np.ndarray, index_T: np.ndarray) -> Table:
        block_size = self.blocks.block_size
        tables = [self.blocks.table(i.seq, group) for i in inputs]
        tables_RB = np.full((len(tables), max(map(len, tables))), -1, np.int32)
        for row, table in enumerate(tables):
            tables_RB[row, : len(table)] = table
        slots_T = tables_RB[row_of_T, index_T // block_size].astype(np.int64) * block_size + index_T % block_size
        return slots_T, tables_RB

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """hidden_TD after the final norm; the batch's keys and values are in the pool afterwards."""
        return self.run(batch, self.blocks.take_copies())

    def planned(self) -> PlannedForward | None:
        """The pass as a list of native calls, where the model is of a kind that has one."""
        if self._planned is not None and not self._planned.body.holds():
            self._planned, self._plans = None, True
        if self._planned is None and self._plans:
            body = plan(self.model, self.pool, self.blocks.block_size, len(self.blocks.groups))
            self._planned, self._plans = None if body is None else PlannedForward(body), False
        return self._planned

    def run(self, batch: Batch, copies: Sequence[tuple[int, int, int]]) -> Tensor:
        """`forward` after these copies of blocks; a model split over processes sends both on."""
        if copies:
            self.pool.copy_blocks(copies)
        return self._compute(batch)

    def _forward(self, batch: Batch) -> Tensor:
        if batch.adapters is None and (planned := self.planned()) is not None:
            return planned(batch)
        attend: Attend = PagedAttend(self.model, self.pool, self.group_of_layer, self.blocks.block_size, batch)
        return self.model(batch.tokens_T, batch.positions_T, attend, batch.adapters)

    @torch.inference_mode()
    def logits(self, hidden_TD: Tensor, rows: Tensor) -> Tensor:
        """float32 logits [L, W] of the given rows, in ascending order; they may lie in a buffer that the next pass uses again."""
        if self.graphs is not None and (made := self.graphs.logits(hidden_TD, rows)) is not None:
            return made
        if len(rows) < len(hidden_TD):  # else all of them, in order
            hidden_TD = _gather(hidden_TD, rows)
        return self.model.logits(hidden_TD)

    def keep_tree_path(self, span: Span, path: Sequence[int]) -> None:
        """Move the KV of the accepted tree nodes (numbers along one root path) to where a chain would have put it."""
        assert span.tree is not None
        self.keep_rows(span.seq, span.context + span.length - len(span.tree), path)

    def keep_rows(self, seq: str, first: int, rows: Sequence[int]) -> None:
        """Move the KV at cache indices first + rows (rising) to first, first + 1, ..."""
        source = first + np.asarray(rows, dtype=np.int64)
        target = first + np.arange(len(rows), dtype=np.int64)
        if np.array_equal(source, target):
            return
        block_size = self.blocks.block_size
        for group in range(len(self.blocks.groups)):
            table = np.asarray(self.blocks.table(seq, group), dtype=np.int64)
            slots = [table[index // block_size] * block_size + index % block_size for index in (source, target)]
            self.move(group, self._to_device(slots[0]), self._to_device(slots[1]))

    def move(self, group: int, source_slots: Tensor, target_slots: Tensor) -> None:
        self.pool.move(group, source_slots, target_slots)


def layer_groups(model: Model) -> list[int]:
    """The KV group of each layer."""
    numbers = [0] * len(model.attention)
    for number, group in enumerate(groups_for(model.attention)):
        for layer in group.layers:
            numbers[layer] = number
    return numbers


def _gather(hidden_TD: Tensor, rows: Tensor) -> Tensor:
    """Some rows. On a CPU without torch's threads: once woken they keep their cores busy for milliseconds, which the kernels' threads need."""
    native = hidden_TD.device.type == "cpu" and hidden_TD.dtype == torch.float32
    return kernels.embedding(rows, hidden_TD) if native else hidden_TD.index_select(0, rows)


def _token_parts(span: SpanInput) -> list[np.ndarray]:
    committed = np.asarray(span.tokens, dtype=np.int64)
    return [committed] if span.tree is None else [committed, span.tree.tokens]


def ancestor_mask(inputs: Sequence[SpanInput], starts: np.ndarray) -> np.ndarray:
    """uint64 [T, P]: bit j of a row says it sees cache index context + j of its sequence; committed rows are causal, tree rows see their
    ancestors."""
    words = (max(i.length + (i.growth.cached if i.growth else 0) for i in inputs) + 63) // 64
    mask = np.zeros((int(starts[-1]), words), np.uint64)
    for i, start in zip(inputs, starts.tolist(), strict=False):
        if i.growth is not None:
            visible = i.growth.visible
        else:
            visible = np.tri(i.length, dtype=bool)
            if i.tree is not None and len(i.tree):
                first = len(i.tokens)
                visible[first:, first:] = i.tree.visible()
        mask[start : start + i.length] = pack_bits(visible, words)
    return mask
