"""A small model's whole pass as a fixed list of native calls (`serve/planned.py`), from spans of tokens to logits.

A draft of two layers computes for some tenths of a millisecond, so here the arrays are filled without making tensors too. Models that have
no plan go the ordinary way: `plan_pass` returns None.

Shape legend: T tokens, R spans, P mask words, L rows whose logits are wanted, W vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from wager.kernels.fused import plain
from wager.kernels.native_linear import LinearArgs, NativeLinear
from wager.models.layers import Linear
from wager.serve.planned import PlannedBody, at, buffer, plan
from wager.serve.runner import ModelRunner, SpanInput
from wager.serve.speculate.small_head import SmallHead
from wager.serve.token_tree import pack_bits

MAX_TOKENS, MAX_SPANS, MAX_WORDS = 64, 16, 8


class PlannedPass:
    """`logits(inputs)` of a Llama-layout draft over its runner's pool and block tables."""

    def __init__(self, runner: ModelRunner, body: PlannedBody, head: NativeLinear):
        model, block_size = body.model, runner.blocks.block_size
        self.runner, self.body, self.head, self.block_size = runner, body, head, block_size
        self.table_width = -(-model.max_positions // block_size) + 8
        body.room(MAX_TOKENS, MAX_SPANS, MAX_WORDS, MAX_SPANS * self.table_width)
        self.picked = buffer((MAX_TOKENS, model.hidden_size))
        self.narrow = buffer((MAX_TOKENS, head.outputs))
        self.full = self.narrow
        if head.outputs < model.vocab_size:
            self.full = buffer((MAX_TOKENS, model.vocab_size))
            self.full.fill(-np.inf)
        self._heads: dict[tuple[int, int], LinearArgs] = {}

    def fits(self, inputs: Sequence[SpanInput]) -> bool:
        """Whether the buffers hold such a batch."""
        tokens = sum(i.length for i in inputs)
        longest = max((i.growth.cached + i.length for i in inputs if i.growth), default=0)
        return tokens <= MAX_TOKENS and len(inputs) <= MAX_SPANS and longest <= 64 * MAX_WORDS

    def logits(self, inputs: Sequence[SpanInput]) -> np.ndarray:
        """float32 [L, W] of the wanted rows, span by span; the buffer is used again by the next pass."""
        blocks = self.runner.blocks
        if copies := blocks.take_copies():
            self.runner.pool.copy_blocks(copies)
        tokens, words, wanted = self._lay_out(inputs)
        normed_TD = self.body.run(tokens, len(inputs), words, self.table_width)
        count = len(wanted)
        if count:
            rows = normed_TD
            if count < tokens:
                rows = np.take(normed_TD, wanted, axis=0, out=self.picked[:count], mode="clip")
            self.head._function(ctypes.byref(self._head(count, rows)))
        if self.full is not self.narrow:
            self.full[:count, : self.head.outputs] = self.narrow[:count]
        return self.full[:count]

    def _lay_out(self, inputs: Sequence[SpanInput]) -> tuple[int, int, list[int]]:
        """Fill the body's arrays of a batch; returns (tokens, words of a mask row or 0, wanted rows)."""
        body, block_size, width, start = self.body, self.block_size, self.table_width, 0
        wanted: list[int] = []
        reach = max((i.growth.cached + i.length for i in inputs if i.growth), default=0)
        words = (reach + 63) // 64
        for row, span in enumerate(inputs):
            count = span.length
            end, growth = start + count, span.growth
            body.tokens_T[start:end] = span.tokens
            first = span.context + (growth.cached if growth else 0)
            index = np.arange(first, first + count)
            if growth is None:
                body.positions_T[start:end] = index
            else:
                np.add(growth.depths, span.context - 1, out=body.positions_T[start:end], casting="unsafe")
            if words:
                visible = np.tri(count, dtype=bool) if growth is None else growth.visible
                body.mask[start * words : end * words] = pack_bits(visible, words).ravel()
            table = self.runner.blocks.table(span.seq, 0)
            body.tables[row * width : row * width + len(table)] = table
            body.slots_T[start:end] = table[index // block_size] * block_size + index % block_size
            body.contexts_R[row] = span.context
            body.starts_R[row + 1] = end
            wanted += range(end - span.logit_rows, end)
            start = end
        return start, words, wanted

    def _head(self, count: int, rows: np.ndarray) -> LinearArgs:
        key = (count, at(rows))
        if key not in self._heads:
            empty = torch.empty(0)
            a = self.head.arguments(empty.view(0, 0), torch.empty(0, self.head.outputs))
            a.x, a.y, a.rows = at(rows), at(self.narrow), count
            self._heads[key] = a
        self._heads[key].threads = torch.get_num_threads()
        return self._heads[key]


def plan_pass(runner: ModelRunner) -> PlannedPass | None:
    """The planned pass of this runner's model, or None where its parts are not the ones a plan is made of."""
    body = plan(runner.model, runner.pool, runner.blocks.block_size, len(runner.blocks.groups))
    if body is None:
        return None
    head = body.model.head.inner if isinstance(body.model.head, SmallHead) else body.model.head
    packed = head.packed if isinstance(head, Linear) else None
    return PlannedPass(runner, body, packed) if isinstance(packed, NativeLinear) and plain(packed) else None
