"""Block graphs that run as Triton kernels, and programs of them; the text of a kernel is made in `triton_source.py`.

The source is a file in the cache, so it can be read. TRITON_INTERPRET=1 runs it on a CPU.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wager.errors import UsageError
from wager.graph.execute import operator
from wager.graph.lower.triton_source import Launch, block_source, default_launch
from wager.graph.operators import Shape
from wager.graph.program import Node, Program
from wager.native import build


def available() -> bool:
    return importlib.util.find_spec("triton") is not None


class TritonKernel:
    """One compiled kernel node on tensors of one device, read where they lie."""

    def __init__(self, node: Node, arguments: Sequence[Shape], launch: Launch | None = None):
        """`launch`: without one, a start that fits. Raises UsageError when Triton is not installed or the kernel has no Triton form."""
        if not available():
            raise UsageError("Triton is not installed; pip install triton, or use the C++ form")
        assert node.block is not None
        self.block, self.arguments, self.launch = node.block, list(arguments), launch
        self.text = block_source(self.block, self.arguments)
        self.output_shapes = [self.block.output_shape(n) for n in self.block.outputs]
        self._forms: dict[Any, Any] = {}

    def form(self, args: Sequence[Tensor]) -> Any:
        """The Triton function for arguments with these strides and types."""
        layouts, kinds = tuple(a.stride() for a in args), tuple(a.dtype for a in args)
        if (layouts, kinds) not in self._forms:
            self.text = block_source(self.block, self.arguments, "wager_kernel", layouts, kinds)
            self._forms[layouts, kinds] = load_source(self.text).wager_kernel
        return self._forms[layouts, kinds]

    def options(self, args: Sequence[Tensor]) -> dict[str, int]:
        launch = self.launch or default_launch(self.block, min(a.dtype.itemsize for a in args))
        return {"num_warps": launch.warps, "num_stages": launch.stages}

    def prepare(self, args: Sequence[Tensor], kinds: Sequence[torch.dtype]) -> Any:
        """Compiles for such arguments and results (on a GPU) without running; what Triton made, or None under its interpreter."""
        warm = getattr(self.form(args), "warmup", None)
        if warm is None or os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return warm(*(a.dtype for a in args), *kinds, grid=self.block.grid, **self.options(args))

    def __call__(self, *args: Tensor, kinds: Sequence[torch.dtype] | None = None) -> list[Tensor]:
        """The results, of these types (the first argument's unless said)."""
        kinds = kinds or [args[0].dtype] * len(self.output_shapes)
        out = [torch.empty(s, dtype=k, device=args[0].device) for s, k in zip(self.output_shapes, kinds, strict=True)]
        self.form(args)[self.block.grid](*args, *out, **self.options(args))
        return out


def load_source(text: str) -> Any:
    """The generated module, from a file in the cache (Triton reads its source)."""
    if not available():
        raise UsageError("Triton is not installed; pip install triton, or use the C++ form")
    digest = hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
    folder = build.cache_dir() / "generated" / digest
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "wager_kernel.py"
    if not path.exists():
        temporary = folder / f"wager_kernel.{os.getpid()}.tmp"
        temporary.write_text(text)
        temporary.replace(path)
    spec = importlib.util.spec_from_file_location(f"wager_kernel_{digest}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _shadow(x: Tensor) -> Tensor:
    """A tensor of the same shape, strides and type without memory."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


class TritonProgram:
    """A program whose kernel nodes run as Triton and whose other operators run as torch; call with the non-constant inputs in order."""

    def __init__(
        self,
        program: Program,
        constants: Mapping[str, Tensor] | None = None,
        launches: Sequence[Launch] | None = None,
    ):
        """`launches`: one for each kernel, in order."""
        self.program, self.constants = program, dict(constants or {})
        at = [i for i, n in enumerate(program.nodes) if n.op == "kernel"]
        chosen = list(launches) if launches is not None else [None] * len(at)
        self.kernels = {
            i: TritonKernel(program.nodes[i], [program.nodes[j].shape for j in program.nodes[i].inputs], launch)
            for i, launch in zip(at, chosen, strict=True)
        }
        self.shapes = [program.nodes[i].shape for i in self._given()]
        self.wide = {i: self._wide(i) for i in at}

    def _given(self) -> list[int]:
        return [i for i in self.program.input_positions if self.program.nodes[i]["name"] not in self.constants]

    def _wide(self, kernel: int) -> list[bool]:
        """For each result of a kernel, whether only kernels read it: it then stays float32."""
        nodes, found = self.program.nodes, []
        for index in range(len(self.kernels[kernel].output_shapes)):
            results = {
                i for i, n in enumerate(nodes) if n.op == "result" and n.inputs[0] == kernel and n["index"] == index
            }
            readers = [n.op for n in nodes if results & set(n.inputs)]
            found.append(not results & set(self.program.outputs) and all(op == "kernel" for op in readers))
        return found

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Raises UsageError for inputs of other shapes than the program's."""
        return self._run(inputs, lambda kernel, args, kinds: kernel(*args, kinds=kinds))

    def prepare(self, *inputs: Tensor) -> list[Any]:
        """Compiles every kernel for such inputs without running any (meta tensors do); what Triton made of each."""
        made: list[Any] = []

        def compile_only(kernel: TritonKernel, args: Sequence[Tensor], kinds: Sequence[torch.dtype]) -> list[Tensor]:
            made.append(kernel.prepare(args, kinds))
            shapes = zip(kernel.output_shapes, kinds, strict=True)
            return [torch.empty(s, dtype=k, device="meta") for s, k in shapes]

        self._run([_shadow(x) for x in inputs], compile_only)
        return made

    def _run(self, inputs: Sequence[Tensor], launch: Any) -> list[Tensor]:
        for x, shape in zip(inputs, self.shapes, strict=True):
            if tuple(x.shape) != tuple(shape):
                raise UsageError(f"an input has shape {tuple(x.shape)}, compiled for {shape}")
        values: list[Any] = []
        given, device = iter(inputs), inputs[0].device
        for i, node in enumerate(self.program.nodes):
            args = [values[j] for j in node.inputs]
            if node.op == "input":
                name = node["name"]
                known = self.constants.get(name)
                values.append(next(given) if known is None else _shadow(known) if device.type == "meta" else known)
            elif node.op == "const":
                values.append(torch.full((), node["value"], device=device))
            elif node.op == "kernel":
                kinds = [torch.float32 if wide else inputs[0].dtype for wide in self.wide[i]]
                values.append(launch(self.kernels[i], args, kinds))
            elif node.op == "result":
                values.append(args[0][node["index"]])
            else:
                values.append(operator(node)(*args))
        return [values[i] for i in self.program.outputs]
