"""`wager.compile(function, example_inputs)`: something faster that is proved or bounded to compute the same, or the original and why.

`search="prism"` (symbolic) and `"mirage"` (concrete) look for one fused kernel of a small program; `"ollie"` derives the convolutions and
constant products of a network; `"auto"` takes OLLIE for programs with convolutions and Prism for the rest. The result is used only if it
is measured faster than the original on the example inputs and lies within the accumulation-aware error bound. Parameters of a module are
frozen. On float32 CPU tensors kernels are C++; on a CUDA device (float16, bfloat16 or float32) they are Triton, searched by prism. Sources: arXiv 2208.02025, 2405.05751, 2604.15272.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from wager.compile import device
from wager.compile.dynamo import Frozen
from wager.compile.fused import Settings, superoptimize
from wager.compile.mirage.generate import Limits
from wager.compile.ollie.network import optimize
from wager.compile.report import Report
from wager.errors import UsageError
from wager.graph import cuda_timer
from wager.graph.draw import svg
from wager.graph.execute import Executable
from wager.graph.program import Builder, Program, from_json, to_json
from wager.graph.timer import Timing, time_together
from wager.graph.trace import Traced, trace
from wager.graph.verify.floating import STORED, compare, memory_needed

SEARCHES = ("auto", "ollie", "mirage", "prism")


class Compiled:
    """A callable that takes the original's inputs. Falls back to the original for gradients, other devices and other types."""

    def __init__(
        self,
        original: Callable[..., Any],
        traced: Traced,
        run: Callable[..., list[Tensor]] | None,
        program: Program,
        report: Report,
        kind: tuple[str, torch.dtype] = ("cpu", torch.float32),
    ):
        """`kind`: the device and the type that `run` takes."""
        self.original, self.traced, self.run, self.program, self._report = original, traced, run, program, report
        self.kind = kind

    def _served(self, x: Tensor) -> bool:
        return (str(x.device), x.dtype) == self.kind and not (x.requires_grad and torch.is_grad_enabled())

    def __call__(self, *inputs: Tensor) -> Any:
        if self.run is None or not all(self._served(x) for x in inputs):
            return self.original(*inputs)
        with torch.no_grad():
            outputs = self.run(*inputs)
        return outputs[0] if self.traced.single_output else tuple(outputs)

    def report(self) -> Report:
        return self._report

    def save(self, path: str | Path) -> None:
        """The program (with kernel graphs) and the report as JSON; constants are not part of it."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps({"program": json.loads(to_json(self.program)), "report": asdict(self._report)}))
        temporary.replace(path)

    def draw(self, path: str | Path) -> None:
        """Both levels as an SVG picture."""
        Path(path).write_text(svg(self.program))


def kind_of(example_inputs: Sequence[Any]) -> tuple[str, torch.dtype]:
    """The device and the type of all inputs. Raises UsageError where there is no form for them."""
    kinds = {(str(x.device), x.dtype) if isinstance(x, Tensor) else (type(x).__name__, None) for x in example_inputs}
    if len(kinds) == 1:
        ((place, dtype),) = kinds
        if dtype is torch.float32 and place == "cpu":
            return "cpu", torch.float32
        if dtype is not None and place.startswith("cuda") and str(dtype).removeprefix("torch.") in STORED:
            return place, dtype
    told = ", ".join(f"{dtype or place} on {place}" if dtype else place for place, dtype in sorted(kinds, key=str))
    raise UsageError(
        f"example input of type {told}: compiled programs take float32 CPU tensors, "
        "or tensors of one type (float16, bfloat16, float32) on one CUDA device"
    )


def compile(
    function: Callable[..., Any] | nn.Module,
    example_inputs: Sequence[Tensor],
    *,
    search: str = "auto",
    time_budget_s: float = 60.0,
    max_block_ops: int = 11,
    max_kernels: int = 1,
    max_library_ops: int = 0,
    samples: int = 12,
    workers: int = 1,
    state: str | Path | None = None,
    cache: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Compiled:
    """The fastest verified form found within the budget. Raises UsageError for an unknown search or a function that cannot be imported.

    `max_block_ops` bounds Mirage's and Prism's block graphs; `max_kernels=2` lets them also split a sum over blocks of one kernel and merge it
    in a second (flash-decoding); `max_library_ops` lets Mirage build kernel graphs of that many library operators beside custom kernels;
    `samples` is how many members are compiled and timed; `workers` processes search; `state` names a file from which a stopped search goes on;
    with `cache` an answer found before on this machine is taken from disk (and verified and timed again). On a GPU the search is prism and
    `max_library_ops` is 0; both sides of the final timing are replayed as CUDA graphs.
    """
    if search not in SEARCHES:
        raise UsageError(f"search {search!r} is unknown; use one of {', '.join(SEARCHES)}")
    if time_budget_s <= 0:
        raise UsageError(f"time_budget_s is {time_budget_s}; give a positive number of seconds")
    if max_kernels not in (1, 2) or (max_kernels == 2 and search == "ollie"):
        raise UsageError(f"max_kernels is {max_kernels} with search {search!r}; use 1, or 2 with prism or mirage")
    if max_library_ops < 0 or (max_library_ops and search != "mirage"):
        raise UsageError(f"max_library_ops is {max_library_ops} with search {search!r}; use 0, or more with mirage")
    kind = kind_of(example_inputs)
    start = time.perf_counter()
    traced = freeze(trace(function, example_inputs))
    if search == "auto":
        search = "ollie" if kind[0] == "cpu" and any(n.op == "conv" for n in traced.program.nodes) else "prism"
    if search == "ollie" and kind[0] != "cpu":
        raise UsageError("search 'ollie' makes kernels for a CPU; on a GPU use prism")
    if missing := _memory_missing(traced.program):
        return Compiled(
            function, traced, None, traced.program, Report(search, "original", missing, 0.0, 0.0, 0.0, 0.0), kind
        )
    if search == "ollie":
        run, program, report = _ollie(traced, time_budget_s, progress)
    else:
        limits = Limits(max_block_ops, max_kernels=max_kernels, max_library_ops=max_library_ops, budget_s=time_budget_s)
        settings = Settings(search, limits, samples, workers, state, cache)
        engine = superoptimize if kind[0] == "cpu" else device.superoptimize
        run, program, report = engine(traced, example_inputs, settings, progress)
    compiled = Compiled(function, traced, run, program, report, kind)
    _judge(compiled, example_inputs)
    report.seconds = time.perf_counter() - start
    return compiled


def _memory_missing(program: Program) -> str:
    """Why a replacement of the program could not be checked here; empty where it can."""
    needed, free = memory_needed(program), psutil.virtual_memory().available
    if needed <= free:
        return ""
    return (
        f"not searched: checking a replacement in float64 takes about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
        "the original is kept (compile it for smaller inputs, or where there is more memory)"
    )


def freeze(traced: Traced) -> Traced:
    """Values that depend on constants alone become constants of their own (a transposed weight is stored transposed)."""
    executable = Executable(traced.program, traced.constants)
    program, known = executable.program, executable.values
    build, place = Builder(), {}
    constants: dict[str, Tensor] = {}
    for i, node in enumerate(program.nodes):
        if known[i] is None:
            place[i] = (
                build.input(node.shape, node["name"])
                if node.op == "input"
                else build.add(
                    node.op, [_placed(j, place, known, build, constants) for j in node.inputs], **dict(node.attrs)
                )
            )
    outputs = [_placed(j, place, known, build, constants) for j in program.outputs]
    return Traced(build.build(*outputs), constants, traced.user_inputs, traced.single_output)


def _placed(j: int, place: dict[int, int], known: Sequence[Any], build: Builder, constants: dict[str, Tensor]) -> int:
    if j not in place:
        name = f"constant{len(constants)}"
        value = known[j]
        constants[name] = (value if value.is_cuda else value.float()).contiguous()
        place[j] = build.input(tuple(known[j].shape), name)
    return place[j]


def _ollie(traced: Traced, budget_s: float, progress: Callable[[str], None] | None) -> tuple[Any, Program, Report]:
    network = optimize(traced.program, traced.constants, budget_s=budget_s, progress=progress)
    derived = sum(c.chosen.startswith("derived") for c in network.choices)
    details = [
        f"{c.operator}: {c.chosen} ({c.baseline_ms:.3f} -> {c.chosen_ms:.3f} ms)"
        + (f", stopped by {c.limit}" if c.limit else "")
        + "".join(f"; refused {why}" for why in c.refused)
        for c in network.choices
    ]
    counters = {"operators": len(network.choices), "derived": derived, "states": sum(c.states for c in network.choices)}
    reason = (
        "derived step by step by exact rules; candidates evaluated against the original on integers"
        if network.choices
        else "no convolution or constant product to derive"
    )
    report = Report("ollie", "ollie", reason, 0.0, 0.0, 0.0, 0.0, counters, details)
    return network.executable if network.choices else None, traced.program, report


def _judge(compiled: Compiled, inputs: Sequence[Tensor]) -> None:
    """Keeps the replacement only if it is within the error bound and faster than the original."""
    report, run = compiled.report(), compiled.run
    if run is None:
        return
    named = dict(zip(compiled.traced.user_inputs, inputs, strict=True)) | compiled.traced.constants
    values = [named[n].detach().double().cpu().numpy() for n in compiled.traced.program.input_names]
    dtype = str(compiled.kind[1]).removeprefix("torch.")
    with torch.no_grad():
        outputs = [o.double().cpu().numpy() for o in run(*inputs)]
        verdict = compare(compiled.traced.program, values, outputs, dtype=dtype)
        timing = _timing(
            {"original": lambda: compiled.original(*inputs), "compiled": lambda: run(*inputs)}, compiled.kind
        )
    report.original_ms, report.compiled_ms = timing.medians_s["original"] * 1e3, timing.medians_s["compiled"] * 1e3
    report.noise = timing.noise
    report.counters["error"] = f"{verdict.worst:.2g} of the {dtype} bound"
    if not verdict:
        report.reason = f"the result leaves the {dtype} error bound ({verdict.worst:.3g} times); the original is kept"
    elif report.compiled_ms >= report.original_ms:
        report.reason = f"nothing faster was found ({report.compiled_ms:.3f} against {report.original_ms:.3f} ms); the original is kept"
    else:
        return
    report.used, report.compiled_ms, compiled.run = "original", report.original_ms, None


def _timing(contenders: Mapping[str, Callable[[], Any]], kind: tuple[str, torch.dtype]) -> Timing:
    if kind[0] == "cpu":
        return time_together(contenders, rounds=25, budget_s=4.0)
    with cuda_timer.alone():
        return cuda_timer.time_together(contenders)


def load(path: str | Path) -> tuple[Program, Mapping[str, Any]]:
    """A saved program and its report. Raises UsageError for a file that is not one."""
    try:
        data = json.loads(Path(path).read_text())
        return from_json(json.dumps(data["program"])), data["report"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a saved compilation ({error}); save one with Compiled.save") from None


def backend(graph: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A torch.compile backend: `torch.compile(model, backend=wager.compile.backend)`; see wager.compile.dynamo."""
    return Frozen(graph, lambda module, inputs: compile(module, inputs))
