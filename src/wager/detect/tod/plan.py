"""Detectors as data: a graph of operator calls, folded so that equal work is done once, run in an order that frees what is no longer needed.

    x = data()                                # a leaf
    nn = node("knn", x, k=20)                 # an operator call
    score = node("aggregate", nn, method="largest")

Nodes with the same operator, inputs and attributes are the same node. All neighbour searches over the same data become one search for
the largest k, of which the others are prefixes (`fold`). `explain` prints the folded plan with the bytes of each step before anything runs.
Exact. Source: TOD (arXiv 2110.14007).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wager.detect.tod.batching import Execution
from wager.errors import UsageError


@dataclass(frozen=True)
class Node:
    """One operator call; attributes are sorted pairs, so that equal calls are equal."""

    op: str
    inputs: tuple[Node, ...] = ()
    attrs: tuple[tuple[str, Any], ...] = ()

    def __getitem__(self, name: str) -> Any:
        return dict(self.attrs)[name]


@dataclass(frozen=True)
class Operator:
    """A tensor operator. run(execution, *inputs, **attrs) does it whole.

    A splittable operator also has map(inputs, start, stop, **attrs) for rows start..stop and merge(parts, **attrs); the runtime then cuts it so
    that bytes(rows, features, **attrs) of a part stay under the budget. Merging must give the bits that one part would have given.
    on_device, if there is one, is run for tensors of a torch device; it cuts its work itself.
    """

    name: str
    run: Callable[..., Any]
    bytes: Callable[..., int]
    map: Callable[..., Any] | None = None
    merge: Callable[..., Any] | None = None
    made_of: str = ""
    on_device: Callable[..., Any] | None = None

    @property
    def splittable(self) -> bool:
        return self.map is not None


OPERATORS: dict[str, Operator] = {}


def operator(
    name: str,
    *,
    bytes: Callable[..., int],
    map: Callable[..., Any] | None = None,
    merge: Callable[..., Any] | None = None,
    made_of: str = "",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as an operator."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        if (map is None) != (merge is None):
            raise UsageError(f"operator {name!r}: map and merge come together")
        OPERATORS[name] = Operator(name, run, bytes, map, merge, made_of)
        return run

    return register


def on_device(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the form of an operator that computes where `Execution.device` says."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        OPERATORS[name] = replace(OPERATORS[name], on_device=run)
        return run

    return register


def data() -> Node:
    """The training rows."""
    return Node("data")


def node(op: str, *inputs: Node, **attrs: Any) -> Node:
    """A call of a registered operator. Raises UsageError for an unknown one."""
    if op not in OPERATORS:
        raise UsageError(f"unknown operator {op!r}; registered are {', '.join(sorted(OPERATORS))}")
    return Node(op, inputs, tuple(sorted(attrs.items())))


def reachable(roots: Sequence[Node]) -> list[Node]:
    """Every node below the roots once, inputs before users."""
    order: dict[Node, None] = {}

    def visit(current: Node) -> None:
        if current in order:
            return
        for child in current.inputs:
            visit(child)
        order[current] = None

    for root in roots:
        visit(root)
    return list(order)


def fold(roots: Sequence[Node]) -> list[Node]:
    """The same roots with all neighbour searches of one input served by the widest."""
    widest: dict[tuple[Node, ...], int] = {}
    for n in reachable(roots):
        if n.op == "knn":
            widest[n.inputs] = max(widest.get(n.inputs, 0), n["k"])
    done: dict[Node, Node] = {}

    def rewrite(n: Node) -> Node:
        if n not in done:
            inputs = tuple(rewrite(child) for child in n.inputs)
            if n.op == "knn":
                wide = node("knn", *inputs, k=widest[n.inputs])
                done[n] = wide if wide["k"] == n["k"] else node("first", wide, k=n["k"])
            else:
                done[n] = replace(n, inputs=inputs)
        return done[n]

    return [rewrite(root) for root in roots]


@dataclass(frozen=True)
class Run:
    """Values of the roots, and what each step took."""

    values: list[Any]
    seconds: Mapping[str, float]
    facts: Mapping[str, Any]


def run(roots: Sequence[Node], x_ND: Any, execution: Execution, progress: Callable[[str], None] | None = None) -> Run:
    """Evaluate folded roots on the data; a value is dropped after its last use."""
    order = reachable(roots)
    uses: dict[Node, int] = dict.fromkeys(order, 0)
    for n in order:
        for child in n.inputs:
            uses[child] += 1
    for root in roots:
        uses[root] += 1
    values: dict[Node, Any] = {}
    seconds: dict[str, float] = {}
    facts: dict[str, Any] = {}
    there = Elsewhere(execution, x_ND) if execution.device != "cpu" else None
    compute = call if there is None else there.call
    for n in order:
        if n.op == "data":
            values[n] = x_ND
            continue
        if progress:
            progress(label(n))
        start = time.perf_counter()
        values[n] = compute(n, [values[c] for c in n.inputs], x_ND.shape, execution)
        seconds[label(n)] = seconds.get(label(n), 0.0) + time.perf_counter() - start
        if n.op == "knn":
            facts[label(n)] = values[n].facts
        for child in n.inputs:
            uses[child] -= 1
            if uses[child] == 0:
                del values[child]
    if there is not None:
        home = {root: there.fetched(values[root]) for root in roots}
        return Run([home[root] for root in roots], seconds, facts)
    return Run([values[root] for root in roots], seconds, facts)


class Elsewhere:
    """Evaluates operators on the execution's torch device; the rows are there once, and what has no form for it runs here."""

    def __init__(self, execution: Execution, x_ND: Any):
        from wager.detect.tod import device, device_operators

        assert device_operators  # importing it registers the forms
        self.device, self.x_ND, self._x_there = device.check(execution), x_ND, None
        self.placed, self.fetched, self.settle = device.placed, device.fetched, device.settle

    def input(self, value: Any) -> Any:
        if value is not self.x_ND:
            return self.placed(value, self.device)
        if self._x_there is None:
            self._x_there = self.placed(self.x_ND, self.device)
        return self._x_there

    def call(self, n: Node, inputs: list[Any], shape: tuple[int, int], execution: Execution) -> Any:
        """One operator, there if it can be."""
        run_there = OPERATORS[n.op].on_device
        if run_there is None:
            return call(n, [self.fetched(value) for value in inputs], shape, execution)
        value = run_there(execution, *[self.input(value) for value in inputs], **dict(n.attrs))
        self.settle(self.device)
        return value


