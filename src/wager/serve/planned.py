"""The blocks of a Llama-layout model as a fixed list of native calls: what a step costs is then its weights, not its bookkeeping.

Making tensors and arguments for every operator of every layer in Python costs some milliseconds a pass: a tenth of a decode step of a small
model, several times the work of a draft model of two layers. Here every buffer and the arguments of every call exist once, so that a pass fills
in tokens, positions, block numbers and, where it changed, the shape, and runs the list. The kernels are those of the ordinary pass, in the same order, and so
are the bits.

Models of other kinds (another family, other devices, quantized forms with padding, blocks with hooks) go the ordinary way: `plan` returns None.

Shape legend: T tokens, R spans, B blocks of a table row, P mask words, D hidden.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wager.kernels import native
from wager.kernels.fused import BlockInput, BlockOutput, InputArgs, OutputArgs
from wager.models.layers import Embedding, RMSNorm
from wager.models.llama import Block, Llama
from wager.serve.batch import Batch
from wager.serve.cache.pool import KVPool

ROPE_POSITIONS = 512  # whose angles are there from the start
Call = tuple[Any, tuple]
Calls = list[Call]
Halves = list[tuple[BlockInput, BlockOutput]]


class PlannedBody:
    """Embedding, blocks and last norm. The caller makes `room`, fills the arrays below and calls `run`.

    tokens_T, positions_T, slots_T int64; starts_R, contexts_R int32; tables int32 [R * B] and mask uint64 [T * P], rows side by side.
    """

    def __init__(self, model: Llama, pool: KVPool, block_size: int, halves: Halves):
        self.model, self.pool, self.block_size, self.halves = model, pool, block_size, halves
        self._angles = self._turns(ROPE_POSITIONS)
        self._room = (0, 0, 0, 0)
        self._calls: Calls = []
        self._layers: list[
            tuple[Any, Any, Any]
        ] = []  # arguments: of a block's first half, its attention, its second half
        self._threads = 0  # that the calls were made for; 0: they are to be made
        self._shape: tuple[int, ...] = ()

    def room(self, tokens: int, spans: int, words: int = 0, table_entries: int = 0) -> None:
        """Buffers for that many at least; larger ones replace them, with contents lost, when they do not suffice."""
        asked = (tokens, spans, tokens * words, table_entries)
        if all(a <= b for a, b in zip(asked, self._room, strict=True)):
            return
        self._room = rows, spans, mask, entries = tuple(map(max, map(_rounded, asked), self._room))
        self._threads = 0
        width, (heads, kv_heads, head_dim) = self.model.hidden_size, self.halves[0][0].shape
        self.tokens_T, self.positions_T, self.slots_T = (buffer(rows, torch.int64) for _ in range(3))
        self.starts_R, self.contexts_R = buffer(spans + 1, torch.int32), buffer(spans, torch.int32)
        self.tables, self.mask = buffer(entries, torch.int32), buffer(mask, torch.int64).view(np.uint64)
        self._cos_TR, self._sin_TR = (buffer((rows, table.shape[1])) for table in self._angles)
        self._x, self._total, self._stream, self._branch, self._normed = (buffer((rows, width)) for _ in range(5))
        self._qkv = buffer((rows, heads + 2 * kv_heads, head_dim))
        self._attended = buffer((rows, heads * self.model.attention[0].value_dim))

    def run(self, tokens: int, spans: int, words: int, table_width: int) -> np.ndarray:
        """The normed hidden states [T, D] of what the arrays hold (words: P, table_width: B); the next pass uses the buffer again."""
        shape, threads = (tokens, spans, words, table_width), torch.get_num_threads()
        if threads != self._threads:
            self._make_calls(threads)
            self._shape = ()
        if shape != self._shape:
            self._fit(*shape)
        self._turn(tokens)
        for function, arguments in self._calls:
            function(*arguments)
        return self._normed[:tokens]

    def _fit(self, tokens: int, spans: int, words: int, table_width: int) -> None:
        """Write a shape into the calls' arguments: trees make a new one almost every step."""
        mask = at(self.mask) if words else None
        for first, attention, second in self._layers:
            first.qkv.rows = second.output.rows = second.gate_up.rows = second.down.rows = tokens
            attention.tokens, attention.spans, attention.table_width = tokens, spans, table_width
            attention.words, attention.mask = words, mask
        self._calls[0], self._calls[-1] = self._ends(tokens)
        self._shape = tokens, spans, words, table_width

    def _ends(self, tokens: int) -> tuple[Call, Call]:
        """The embedding and the last norm."""
        lib, model, threads = native.library(), self.model, self._threads
        table, norm = model.embed.weight, model.norm
        embed = getattr(lib, f"wager_embedding_{native.SUFFIX[table.dtype]}")
        last = getattr(lib, f"wager_rms_norm_{native.SUFFIX[norm.weight.dtype]}")
        return (
            (embed, (table.data_ptr(), at(self.tokens_T), tokens, model.hidden_size, at(self._x), threads)),
            (
                last,
                (
                    at(self._branch), model.hidden_size, at(self._stream), norm.weight.data_ptr(), tokens, model.hidden_size, norm.eps,
                    norm.offset, at(self._normed), threads,
                ),
            ),
        )  # fmt: skip

    def _turn(self, tokens: int) -> None:
        """The angles of the positions, from tables that grow with the longest sequence."""
        positions = self.positions_T[:tokens]
        if (last := int(positions.max())) >= len(self._angles[0]):
            self._angles = self._turns(_rounded(last + 1))
        for table, to in zip(self._angles, (self._cos_TR, self._sin_TR), strict=True):
            np.take(table, positions, axis=0, out=to[:tokens], mode="clip")

    def _turns(self, positions: int) -> list[np.ndarray]:
        return [t.contiguous().numpy() for t in self.model.rope(torch.arange(positions))]

    def _make_calls(self, threads: int) -> None:
        """All calls, but for their shape."""
        self._threads, self._layers, stream = threads, [], None
        ends = self._ends(0)
        calls: Calls = [ends[0]]
        for layer, (first, second) in enumerate(self.halves):
            attend, attention = self._attention(layer, threads)
            total = self._x if stream is None else self._total
            arguments = self._input(first, stream, threads), attention, self._output(second, total, threads)
            calls += zip(
                (first.function, attend, second.function), ((ctypes.byref(a),) for a in arguments), strict=True
            )
            self._layers.append(arguments)
            stream = self._stream
        self._calls = [*calls, ends[1]]

    def _input(self, half: BlockInput, stream: np.ndarray | None, threads: int) -> Any:
        """Norm, projection and rotation of what the block before it made: (branch, stream), or the embeddings alone."""
        a = InputArgs.from_buffer_copy(half.template)
        a.x = at(self._x) if stream is None else at(self._branch)
        if stream is not None:
            a.residual, a.total = at(stream), at(self._total)
        a.qkv.y, a.qkv.threads = at(self._qkv), threads
        a.cos, a.sin, a.pairs = at(self._cos_TR), at(self._sin_TR), self._cos_TR.shape[1]
        return a

    def _output(self, half: BlockOutput, total: np.ndarray, threads: int) -> Any:
        a = OutputArgs.from_buffer_copy(half.template)
        a.output.x, a.output.residual, a.output.y = at(self._attended), at(total), at(self._stream)
        a.output.threads = a.gate_up.threads = a.down.threads = threads
        a.down.y = at(self._branch)
        return a

    def _attention(self, layer: int, threads: int) -> tuple[Any, Any]:
        """The function and its arguments."""
        spec, k_pool, v_pool = self.model.attention[layer], self.pool.k[layer], self.pool.v[layer]
        assert v_pool is not None
        row = self._qkv.shape[1] * self._qkv.shape[2]
        keys = at(self._qkv) + 4 * spec.num_heads * spec.key_dim
        a = native.AttentionArgs(
            q=at(self._qkv), new_k=keys, new_v=keys + 4 * spec.num_kv_heads * spec.key_dim, slots=at(self.slots_T),
            q_token=row, new_k_token=row, new_v_token=row,
            k_pool=k_pool.data_ptr(), v_pool=v_pool.data_ptr(),
            k_slot=k_pool.stride(0), k_head=k_pool.stride(1), v_slot=v_pool.stride(0), v_head=v_pool.stride(1),
            tables=at(self.tables), starts=at(self.starts_R), contexts=at(self.contexts_R), positions=at(self.positions_T),
            out=at(self._attended), heads=spec.num_heads, kv_heads=spec.num_kv_heads,
            key_dim=spec.key_dim, value_dim=spec.value_dim, block_size=self.block_size, window=spec.window or 0,
            scale=spec.scale, softcap=spec.softcap or 0.0, threads=threads,
        )  # fmt: skip
        return getattr(native.library(), f"wager_attention_{native.POOL_SUFFIX[k_pool.dtype]}"), a

    def holds(self) -> bool:
        """Whether the model's blocks are still those of the plan, without hooks."""
        blocks: Any = self.model.layers
        return all(
            b.halves is not None and b.halves[0] is first and not b._forward_hooks and not b._forward_pre_hooks
            for b, (first, _) in zip(blocks, self.halves, strict=True)
        )


