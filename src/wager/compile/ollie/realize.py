"""Makes a derived expression run: library operators, generated kernels, and weights re-laid-out once.

A matrix product with a constant right side has three forms, timed against each other once per shape: torch, oneDNN's packed linear, and our
own tiles. Their costs are remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from wager.compile.ollie import banded
from wager.graph import expression as ex
from wager.graph.expression import Read, Scope
from wager.graph.lower.banded import Rows
from wager.graph.lower.eoperator import EOperator, is_identity, leaf_tensors
from wager.graph.lower.library import NativeKernel
from wager.graph.program import BlockBuilder, Node
from wager.graph.timer import quick_time

WIDTH = 16


@dataclass
class Step:
    """One call at run time: `name` is computed by `run` from `inputs`."""

    name: str
    kind: str
    run: Callable[..., Tensor]
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Profiled:
    """What a step costs."""

    name: str
    kind: str
    seconds: float
    bytes_moved: int


class Plan:
    """A derived expression, compiled. Call with the non-constant input tensors by name; the result has the expression's shape."""

    def __init__(self, scope: Scope, constants: Mapping[str, Tensor]):
        self.scope = scope
        self.known: dict[str, Tensor] = {n: t.detach().float().contiguous() for n, t in constants.items()}
        self.steps: list[Step] = []
        self.scope = widen(scope, frozenset(constants))
        self.output = self._compute("out", self.scope)

    def _compute(self, name: str, scope: Scope) -> str:
        """Emits the steps for a scope; returns the name of its value."""
        if isinstance(scope.body, Read) and isinstance(scope.body.object, ex.Tensor) and is_identity(scope):
            source = self._tensor(scope.body.object)
            shape = scope.shape
            return self._add(Step(name, "view", lambda x: x.reshape(shape), (source,)))
        rows = banded.placed(scope)
        if rows is not None:
            assert isinstance(scope.body, Read) and isinstance(scope.body.object, ex.Tensor)
            return self._banded(name, scope.body.object, rows, scope.shape)
        leaves = leaf_tensors(scope)
        sources = tuple(self._tensor(t) for t in leaves)
        return self._add(Step(name, "eoperator", EOperator(scope, leaves), sources))

    def _add(self, step: Step) -> str:
        if all(i in self.known for i in step.inputs):
            self.known[step.name] = step.run(*(self.known[i] for i in step.inputs)).contiguous()
        elif not any(s.name == step.name for s in self.steps):
            self.steps.append(step)
        return step.name

    def _tensor(self, tensor: ex.Tensor) -> str:
        routine = tensor.source
        if routine is None or tensor.name in self.known or any(s.name == tensor.name for s in self.steps):
            return tensor.name
        if routine.kind == "eoperator":
            return self._compute(tensor.name, routine.expr)
        if routine.kind == "banded":
            return self._banded(tensor.name, tensor, None, tensor.shape)
        left, right = (self._tensor(t) for t in routine.inputs)
        if routine.kind == "conv":
            args = dict(routine.args)
            weight = self.known.get(right)
            return self._add(
                Step(
                    tensor.name,
                    "conv",
                    _conv(args, weight),
                    (left,) if weight is not None else (left, right),
                )
            )
        width = tensor.shape[-1]
        if right in self.known:
            b = self.known[right]
            if b.shape[-1] != width:
                b = F.pad(b, (0, width - b.shape[-1])).contiguous()
            m = routine.expr.loops[-2][2]
            form, run = best_product(m, b)
            return self._add(Step(tensor.name, f"matmul ({form})", run, (left,)))
        return self._add(Step(tensor.name, "matmul (torch)", torch.matmul, (left, right)))

    def _banded(self, name: str, tensor: ex.Tensor, out: Rows | None, shape: tuple[int, ...]) -> str:
        """A banded product; operands are read where their rows lie, and are laid out anew only where those are no runs."""
        assert tensor.source is not None
        held = [banded.rows_of(t) or (t, Rows.contiguous(*t.shape)) for t in tensor.source.inputs]
        run = banded.product(tensor, held[0][1], held[1][1], out, shape)
        return self._add(Step(name, "banded", run, tuple(self._tensor(t) for t, _ in held)))

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        values = {**self.known, **inputs}
        for step in self.steps:
            values[step.name] = step.run(*(values[i] for i in step.inputs))
        return values[self.output]

    def profile(self, inputs: Mapping[str, Tensor], rounds: int = 15) -> list[Profiled]:
        """Every step with its time, and the bytes that it has to read and write at least."""
        values, found = {**self.known, **inputs}, []
        for step in self.steps:
            args = [values[i] for i in step.inputs]
            values[step.name] = step.run(*args)
            moved = sum(t.numel() * t.element_size() for t in (*args, values[step.name]))
            seconds = quick_time(lambda step=step, args=args: step.run(*args), rounds=rounds)
            found.append(Profiled(step.name, step.kind, seconds, moved))
        return found

    @property
    def description(self) -> list[str]:
        return [f"{s.kind} {s.name}" for s in self.steps]


