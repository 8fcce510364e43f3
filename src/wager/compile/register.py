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
from wager.kernels.referee.architectures import architectures
from wager.kernels.referee.capture import capture, select

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
"""Each program with the shapes of inputs and parameters and the settings (like eps) that it was found for."""


def _key(shapes, settings):
    return tuple(map(tuple, shapes)), tuple(sorted(settings.items()))


FOUND = {{_key(entry["shapes"], entry["settings"]): entry["program"] for entry in PROGRAMS}}


@functools.cache
def _compiled(key):
    return Executable(from_json(FOUND[key]))


'''
TAIL = """

class _Plain({name}):
    pass


class {name}(_Plain):
    def _serve(self, inputs):
        places = [(m._parameters, n) for m in self.modules() for n in m._parameters]
        tensors = (*inputs, *[held[n] for held, n in places])
        settings = {{k: v for k, v in vars(self).items() if k != "training" and isinstance(v, (bool, int, float, str))}}
        key = _key([x.shape for x in tensors], settings)
        fits = all(x.dtype is torch.float32 and x.is_cpu for x in tensors)
        return (_compiled(key), places) if fits and key in FOUND else None

    def forward(self, *inputs):
        if torch.is_grad_enabled():
            return super().forward(*inputs)
        first = inputs[0]
        served = self.__dict__.setdefault("_served", {{}})
        at = (*[x.shape for x in inputs], first.dtype, first.device)
        if at not in served:
            served[at] = self._serve(inputs)
        if served[at] is None:
            return super().forward(*inputs)
        run, places = served[at]
        return run(*inputs, *[held[n] for held, n in places])[0]

    def _apply(self, *args, **kwargs):
        self.__dict__.pop("_served", None)  # moved or converted: the parameters may be of another type now
        return super()._apply(*args, **kwargs)
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
    shapes: Sequence[Sequence[Shape]] | None,
    path: str | Path,
    recipe: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Registration:
    """Search a judged operator at each of `shapes` (a list of input shapes each) and write the candidate file.

    `recipe`: the operator's constructor arguments; without `shapes` the cases that the referee times are taken, each with its own recipe.
    `settings` go to `wager.compile`. Raises UsageError for an operator that is not judged, a
    constructor that refuses the recipe, or when the search found nothing for any shape (the reasons are in the message).
    """
    cls = getattr(judged, operator, None)
    if not (inspect.isclass(cls) and issubclass(cls, judged.Operator) and cls is not judged.Operator):
        known = ", ".join(
            sorted(n for n, c in vars(judged).items() if inspect.isclass(c) and issubclass(c, judged.Operator))
        )
        raise UsageError(f"operator {operator!r} is not judged; known: {known.replace('Operator, ', '')}")
    programs: list[dict[str, Any]] = []
    cases = []
    for made, inputs in _wanted(operator, recipe or {}) if shapes is None else [(recipe or {}, s) for s in shapes]:
        try:
            module = cls(**made).eval().requires_grad_(False)
        except TypeError as error:
            raise UsageError(f"{operator} cannot be built with {dict(made)}: {error}") from None
        if any(True for _ in module.buffers()):
            raise UsageError(
                f"{operator} keeps buffers, which a found program would have built in; it cannot be registered"
            )
        case, program = _search(module, [torch.randn(s) for s in inputs], settings)
        cases.append(case)
        if program is not None:
            entry = {"shapes": case.shapes, "settings": scalars(module), "program": program}
            programs += [entry] if entry not in programs else []
    if not programs:
        reasons = "; ".join(dict.fromkeys(c.reason for c in cases))
        raise UsageError(f"nothing to register for {operator}: {reasons}")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(candidate_source(operator, programs, len(cases)))
    temporary.replace(path)
    return Registration(operator, path, tuple(cases))


def _wanted(operator: str, recipe: Mapping[str, Any]) -> list[tuple[dict[str, Any], list[Shape]]]:
    """The calls that the referee times: constructor arguments (some replaced by `recipe`) and input shapes."""
    made = [c for a in architectures().values() for c in capture(a)]
    timed, _ = select(made, operator)
    found = [({**c.init, **recipe}, [s.shape for s in c.inputs if s is not None]) for c in timed]
    if not found:
        raise UsageError(f"no architecture of the referee calls {operator}; give --shapes")
    return found


def scalars(module: nn.Module) -> dict[str, Any]:
    """The settings that a program has built in: what else decides what the module computes, besides its parameters."""
    return {k: v for k, v in vars(module).items() if k != "training" and isinstance(v, bool | int | float | str)}


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


def candidate_source(operator: str, programs: Sequence[Mapping[str, Any]], cases: int) -> str:
    """The file's text. `programs`: saved programs, each with the `shapes` of inputs and parameters and the module's `settings`."""
    plain = textwrap.dedent(inspect.getsource(getattr(judged, operator)))
    head = HEAD.format(name=operator, count=len(programs), cases=cases, programs=json.dumps(programs))
    return head + plain + TAIL.format(name=operator)
