"""One stage of a pipeline: some consecutive layers of a model, their KV, and nothing else of it.

Any family whose network is `embed`, a list of `layers`, `norm`, `head` can be cut: the layers before the stage give way to an entry that
returns what the stage before sent, those after it to an exit that notes what the stage after needs. The layers between compute what they
compute in the whole model, so the tokens are the same bits.

Weights and KV lie in memory that the caller provides. When that is shared memory which outlives this process, a new process over the same
memory goes on where the last one was killed: keys and values of tokens that are counted as computed are never written again, and a step
that was cut short writes the same values to the same slots when it is repeated.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wager import kernels
from wager.errors import CheckpointError, UsageError
from wager.models import demo
from wager.models.base import Attend, Model
from wager.models.loader import checkpoint_dtype, fill, open_plain, resolve
from wager.models.registry import family_of
from wager.serve.batch import Batch, KVTables
from wager.serve.cache.block_manager import KVGroup
from wager.serve.cache.pool import KVPool, groups_for
from wager.serve.runner import PagedAttend

ALIGN = 64
LEDGER = 8  # int64 words at the start of a stage's memory
WEIGHTS_READY, COPIED_STEP, DONE_STEP = 0, 1, 2  # its words


@dataclass(frozen=True)
class StageSpec:
    """Layers [first, last) of a checkpoint, and how the stage holds them. `num_blocks`: of KV, the same in every stage."""

    model: str
    first: int
    last: int
    num_blocks: int
    block_size: int = 16
    dtype: str = "auto"
    quantization: str | None = None
    threads: int = 1


class Entry(nn.Module):
    """Stands for the layers before the stage."""

    def __init__(self):
        super().__init__()
        self.received: Tensor | tuple[Tensor, ...] = ()

    def forward(self, *_: Any) -> Any:
        return self.received


class Exit(nn.Module):
    """Stands for the layers after the stage."""

    def __init__(self, streams: int):
        super().__init__()
        self.streams = streams
        self.noted: tuple[Tensor, ...] = ()

    def forward(self, *given: Any) -> Any:
        self.noted = given[: self.streams]
        return self.noted if self.streams > 1 else self.noted[0]


class NoEmbedding(nn.Module):
    """Rows of nothing, of the right shape."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, tokens_T: Tensor) -> Tensor:
        return torch.zeros(1).expand(tokens_T.shape[0], self.width)


class NoNorm(nn.Module):
    """Where the final norm is another stage's."""

    def forward(self, x_TD: Tensor) -> Tensor:
        return x_TD

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        return x_TD, residual_TD


def skeleton(model: str, dtype: str = "auto") -> tuple[Model, dict[str, Any], Path]:
    """The whole network without weights, its config.json, and where the checkpoint lies."""
    path = resolve(demo.path(model) if demo.is_demo(model) else model)
    raw, checkpoint = open_plain(path, "a pipeline of stages")
    with checkpoint:  # only to say now what a stage would refuse later
        pass
    target = checkpoint_dtype(raw if dtype == "auto" else {"dtype": dtype})
    with torch.device("meta"):
        return family_of(raw).from_checkpoint(raw, target).eval().requires_grad_(False), raw, path


def cut(model: Model, first: int, last: int) -> int:
    """Reduce a meta model to layers [first, last); returns how many tensors travel between its stages (1, or 2 with a residual stream)."""
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise CheckpointError("this model's layers cannot be cut into stages; serve it in one process")
    count = len(layers)
    if not 0 <= first < last <= count:
        raise UsageError(f"layers [{first}, {last}) are no range within the model's {count} layers")
    streams = 2 if "residual_TD" in inspect.signature(layers[first].forward).parameters else 1
    head, embed = getattr(model, "head", None), model.embed
    if isinstance(head, nn.Module) and getattr(head, "weight", None) is getattr(embed, "weight", 0):
        head.parts = embed.parts  # type: ignore[assignment]  # tied: the last stage reads the table under the embedding's name
    kept: list[nn.Module] = list(layers[first:last])
    if first > 0:
        kept.insert(0, Entry())
        for name in ("embed", "embed_positions"):
            if hasattr(model, name):
                setattr(model, name, NoEmbedding(model.hidden_size))
    if last < count:
        kept.append(Exit(streams))
        model.norm = NoNorm()
        model.head = nn.Identity()
    model.layers = nn.ModuleList(kept)
    model.attention = model.attention[first:last]
    return streams


