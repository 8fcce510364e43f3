"""Chains of window products as native code: structures that the C++ reads, weights packed once, one call for a whole chain.

An operator says which buffer it reads and writes. `Chain` owns the buffers between operators, so that a network of convolutions is one call
without allocation, layout change or return to Python. fp32, channels last inside. The C++ side: windows.h, winograd.h.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wager.graph.lower import filtering
from wager.graph.lower.library import compile_source
from wager.graph.lower.pages import resident

ACTIVATIONS = {n: i for i, n in enumerate(("", "relu", "prelu", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh"))}
POINTER, LONG = ctypes.c_void_p, ctypes.c_long
MAX_TAPS = 64


class _Epilogue(ctypes.Structure):
    _fields_ = [("bias", POINTER), ("slope", POINTER), ("activation", LONG)]


class _Group(ctypes.Structure):
    _fields_ = [("pixels", LONG), *((n, POINTER) for n in ("base", "mask", "place", "weight", "delta"))]


_WINDOW = (
    "repeats", "in_step", "out_step", "groups", "taps", "channels", "features", "feature_step", "rows", "row_step",
)  # fmt: skip


class _Window(ctypes.Structure):
    _fields_ = [
        *((n, LONG) for n in _WINDOW),
        *(("copy", POINTER), ("dot", LONG), ("group", POINTER), ("epilogue", _Epilogue)),
    ]


_WINOGRAD = (
    *("height", "width", "channels", "features", "in_step", "out_step", "tile", "window", "tiles", "block", "alone"),
    "weights",
)


class _Winograd(ctypes.Structure):
    _fields_ = [
        *((n, LONG) for n in _WINOGRAD),
        *((n, POINTER) for n in ("start", "weight", "lattice", "tiles_at", "scratch")),
        ("epilogue", _Epilogue),
    ]


class _Layout(ctypes.Structure):
    _fields_ = [("batch", LONG), ("rows", LONG), ("columns", LONG)]


class _Operation(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int64), ("source", ctypes.c_int64), ("target", ctypes.c_int64), ("what", POINTER)]


@cache
def library() -> Any:
    """The compiled kernels."""
    here = Path(__file__).parent
    parts = [
        (here / "windows.h").read_text(),
        filtering.source(),
        (here / "winograd.h").read_text(),
        filtering.dispatch(),
    ]
    loaded = compile_source(parts, "wager_windows", products=False)
    loaded.wager_chain.argtypes, loaded.wager_chain.restype = (POINTER, LONG, POINTER, POINTER, LONG), None
    return loaded


@cache
def width() -> int:
    """Features of a tile: two vectors of this processor."""
    return int(library().wager_width())


@dataclass(frozen=True)
class Epilogue:
    """What happens to a finished sum: a bias per feature, then an activation; `slope` per feature for prelu."""

    bias: np.ndarray | None = None
    activation: str = ""
    slope: np.ndarray | None = None


class Operator:
    """One step of a chain: a C structure and the arrays it points to (kept alive here)."""

    kind: int
    in_floats: int
    out_floats: int
    zeros: int = 0

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.structure: ctypes.Structure

    def at(self, array: np.ndarray | ctypes.Array) -> int:
        """The address of an array that stays alive with this operator."""
        self.kept.append(array)
        return array.ctypes.data if isinstance(array, np.ndarray) else ctypes.addressof(array)

    def epilogue(self, how: Epilogue, features: int) -> _Epilogue:
        padded = -(-features // 16) * 16 + 2 * width()

        def row(values: np.ndarray | None) -> int:
            full = np.zeros(padded, np.float32)
            if values is not None:
                full[:features] = values
            return self.at(resident(full))

        slope = row(how.slope) if how.slope is not None else None
        return _Epilogue(row(how.bias), slope, ACTIVATIONS[how.activation])


def blocks_of_features(weight_kcf: np.ndarray) -> np.ndarray:
    """[blocks, K, C, width] from [K, C, F]; the last block is padded with zeros."""
    k, c, f = weight_kcf.shape
    blocks = -(-f // width())
    padded = np.zeros((k, c, blocks * width()), np.float32)
    padded[:, :, :f] = weight_kcf
    return padded.reshape(k, c, blocks, width()).transpose(2, 0, 1, 3)


def vectors_of_channels(weight_tcf: np.ndarray) -> np.ndarray:
    """[taps, F, C] from [taps, C, F], C padded with zeros to whole vectors."""
    lanes = width() // 2
    short = -weight_tcf.shape[1] % lanes
    return np.pad(weight_tcf.transpose(0, 2, 1), ((0, 0), (0, 0), (0, short)))


@dataclass(frozen=True)
class Group:
    """Pixels that share weights: element offsets into the input and the output, which taps are inside (bits), weights [taps, c, f]."""

    base: np.ndarray
    mask: np.ndarray
    place: np.ndarray
    delta: np.ndarray
    weight_tcf: np.ndarray


@dataclass(frozen=True)
class Table:
    """A product over windows, enumerated. The groups' tables hold for one repeat; steps are in floats."""

    groups: tuple[Group, ...]
    channels: int
    features: int
    feature_step: int
    repeats: int
    in_step: int
    out_step: int
    in_floats: int
    out_floats: int


