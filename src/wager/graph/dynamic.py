"""Between torch.export's dynamic shapes and the symbols of a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wager.errors import UsageError
from wager.graph.symbolic import Symbol


def dimensions(function: Any, inputs: Sequence[Tensor], dynamic: Sequence[Mapping[int, Symbol]] | None) -> Any:
    """`dynamic` as torch.export wants it. Raises UsageError where it does not fit the inputs."""
    if dynamic is None:
        return None
    if len(dynamic) != len(inputs):
        raise UsageError(f"dynamic has {len(dynamic)} entries for {len(inputs)} inputs; give one dictionary for each")
    known: dict[Symbol, Any] = {}
    shapes = []
    for at, (x, dims) in enumerate(zip(inputs, dynamic, strict=True)):
        for d, symbol in dims.items():
            if not 0 <= d < x.dim() or not symbol.allows(x.shape[d]):
                size = x.shape[d] if 0 <= d < x.dim() else "no such dimension"
                raise UsageError(f"dimension {d} of example input {at} is {size}, which {symbol} does not allow")
            known.setdefault(symbol, torch.export.Dim(symbol.name, min=symbol.low, max=symbol.high))
        shapes.append({d: known[s] for d, s in dims.items()} or None)
    return tuple(shapes) if isinstance(function, nn.Module) else (tuple(shapes),)


def factors(expression: Any) -> list[Any]:
    """[coefficient, symbol names...] of a product; a coefficient of None for anything else."""
    coefficient, rest = expression.as_coeff_Mul()
    names: list[Any] = []
    for base, power in rest.as_powers_dict().items():
        if base == 1:
            continue
        if not (base.is_Symbol and power.is_Integer and power > 0):
            return [None]
        names += [str(base)] * int(power)
    return [int(coefficient) if coefficient.is_Integer else None, *names]