def call(n: Node, inputs: list[Any], shape: tuple[int, int], execution: Execution) -> Any:
    """One operator, whole when it fits the budget, else in row parts."""
    op, attrs = OPERATORS[n.op], dict(n.attrs)
    rows, features = shape
    need = op.bytes(rows, features, **attrs)
    if op.map is None or op.merge is None or (need <= execution.budget_bytes and execution.batch_rows is None):
        return op.run(execution, *inputs, **attrs)
    step = execution.batch_rows or part_rows(op, rows, features, attrs, execution.budget_bytes)
    parts = [op.map(inputs, start, min(rows, start + step), **attrs) for start in range(0, rows, step)]
    return op.merge(parts, **attrs)


def part_rows(op: Operator, rows: int, features: int, attrs: dict[str, Any], budget: int) -> int:
    """The most rows of a part whose bytes fit."""
    step = rows
    while step > 1 and op.bytes(step, features, **attrs) > budget:
        step = max(1, step // 2)
    return step


def label(n: Node) -> str:
    shown = ", ".join(
        f"{k}=({len(v)} values)" if isinstance(v, tuple) and len(v) > 8 else f"{k}={v}" for k, v in n.attrs
    )
    return f"{n.op}({shown})"


def explain(roots: Mapping[str, Node], shape: tuple[int, int], execution: Execution | None = None) -> str:
    """The folded plan in words: each step once, its inputs, its bytes, its parts, and who uses it."""
    execution = execution or Execution()
    folded = dict(zip(roots, fold(list(roots.values())), strict=True))
    order = reachable(list(folded.values()))
    number = {n: i for i, n in enumerate(order)}
    before = len(reachable([n for root in roots.values() for n in [root]]))
    asked = sum(len(reachable([root])) - 1 for root in roots.values())
    lines = [
        f"{shape[0]} rows x {shape[1]} features; {asked} steps asked for, {before - 1} distinct, {len(order) - 1} after folding"
    ]
    for n in order:
        users = [name for name, root in folded.items() if n in reachable([root])]
        text = f"%{number[n]} = {label(n)}"
        if n.inputs:
            text += " of " + ", ".join(f"%{number[c]}" for c in n.inputs)
        if n.op in OPERATORS:
            op = OPERATORS[n.op]
            need = op.bytes(*shape, **dict(n.attrs))
            rows = (
                shape[0]
                if need <= execution.budget_bytes
                else part_rows(op, *shape, dict(n.attrs), execution.budget_bytes)
            )
            cut = f" in {-(-shape[0] // rows)} parts" if op.splittable and rows < shape[0] else ""
            text += f"   [{need / 1e6:.1f} MB{cut}]"
        lines.append(f"{text}   -> {', '.join(users)}")
    return "\n".join(lines)
