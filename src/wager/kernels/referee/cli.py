"""`wager kernels list | capture | judge | bench | search | agent`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any

import typer

from wager.errors import UsageError, WagerError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Referee kernels: capture what models call, judge candidates, search.",
)

Capture = Annotated[
    Path | None, typer.Option("--capture", help="A capture file; default: capture all architectures now.")
]
Operators = Annotated[list[str] | None, typer.Option("--operator", help="Judge only this one; may be repeated.")]
MaxShapes = Annotated[int, typer.Option(help="Timed cases of an operator, at most.", min=1)]
Iterations = Annotated[int, typer.Option(help="Timed calls of a round.", min=2)]
Rounds = Annotated[int, typer.Option(help="Rounds in which baseline and candidate alternate.", min=1)]
Threads = Annotated[int, typer.Option(help="Threads of each process.", min=1)]


@app.command("list")
def list_(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """List the architectures with their families, and which operators each uses."""
    from wager.kernels.referee.architectures import architectures
    from wager.kernels.referee.capture import capture

    rows = [(a, sorted({c.operator for c in capture(a)})) for a in architectures().values()]
    if as_json:
        print(
            json.dumps(
                [{"name": a.name, "family": a.family, "operators": operators} for a, operators in rows], indent=1
            )
        )
        return
    for a, operators in rows:
        print(f"{a.name:20} {a.family:30} {' '.join(operators)}")


@app.command("capture")
def capture_(
    output: Annotated[Path, typer.Argument(help="Where the records go, a JSON file.")],
    architecture: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
) -> None:
    """Run the architectures and write down what every operator was built with and called with."""
    from wager.kernels.referee.capture import save

    cases = _captured(None, architecture)
    save(cases, output)
    print(f"{len(cases)} cases of {len({c.operator for c in cases})} operators in {output}")


@app.command()
def judge(
    candidate: Annotated[
        Path | None,
        typer.Argument(help="A file with classes named after operators; without it the baseline judges itself."),
    ] = None,
    operator: Operators = None,
    capture: Capture = None,
    max_shapes: MaxShapes = 5,
    iterations: Iterations = 10,
    rounds: Rounds = 3,
    threads: Threads = 1,
    forbid_library: Annotated[
        bool, typer.Option(help="A kernel of its own is asked for: torch's form of an operator is a cheat.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Also run the engine on this checkpoint with and without the candidate.")
    ] = None,
    output_json: Annotated[Path | None, typer.Option(help="Write the verdicts here.")] = None,
) -> None:
    """Judge a candidate's operators: right on captured and held-out shapes, honest, how fast. Exits 1 when one fails."""
    from wager.kernels.referee import oracle
    from wager.kernels.referee.judge import Options, Status, save_verdicts

    options = Options(iterations, rounds, threads=threads, library=not forbid_library)
    names = operator or (_defined(candidate) if candidate else oracle.operator_names())
    unknown = set(names) - set(oracle.operator_names())
    if unknown:
        raise UsageError(f"operator {sorted(unknown)[0]!r} is unknown; use one of {', '.join(oracle.operator_names())}")
    verdicts = _verdicts(names, candidate, _captured(capture, None), max_shapes, options)
    if output_json:
        save_verdicts(verdicts, output_json)
    failed = [v.operator for v in verdicts if v.status is not Status.PASSED]
    if failed:
        raise WagerError(f"not passed: {', '.join(failed)}")
    if candidate and model:
        _engine(model, candidate)


@app.command()
def bench(
    candidate: Annotated[
        Path | None,
        typer.Argument(help="A file with classes named after operators; without it the house's own C++ kernels."),
    ] = None,
    self_test: Annotated[
        bool, typer.Option(help="The baseline against itself: the noise of this machine today.")
    ] = False,
    compiled: Annotated[bool, typer.Option(help="Also time torch.compile of the baseline.")] = False,
    operator: Operators = None,
    capture: Capture = None,
    max_shapes: MaxShapes = 3,
    iterations: Iterations = 10,
    rounds: Rounds = 3,
    threads: Threads = 1,
    output_json: Annotated[Path | None, typer.Option(help="Write verdicts and score here.")] = None,
) -> None:
    """Score a set of kernels: verdicts, share that is right, aggregate speedup, fast_p. A failing kernel lowers the score, not the exit status."""
    from wager.kernels.referee import oracle
    from wager.kernels.referee.judge import Options, save_verdicts
    from wager.kernels.referee.score import SELF_TEST_NOISE, score

    if self_test and candidate:
        raise UsageError("--self-test judges the baseline itself; leave the candidate out")
    source = None if self_test else candidate or Path(__file__).parent / "candidates" / "native.py"
    names = operator or (oracle.operator_names() if source is None else _defined(source))
    unknown = set(names) - set(oracle.operator_names())
    if unknown:
        raise UsageError(f"operator {sorted(unknown)[0]!r} is unknown; use one of {', '.join(oracle.operator_names())}")
    options = Options(iterations, rounds, threads=threads, compiled=compiled)
    verdicts = _verdicts(names, source, _captured(capture, None), max_shapes, options)
    total = score(verdicts)
    shown = lambda value: "none" if value is None else f"{value:.2f}x"
    print(f"right: {total.correct:.0%} of {total.operators} operators ({total.skipped} skipped)")
    print(
        f"speedup: {shown(total.fallback_speedup)} with failures as the baseline, {shown(total.passed_speedup)} over those that passed"
    )
    if compiled:
        print(f"against torch.compile: {shown(total.compiled_speedup)}")
    print("fast_p: " + ", ".join(f"p={p} {share:.0%}" for p, share in total.fast_p.items()))
    if total.noise is not None and total.noise > SELF_TEST_NOISE:
        print(f"the median A/A noise is {total.noise:.0%}: this machine is too busy today for differences below that")
    if output_json:
        save_verdicts(verdicts, output_json, total.as_dict())


