"""Compiles generated C++ through the build service and calls it on torch tensors."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from wager.graph.interpret import cut_tiles
from wager.graph.lower.cpp import RUNTIME, block_source, panel_width, panels
from wager.graph.lower.peel import peel
from wager.graph.operators import Shape
from wager.graph.program import BlockGraph, Node
from wager.native import build

FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fassociative-math", "-fno-signed-zeros")
POINTER = ctypes.c_void_p


@cache
def runtime_text() -> str:
    return RUNTIME.read_text()


def compile_source(functions: Sequence[str], stem: str = "wager_program") -> ctypes.CDLL:
    """Loads a library with these functions (the runtime is put in front). Raises BuildError."""
    text = "\n".join([runtime_text(), *functions])
    digest = hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
    folder = build.cache_dir() / "generated" / digest
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.cpp"
    if not path.exists():
        temporary = folder / f"{stem}.{id(functions)}.tmp"
        temporary.write_text(text)
        temporary.replace(path)
    return build.load(stem, [path], FLAGS)


class NativeKernel:
    """One compiled kernel node. Arguments are contiguous float32 tensors on the CPU; results are new tensors or those given."""

    def __init__(self, node: Node, arguments: Sequence[Shape], constant: Sequence[int] = ()):
        """`constant`: arguments whose values never change; they are packed as tiles once, by `pack`."""
        assert node.block is not None
        self.block, self.arguments = peel(node.block), list(arguments)
        self.packed = tuple(a for a in constant if _packable(self.block, a))
        self.panels = panels(self.block, self.arguments, self.packed)
        self.text = block_source(self.block, self.arguments, "wager_kernel", self.packed)
        self.function = compile_source([self.text]).wager_kernel
        self.function.argtypes, self.function.restype = (POINTER, POINTER), None
        self.output_shapes = [self.block.output_shape(n) for n in self.block.outputs]
        self._in, self._out = (POINTER * len(self.arguments))(), (POINTER * len(self.output_shapes))()

    def pack(self, arg: int, x: Tensor) -> Tensor:
        """The tensor in the order in which blocks read it."""
        if arg not in self.packed:
            return x.contiguous()
        node = next(n for n in self.block.inputs if n["arg"] == arg)
        tiles = cut_tiles(x.numpy(), node["imap"], node["fmap"], self.block)
        if arg in self.panels:
            *lead, rows, columns = tiles.shape
            tiles = tiles.reshape(*lead, rows, columns // panel_width(), panel_width()).swapaxes(-3, -2)
        return torch.from_numpy(tiles.copy()).contiguous()

    def __call__(self, *args: Tensor, out: Sequence[Tensor] | None = None) -> list[Tensor]:
        results = list(out) if out is not None else [torch.empty(s) for s in self.output_shapes]
        kept = [a if a.is_contiguous() else a.contiguous() for a in args]
        for i, a in enumerate(kept):
            self._in[i] = a.data_ptr()
        for i, r in enumerate(results):
            self._out[i] = r.data_ptr()
        self.function(self._in, self._out)
        return results


def _packable(block: BlockGraph, arg: int) -> bool:
    """Only one input node reads it, and it is cut at all."""
    readers = [n for n in block.inputs if n["arg"] == arg]
    return len(readers) == 1 and any(t >= 0 for t in (*readers[0]["imap"], readers[0]["fmap"]))
