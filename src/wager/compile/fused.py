"""One fused kernel for a small program: search (or remember), race, and say what proves it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wager.compile import cache as found_before
from wager.compile.mirage import search as mirage_search
from wager.compile.mirage.generate import Limits, Progress
from wager.compile.mirage.tune import race
from wager.compile.prism import search as prism_search
from wager.compile.report import Report
from wager.compile.views import absorb, restore
from wager.errors import WagerError
from wager.graph.domains import NotInDomain
from wager.graph.execute import Executable
from wager.graph.operators import BINARY, UNARY
from wager.graph.program import Program
from wager.graph.trace import Traced
from wager.graph.verify import axioms
from wager.graph.verify.family import prove
from wager.graph.verify.finite_field import verify

TARGET = 1e-9  # the chance with which finite-field trials may pass an unequal pair
SECOND_OPINION = replace(axioms.BOUNDS, seconds=5.0)
FUSABLE = UNARY | BINARY | {"matmul", "sum", "rms_norm", "input", "const"}


@dataclass(frozen=True)
class Settings:
    """`search` is prism or mirage; `state` a file that a stopped search goes on from; `cache` allows an answer found before."""

    search: str
    limits: Limits
    samples: int = 12
    workers: int = 1
    state: str | Path | None = None
    cache: bool = True


def refusal(program: Program) -> str:
    """Why a program cannot become a fused kernel; empty when it can."""
    strange = sorted({n.op for n in program.nodes} - FUSABLE)
    if not strange and len(program.outputs) == 1:
        return ""
    what = f"operators {', '.join(strange)}" if strange else f"{len(program.outputs)} outputs"
    return f"{what} cannot enter a fused kernel; the original is kept"


def superoptimize(
    traced: Traced, inputs: Sequence[Tensor], settings: Settings, say: Callable[[str], None] | None = None
) -> tuple[Any, Program, Report]:
    """What runs (None: the original), its program, and the report."""
    program, limits = absorb(traced.program), settings.limits
    report = Report(settings.search, "original", "", 0.0, 0.0, 0.0, 0.0)
    report.reason = refusal(program)
    if report.reason:
        return None, traced.program, report
    place = found_before.path(traced.program, settings.search, limits, settings.samples)
    if settings.cache and (known := _remembered(place, traced, report)) is not None:
        return *known, report
    programs, counters = _candidates(program, settings, report, say)
    if not programs:
        stopped = counters.limit or f"max_block_ops {limits.max_block_ops}: no graph of that size computes the function"
        report.reason = f"0 graphs found ({stopped}); the original is kept"
        return None, traced.program, report
    programs = [restore(p, traced.program) for p in programs]
    told = (lambda n: say(f"{n} candidates left in the race")) if say else None
    best = race(programs, traced.constants, inputs, samples=settings.samples, on_timed=told)
    if not best:
        report.reason = "no candidate could be compiled; the original is kept"
        return None, traced.program, report
    if say:
        say(f"best: {best[0].seconds * 1e3:.3f} ms")
    report.counters["timed"] = min(settings.samples, len(programs))
    sure, report.reason = certificate(traced.program, best[0].program)
    if not sure:
        return None, traced.program, report
    report.used = settings.search
    if settings.cache and not counters.limit:
        found_before.write(place, best[0].program, report.counters)
    return best[0].run, best[0].program, report


def _remembered(place: Path, traced: Traced, report: Report) -> tuple[Any, Program] | None:
    """The answer found before, checked again; None when there is none or it does not hold."""
    known = found_before.read(place)
    if known is None:
        return None
    program, counters = known
    sure, reason = certificate(traced.program, program)
    if not sure:
        return None
    try:
        runner = Executable(program, traced.constants)
    except WagerError:
        return None
    report.used, report.reason, report.counters = report.search, reason, counters | {"remembered": str(place)}
    return runner, program


TELL_EVERY_S = 1.0


class Told:
    """Tells how far a search is, not more often than a person reads."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.last = say, 0.0

    def __call__(self, p: Progress) -> None:
        now = time.perf_counter()
        if now - self.last >= TELL_EVERY_S:
            self.last = now
            self.say(f"{p.states} states, {p.pruned} pruned, {p.mappings} mappings, {p.verified} verified")


def _candidates(
    program: Program, settings: Settings, report: Report, say: Callable[[str], None] | None
) -> tuple[list[Program], Progress]:
    listener = Told(say) if say else None
    counters, threads = Progress(listener=listener), torch.get_num_threads()
    if settings.search == "prism":
        found = prism_search.search(program, settings.limits, counters, workers=settings.workers, state=settings.state)
        programs = prism_search.members(found.families, program, threads)
        if not programs and threads > 1:  # e.g. one row that cannot be cut: a single block is all there is
            programs = prism_search.members(found.families, program, 1)
        report.details = [found.families[0].explain()] if found.families else []
    else:
        concrete = mirage_search.search(
            program, settings.limits, counters, least_blocks=threads, workers=settings.workers, state=settings.state
        )
        programs = concrete.programs
    report.counters = {k: v for k, v in vars(counters).items() if isinstance(v, int) and not isinstance(v, bool)}
    if counters.limit:
        report.counters["stopped by"] = counters.limit
    return programs, counters


def certificate(reference: Program, candidate: Program) -> tuple[bool, str]:
    """Whether the candidate may be used, and what is known about the equivalence in one sentence."""
    reference, candidate = absorb(reference), absorb(candidate)
    why_not = prove(reference, candidate)
    proof = _proof_text(why_not, reference, candidate)
    proved = proof.startswith("proved")
    try:
        verdict = verify(reference, candidate, np.random.default_rng(), target=TARGET, max_trials=100)
    except NotInDomain as error:
        return proved, f"{proof}; no finite-field check ({error})" + ("" if proved else "; the original is kept")
    if not verdict:
        return False, f"refused by the finite-field check ({verdict.reason}); the original is kept"
    checked = f"{verdict.trials} finite-field trials ({verdict.method})"
    if verdict.error_bound <= TARGET:
        return True, f"{proof}; {checked}, error bound {verdict.error_bound:.1e}"
    unbounded = f"{proof}; {checked} agree, but bound the error only by {verdict.error_bound:.2g}"
    return proved, unbounded + ("" if proved else "; the original is kept")


def _proof_text(why_not: str, reference: Program, candidate: Program) -> str:
    """What the first verifier says; the second is asked where it is silent."""
    if not why_not:
        return "proved for every tile size"
    second = axioms.prove(reference, candidate, SECOND_OPINION)
    if second:
        return f"proved at these sizes by {len(second.axioms)} axioms"
    return f"not proved symbolically ({why_not}; {second.reason})"
