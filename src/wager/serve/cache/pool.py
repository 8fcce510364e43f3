"""The tensors behind the block tables: per layer one pool of keys and one of values.

Shape legend: S pool slots (blocks times block size), G key/value heads, K key width, V value width.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from wager.models.base import AttentionSpec
from wager.native.memory import huge_zeros
from wager.serve.cache.block_manager import KVGroup, per_group

FEW_ROWS = 16


def groups_for(specs: Sequence[AttentionSpec]) -> tuple[KVGroup, ...]:
    """Layers with the same window share block tables; groups are in order of their first layer."""
    layers: dict[int | None, list[int]] = {}
    for layer, spec in enumerate(specs):
        layers.setdefault(spec.window, []).append(layer)
    return tuple(KVGroup(tuple(members), window) for window, members in layers.items())


class KVPool:
    """`k[layer]` is [S, G, K]; `v[layer]` is [S, G, V], None where the value is part of the key.

    num_host_blocks: further blocks, numbered after the others, whose rows lie in the host's memory; only `copy_blocks` reaches them.
    """

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        groups: Sequence[KVGroup],
        num_blocks: int | Sequence[int],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        num_host_blocks: int | Sequence[int] = 0,
    ):
        self.groups, self.block_size, self.num_host_blocks = tuple(groups), block_size, num_host_blocks
        self.k: list[Tensor] = [torch.empty(0)] * len(specs)
        self.v: list[Tensor | None] = [None] * len(specs)
        for group, count in zip(groups, per_group(num_blocks, groups), strict=True):
            for layer in group.layers:
                spec, slots = specs[layer], count * block_size
                self.k[layer] = zeros((slots, spec.num_kv_heads, spec.key_dim), dtype, device)
                if not spec.value_from_key:
                    self.v[layer] = zeros((slots, spec.num_kv_heads, spec.value_dim), dtype, device)
        self._host = [
            [zeros((count * block_size, *pool.shape[1:]), dtype, "cpu") for pool in self.tensors(g)] if count else []
            for g, count in enumerate(per_group(num_host_blocks, groups))
        ]

    @staticmethod
    def bytes_per_block(specs: Sequence[AttentionSpec], block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block in every layer."""
        widths = (s.num_kv_heads * (s.key_dim + (0 if s.value_from_key else s.value_dim)) for s in specs)
        return sum(widths) * block_size * dtype.itemsize

    def tensors(self, group: int) -> list[Tensor]:
        """All pools of a group's layers."""
        layers = self.groups[group].layers
        return [pool for layer in layers for pool in (self.k[layer], self.v[layer]) if pool is not None]

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Carry out (group, source block, target block) copies, in this order."""
        for group, source, target in copies:
            pools, hosts = self.tensors(group), self._host[group]
            for pool, host in zip_longest(pools, hosts):
                self._rows(pool, host, target).copy_(self._rows(pool, host, source))

    def _rows(self, pool: Tensor, host: Tensor | None, block: int) -> Tensor:
        """A block's rows in one layer's pool, or in the host's memory behind it."""
        first, behind = block * self.block_size, block * self.block_size - len(pool)
        if behind < 0:
            return pool[first : first + self.block_size]
        assert host is not None, f"block {block} lies behind a pool of {len(pool)} rows and there is no host memory"
        return host[behind : behind + self.block_size]

    def move(self, group: int, source_slots: Tensor, target_slots: Tensor) -> None:
        """Move rows to other slots in every layer of the group; sources are read before targets are written."""
        if source_slots.device.type == "cpu" and len(source_slots) <= FEW_ROWS:
            sources, targets = source_slots.tolist(), target_slots.tolist()
            if all(target not in sources[i + 1 :] for i, target in enumerate(targets)):
                self._move_one_by_one(group, [(s, t) for s, t in zip(sources, targets, strict=True) if s != t])
                return
        for pool in self.tensors(group):
            pool[target_slots] = pool[source_slots]

    def _move_one_by_one(self, group: int, moves: Sequence[tuple[int, int]]) -> None:
        """A handful of rows: copying memory is much faster than indexing, which costs the same for one row as for hundreds."""
        for pool in self.tensors(group):
            start, row_bytes = pool.data_ptr(), pool.stride(0) * pool.element_size()
            for source, target in moves:
                ctypes.memmove(start + target * row_bytes, start + source * row_bytes, row_bytes)

    def export(self, tables: Sequence[np.ndarray], num_tokens: int) -> dict[str, Tensor]:
        """Copies of the first `num_tokens` rows of a sequence, named for safetensors. `tables` has one block table per group."""
        rows = {}
        for g, group in enumerate(self.groups):
            slots = self._slots(tables[g], num_tokens)
            for layer in group.layers:
                rows[f"layers.{layer}.k"] = self.k[layer][slots].cpu()
                values = self.v[layer]
                if values is not None:
                    rows[f"layers.{layer}.v"] = values[slots].cpu()
        return rows

    def import_(self, rows: dict[str, Tensor], tables: Sequence[np.ndarray], num_tokens: int) -> None:
        """Write rows made by `export` into the blocks of `tables`."""
        for g, group in enumerate(self.groups):
            slots = self._slots(tables[g], num_tokens)
            for layer in group.layers:
                self.k[layer][slots] = rows[f"layers.{layer}.k"].to(self.k[layer].device)
                values = self.v[layer]
                if values is not None:
                    values[slots] = rows[f"layers.{layer}.v"].to(values.device)

    def _slots(self, table: np.ndarray, num_tokens: int) -> Tensor:
        positions = np.arange(num_tokens)
        slots = (
            np.asarray(table, np.int64)[positions // self.block_size] * self.block_size + positions % self.block_size
        )
        return torch.from_numpy(slots).to(self.k[0].device)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros whose memory a CPU only commits when it is written: a large pool costs what is used of it, in huge pages where it may."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return huge_zeros(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
