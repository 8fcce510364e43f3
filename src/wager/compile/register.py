"""What a search finds, written down as a kernel: a candidate file that the referee judges and the engine runs.

For each shape of an operator's inputs the search runs once, with the parameters as inputs, so that the kernel serves any weights. The file
holds the operator's plain form and the programs found; other shapes, types and devices go to the plain form. Nothing is trusted because it was
found: `wager kernels judge FILE --operator NAME` decides, and WAGER_CANDIDATES=FILE puts it into the engine.
"""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wager.compile.api import compile as optimise
from wager.errors import UsageError
from wager.graph.operators import Shape
from wager.graph.program import to_json
from wager.kernels.referee import operators as judged

HEAD = '''"""{name}, found by wager.compile for {count} of {cases} shapes; everything else runs in plain torch."""

import functools
import json
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wager.graph.execute import Executable
from wager.graph.program import from_json

Operator = nn.Module
PROGRAMS = json.loads({programs!r})
SHAPES = {{tuple(tuple(map(int, s.split("x"))) for s in key.split(";")): key for key in PROGRAMS}}


@functools.cache
def _found(key):
    return Executable(from_json(PROGRAMS[key]))


'''
TAIL = """

class _Plain({name}):
    pass


class {name}(_Plain):
    def forward(self, *inputs):
        tensors = (*inputs, *self.parameters())
        key = SHAPES.get(tuple(x.shape for x in tensors))
        if key is None or torch.is_grad_enabled() or any(x.dtype != torch.float32 or x.device.type != "cpu" for x in tensors):
            return super().forward(*inputs)
        return _found(key)(*tensors)[0]
"""


@dataclass(frozen=True)
class Case:
    """One shape: what the search says about it."""

    shapes: tuple[Shape, ...]
    used: str
    reason: str
    ratio: float


@dataclass(frozen=True)
class Registration:
    """Where the candidate file is, and what it holds."""

    operator: str
    path: Path
    cases: tuple[Case, ...]

    @property
    def found(self) -> int:
        return sum(c.used != "original" for c in self.cases)

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.found} of {len(self.cases)} shapes found, in {self.path}"]
        lines += [f"  {' '.join(map(_text, c.shapes))}: {c.used}, {c.ratio:.2f}x; {c.reason}" for c in self.cases]
        lines += [
            f"judge it: wager kernels judge {self.path} --operator {self.operator}",
            f"use it: WAGER_CANDIDATES={self.path}",
        ]
        return "\n".join(lines)


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def register(
    operator: str,
    shapes: Sequence[Sequence[Shape]],
    path: str | Path,
    recipe: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Registration:
    """Search a judged operator at each of `shapes` (a list of input shapes each) and write the candidate file.

    `recipe`: the operator's constructor arguments; `settings` go to `wager.compile`. Raises UsageError for an operator that is not judged, a
    constructor that refuses the recipe, or when the search found nothing for any shape (the reasons are in the message).
    """
    cls = getattr(judged, operator, None)
    if not (inspect.isclass(cls) and issubclass(cls, judged.Operator) and cls is not judged.Operator):
        known = ", ".join(
            sorted(n for n, c in vars(judged).items() if inspect.isclass(c) and issubclass(c, judged.Operator))
        )
        raise UsageError(f"operator {operator!r} is not judged; known: {known.replace('Operator, ', '')}")
    try:
        module = cls(**(recipe or {})).eval().requires_grad_(False)
    except TypeError as error:
        raise UsageError(f"{operator} cannot be built with {dict(recipe or {})}: {error}") from None
    programs: dict[str, str] = {}
    cases = []
    for inputs in shapes:
        case, program = _search(module, [torch.randn(s) for s in inputs], settings)
        cases.append(case)
        if program is not None:
            programs[";".join(map(_text, case.shapes))] = program
    if not programs:
        reasons = "; ".join(dict.fromkeys(c.reason for c in cases))
        raise UsageError(f"nothing to register for {operator}: {reasons}")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(candidate_source(operator, programs, len(cases)))
    temporary.replace(path)
    return Registration(operator, path, tuple(cases))


def _search(module: nn.Module, inputs: list[Tensor], settings: Mapping[str, Any]) -> tuple[Case, str | None]:
    names = [n for n, _ in module.named_parameters()]
    count = len(inputs)

    def function(*tensors: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, tensors[count:], strict=True)), tensors[:count])

    tensors = [*inputs, *(p.detach().float() for p in module.parameters())]
    done = optimise(function, tensors, **settings)
    report = done.report()
    case = Case(
        tuple(tuple(x.shape) for x in tensors),
        report.used,
        report.reason,
        report.original_ms / report.compiled_ms if report.compiled_ms else 1.0,
    )
    return case, None if report.used == "original" else to_json(done.program)


def candidate_source(operator: str, programs: Mapping[str, str], cases: int) -> str:
    """The file's text. `programs`: saved programs by the shapes of inputs and parameters, like "4x64;64"."""
    plain = textwrap.dedent(inspect.getsource(getattr(judged, operator)))
    head = HEAD.format(name=operator, count=len(programs), cases=cases, programs=json.dumps(programs))
    return head + plain + TAIL.format(name=operator)
