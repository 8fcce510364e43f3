"""A small model's whole pass as a fixed list of native calls: what a draft pass costs is then its weights, not its bookkeeping.

A draft of two layers computes for some tenths of a millisecond; making tensors for every operator of it in Python takes several times as
long. Here every buffer exists once and the arguments of every call are made once per shape, so that a pass fills in tokens, positions and
block numbers and runs the list. The kernels are those of the ordinary pass (`ModelRunner`), in the same order.

Models it does not know (another family, other devices, quantized forms with padding) go the ordinary way: `plan_pass` returns None.

Shape legend: T tokens, R spans, B blocks of a table row, P mask words, D hidden, L rows whose logits are wanted, W vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from wager.kernels import native
from wager.kernels.fused import BlockInput, BlockOutput, InputArgs, OutputArgs
from wager.kernels.native_linear import LinearArgs, NativeLinear
from wager.models.layers import Linear
from wager.models.llama import Block, Llama
from wager.serve.runner import ModelRunner, SpanInput
from wager.serve.speculate.small_head import SmallHead
from wager.serve.token_tree import pack_bits

MAX_TOKENS, MAX_SPANS, MAX_WORDS = 64, 16, 8
Calls = list[tuple[Any, tuple]]


class PlannedPass:
    """`logits(inputs)` of a Llama-layout draft over its runner's pool and block tables."""

    def __init__(self, runner: ModelRunner, blocks: list[tuple[BlockInput, BlockOutput]], head: NativeLinear):
        model = runner.model
        assert isinstance(model, Llama)
        self.runner, self.blocks, self.head, self.model = runner, blocks, head, model
        self.block_size = runner.blocks.block_size
        width, first = model.hidden_size, blocks[0][0]
        heads, kv_heads, head_dim = first.shape
        positions = torch.arange(model.max_positions)
        self.cos_table, self.sin_table = (t.contiguous().numpy() for t in model.rope(positions))
        self.table_width = -(-model.max_positions // self.block_size) + 8
        self.tokens = buffer(MAX_TOKENS, torch.int64)
        self.positions = buffer(MAX_TOKENS, torch.int64)
        self.slots = buffer(MAX_TOKENS, torch.int64)
        self.starts = buffer(MAX_SPANS + 1, torch.int32)
        self.contexts = buffer(MAX_SPANS, torch.int32)
        self.tables = buffer((MAX_SPANS, self.table_width), torch.int32)
        self.mask = buffer(MAX_TOKENS * MAX_WORDS, torch.int64).view(np.uint64)
        pairs = self.cos_table.shape[1]
        self.cos, self.sin = (buffer((MAX_TOKENS, pairs)) for _ in range(2))
        self.x, self.total, self.stream, self.branch, self.normed, self.picked = (
            buffer((MAX_TOKENS, width)) for _ in range(6)
        )
        self.qkv = buffer((MAX_TOKENS, heads + 2 * kv_heads, head_dim))
        self.attended = buffer((MAX_TOKENS, heads * model.attention[0].value_dim))
        self.narrow = buffer((MAX_TOKENS, head.outputs))
        self.full = self.narrow
        if head.outputs < model.vocab_size:
            self.full = buffer((MAX_TOKENS, model.vocab_size))
            self.full.fill(-np.inf)
        self._bodies: dict[tuple[int, int, int, int], Calls] = {}
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
        for function, arguments in self._body(tokens, len(inputs), words):
            function(*arguments)
        rows = self.normed
        if len(wanted) < tokens:
            rows = np.take(self.normed, wanted, axis=0, out=self.picked[: len(wanted)], mode="clip")
        count = len(wanted)
        if count:
            self.head._function(ctypes.byref(self._head(count, rows)))
        if self.full is not self.narrow:
            self.full[:count, : self.head.outputs] = self.narrow[:count]
        return self.full[:count]

    # -- arrays ------------------------------------------------------------------------------------------------------------------

    def _lay_out(self, inputs: Sequence[SpanInput]) -> tuple[int, int, list[int]]:
        """Fill the arrays of a batch; returns (tokens, words of a mask row or 0, wanted rows)."""
        block_size, start = self.block_size, 0
        wanted: list[int] = []
        reach = max((i.growth.cached + i.length for i in inputs if i.growth), default=0)
        words = (reach + 63) // 64
        mask = self.mask[: MAX_TOKENS * words].reshape(MAX_TOKENS, words) if words else None
        for row, span in enumerate(inputs):
            count = span.length
            end, growth = start + count, span.growth
            self.tokens[start:end] = span.tokens
            first = span.context + (growth.cached if growth else 0)
            index = np.arange(first, first + count)
            if growth is None:
                self.positions[start:end] = index
            else:
                np.add(growth.depths, span.context - 1, out=self.positions[start:end], casting="unsafe")
            if mask is not None:
                visible = np.tri(count, dtype=bool) if growth is None else growth.visible
                mask[start:end] = pack_bits(visible, words)
            table = self.runner.blocks.table(span.seq, 0)
            self.tables[row, : len(table)] = table
            self.slots[start:end] = table[index // block_size] * block_size + index % block_size
            self.contexts[row] = span.context
            self.starts[row + 1] = end
            wanted += range(end - span.logit_rows, end)
            start = end
        np.take(self.cos_table, self.positions[:start], axis=0, out=self.cos[:start], mode="clip")
        np.take(self.sin_table, self.positions[:start], axis=0, out=self.sin[:start], mode="clip")
        return start, words, wanted

    # -- calls -------------------------------------------------------------------------------------------------------------------

    def _body(self, tokens: int, spans: int, words: int) -> Calls:
        threads = torch.get_num_threads()
        key = (tokens, spans, words, threads)
        if key not in self._bodies:
            self._bodies[key] = self._make_body(*key)
        return self._bodies[key]

    def _make_body(self, tokens: int, spans: int, words: int, threads: int) -> Calls:
        lib, model = native.library(), self.model
        table, norm = model.embed.weight, model.norm
        embed = getattr(lib, f"wager_embedding_{native.SUFFIX[table.dtype]}")
        calls: Calls = [
            (embed, (table.data_ptr(), at(self.tokens), tokens, model.hidden_size, at(self.x), threads)),
        ]
        stream = None
        for layer, (first, second) in enumerate(self.blocks):
            calls.append((first.function, (self._input(first, stream, tokens, threads),)))
            calls.append(self._attention(layer, tokens, spans, words, threads))
            total = self.x if stream is None else self.total
            calls.append((second.function, (self._output(second, total, tokens, threads),)))
            stream = self.stream
        last = getattr(lib, f"wager_rms_norm_{native.SUFFIX[norm.weight.dtype]}")
        calls.append(
            (
                last,
                (
                    at(self.branch), model.hidden_size, at(self.stream), norm.weight.data_ptr(), tokens, model.hidden_size, norm.eps,
                    norm.offset, at(self.normed), threads,
                ),
            )
        )  # fmt: skip
        return calls

    def _input(self, half: BlockInput, stream: np.ndarray | None, tokens: int, threads: int) -> Any:
        """Norm, projection and rotation of what the block before it made: (branch, stream), or the embeddings alone."""
        a = InputArgs.from_buffer_copy(half.template)
        a.x = at(self.x) if stream is None else at(self.branch)
        if stream is not None:
            a.residual, a.total = at(stream), at(self.total)
        a.qkv.rows, a.qkv.y, a.qkv.threads = tokens, at(self.qkv), threads
        a.cos, a.sin, a.pairs = at(self.cos), at(self.sin), self.cos.shape[1]
        return ctypes.byref(a)

    def _output(self, half: BlockOutput, total: np.ndarray, tokens: int, threads: int) -> Any:
        a = OutputArgs.from_buffer_copy(half.template)
        a.output.x, a.output.residual, a.output.y = at(self.attended), at(total), at(self.stream)
        a.output.rows = a.gate_up.rows = a.down.rows = tokens
        a.output.threads = a.gate_up.threads = a.down.threads = threads
        a.down.y = at(self.branch)
        return ctypes.byref(a)

    def _attention(self, layer: int, tokens: int, spans: int, words: int, threads: int) -> tuple[Any, tuple]:
        spec, pool = self.model.attention[layer], self.runner.pool
        k_pool, v_pool = pool.k[layer], pool.v[layer]
        assert v_pool is not None
        row = self.qkv.shape[1] * self.qkv.shape[2]
        keys = at(self.qkv) + 4 * spec.num_heads * spec.key_dim
        a = native.AttentionArgs(
            q=at(self.qkv), new_k=keys, new_v=keys + 4 * spec.num_kv_heads * spec.key_dim, slots=at(self.slots),
            q_token=row, new_k_token=row, new_v_token=row,
            k_pool=k_pool.data_ptr(), v_pool=v_pool.data_ptr(),
            k_slot=k_pool.stride(0), k_head=k_pool.stride(1), v_slot=v_pool.stride(0), v_head=v_pool.stride(1),
            tables=at(self.tables), starts=at(self.starts), contexts=at(self.contexts), positions=at(self.positions),
            mask=at(self.mask) if words else None, out=at(self.attended),
            tokens=tokens, spans=spans, table_width=self.table_width, heads=spec.num_heads, kv_heads=spec.num_kv_heads,
            key_dim=spec.key_dim, value_dim=spec.value_dim, block_size=self.block_size, window=spec.window or 0, words=words,
            scale=spec.scale, softcap=spec.softcap or 0.0, threads=threads,
        )  # fmt: skip
        return getattr(native.library(), f"wager_attention_{native.POOL_SUFFIX[k_pool.dtype]}"), (ctypes.byref(a),)

    def _head(self, count: int, rows: np.ndarray) -> LinearArgs:
        key = (count, at(rows))
        if key not in self._heads:
            empty = torch.empty(0)
            a = self.head.arguments(empty.view(0, 0), torch.empty(0, self.head.outputs))
            a.x, a.y, a.rows = at(rows), at(self.narrow), count
            self._heads[key] = a
        self._heads[key].threads = torch.get_num_threads()
        return self._heads[key]


def buffer(shape: int | tuple[int, ...], dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Zeros, aligned as torch aligns them."""
    return torch.zeros(shape, dtype=dtype).numpy()


def at(array: np.ndarray) -> int:
    """Address of a buffer that the pass keeps."""
    return array.ctypes.data


def plan_pass(runner: ModelRunner) -> PlannedPass | None:
    """The planned pass of this runner's model, or None where its parts are not the ones a plan is made of."""
    model = runner.model
    if type(model) is not Llama or runner.device.type != "cpu" or len(runner.blocks.groups) != 1:
        return None
    head = model.head.inner if isinstance(model.head, SmallHead) else model.head
    packed = head.packed if isinstance(head, Linear) else None
    if (
        not _plain(packed)
        or model.embed.weight.dtype not in native.SUFFIX
        or model.norm.weight.dtype not in native.SUFFIX
    ):
        return None
    blocks = []
    for block in model.layers:
        hooked = block._forward_pre_hooks or block._forward_hooks  # streamed layers, recorders
        if not isinstance(block, Block) or hooked:
            return None
        first, second = block.fused(torch.empty(1, model.hidden_size))
        if first is None or second is None:
            return None
        blocks.append((first, second))
    assert isinstance(packed, NativeLinear)
    return PlannedPass(runner, blocks, packed)


def _plain(linear: Any) -> bool:
    return isinstance(linear, NativeLinear) and not linear.padding and linear.order is None
