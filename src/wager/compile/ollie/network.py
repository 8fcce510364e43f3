"""Whole networks: cut into subprograms, derive each, join what can run together, keep what measures fastest.

Bias, batch normalisation and the activation behind a convolution are folded into it first; parallel products and convolutions of one value
become one (see inter.py). For every distinct convolution the contenders are the library's own fused operator, the native forms of its product
over windows, and the finalists of the derivation search with the activation inside the generated kernel; equal shapes are searched once.
Afterwards neighbours that run natively are joined into chains: one call, channels last inside, no layout change between them. An operator
that is second alone may be first where it keeps a chain whole: graphs are combined left to right, the best sixteen kept (see beam.py), and the
choices of the fastest are revised one by one on the whole network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wager.compile.ollie.assemble import Overrides, chains, revise, rewired
from wager.compile.ollie.beam import choose
from wager.compile.ollie.convolutions import Fused, find_convolutions
from wager.compile.ollie.cut import pieces
from wager.compile.ollie.inter import alike, parallel_products
from wager.compile.ollie.realize import best_product
from wager.compile.ollie.sites import Choice, Run, Site, piece_site, site_of
from wager.graph.execute import Executable
from wager.graph.program import Program
from wager.graph.timer import quick_time

NETWORK_SHARE = 0.2  # of the budget at least, for choosing on the whole network
BEAM_SHARE = 0.5  # of the time that is left for that


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
    keep: int = 4,
    eoperators: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Network:
    """Derives every convolution and constant product of the program. With `eoperators` off only named library operators are used."""
    plain = Executable(program, constants)
    program, values = plain.program, plain.values
    known = {i: v for i, v in enumerate(values) if isinstance(v, Tensor)}
    deadline = time.perf_counter() + budget_s
    sites: list[Site] = []
    memory: dict[Any, Site] = {}
    found = find_convolutions(program, known)
    for left, fused in zip(range(len(found), 0, -1), found, strict=True):
        share = (deadline - NETWORK_SHARE * budget_s - time.perf_counter()) / left
        site = site_of(program, fused, max_depth, share, keep, eoperators, memory)
        sites.append(site)
        if progress:
            choice, best = site.choice, site.contenders[0]
            progress(
                f"{choice.operator}: fastest alone {best.name}, {choice.baseline_ms:.3f} -> {best.seconds * 1e3:.3f} ms"
            )
    sites, slices = _join_alike(program, found, sites, max(deadline - time.perf_counter(), 1.0), memory)
    overrides, chosen = _products(program, known, len(program.nodes) + len(found))
    overrides |= slices
    lifted = []
    for piece in pieces(program, known):
        lifted.append(piece_site(program, piece, max(deadline - time.perf_counter(), 2.0), keep))
        if (run := lifted[-1].run) is not None and eoperators:
            overrides[piece.last] = (run, piece.inputs)
        if progress:
            progress(f"{lifted[-1].choice.operator}: {lifted[-1].choice.chosen}")
    choices = [s.choice for s in (*sites, *lifted)] + chosen

    def build() -> Executable:
        return rewired(program, constants, overrides | chains(program, sites))

    choose(program, sites, build, max(deadline - time.perf_counter(), 2.0) * BEAM_SHARE)
    executable = revise(program, sites, build, max(deadline - time.perf_counter(), 2.0))
    for site in sites:
        _explain(site)
    return Network(executable, choices)


# ── joined operators ────────────────────────────────────────────────────────────────────────────────────────────────────


def _columns(low: int, high: int) -> Run:
    return lambda x: x[:, low:high]


def _join_alike(
    program: Program, found: list[Fused], sites: list[Site], budget_s: float, memory: dict[Any, Site]
) -> tuple[list[Site], Overrides]:
    """Convolutions of one value become one where that is priced below their sum."""
    slices: Overrides = {}
    for joint in alike(program, found, len(program.nodes)):
        lasts = {last for last, _, _ in joint.parts}
        apart = [s for s in sites if s.fused.last in lasts]
        site = site_of(program, joint.fused, 0, budget_s, 1, True, memory)
        if site.taken.seconds < sum(s.taken.seconds for s in apart):
            sites = [s for s in sites if s.fused.last not in lasts] + [site]
            slices |= {last: (_columns(low, high), (joint.fused.last,)) for last, low, high in joint.parts}
            site.choice.path = ("merge", *site.choice.path)
    return sites, slices


def _products(program: Program, known: Mapping[int, Tensor], position: int) -> tuple[Overrides, list[Choice]]:
    """Every product with a constant right side in its fastest form; products of one value as one where that is faster."""
    overrides: Overrides = {}
    choices: list[Choice] = []
    seconds: dict[int, float] = {}
    for i, node in enumerate(program.nodes):
        if node.op == "matmul" and node.inputs[1] in known and node.inputs[0] not in known and len(node.shape) == 2:
            form, run = best_product(node.shape[0], known[node.inputs[1]].contiguous())
            x = torch.randn(program.nodes[node.inputs[0]].shape)
            seconds[i] = quick_time(lambda run=run, x=x: run(x), rounds=7)
            overrides[i] = (_contiguous(run), (node.inputs[0],))
            choices.append(Choice(f"matmul {node.shape}", f"matmul ({form})", 0.0, seconds[i] * 1e3))
    for n, group in enumerate(parallel_products(program, known)):
        source = program.nodes[group[0]].inputs[0]
        wide = torch.cat([known[program.nodes[i].inputs[1]] for i in group], 1).contiguous()
        rows = program.nodes[source].shape[0]
        form, run = best_product(rows, wide)
        x, low = torch.randn(program.nodes[source].shape), 0
        if quick_time(lambda run=run, x=x: run(x), rounds=7) < sum(seconds[i] for i in group):
            overrides[position + n] = (_contiguous(run), (source,))
            for i in group:
                width = program.nodes[i].shape[1]
                overrides[i] = (_columns(low, low + width), (position + n,))
                low += width
            choices.append(Choice(f"{len(group)} products of one value", f"merge | matmul ({form})", 0.0, 0.0))
    return overrides, choices


def _contiguous(run: Run) -> Run:
    return lambda x: run(x.contiguous())


def _explain(site: Site) -> None:
    taken, choice = site.taken, site.choice
    choice.chosen = "library" if taken.name == "library" else f"derived: {taken.name}"
    choice.chosen_ms = taken.seconds * 1e3
    choice.path = ("merge", *taken.path) if choice.path[:1] == ("merge",) else taken.path
