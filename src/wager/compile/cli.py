"""`wager compile`: optimise a function of a Python file, check saved programs against each other, look at them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from wager.errors import UsageError

app = typer.Typer(help="Make tensor programs faster, with a proof.", no_args_is_help=True, add_completion=False)


def load_target(target: str) -> Any:
    """`file.py:name` or `package.module:name`. Raises UsageError when it cannot be imported or is not callable."""
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise UsageError(f"target {target!r} is not of the form file.py:function or package.module:function")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            if spec is None or spec.loader is None:
                raise ImportError(place)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, "")
            module = importlib.import_module(place)
        found = getattr(module, name)
    except (ImportError, OSError, AttributeError) as error:
        raise UsageError(f"target {target!r} cannot be loaded: {error}") from None
    if not callable(found):
        raise UsageError(f"target {target!r} is a {type(found).__name__}, not a function or module")
    return found


def parse_shapes(text: str) -> list[tuple[int, ...]]:
    """ "8x512,512x2048" -> [(8, 512), (512, 2048)]. Raises UsageError."""
    try:
        shapes = [tuple(int(d) for d in part.split("x")) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"shapes {text!r}: write them like 8x512,512x2048") from None
    if any(d < 1 for s in shapes for d in s):
        raise UsageError(f"shapes {text!r}: every dimension must be at least 1")
    return shapes


@app.command()
def run(
    target: str = typer.Argument(
        help="file.py:name or package.module:name of a function, an nn.Module, or a class without arguments."
    ),
    shapes: str = typer.Option(..., help="Shapes of the inputs, like 8x512,512x2048."),
    search: str = typer.Option("auto", help="auto, ollie, mirage or prism."),
    budget: float = typer.Option(60.0, help="Seconds to search."),
    max_block_ops: int = typer.Option(11, help="Largest block graph that Mirage and Prism build."),
    max_kernels: int = typer.Option(1, help="2: also two kernels, the first of which splits a sum (Prism)."),
    max_library_ops: int = typer.Option(0, help="Library operators beside custom kernels in one graph (Mirage)."),
    workers: int = typer.Option(1, help="Processes that search (Mirage and Prism)."),
    state: Path | None = typer.Option(  # noqa: B008
        None, help="File that keeps what the search has done; a stopped search goes on from it."
    ),
    cache: bool = typer.Option(True, help="Take an answer found before on this machine (checked again)."),
    out: Path | None = typer.Option(None, help="Save program and report as JSON here."),  # noqa: B008
    draw: Path | None = typer.Option(None, help="Draw the program as SVG here."),  # noqa: B008
) -> None:
    """Search for a faster form, check it, time it, and say what was found."""
    import torch

    from wager.compile.api import compile as optimise

    inputs = [torch.randn(s) for s in parse_shapes(shapes)]
    function = load_target(target)
    if isinstance(function, type):
        function = function()
    with telling() as say:
        done = optimise(
            function, inputs, search=search, time_budget_s=budget, max_block_ops=max_block_ops, max_kernels=max_kernels,
            max_library_ops=max_library_ops, workers=workers, state=state, cache=cache, progress=say,
        )  # fmt: skip
    print(done.report())
    if out:
        done.save(out)
    if draw:
        done.draw(draw)


@contextmanager
def telling() -> Iterator[Callable[[str], None]]:
    """On a terminal one line that changes, elsewhere plain lines."""
    if not sys.stderr.isatty():
        yield lambda line: print(line, file=sys.stderr, flush=True)
        return
    from rich.console import Console

    with Console(stderr=True).status("searching") as status:
        yield status.update


@app.command()
def verify(
    reference: Path = typer.Argument(help="A program saved by run --out (or Compiled.save)."),  # noqa: B008
    candidate: Path = typer.Argument(help="The program to compare with it."),  # noqa: B008
    trials: int = typer.Option(100, help="Most finite-field trials."),
) -> None:
    """Check that two saved programs compute the same; exits 1 when they differ."""
    import numpy as np

    from wager.compile.api import load
    from wager.graph.verify import axioms
    from wager.graph.verify.family import prove
    from wager.graph.verify.finite_field import verify as check

    (a, _), (b, _) = load(reference), load(candidate)
    verdict = check(a, b, np.random.default_rng(), max_trials=trials)
    proof = prove(a, b) if verdict else ""
    print(
        f"{'equal' if verdict else 'different'}: {verdict.reason}"
        + (f", error bound {verdict.error_bound:.2e}" if verdict else "")
    )
    if verdict:
        print("proved for every tile size" if not proof else f"not proved symbolically: {proof}")
        second = axioms.prove(a, b)
        joined = ", ".join(f"{name} ({count})" for name, count in second.axioms.items()) or "nothing: they are the same"
        print(f"second verifier: joined by {joined}" if second else f"second verifier: {second.reason}")
    if not verdict:
        raise typer.Exit(1)


@app.command()
def show(
    program: Path = typer.Argument(help="A program saved by run --out (or Compiled.save)."),  # noqa: B008
    svg: Path | None = typer.Option(None, help="Draw it as SVG here."),  # noqa: B008
    dot: bool = typer.Option(False, help="Print Graphviz text instead."),
) -> None:
    """Print a saved program and its report."""
    from wager.compile.api import load
    from wager.graph import draw

    found, report = load(program)
    if dot:
        print(draw.dot(found))
    else:
        for i, node in enumerate(found.nodes):
            print(f"n{i} = {draw.label(node)} {list(node.inputs) or ''}")
            for k, inner in enumerate(node.block.nodes if node.block else ()):
                print(f"    b{k} = {draw.label(inner)} {list(inner.inputs) or ''} {draw.detail(inner)}".rstrip())
        print("\n".join(f"{name}: {value}" for name, value in report.items()))
    if svg:
        svg.write_text(draw.svg(found))


@app.command()
def register(
    operator: str = typer.Argument(help="An operator that the referee judges, like RMSNorm (wager kernels list)."),
    shapes: list[str] = typer.Option(  # noqa: B008
        [], help="Shapes of the inputs, like 16x768; repeat for more cases; without it those that the referee times."
    ),
    out: Path = typer.Option(..., help="Write the candidate file here."),  # noqa: B008
    recipe: str = typer.Option("", help="The operator's constructor arguments, like width=768,eps=1e-6."),
    search: str = typer.Option("prism", help="prism or mirage."),
    budget: float = typer.Option(60.0, help="Seconds to search, for each case."),
    max_block_ops: int = typer.Option(11, help="Largest block graph that is built."),
) -> None:
    """Write what a search finds for an operator as a kernel that the referee can judge and the engine can run."""
    from wager.compile.register import register as write

    cases = [parse_shapes(s) for s in shapes] or None
    with telling() as say:
        done = write(
            operator, cases, out, parse_recipe(recipe), search=search, time_budget_s=budget, max_block_ops=max_block_ops,
            progress=say,
        )  # fmt: skip
    print(done)


def parse_recipe(text: str) -> dict[str, Any]:
    """ "width=768,eps=1e-6" -> {"width": 768, "eps": 1e-06}. Raises UsageError."""
    found: dict[str, Any] = {}
    for part in text.split(",") if text else ():
        name, _, value = part.partition("=")
        try:
            found[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            raise UsageError(f"recipe {text!r}: write it like width=768,eps=1e-6") from None
    return found
