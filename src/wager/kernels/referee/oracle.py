"""What is right: the baseline in float64, and how far an honest float32 implementation may lie from it.

The bound follows the operator itself. Inputs and parameters are shaken by one unit of float32 rounding, independently and a few times, in
float64; the spread of each output is what a single rounding of every operand does to it. Sums of n terms in any order round n times
more, in a random walk, so the bound is the spread times a factor that grows with the square root of the longest dimension. It scales with
the data: there is no absolute tolerance that a constant could hide in, and half precision lies thousands of units outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from wager.kernels.referee import operators, recurrent
from wager.kernels.referee.capture import Case

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
PROBES = 4
SIGMAS = 10.0


def baseline_class(name: str) -> type[operators.Operator]:
    for module in (operators, recurrent):
        if hasattr(module, name):
            return getattr(module, name)
    raise KeyError(name)


def operator_names() -> list[str]:
    """Every judged operator."""
    classes = [c for module in (operators, recurrent) for c in vars(module).values() if isinstance(c, type)]
    return sorted({c.__name__ for c in classes if issubclass(c, operators.Operator) and c is not operators.Operator})


def make_state(case: Case, seed: int) -> dict[str, Tensor]:
    """Random parameters for a case, by the baseline's own initialisation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return {k: v.detach().clone() for k, v in baseline_class(case.operator)(**case.init).state_dict().items()}


@dataclass(frozen=True)
class Expectation:
    """Outputs in float64 and, for each element, the largest error that is still right."""

    outputs: list[Tensor]
    slack: list[Tensor]
    dtypes: list[torch.dtype]

    def worst(self, outputs: Sequence[Tensor]) -> float:
        """Largest error in units of its slack; infinite where something is not finite."""
        worst = 0.0
        for got, want, slack in zip(outputs, self.outputs, self.slack, strict=True):
            ratio = (got.double() - want).abs() / slack
            ratio = torch.where(torch.isfinite(got.double()), ratio, torch.inf)
            worst = max(worst, float(ratio.max()) if ratio.numel() else 0.0)
        return worst


@torch.no_grad()
def expect(case: Case, state: dict[str, Tensor], inputs: Sequence[Tensor | None], seed: int = 0) -> Expectation:
    """Raises whatever the baseline raises on these inputs."""
    dtype = next((t.dtype for t in inputs if t is not None and t.dtype.is_floating_point), torch.float32)
    unit = UNIT[dtype]
    wide = [_widen(t) for t in inputs]
    parameters = {k: _widen(v) for k, v in state.items()}
    exact = _run(case, parameters, wide)
    generator = Generator().manual_seed(seed)
    spread = [torch.zeros_like(y) for y in exact]
    for _ in range(PROBES):
        shaken = _run(
            case,
            {k: _shake(v, unit, generator) for k, v in parameters.items()},
            [_shake(t, unit, generator) for t in wide],
        )
        for total, y, moved in zip(spread, exact, shaken, strict=True):
            total += (moved - y).square() / PROBES
    longest = max((n for t in (*inputs, *state.values()) if t is not None for n in t.shape), default=1)
    factor = SIGMAS * (1 + math.sqrt(longest / 2))
    slack = [_slack(y, s, factor, unit) for y, s in zip(exact, spread, strict=True)]
    return Expectation(exact, slack, [dtype if y.dtype.is_floating_point else y.dtype for y in exact])


def _slack(y: Tensor, variance: Tensor, factor: float, unit: float) -> Tensor:
    """A few probes can miss by chance, so an output's spread is averaged with that of its row."""
    row = variance.mean(-1, keepdim=True) if variance.dim() else variance
    sigma = (0.5 * variance + 0.5 * row).sqrt()
    rms = y.square().mean().sqrt() if y.numel() else y.sum()
    return factor * sigma + 32 * unit * y.abs() + 4 * unit * rms + 1e-37


def _widen(tensor: Any) -> Any:
    return tensor.double() if isinstance(tensor, Tensor) and tensor.dtype.is_floating_point else tensor


def _shake(tensor: Any, unit: float, generator: Generator) -> Any:
    if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
        return tensor
    return tensor * (1 + unit * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))


def _run(case: Case, state: dict[str, Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor]:
    module: nn.Module = baseline_class(case.operator)(**case.init).double()
    module.load_state_dict(state)
    return flatten(module(*inputs))


def flatten(output: Any) -> list[Tensor]:
    """The tensors of an output in order."""
    if isinstance(output, Tensor):
        return [output]
    return [t for part in output for t in flatten(part)]
