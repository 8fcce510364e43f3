"""Whole networks: cut at convolutions and constant products, derive each, keep what measures fastest.

Bias, batch normalisation and the activation behind a convolution are folded into it first. For every distinct convolution the contenders are
the library's own fused operator and the finalists of the derivation search with the activation inside the generated kernel; equal shapes are
searched once. Channels-last throughout.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wager.compile.ollie import definitions
from wager.compile.ollie.realize import Plan, best_product
from wager.compile.ollie.search import agrees, derive
from wager.graph.execute import UNARY, Executable
from wager.graph.expression import Scope
from wager.graph.program import Node, Program
from wager.graph.timer import time_together

ACTIVATIONS = frozenset(("relu", "tanh", "sigmoid", "silu", "leaky_relu", "gelu", "gelu_tanh"))
LIBRARY_ACTIVATIONS = {"relu": "relu", "tanh": "tanh", "sigmoid": "sigmoid"}


@dataclass
class Fused:
    """A convolution with what follows it; `last` is the node whose value it produces."""

    first: int
    last: int
    source: int
    node: Node
    weight: Tensor
    bias: Tensor | None
    activation: str = ""
    attrs: tuple[tuple[str, Any], ...] = ()
    slope: Tensor | None = None


@dataclass
class Choice:
    """What was chosen for one operator and why."""

    operator: str
    chosen: str
    baseline_ms: float
    chosen_ms: float
    states: int = 0
    candidates: int = 0
    path: tuple[str, ...] = ()
    limit: str = ""


@dataclass
class Network:
    """The optimised program and the choices made."""

    executable: Executable
    choices: list[Choice] = field(default_factory=list)


def optimize(
    program: Program,
    constants: Mapping[str, Tensor],
    *,
    max_depth: int = 5,
    budget_s: float = 60.0,
    keep: int = 6,
    eoperators: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Network:
    """Derives every convolution and constant product of the program. With `eoperators` off only named library operators are used."""
    plain = Executable(program, constants)
    program, values = plain.program, plain.values
    known = {i: v for i, v in enumerate(values) if isinstance(v, Tensor)}
    deadline = time.perf_counter() + budget_s
    overrides: dict[int, tuple[Callable[..., Tensor], tuple[int, ...]]] = {}
    choices: list[Choice] = []
    memory: dict[Any, tuple[str, Scope | None, Choice]] = {}
    for fused in find_convolutions(program, known):
        run, choice = _optimize_one(program, fused, max_depth, deadline, keep, eoperators, memory)
        overrides[fused.last] = (run, (fused.source,))
        choices.append(choice)
        if progress:
            progress(f"{choice.operator}: {choice.chosen}, {choice.baseline_ms:.3f} -> {choice.chosen_ms:.3f} ms")
    for i, node in enumerate(program.nodes):
        if node.op == "matmul" and node.inputs[1] in known and node.inputs[0] not in known and len(node.shape) == 2:
            form, run = best_product(node.shape[0], known[node.inputs[1]].contiguous())
            overrides[i] = (_contiguous(run), (node.inputs[0],))
            choices.append(Choice(f"matmul {node.shape}", f"matmul ({form})", 0.0, 0.0))
    return Network(rewired(program, constants, overrides), choices)


def _contiguous(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: run(x.contiguous())


def rewired(
    program: Program,
    constants: Mapping[str, Tensor],
    overrides: Mapping[int, tuple[Callable[..., Tensor], tuple[int, ...]]],
) -> Executable:
    """An executable in which some nodes are computed by other means; nodes that nothing reads any more are dropped."""
    executable = Executable(program, constants)
    steps = [(i, *overrides[i]) if i in overrides else (i, run, inputs) for i, run, inputs in executable.steps]
    needed, kept = set(program.outputs), []
    for i, run, inputs in reversed(steps):
        if i in needed:
            kept.append((i, run, inputs))
            needed.update(inputs)
    executable.steps = kept[::-1]
    executable.last_use = executable._last_uses()
    return executable


def find_convolutions(program: Program, known: Mapping[int, Tensor]) -> list[Fused]:
    """Convolutions with constant weights and one group, with the per-channel affine maps and the activation that follow."""
    users: dict[int, list[int]] = {}
    for i, node in enumerate(program.nodes):
        for j in node.inputs:
            users.setdefault(j, []).append(i)
    found = []
    for i, node in enumerate(program.nodes):
        if node.op != "conv" or node.inputs[1] not in known or node.get("groups", 1) != 1:
            continue
        if len(node.inputs) > 2 and node.inputs[2] not in known:
            continue
        if node["transposed"] and node["dilation"] != (1, 1):
            continue
        inputs = list(node.inputs)
        bias = known[inputs[2]] if len(inputs) > 2 else None
        found.append(_extend(program, known, users, Fused(i, i, inputs[0], node, known[inputs[1]], bias)))
    return found


def _extend(program: Program, known: Mapping[int, Tensor], users: Mapping[int, list[int]], fused: Fused) -> Fused:
    while not fused.activation and fused.last not in program.outputs and len(users.get(fused.last, [])) == 1:
        (at,) = users[fused.last]
        node = program.nodes[at]
        channels = fused.node.shape[1]
        others = [j for j in node.inputs if j != fused.last]
        if (
            node.op in ("add", "sub", "mul")
            and len(others) == 1
            and others[0] in known
            and node.shape == fused.node.shape
        ):
            value = known[others[0]]
            if value.numel() not in (1, channels) or (
                value.dim() > 1 and value.numel() > 1 and list(value.shape)[-3] != channels
            ):
                break
            if value.numel() > 1 and value.dim() < 3 or (node.op == "sub" and node.inputs[0] != fused.last):
                break
            _fold(fused, node.op, value.reshape(-1).expand(channels).double())
        elif node.op in ACTIVATIONS:
            fused.activation, fused.attrs = node.op, node.attrs
        elif node.op == "prelu" and node.inputs[1] in known:
            fused.activation, fused.slope = "prelu", known[node.inputs[1]].reshape(-1).expand(channels).contiguous()
        else:
            break
        fused.last = at
    return fused


def _fold(fused: Fused, op: str, value: Tensor) -> None:
    """The affine map moves into weight and bias (in float64, rounded once)."""
    bias = torch.zeros(fused.node.shape[1], dtype=torch.float64) if fused.bias is None else fused.bias.double()
    if op == "mul":
        shape = (1, -1, 1, 1) if fused.node["transposed"] else (-1, 1, 1, 1)
        fused.weight = (fused.weight.double() * value.reshape(shape)).float()
        bias = bias * value
    else:
        bias = bias + value if op == "add" else bias - value
    fused.bias = bias.float()


def expression(program: Program, fused: Fused) -> Scope:
    n, c, h, w = program.nodes[fused.source].shape
    node = fused.node
    if node["transposed"]:
        return definitions.conv_transpose(
            (n, h, w, c), tuple(fused.weight.shape), node["stride"], node["padding"], node["output_padding"]
        )
    return definitions.conv((n, h, w, c), tuple(fused.weight.shape), node["stride"], node["padding"], node["dilation"])


def library(fused: Fused, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """The library's operator with packed weights and, where it can, the activation fused."""
    node, weight, bias = fused.node, fused.weight.contiguous(memory_format=torch.channels_last), fused.bias
    stride, padding, dilation = list(node["stride"]), list(node["padding"]), list(node["dilation"])
    slope = fused.slope if fused.slope is not None else torch.zeros(1)
    extra, transposed = list(node["output_padding"]), bool(node["transposed"])
    inside = LIBRARY_ACTIVATIONS.get(fused.activation, "none")
    if fused.activation and inside == "none":
        after = (lambda x: torch.nn.functional.prelu(x, slope)) if fused.activation == "prelu" else (
            lambda x: UNARY[fused.activation](x, **dict(fused.attrs))
        )  # fmt: skip
    else:
        after = None
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available():
        act = UNARY.get(fused.activation)
        base = lambda x: torch.convolution(x, weight, bias, stride, padding, dilation, transposed, extra, 1)
        return lambda x: after(base(x)) if after else act(base(x)) if act else base(x)
    if transposed:
        packed = ops._reorder_convolution_transpose_weight(weight, padding, extra, stride, dilation, 1, list(shape))
        run = lambda x: ops._convolution_transpose_pointwise(
            x, packed, bias, padding, extra, stride, dilation, 1, inside, [], ""
        )
    else:
        packed = ops._reorder_convolution_weight(weight, padding, stride, dilation, 1, list(shape))
        run = lambda x: ops._convolution_pointwise(x, packed, bias, padding, stride, dilation, 1, inside, [], "")
    return (lambda x: after(run(x))) if after else run


