"""Proved families serve other sizes: only their tile sizes are chosen anew, nothing is searched.

A family's proof holds for every tile size; that it computes the program at the new sizes is proved again before anything is timed, which costs
milliseconds. Source: arXiv 2604.15272.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wager.compile.mirage.tune import Timed, race
from wager.compile.prism.family import Family, verify_family
from wager.compile.prism.search import members
from wager.errors import UsageError
from wager.graph.program import Program


def retune(
    families: Sequence[Family],
    program: Program,
    inputs: Sequence[Tensor],
    constants: Mapping[str, Tensor] | None = None,
    *,
    samples: int = 12,
) -> Timed:
    """The fastest member of `families` for `program`, which is theirs at other sizes. Raises UsageError when none fits."""
    threads = torch.get_num_threads()
    fitting = [f for f in families if not verify_family(program, f)]
    candidates = members(fitting, program, threads) or members(fitting, program, 1)
    timed = race(candidates, constants or {}, inputs, samples=samples)
    if not timed:
        raise UsageError(
            f"none of {len(families)} families fits inputs of shapes {program.input_shapes}; search them anew"
        )
    return timed[0]
