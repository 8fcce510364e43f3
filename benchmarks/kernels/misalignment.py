"""Does a kernel that wins in a sandbox win in the engine? The same candidates, three ways of asking.

    python -m benchmarks.kernels.misalignment [--quick] [--model demo]

sandbox: one large synthetic shape, warm cache, the same buffers again and again, against torch eager. captured: the judge's shapes from real
runs, cold cache, shifted addresses. engine: the serving engine's decode latency with all operators in their reference form but this one.
A candidate's greedy text must stay equal, or its engine column says so. The plot puts the three beside each other.
"""

from __future__ import annotations

import ast
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Report, Row, arguments, compare, format_table, picture_path, say
from wager.kernels import referee
from wager.kernels.referee import oracle
from wager.kernels.referee.architectures import architecture
from wager.kernels.referee.capture import capture, merge, select
from wager.kernels.referee.end_to_end import EndToEnd
from wager.kernels.referee.end_to_end import compare as in_engine
from wager.kernels.referee.judge import Options, Verdict, judge

FOLDER = Path(referee.__path__[0]) / "candidates"
SETS = {"C++": FOLDER / "native.py", "torch.compile": FOLDER / "compiled.py"}
OPERATORS = ("Linear", "RMSNorm", "SiluAndMul", "RotaryEmbedding")
SANDBOX: dict[str, tuple[dict[str, Any], Callable[[], tuple[torch.Tensor, ...]]]] = {
    "Linear": ({"in_features": 1024, "out_features": 1024}, lambda: (torch.randn(256, 1024),)),
    "RMSNorm": ({"width": 1024}, lambda: (torch.randn(256, 1024),)),
    "SiluAndMul": ({}, lambda: (torch.randn(256, 2048),)),
    "RotaryEmbedding": ({}, lambda: (torch.randn(256, 16, 64), torch.randn(256, 32), torch.randn(256, 32))),
}


def only(source: Path, operator: str) -> str:
    """The source with no other operator's class in it."""
    tree = ast.parse(source.read_text())
    tree.body = [
        n
        for n in tree.body
        if not (isinstance(n, ast.ClassDef) and n.name in OPERATORS + ("GeluAndMul",) and n.name != operator)
    ]
    return ast.unparse(tree) + "\n"


def sandbox(path: Path, operator: str, repeats: int) -> Row:
    """The way a sandbox measures: same buffers, warm cache, one shape."""
    recipe, make = SANDBOX[operator]
    scope: dict[str, Any] = {"__name__": "candidate"}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    modules = [oracle.baseline_class(operator)(**recipe).eval(), scope[operator](**recipe).eval()]
    inputs = make()

    def timed(module: torch.nn.Module) -> Callable[[], float]:
        def run() -> float:
            with torch.inference_mode():
                start = time.perf_counter()
                for _ in range(5):
                    module(*inputs)
                return (time.perf_counter() - start) / 5

        return run

    contenders = {"torch eager": timed(modules[0]), "candidate": timed(modules[1])}
    return compare(f"{operator}, sandbox", contenders, repeats=repeats, warmup=3)[0]


def measure(
    name: str, source: Path, operator: str, model: str, quick: bool, folder: Path, cases: list
) -> dict[str, Any]:
    path = folder / f"{operator}-{name.replace('+', 'p')}.py"
    path.write_text(only(source, operator))
    alone = sandbox(path, operator, 3 if quick else 9)
    options = Options(iterations=3 if quick else 10, rounds=1 if quick else 3, timeout_s=300)
    verdict: Verdict = judge(operator, path, *select(cases, operator, 1 if quick else 3), options)
    engine: EndToEnd = in_engine(
        model, path, ("The quick brown fox",), output_tokens=8 if quick else 32, rounds=1 if quick else 3
    )
    say(f"{name} {operator}: sandbox {alone.ratio:.2f}x, captured {verdict.speedup}, engine {engine.speedup:.2f}x")
    return {
        "kernel": f"{operator} ({name})", "sandbox": alone.ratio, "sandbox_noise": alone.aa_noise, "captured": verdict.speedup,
        "status": str(verdict.status), "reason": verdict.reason, "engine": engine.speedup, "text_equal": engine.matches == engine.prompts,
    }  # fmt: skip


def plot(found: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.62 * len(found) + 1.6))
    for offset, (column, colour) in enumerate((("sandbox", "#9aa5b1"), ("captured", "#3e7cb1"), ("engine", "#d1495b"))):
        places = [i + 0.26 * (offset - 1) for i in range(len(found))]
        values = [line[column] or 0.0 for line in found]
        axes.barh(places, values, 0.24, color=colour, label=column)
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                f"{value:.2f}" if value else "failed",
                (max(value, 0.02), place),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(found)), [line["kernel"] for line in found])
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as torch eager (engine: as the engine without it)")
    axes.margins(x=0.1)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = arguments(__doc__ or "", repeats=False)
    parser.add_argument("--model", default="demo", help="checkpoint that the engine serves")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["WAGER_KERNELS"] = "reference"  # the engines it starts: everything in torch but the candidate
    cases = merge(c for held in (False, True) for c in capture(architecture("llama"), held))
    with tempfile.TemporaryDirectory() as folder:
        sets = {"C++": SETS["C++"]} if chosen.quick else SETS
        operators = OPERATORS[1:3] if chosen.quick else OPERATORS
        found = [
            measure(n, source, o, chosen.model, chosen.quick, Path(folder), cases)
            for n, source in sets.items()
            for o in operators
        ]
    shown = lambda value: "failed" if value is None else f"{value:.2f}x"
    head = ["kernel", "sandbox", "captured shapes, cold", "in the engine", "greedy text"]
    body = [
        [
            f["kernel"],
            shown(f["sandbox"]),
            shown(f["captured"]),
            shown(f["engine"]),
            "equal" if f["text_equal"] else "changed",
        ]
        for f in found
    ]
    print(format_table([head, *body]))
    if not chosen.quick:
        plot(found, picture_path("kernels", "misalignment"))
        say(f"saved {Report('kernels', 'misalignment', [], {'kernels': found, 'model': chosen.model}).save()}")


if __name__ == "__main__":
    main()