def widen(scope: Scope, constants: frozenset[str]) -> Scope:
    """Matrix products with a constant right side get rows of a multiple of the vector width (the added columns are never read)."""

    def visit(read: Read) -> Read:
        thing = read.object
        if isinstance(thing, Scope):
            return Read(replace(thing, body=ex.map_reads(thing.body, visit)), read.index)
        routine = thing.source
        narrow = routine is not None and routine.kind == "matmul" and len(thing.shape) == 2 and thing.shape[-1] % WIDTH
        if routine is None or not narrow:
            return read
        right = routine.inputs[1]
        if set(ex.inputs_of(right.source.expr) if right.source else [right.name]) <= constants:
            shape = (thing.shape[0], -(-thing.shape[1] // WIDTH) * WIDTH)
            return Read(replace(thing, shape=shape, pads=thing.pads), read.index)
        return read

    return replace(scope, body=ex.map_reads(scope.body, visit))


def _conv(args: Mapping, weight: Tensor | None) -> Callable[..., Tensor]:
    stride, padding, dilation = args["stride"], args["padding"], args["dilation"]

    def run(x_nhwc: Tensor, w: Tensor | None = None) -> Tensor:
        kernel = weight if w is None else w
        assert kernel is not None
        out = torch.convolution(x_nhwc.permute(0, 3, 1, 2), kernel, None, stride, padding, dilation, False, (0, 0), 1)
        return out.permute(0, 2, 3, 1).contiguous()

    return run


_FORMS: dict[tuple[int, ...], str] = {}


def best_product(m: int, b_KN: Tensor) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The fastest form of x[m, K] times this constant, by measurement."""
    makers = product_forms(m, b_KN)
    key = (m, *b_KN.shape, torch.get_num_threads())
    if key not in _FORMS:
        x = torch.randn(m, b_KN.shape[-2])
        times = {}
        for name, make in makers.items():
            form = make()
            times[name] = quick_time(lambda form=form: form(x), rounds=7)
        _FORMS[key] = min(times, key=lambda name: times[name])
    return _FORMS[key], makers[_FORMS[key]]()


def product_forms(m: int, b_KN: Tensor) -> dict[str, Callable[[], Callable[[Tensor], Tensor]]]:
    """Makers of the forms that this shape allows."""
    if b_KN.dim() != 2:
        return {"torch": lambda: lambda x: torch.matmul(x, b_KN)}
    forms: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {"torch": lambda: lambda x: torch.mm(x, b_KN)}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        forms["onednn"] = lambda: _onednn_linear(m, b_KN)
    k, n = b_KN.shape
    for columns in (32, 64, 96, 48, 16):
        if n % columns == 0:
            whole = [m] if m <= 256 else []
            for rows in [*whole, *[t for t in (64, 32, 49) if m % t == 0 and t < m][:1]] or [m]:
                forms[f"tiles {rows}x{columns}"] = lambda rows=rows, columns=columns: _tiles(m, b_KN, rows, columns)
            if columns in (32, 96):
                break
    return forms


def _onednn_linear(m: int, b_KN: Tensor) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(b_KN.t().contiguous(), m)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _tiles(m: int, b_KN: Tensor, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
    k, n = b_KN.shape
    build = BlockBuilder([(m, k), (k, n)], (n // columns, m // rows, 1))
    x, w = build.input(0, (-1, 0, -1)), build.input(1, (1, -1, -1))
    build.output(build.accum(build.matmul(x, w)), (1, 0, -1))
    kernel = NativeKernel(Node("kernel", (0, 1), (), (), build.build()), [(m, k), (k, n)], [1])
    kernel.bind(1, b_KN)
    return lambda x: kernel(x)[0]