ALIASED_FLOATS = 1024  # rows this far apart share a set of the first-level cache; a tile reads more than a set holds
COPIED_FLOATS = 1 << 19  # larger inputs leave the second-level cache on the way
LEAST_USES = 256  # of a float of the input, to be worth a copy


def row_step(table: Table) -> int:
    """How far apart (in floats) rows of channels should lie when those of the input share a set of the cache; 0: as they are."""
    offsets = [table.in_floats, table.in_step, *(a for g in table.groups for a in (g.base, g.delta))]
    whole = all(not np.any(np.asarray(o) % table.channels) for o in offsets)
    used = table.features * len(table.groups[0].delta) >= LEAST_USES and table.in_floats <= COPIED_FLOATS
    return table.channels + 16 if whole and used and table.channels % ALIASED_FLOATS == 0 else 0


def spaced(table: Table, step: int) -> Table:
    """The table over an input whose rows of channels lie `step` floats apart."""

    def moved(floats: Any) -> Any:
        return floats // table.channels * step

    groups = tuple(replace(g, base=moved(g.base), delta=moved(g.delta)) for g in table.groups)
    return replace(table, groups=groups, in_step=moved(table.in_step))


class WindowOperator(Operator):
    """Direct sums over taps. `dot`: lanes run over channels, for few features. Rows that share a set of the cache are first moved apart."""

    kind = 0

    def __init__(self, table: Table, how: Epilogue, dot: bool = False):
        super().__init__()
        self.in_floats, self.out_floats, self.zeros = table.in_floats, table.out_floats, table.channels
        step = 0 if dot else row_step(table)
        rows = table.in_floats // table.channels if step else 0
        copy = self.at(resident(np.zeros(rows * step, np.float32))) if step else None
        table = spaced(table, step) if step else table
        groups = (_Group * len(table.groups))()
        for c, g in zip(groups, table.groups, strict=True):
            weight = vectors_of_channels(g.weight_tcf) if dot else blocks_of_features(g.weight_tcf)
            c.pixels, c.base, c.mask = len(g.base), self.at(g.base.astype(np.int32)), self.at(g.mask.astype(np.uint64))
            c.place, c.delta = self.at(g.place.astype(np.int32)), self.at(g.delta.astype(np.int64))
            c.weight = self.at(resident(weight.astype(np.float32)))
        taps = len(table.groups[0].delta)
        self.structure = _Window(
            *(table.repeats, table.in_step, table.out_step, len(groups), taps, table.channels, table.features),
            *(table.feature_step, rows, step, copy, int(dot), self.at(groups), self.epilogue(how, table.features)),
        )


@dataclass(frozen=True)
class Lattice:
    """Output points whose windows lie one tap apart in the input (see winograd.h). `weight` names its windows."""

    weight: int
    rows: int
    columns: int
    in_row: int
    in_column: int
    row_step: int
    column_step: int
    out_base: int
    out_row: int
    out_column: int


@dataclass(frozen=True)
class Filter:
    """A product over square windows that minimal filtering can do: weights [r, r, c, f] each, steps in floats."""

    lattices: tuple[Lattice, ...]
    weights_rscf: tuple[np.ndarray, ...]
    images: int
    height: int
    width: int
    in_step: int
    out_step: int
    out_floats: int


