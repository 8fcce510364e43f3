"""Shapes come from runs, not from imagination: what every operator of an architecture was built and called with.

A record holds no values, only what is needed to make similar ones: dtype, shape, memory order, range, and whether integers ascend.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from wager.errors import WagerError
from wager.kernels.referee.architectures import Architecture
from wager.kernels.referee.operators import Operator

CASES = 5  # timed cases of an operator, at most


@dataclass(frozen=True)
class TensorSpec:
    """A tensor like the captured one. `order` lists dimensions from the outermost in memory; `low`, `high` are the first and last of ascending integers."""

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    low: float
    high: float
    mean: float = 0.0
    std: float = 0.0
    ascending: bool = False

    def make(self, generator: Generator, scale: float = 1.0) -> Tensor:
        dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point:
            drawn = torch.randn(self.shape, generator=generator) * self.std + self.mean
            value = (drawn.clamp(self.low, self.high) * scale).to(dtype)
        elif self.ascending:
            inner = torch.randint(int(self.low), int(self.high) + 1, self.shape, generator=generator).sort().values
            value = inner.index_fill(0, torch.tensor([len(inner) - 1]), int(self.high)).to(dtype)
            value[0] = int(self.low)
        else:
            value = torch.randint(int(self.low), int(self.high) + 1, self.shape, generator=generator).to(dtype)
        inverse = [self.order.index(d) for d in range(len(self.order))]
        return value.permute(self.order).contiguous().permute(inverse)


@dataclass(frozen=True)
class Case:
    """One way an operator is built and called. A None input is an argument left out."""

    operator: str
    init: dict[str, Any]
    inputs: tuple[TensorSpec | None, ...]
    count: int = 1
    held_out: bool = False
    sources: tuple[str, ...] = field(default=())

    @property
    def elements(self) -> int:
        return sum(_size(s) for s in self.inputs if s)

    @property
    def key(self) -> str:
        return json.dumps(
            [self.operator, self.init, [s and [s.dtype, s.shape, s.order] for s in self.inputs]], sort_keys=True
        )

    @property
    def label(self) -> str:
        return " ".join("x".join(map(str, s.shape)) for s in self.inputs if s)

    def make_inputs(self, seed: int, scale: float = 1.0) -> list[Tensor | None]:
        generator = Generator().manual_seed(seed)
        return [None if s is None else s.make(generator, scale) for s in self.inputs]


def _size(spec: TensorSpec) -> int:
    total = 1
    for n in spec.shape:
        total *= n
    return total


def describe(tensor: Tensor) -> TensorSpec:
    order = tuple(sorted(range(tensor.dim()), key=lambda d: (-tensor.stride(d), d)))
    flat = tensor.detach().double().flatten()
    integer = not tensor.dtype.is_floating_point
    ascending = integer and tensor.dim() == 1 and len(flat) > 1 and bool((flat.diff() >= 0).all())
    return TensorSpec(
        str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), order, float(flat.min()), float(flat.max()),
        0.0 if integer else float(flat.mean()), 0.0 if integer or len(flat) < 2 else float(flat.std()), ascending,
    )  # fmt: skip


@torch.no_grad()
def capture(architecture: Architecture, held_out: bool = False, seed: int = 0) -> list[Case]:
    """Run once and return the distinct calls of its operators with their counts."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = architecture.build().eval()
    found: dict[str, Case] = {}

    def record(module: Operator, args: tuple[Any, ...]) -> None:
        case = Case(
            type(module).__name__,
            module.recipe,
            tuple(None if a is None else describe(a) for a in args),
            1,
            held_out,
            (architecture.name,),
        )
        known = found.get(case.key)
        found[case.key] = case if known is None else _counted(known, known.count + 1)

    hooks = [m.register_forward_pre_hook(record) for m in model.modules() if isinstance(m, Operator)]
    model(*architecture.inputs(Generator().manual_seed(seed + 1), held_out))
    for hook in hooks:
        hook.remove()
    return list(found.values())


def _counted(case: Case, count: int, sources: Iterable[str] = ()) -> Case:
    merged = tuple(dict.fromkeys((*case.sources, *sources)))
    return Case(case.operator, case.init, case.inputs, count, case.held_out, merged)


def merge(cases: Iterable[Case]) -> list[Case]:
    """Equal cases of several runs as one, counts added."""
    found: dict[tuple[str, bool], Case] = {}
    for case in cases:
        at = (case.key, case.held_out)
        found[at] = _counted(found[at], found[at].count + case.count, case.sources) if at in found else case
    return list(found.values())


def select(cases: Sequence[Case], operator: str, most: int = CASES) -> tuple[list[Case], list[Case]]:
    """(timed cases, held-out cases) of an operator: smallest, largest, median by elements, then the most frequent."""
    mine = merge(c for c in cases if c.operator == operator)
    timed, held = ([c for c in mine if c.held_out is flag] for flag in (False, True))
    by_size = sorted(timed, key=lambda c: c.elements)
    picked = [by_size[i] for i in (0, -1, len(by_size) // 2)] if by_size else []
    picked += sorted(timed, key=lambda c: -c.count)
    timed_keys = {c.key for c in timed}
    held = [c for c in sorted(held, key=lambda c: -c.count) if c.key not in timed_keys]
    return list({c.key: c for c in picked}.values())[:most], held[: max(1, most // 2)]


def save(cases: Sequence[Case], path: Path) -> None:
    text = json.dumps({"version": 1, "cases": [asdict(c) for c in cases]}, indent=1)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n")
    temporary.replace(path)


def load(path: Path) -> list[Case]:
    """Raises WagerError when the file is not a capture."""
    try:
        record = json.loads(path.read_text())
        return [_case(entry) for entry in record["cases"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WagerError(f"{path} is not a capture ({error}); make one with `wager kernels capture`") from None


def _case(entry: dict[str, Any]) -> Case:
    specs = tuple(
        None if s is None else TensorSpec(**{**s, "shape": tuple(s["shape"]), "order": tuple(s["order"])})
        for s in entry["inputs"]
    )
    return Case(**{**entry, "inputs": specs, "sources": tuple(entry["sources"])})
