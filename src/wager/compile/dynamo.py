"""What `torch.compile(model, backend=wager.compile.backend)` runs: a graph whose parameters and buffers are constants until they change.

Dynamo passes a module's parameters as inputs, and shows a backend no values. So the graph is compiled at its first call, with the parameters
frozen; later calls look only at whether they are still the same memory and version.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wager.errors import UsageError

log = logging.getLogger(__name__)
CHANGES = 3  # so often weights may change before the graph is left to eager torch


class _Bound(nn.Module):
    """The graph with some inputs held."""

    def __init__(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor], held: Sequence[int]):
        super().__init__()
        self.graph, self.count, self.held = graph, len(inputs), frozenset(held)
        for i in held:
            self.register_buffer(f"held{i}", inputs[i].detach())

    def forward(self, *inputs: Tensor) -> Any:
        rest = iter(inputs)
        return self.graph(*(getattr(self, f"held{i}") if i in self.held else next(rest) for i in range(self.count)))


def is_static(x: Any) -> bool:
    """A parameter or buffer of the module that Dynamo traced."""
    return isinstance(x, nn.Parameter) or getattr(x, "_dynamo_static_input_type", None) is not None


class Frozen:
    """Callable with all inputs of the graph. A graph that cannot be imported runs as it is, and one warning says why."""

    def __init__(self, graph: torch.fx.GraphModule, compile: Callable[[nn.Module, list[Tensor]], Any]):
        self.graph, self.compile = graph, compile
        self.compiled: Any = None
        self.stamp: list[tuple[int, int, int]] | None = None
        self.changes, self.eager, self.warned = 0, False, False

    def __call__(self, *inputs: Any) -> Any:
        if self.eager:
            return self.graph.forward(*inputs)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            if not self.warned:
                log.warning("wager runs a graph eagerly while gradients are on; call it under torch.no_grad()")
            self.warned = True
            return self.graph.forward(*inputs)
        stamp = [(i, x.data_ptr(), x._version) for i, x in enumerate(inputs) if is_static(x)]
        if stamp != self.stamp and not self._prepare(inputs, stamp):
            return self.graph.forward(*inputs)
        held = {i for i, _, _ in stamp}
        outputs = self.compiled(*(x for i, x in enumerate(inputs) if i not in held))
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    def _prepare(self, inputs: Sequence[Any], stamp: list[tuple[int, int, int]]) -> bool:
        self.changes += 1
        try:
            if self.changes > CHANGES:
                raise UsageError(f"its parameters changed {CHANGES} times; compile it when they stay")
            if not all(isinstance(x, Tensor) for x in inputs):
                raise UsageError(
                    "a dynamic size is an input of the graph; mark the model static with torch.compile(dynamic=False)"
                )
            held = [i for i, _, _ in stamp]
            rest = [x.detach() for i, x in enumerate(inputs) if i not in held]
            self.compiled, self.stamp = self.compile(_Bound(self.graph, inputs, held), rest), stamp
        except UsageError as error:
            log.warning("wager leaves a graph to eager torch: %s", error)
            self.eager = True
        return not self.eager