PRIVATE_FLOATS = 80 << 10
SHARED_FLOATS = 2 << 20


class WinogradOperator(Operator):
    """Minimal filtering in tiles of `tile` x `tile` outputs; `alone`: a thread takes its tiles through all three steps. Channels and features must be multiples of the vector."""

    kind = 1

    def __init__(self, what: Filter, how: Epilogue, tile: int, alone: bool):
        super().__init__()
        taps, _, channels, features = what.weights_rscf[0].shape
        self.in_floats, self.out_floats = what.images * what.in_step, what.out_floats
        points, padded = (tile + taps - 1) ** 2, -(-features // width()) * width()
        rows = [
            (n, at, i, j)
            for at in sorted(range(len(what.lattices)), key=lambda a: what.lattices[a].weight)
            for n in range(what.images)
            for i in range(0, what.lattices[at].rows, tile)
            for j in range(0, what.lattices[at].columns, tile)
        ]
        tiles = np.array(rows, np.int32)
        of_weight = np.array([x.weight for x in what.lattices])[tiles[:, 1]]
        start = np.searchsorted(of_weight, np.arange(len(what.weights_rscf) + 1)).astype(np.int64)
        per_tile = points * (channels + padded)
        private = max(1, PRIVATE_FLOATS // per_tile // 12) * 12
        threads = max(torch.get_num_threads(), 1)
        block = min(private if alone else max(48, SHARED_FLOATS // per_tile), len(tiles))
        scratch = np.zeros((threads if alone else 1) * points * (block * (channels + padded) + 32), np.float32)
        weights = [resident(self._pack(filtering.transform_weights(w, tile))) for w in what.weights_rscf]
        lattices = np.array([[getattr(x, n) for n in Lattice.__dataclass_fields__] for x in what.lattices], np.int64)
        self.kept += weights
        self.structure = _Winograd(
            *(what.height, what.width, channels, features, what.in_step, what.out_step, tile, taps, len(tiles)),
            *(
                block,
                int(alone),
                len(weights),
                self.at(start),
                self.at((POINTER * len(weights))(*(w.ctypes.data for w in weights))),
            ),
            *(self.at(lattices), self.at(tiles), self.at(resident(scratch)), self.epilogue(how, features)),
        )

    @staticmethod
    def _pack(weight_pcf: np.ndarray) -> np.ndarray:
        """[point, block, c, width]."""
        return np.ascontiguousarray(blocks_of_features(weight_pcf).transpose(1, 0, 2, 3))


class LayoutOperator(Operator):
    """[batch, rows, columns] to [batch, columns, rows]."""

    kind = 2

    def __init__(self, batch: int, rows: int, columns: int):
        super().__init__()
        self.in_floats = self.out_floats = batch * rows * columns
        self.structure = _Layout(batch, rows, columns)


class Chain:
    """Operators one after another. Call with a contiguous float32 tensor; the result is a new tensor of `shape`."""

    def __init__(self, operators: Sequence[Operator], shape: Sequence[int]):
        self.operators, self.shape, self.lock = list(operators), tuple(shape), threading.Lock()
        self.function, self.threads = library().wager_chain, max(torch.get_num_threads(), 1)
        self.between = [resident(np.zeros(op.out_floats, np.float32)) for op in self.operators[:-1]]
        self.zeros = resident(np.zeros(max([op.zeros for op in self.operators] + [1]) + 32, np.float32))
        self.calls = (_Operation * len(self.operators))(
            *(_Operation(op.kind, i, i + 1, ctypes.addressof(op.structure)) for i, op in enumerate(self.operators))
        )
        self.buffers = (POINTER * (len(self.operators) + 1))(None, *(b.ctypes.data for b in self.between), None)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty(self.shape)
        threads = min(self.threads, max(torch.get_num_threads(), 1))
        with self.lock:
            self.buffers[0], self.buffers[len(self.operators)] = x.data_ptr(), out.data_ptr()
            self.function(self.calls, len(self.operators), self.buffers, self.zeros.ctypes.data, threads)
        return out