def _optimize_one(
    program: Program, fused: Fused, max_depth: int, deadline: float, keep: int, eoperators: bool, memory: dict
) -> tuple[Callable[[Tensor], Tensor], Choice]:
    shape = program.nodes[fused.source].shape
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    base = library(fused, shape)
    kind = "transposed conv" if fused.node["transposed"] else "conv"
    name = f"{kind} {fused.node['stride']} {tuple(fused.weight.shape)} on {shape}"
    key = (shape, tuple(fused.weight.shape), fused.node.attrs, fused.activation, fused.bias is None)
    if key in memory:
        chosen, scope, old = memory[key]
        run = base if scope is None else _planned(scope, fused)
        return run, old
    left = deadline - time.perf_counter()
    scope = expression(program, fused)
    contenders: dict[str, Callable[[], Any]] = {"library": lambda: base(x)}
    runs: dict[str, Callable[[Tensor], Tensor]] = {"library": base}
    scopes: dict[str, Scope] = {}
    paths: dict[str, tuple[str, ...]] = {}
    states, limit = 0, "time budget" if left <= 0 else ""
    if left > 0:
        found = derive(scope, max_depth=max_depth, budget_s=min(left, 5.0), keep=keep)
        states, limit = found.states, found.limit
        rng = np.random.default_rng(0)
        for c in found.candidates:
            if not agrees(scope, c.scope, rng, 16):
                continue
            whole = _epilogue(c.scope, fused)
            plan = _planned(whole, fused)
            label = " | ".join(c.path)
            if not eoperators and any(d.startswith("eoperator") for d in plan_steps(plan)):
                continue
            runs[label], scopes[label], paths[label] = plan, whole, c.path
            contenders[label] = lambda plan=plan: plan(x)
    timing = time_together(contenders, rounds=15, budget_s=1.5) if len(contenders) > 1 else None
    best = "library"
    if timing is not None:
        best = min(timing.medians_s, key=lambda n: timing.medians_s[n])
        if timing.medians_s[best] > timing.medians_s["library"] * (1 - timing.noise):
            best = "library"
    base_ms = timing.medians_s["library"] * 1e3 if timing else 0.0
    choice = Choice(
        name,
        "library" if best == "library" else f"derived: {best}",
        base_ms,
        timing.medians_s[best] * 1e3 if timing else 0.0,
        states,
        len(scopes),
        paths.get(best, ()),
        limit,
    )
    memory[key] = (best, scopes.get(best), choice)
    return runs[best], choice


def _epilogue(scope: Scope, fused: Fused) -> Scope:
    if fused.bias is None and not fused.activation:
        return scope
    return definitions.with_epilogue(scope, fused.bias is not None, fused.activation, fused.attrs)


def plan_steps(run: Callable[[Tensor], Tensor]) -> list[str]:
    return run.plan.description if isinstance(run, _Planned) else []


@dataclass
class _Planned:
    """NCHW in and out over a plan that works channels last."""

    plan: Plan

    def __call__(self, x: Tensor) -> Tensor:
        return self.plan({"A": x.permute(0, 2, 3, 1).contiguous()}).permute(0, 3, 1, 2)


def _planned(scope: Scope, fused: Fused) -> _Planned:
    constants = {"K": fused.weight}
    if fused.bias is not None:
        constants["bias"] = fused.bias
    if fused.slope is not None:
        constants["slope"] = fused.slope
    return _Planned(Plan(scope, constants))
