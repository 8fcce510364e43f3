"""Compiles generated C++ through the build service and calls it on torch tensors.

Products that generated kernels share are compiled once per machine (parts.cpp); many kernels are compiled together, as many libraries side by
side as there are cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wager.errors import BuildError
from wager.graph.interpret import cut_tiles
from wager.graph.lower.code import inner_last, panel_width
from wager.graph.lower.cpp import HEADERS, block_source
from wager.graph.lower.layout import packed_arguments
from wager.graph.lower.pages import resident
from wager.graph.lower.peel import peel
from wager.graph.lower.tiles import Layout, Order, panels, row_major
from wager.graph.operators import Shape
from wager.graph.program import BlockGraph, Node
from wager.native import build

FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fassociative-math", "-fno-signed-zeros")
POINTER = ctypes.c_void_p
NAME = "wager_kernel"


@cache
def header(name: str) -> str:
    """A header's text, to be put in front of generated code."""
    return re.sub(r'#pragma once\n|#include "\w+\.h"\n', "", (HEADERS / name).read_text())


@cache
def parts() -> Any:
    """The shared products; what is loaded later finds them by name."""
    path = build.build("wager_parts", [HEADERS / "parts.cpp"], FLAGS)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def compile_source(
    functions: Sequence[str], stem: str = "wager_program", products: bool = True, march: str = "native"
) -> ctypes.CDLL:
    """Loads a library with these functions (the runtime is put in front), for the compiler's -march. Raises BuildError."""
    text = "\n".join([header("functions.h"), *([header("gemm.h")] if products else []), *functions])
    digest = hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
    folder = build.cache_dir() / "generated" / digest
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.cpp"
    if not path.exists():
        temporary = folder / f"{stem}.{os.getpid()}-{threading.get_ident()}.tmp"  # others may be writing the same text
        temporary.write_text(text)
        temporary.replace(path)
    return build.load(stem, [path], FLAGS, march)


@dataclass(frozen=True)
class Generated:
    """A kernel node as C++ text, and what the text expects. `packed` arguments are tiles, those in `panels` panels of columns."""

    block: BlockGraph
    packed: frozenset[int]
    panels: frozenset[int]
    layout: Layout
    text: str


def generate(
    node: Node, arguments: Sequence[Shape], constant: Sequence[int] = (), layout: Layout | None = None
) -> Generated:
    """Raises UsageError for an operator without a C++ form."""
    assert node.block is not None
    block = peel(node.block)
    layout = layout or row_major(block, arguments)
    packed = packed_arguments(block, constant)
    text = block_source(block, arguments, NAME, sorted(packed), layout)
    return Generated(block, packed, panels(block, sorted(packed), layout), layout, text)


_FUNCTIONS: dict[str, Any] = {}


def functions(texts: Sequence[str]) -> list[Any]:
    """The compiled function of every text. What is not compiled yet is compiled together. Raises BuildError."""
    missing = [t for t in dict.fromkeys(texts) if t not in _FUNCTIONS]
    if missing:
        parts()
        libraries = min(len(missing), len(os.sched_getaffinity(0)))
        shares = [missing[n::libraries] for n in range(libraries)]
        with ThreadPoolExecutor(libraries) as pool:  # the system compiler works outside this process
            for share, loaded in zip(shares, pool.map(_compile, shares), strict=True):
                for text in share:
                    found = getattr(loaded, _named(text))
                    found.argtypes, found.restype = (POINTER, POINTER), None
                    _FUNCTIONS[text] = found
    return [_FUNCTIONS[t] for t in texts]


def _compile(share: Sequence[str]) -> ctypes.CDLL:
    renamed = [t.replace(NAME, _named(t)) for t in share]
    own = any(f"<{NAME}_e" in t for t in share)  # products with an epilogue are compiled with the kernel
    return compile_source([header("parts.h"), *renamed], products=own)