def weight_bytes(model: nn.Module) -> int:
    """Room that the parameters of a cut model take in a stage's memory."""
    unique = {id(p): p for p in model.parameters()}
    return sum(_padded(p.numel() * p.dtype.itemsize) for p in unique.values())


def _padded(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


class Stage:
    """A cut model over its own KV pool. `memory`: uint8, at least `bytes_needed` long, zeros when new; without it
    the stage only knows its sizes.

    The ledger at its start says whether the weights are in it and which step was begun and done last.
    """

    def __init__(self, spec: StageSpec, memory: Tensor | None = None):
        torch.set_num_threads(spec.threads)
        self.spec = spec
        self.model, self.raw, self.path = skeleton(spec.model, spec.dtype)
        self.num_layers = len(self.model.attention)
        self.all_groups = groups_for(self.model.attention)
        self.streams = cut(self.model, spec.first, spec.last)
        self.dtype = self.model.dtype
        self.groups = self._own_groups()
        self.weight_bytes = weight_bytes(self.model)
        self.memory = torch.empty(self.bytes_needed, dtype=torch.uint8, device="meta") if memory is None else memory
        if len(self.memory) < self.bytes_needed:
            raise UsageError(
                f"a stage of {self.bytes_needed} bytes does not fit into {len(self.memory)} bytes of memory"
            )
        self.ledger = self.memory[: LEDGER * 8].view(torch.int64)
        self.pool = self._pool()

    def _own_groups(self) -> list[tuple[int, KVGroup]]:
        """(number in the whole model, the group's layers here by local number)."""
        own = []
        for number, group in enumerate(self.all_groups):
            local = tuple(l - self.spec.first for l in group.layers if self.spec.first <= l < self.spec.last)
            if local:
                own.append((number, KVGroup(local, group.window)))
        return own

    @property
    def bytes_needed(self) -> int:
        kv = KVPool.bytes_per_block(self.model.attention, self.spec.block_size, self.dtype) * self.spec.num_blocks
        return _padded(LEDGER * 8) + self.weight_bytes + kv + ALIGN * 2 * len(self.model.attention)

    @property
    def weights(self) -> Tensor:
        """uint8: the part of the memory that holds the weights."""
        start = _padded(LEDGER * 8)
        return self.memory[start : start + self.weight_bytes]

    def _pool(self) -> KVPool:
        specs, slots = self.model.attention, self.spec.num_blocks * self.spec.block_size
        pool = KVPool(specs, [g for _, g in self.groups], 0, self.spec.block_size, self.dtype)
        at = _padded(LEDGER * 8) + self.weight_bytes

        def take(heads: int, width: int) -> Tensor:
            nonlocal at
            size = slots * heads * width * self.dtype.itemsize
            taken = self.memory[at : at + size].view(self.dtype).view(slots, heads, width)
            at += _padded(size)
            return taken

        for layer, spec in enumerate(specs):
            pool.k[layer] = take(spec.num_kv_heads, spec.key_dim)
            if not spec.value_from_key:
                pool.v[layer] = take(spec.num_kv_heads, spec.value_dim)
        return pool

    def load(self) -> str:
        """Bring the weights in: "memory" when they were there already, else "disk"."""
        at = 0
        placed: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if id(parameter) not in placed:
                    size = parameter.numel() * parameter.dtype.itemsize
                    view = self.weights[at : at + size].view(parameter.dtype).view(parameter.shape)
                    placed[id(parameter)] = nn.Parameter(view, requires_grad=False)
                    at += _padded(size)
                setattr(module, name, placed[id(parameter)])
        allocate_tables(self.model)
        source = "memory" if self.ledger[WEIGHTS_READY] else "disk"
        if source == "disk":
            with open_plain(self.path, "a pipeline stage")[1] as checkpoint:
                fill(self.model, checkpoint)
            self.ledger[WEIGHTS_READY] = 1
        self.model.prepack(self.spec.quantization or kernels.usual_mode(self.dtype, torch.device("cpu")))
        return source

    @property
    def is_last(self) -> bool:
        return self.spec.last == self.num_layers

    def entry_shape(self, num_tokens: int) -> tuple[int, int, int]:
        """Of what the stage before sends."""
        return self.streams, num_tokens, self.model.hidden_size

    @torch.inference_mode()
    def begin(self, step: int, copies: Sequence[Sequence[int]]) -> None:
        """Carry out the block copies of a step, once however often the step is begun."""
        if int(self.ledger[COPIED_STEP]) < step:
            local = {number: i for i, (number, _) in enumerate(self.groups)}
            self.pool.copy_blocks([(local[g], source, target) for g, source, target in copies if g in local])
            self.ledger[COPIED_STEP] = step

    def done(self, step: int) -> None:
        self.ledger[DONE_STEP] = step

    @torch.inference_mode()
    def forward(self, batch: Batch, received: Tensor | None) -> Tensor:
        """[streams, T, D] for the next stage, or hidden [T, D] from the last."""
        if received is not None:
            parts = tuple(received.unbind(0))
            self.model.layers[0].received = parts if self.streams > 1 else parts[0]  # type: ignore[union-attr]
        own = tuple(batch.groups[number] for number, _ in self.groups)
        group_of_layer = [0] * len(self.model.attention)
        for i, (_, group) in enumerate(self.groups):
            for layer in group.layers:
                group_of_layer[layer] = i
        here = Batch(
            batch.spans, batch.tokens_T, batch.positions_T, batch.span_starts, batch.contexts_R, own,
            batch.logit_rows_L, batch.mask_TP,
        )  # fmt: skip
        paged = PagedAttend(self.model, self.pool, group_of_layer, self.spec.block_size, here)
        first = self.spec.first

        def attend(layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor | None) -> Tensor:
            return paged(layer - first, q_THK, k_TGK, v_TGV)

        whole: Attend = attend
        hidden_TD = self.model(batch.tokens_T, batch.positions_T, whole)
        return hidden_TD if self.is_last else torch.stack(self.model.layers[-1].noted)  # type: ignore[arg-type,union-attr]

    @torch.inference_mode()
    def logits(self, hidden_TD: Tensor, rows_L: Tensor) -> Tensor:
        return self.model.logits(hidden_TD.index_select(0, rows_L))

    def blocks(self, number: int) -> list[Tensor]:
        """Views [blocks, block_size, G, K] of every pool here of group `number` of the whole model."""
        for i, (own, _) in enumerate(self.groups):
            if own == number:
                return [p.view(-1, self.spec.block_size, *p.shape[1:]) for p in self.pool.tensors(i)]
        return []


def allocate_tables(model: nn.Module) -> None:
    """Make rotary tables and the like anew: they are no parameters and were only sketched on the meta device."""
    for module in model.modules():
        rebuild = getattr(module, "rebuild", None)
        if rebuild is not None:
            rebuild("cpu")


def batch_arrays(batch: Batch) -> tuple[dict[str, Any], list[np.ndarray]]:
    """A batch as a message: what `batch_from` makes again. Spans stay with the sender."""
    arrays = [batch.tokens_T, batch.positions_T, batch.span_starts, batch.contexts_R, batch.logit_rows_L]
    for tables in batch.groups:
        arrays += [tables.slots_T, tables.tables_RB]
    if batch.mask_TP is not None:
        arrays.append(batch.mask_TP)
    return {"groups": len(batch.groups), "masked": batch.mask_TP is not None}, [a.numpy() for a in arrays]


def batch_from(head: dict[str, Any], arrays: list[np.ndarray]) -> Batch:
    tokens_T, positions_T, starts, contexts_R, rows_L, *rest = map(torch.from_numpy, arrays)
    groups = tuple(KVTables(rest[2 * g], rest[2 * g + 1]) for g in range(head["groups"]))
    mask_TP = rest[-1] if head["masked"] else None
    return Batch((), tokens_T, positions_T, starts, contexts_R, groups, rows_L, mask_TP)