class PlannedForward:
    """`hidden_TD = planned(batch)`: the ordinary pass over a batch without adapters."""

    def __init__(self, body: PlannedBody):
        self.body = body

    def __call__(self, batch: Batch) -> Tensor:
        body, tables, mask = self.body, batch.groups[0], batch.mask_TP
        (spans, used), tokens = tables.tables_RB.shape, len(batch.tokens_T)
        width, words = _rounded(used), 0 if mask is None else mask.shape[1]  # few widths: each has calls of its own
        body.room(tokens, spans, words, spans * width)
        for to, array in (
            (body.tokens_T, batch.tokens_T), (body.positions_T, batch.positions_T), (body.slots_T, tables.slots_T),
            (body.starts_R, batch.span_starts), (body.contexts_R, batch.contexts_R),
        ):  # fmt: skip
            to[: len(array)] = array.numpy()
        body.tables[: spans * width].reshape(spans, width)[:, :used] = tables.tables_RB.numpy()
        if mask is not None:
            body.mask[: tokens * words] = mask.numpy().view(np.uint64).ravel()
        return torch.from_numpy(body.run(tokens, spans, words, width).copy())


def plan(model: torch.nn.Module, pool: KVPool, block_size: int, groups: int) -> PlannedBody | None:
    """The planned body of a model whose layers share one of `groups` groups of block tables, or None where its parts are not known."""
    if type(model) is not Llama or model.device.type != "cpu" or groups != 1:
        return None
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):  # streamed or split layers, recorders
        return None
    ends = (model.embed, Embedding), (model.norm, RMSNorm)
    if any(type(m) is not kind or m.weight.dtype not in native.SUFFIX for m, kind in ends):
        return None
    halves: Halves = []
    for block in model.layers:
        first, second = block.fused(torch.empty(1, model.hidden_size)) if type(block) is Block else (None, None)
        if first is None or second is None:
            return None
        halves.append((first, second))
    return PlannedBody(model, pool, block_size, halves)


def buffer(shape: int | tuple[int, ...], dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Zeros, aligned as torch aligns them."""
    return torch.zeros(shape, dtype=dtype).numpy()


def at(array: np.ndarray) -> int:
    """Address of a buffer that the pass keeps."""
    return array.ctypes.data


def _rounded(count: int) -> int:
    """The next power of two, so that buffers grow seldom."""
    return 1 << max(0, count - 1).bit_length() if count else 0