@app.command()
def agent(
    folder: Annotated[Path, typer.Argument(help="Where the proposed sources are kept.")],
    base_url: Annotated[str, typer.Option(help="An OpenAI-compatible endpoint, ending in /v1.")],
    model: Annotated[str, typer.Option(help="The model to ask.")],
    operator: Annotated[str, typer.Option(help="The operator to write.")] = "SiluAndMul",
    attempts: Annotated[int, typer.Option(help="Sources to ask for.", min=1)] = 4,
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="The endpoint's key.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 1024,
    capture: Capture = None,
    max_shapes: MaxShapes = 3,
    iterations: Iterations = 10,
    threads: Threads = 1,
) -> None:
    """Let a language model propose kernels, judge them, and tell it what the judge says."""
    from wager.kernels.referee import oracle
    from wager.kernels.referee.agent import Endpoint
    from wager.kernels.referee.capture import select
    from wager.kernels.referee.judge import Options, Status
    from wager.kernels.referee.search import search as run

    if operator not in oracle.operator_names():
        raise UsageError(f"operator {operator!r} is unknown; use one of {', '.join(oracle.operator_names())}")
    folder.mkdir(parents=True, exist_ok=True)
    endpoint = Endpoint(base_url, model, operator, attempts, api_key, max_tokens)
    cases = select(_captured(capture, None), operator, max_shapes)
    found = run(operator, endpoint, *cases, folder, Options(iterations, threads=threads), print)
    print(f"{sum(a.verdict.status is Status.PASSED for a in found)} of {len(found)} passed")


@app.command()
def search(
    folder: Annotated[Path, typer.Argument(help="Where the tried sources are kept.")],
    attempts: Annotated[int, typer.Option(help="Sources to try.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the mutations.")] = 0,
    capture: Capture = None,
    max_shapes: MaxShapes = 3,
    iterations: Iterations = 10,
    threads: Threads = 1,
) -> None:
    """Mutate the constants of the C++ linear and report what the judge says of each try."""
    from wager.kernels.referee.capture import select
    from wager.kernels.referee.judge import Options
    from wager.kernels.referee.search import Mutation, report
    from wager.kernels.referee.search import search as run

    folder.mkdir(parents=True, exist_ok=True)
    cases = select(_captured(capture, None), "Linear", max_shapes)
    found = run(
        "Linear", Mutation(random.Random(seed), attempts), *cases, folder, Options(iterations, threads=threads), print
    )
    best = max(found, key=lambda a: a.verdict.speedup or 0.0)
    print(f"best of {len(found)}:\n{report(best)}")


def _verdicts(names: list[str], candidate: Path | None, cases: list, max_shapes: int, options: Any) -> list:
    """Judge operator by operator, printing a line for each."""
    from wager.kernels.referee.capture import select
    from wager.kernels.referee.judge import judge as decide

    verdicts = []
    print(f"{'operator':22} {'status':20} {'cases':>5} {'worst error':>11} {'speedup':>8} {'A/A noise':>9}")
    for name in names:
        found = decide(name, candidate, *select(cases, name, max_shapes), options)
        verdicts.append(found)
        errors, noises = (
            [c.error for c in found.cases if c.error is not None],
            [c.noise for c in found.cases if c.noise is not None],
        )
        shown = (
            f"{max(errors):.2f}" if errors else "",
            f"{found.speedup:.2f}x" if found.speedup else "",
            f"{max(noises):.0%}" if noises else "",
        )
        print(
            f"{name:22} {found.status:20} {len(found.cases):5} {shown[0]:>11} {shown[1]:>8} {shown[2]:>9}  {found.reason}",
            flush=True,
        )
    return verdicts


def _captured(path: Path | None, names: list[str] | None):
    from wager.kernels.referee.architectures import architecture, architectures
    from wager.kernels.referee.capture import capture, load, merge

    if path is not None:
        return load(path)
    chosen = [architecture(n) for n in names] if names else list(architectures().values())
    return merge(c for a in chosen for held in (False, True) for c in capture(a, held))


def _defined(candidate: Path) -> list[str]:
    import ast

    from wager.kernels.referee import oracle

    try:
        tree = ast.parse(candidate.read_text())
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise UsageError(f"{candidate} cannot be read: {error}") from None
    names = [n.name for n in tree.body if isinstance(n, ast.ClassDef) and n.name in oracle.operator_names()]
    if not names:
        raise UsageError(
            f"{candidate} defines no class named after an operator; use one of {', '.join(oracle.operator_names())}"
        )
    return names


def _engine(model: str, candidate: Path) -> None:
    from wager.kernels.referee.end_to_end import compare

    found = compare(model, candidate)
    print(
        f"in the engine: {found.matches} of {found.prompts} greedy texts equal, {found.speedup:.2f}x "
        f"({found.baseline_s:.3f} s to {found.candidate_s:.3f} s) with {', '.join(found.operators)}"
    )
    if found.matches < found.prompts:
        raise WagerError("the engine's greedy text changed")
