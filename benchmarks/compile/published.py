"""The verifiers on the 105 published graphs, on their single-edit mutants, and the measured false-accept rate against its bound.

    python -m benchmarks.compile.published [--quick] --data DIR

DIR is the folder that holds `compilers/` (or WAGER_DATA names it). A row compares, in time, a proof by normal form
(for all sizes) and one by axioms in an e-graph (at these sizes) with finite-field trials.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compile.superoptimize import machine_facts
from benchmarks.harness import Report, Row, arguments, compare, say
from tests.graph.mutants import mutants
from wager.errors import UsageError
from wager.graph import published
from wager.graph.interpret import random_inputs, run
from wager.graph.operators import ShapeError
from wager.graph.program import Builder, Program
from wager.graph.verify import axioms
from wager.graph.verify.family import prove
from wager.graph.verify.finite_field import trial_bound, verify
from wager.graph.verify.twin import shrink

COUNTS = ("graphs", "verified", "proved", "joined by axioms", "mutants", "rejected", "identities", "accepted wrongly")
SMALL_FIELDS = ((23, 11), (47, 23), (107, 53), (227, 113))


def main() -> None:
    parser = arguments("Verification of published graphs.", repeats=False)
    parser.add_argument("--data", default=os.environ.get("WAGER_DATA"), help="folder that holds compilers/")
    args = parser.parse_args()
    root = args.data
    if not root or not (Path(root) / "compilers" / "mugraphs").is_dir():
        raise UsageError(f"--data is {root!r}; name the folder that holds compilers/mugraphs")
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    folder = Path(root) / "compilers" / "mugraphs"
    judged = judge_all(folder, 8 if args.quick else 1)
    for name, make in published.PROGRAMS.items():
        reference, first = make(), published.load(folder / f"{name}.json")[0]
        facts[name] = judged[name]
        say(f"{name}: {facts[name]}")
        rows += compare(
            f"{name}: one graph",
            {
                "10 field trials": lambda a=reference, b=first: _void(verify(a, b, rng, max_trials=10, target=0.0)),
                "normal form": lambda a=reference, b=first: _void(prove(a, b)),
                "axioms": lambda a=reference, b=first: _void(axioms.prove(a, b)),
            },
            repeats=3,
            warmup=1,
        )
    facts["false accepts"] = false_accepts(400 if args.quick else 4000, rng)
    for what in COUNTS:
        facts[f"all {what}"] = sum(judged[name][what] for name in judged)
    report = Report("compile", "published", rows, facts)
    print(report.table())
    for name in ("false accepts", *(f"all {what}" for what in COUNTS)):
        say(f"{name}: {facts[name]}")
    if not args.quick:
        report.save(machine_facts())


def _void(_: Any) -> None:
    return None


def judge_all(folder: Path, every: int) -> dict[str, dict[str, Any]]:
    """The counts of every file, on all cores."""
    tasks = [
        (str(folder), name, at, every)
        for name in published.PROGRAMS
        for at in range(len(published.load(folder / f"{name}.json")))
    ]
    out: dict[str, dict[str, Any]] = {name: dict.fromkeys((*COUNTS, "seconds"), 0) for name in published.PROGRAMS}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for (_, name, _, _), count in zip(tasks, pool.map(judge, tasks), strict=True):
            out[name] = {what: out[name][what] + count[what] for what in count}
    return {name: {what: round(value, 1) for what, value in count.items()} for name, count in out.items()}


def judge(task: tuple[str, str, int, int]) -> dict[str, Any]:
    """One graph verified in three ways; the mutants of every `every`-th graph rejected unless they are identities."""
    folder, name, at, every = task
    reference, rng = published.PROGRAMS[name](), np.random.default_rng([7, at])
    graph = published.load(Path(folder) / f"{name}.json")[at]
    count: dict[str, Any] = dict.fromkeys(COUNTS, 0)
    start = time.perf_counter()
    count["graphs"] = 1
    count["verified"] = int(bool(verify(reference, graph, rng, max_trials=10)))
    count["proved"] = int(prove(reference, graph) == "")
    count["joined by axioms"] = int(bool(axioms.prove(reference, graph)))
    for _, mutant in mutants(graph) if at % every == 0 else ():
        count["mutants"] += 1
        count[verdict(reference, mutant, rng)] += 1
    return count | {"seconds": time.perf_counter() - start}


def verdict(reference: Program, mutant: Program, rng: np.random.Generator) -> str:
    if mutant.output_shapes != reference.output_shapes:
        return "rejected"
    try:
        small, changed = shrink(reference, mutant)
    except ShapeError:
        return "rejected" if prove(reference, mutant) else "accepted wrongly"
    if not verify(reference, mutant, rng, max_trials=3):
        return "rejected"
    inputs = random_inputs(small, rng)
    same = np.allclose(run(small, inputs)[0], run(changed, inputs)[0], rtol=1e-8)
    return "identities" if same else "accepted wrongly"


def false_accepts(rounds: int, rng: np.random.Generator) -> dict[str, Any]:
    """Measured against the bound in fields so small that accidents happen: x*y + x against x*y + y."""

    def program(first: bool) -> Program:
        b = Builder()
        x, y = b.input((1,)), b.input((1,))
        return b.build(b.add("add", [b.mul(x, y), x if first else y]))

    out = {}
    for primes in SMALL_FIELDS:
        accepted = sum(
            bool(verify(program(True), program(False), rng, max_trials=1, target=0.0, primes=primes))
            for _ in range(rounds)
        )
        bound = trial_bound(2, 0, primes[1])
        out[str(primes)] = {"measured": accepted / rounds, "bound": round(min(bound, 1.0), 4), "rounds": rounds}
    return out


if __name__ == "__main__":
    main()