def _named(text: str) -> str:
    return f"{NAME}_{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def prepare(texts: Sequence[str]) -> None:
    """Compiles many kernels at once, so that making each one is quick; a text that does not compile is left to its own kernel to report."""
    try:
        functions(texts)
    except BuildError:
        return


class NativeKernel:
    """One compiled kernel node on float32 CPU tensors; results are new tensors or those given (row-major or as the layout says)."""

    def __init__(
        self,
        node: Node,
        arguments: Sequence[Shape],
        constant: Sequence[int] = (),
        layout: Layout | None = None,
    ):
        """`constant`: arguments whose values never change; they are laid out once, by `pack`."""
        self.generated = generate(node, arguments, constant, layout)
        self.block, self.packed = self.generated.block, self.generated.packed
        (self.function,) = functions([self.generated.text])
        self.output_shapes = [self.block.output_shape(n) for n in self.block.outputs]
        self._in, self._out = (POINTER * len(arguments))(), (POINTER * len(self.output_shapes))()
        given = self.generated.layout
        self._results = [None if o == tuple(range(len(o))) else o for o in given.results]
        self._held: dict[int, Tensor] = {}
        self._free: list[tuple[int, Order | None]] = []
        self._ask(range(len(arguments)))

    def _ask(self, arguments: Iterable[int]) -> None:
        """Which arguments every call passes, and their memory order where it is not row-major."""
        orders = self.generated.layout.arguments
        plain = [o == tuple(range(len(o))) for o in orders]
        self._free = [(i, None if plain[i] else orders[i]) for i in arguments]

    def bind(self, arg: int, x: Tensor) -> None:
        """Fixes a constant argument: it is laid out here, once, and calls no longer pass it."""
        self._held[arg] = self.pack(arg, x)
        self._in[arg] = self._held[arg].data_ptr()
        self._ask(i for i, _ in self._free if i != arg)

    def pack(self, arg: int, x: Tensor) -> Tensor:
        """A constant in the order in which blocks read it."""
        if arg not in self.packed:
            return arranged(x, self.generated.layout.arguments[arg])
        at, node = next((i, n) for i, n in enumerate(self.block.nodes) if n.op == "input" and n["arg"] == arg)
        tiles = cut_tiles(x.numpy(), node["imap"], node["fmap"], self.block)
        if arg in self.generated.panels:
            *lead, rows, columns = tiles.shape
            tiles = tiles.reshape(*lead, rows, columns // panel_width(), panel_width()).swapaxes(-3, -2)
        else:
            lead, rank = tiles.ndim - len(node.shape), len(node.shape)
            order = inner_last(rank, self.generated.layout.inner[at])
            tiles = tiles.transpose(*range(lead), *(lead + d for d in order))
        return torch.from_numpy(resident(tiles))

    def __call__(self, *args: Tensor, out: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The arguments that are not bound, in order."""
        results = list(out) if out is not None else [self._empty(i) for i in range(len(self.output_shapes))]
        kept = []  # what is rearranged has to live until the call is over
        for (i, order), a in zip(self._free, args, strict=True):
            if i not in self.packed and not (a.is_contiguous() if order is None else a.permute(order).is_contiguous()):
                a = a.contiguous() if order is None else arranged(a, order)
                kept.append(a)
            self._in[i] = a.data_ptr()
        for i, r in enumerate(results):
            self._out[i] = r.data_ptr()
        self.function(self._in, self._out)
        return results

    def _empty(self, i: int) -> Tensor:
        order, shape = self._results[i], self.output_shapes[i]
        if order is None:
            return torch.empty(shape)
        return torch.empty([shape[d] for d in order]).permute(inverse(order))


def arranged(x: Tensor, order: Order) -> Tensor:
    """The same tensor, lying in memory in this order of dimensions."""
    return x.permute(order).contiguous().permute(inverse(order))


def inverse(order: Order) -> list[int]:
    return sorted(range(len(order)), key=lambda d: order[d])
