"""The six workloads of the Mirage sheet on a GPU: what `wager.compile` finds, as Triton, against torch.compile and eager torch.

    python -m benchmarks.compile.gpu --device cuda [--quick] [--workloads rms-16,lora] [--budget-s 100]

Published shapes, float16, weights as `nn.Linear` holds them. Each workload is a process of its own: it searches, compiles and tunes, and
compiles the peer (mode max-autotune) meanwhile; whoever measures on the GPU holds a lock, so that nothing else runs on it. Every contender's
calls are captured in a CUDA graph (20 calls and more each, so that neither Python nor the launch of the graph is timed; torch.compile's own
capture, which max-autotune adds, is left out for that reason), and replays are timed by events, in turns. Rows are warm, as in the paper:
one set of inputs again and again. "cold" rows go around sets that are larger together than the second-level cache, where 64 sets are enough.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.compile.mirage_workloads import BARRED, Workload, draw, workloads
from benchmarks.harness import Report, Row, arguments, compare, say

CALLS = 20
MOST_SETS = 64
SAMPLE_S = 2e-3
PEERS = {"torch.compile default": "default", "torch.compile": "max-autotune-no-cudagraphs"}


# ── one workload, in its own process ────────────────────────────────────────────────────────────────────────────────────


def one(name: str, into: Path, quick: bool, repeats: int, samples: int) -> None:
    """Writes rows and facts to `into`, after every step anew; a step that fails leaves its traceback there."""
    start = time.perf_counter()
    load = workloads()[name]
    found: dict[str, Any] = {"rows": [], "facts": {}, "errors": []}
    facts = found["facts"]

    def step(what: str, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except Exception:
            found["errors"].append(f"{what}: {traceback.format_exc()}")
            return None
        finally:
            facts[f"{what} done at s"] = round(time.perf_counter() - start, 1)
            into.with_suffix(".tmp").write_text(json.dumps(found))
            into.with_suffix(".tmp").replace(into)

    inputs = draw(load, "cuda", torch.float16, 0)
    compiled = step("search", lambda: ours(load, inputs, samples, facts))
    if compiled is None:
        return
    if compiled.run is not None:  # otherwise the original is what is measured
        step("kernel", lambda: facts.update(resources(compiled, inputs)))
    serialise_autotuning()
    contenders: dict[str, Callable[..., Tensor]] = {"wager": compiled, "eager": load.function}
    for peer, mode in PEERS.items():
        made = step(peer, lambda mode=mode: peer_of(load.function, inputs, mode))
        if made is not None:
            contenders = {peer: made, **contenders}
            if not quick or peer == "torch.compile":
                step(f"time {peer}", lambda c=contenders: found.update(rows=measured(load, inputs, c, repeats)))
    step(
        "errors",
        lambda: facts.update({"errors against float64 as parts of the bound": errors(inputs, contenders, compiled)}),
    )


def ours(load: Workload, inputs: list[Tensor], samples: int, facts: dict[str, Any]) -> Any:
    from wager.compile.api import compile

    done = compile(
        load.function, inputs, search="prism", max_block_ops=load.max_block_ops, samples=samples, cache=False,
        time_budget_s=30.0, progress=lambda line: say(f"{load.title}: {line}"),
    )  # fmt: skip
    report = done.report()
    facts.update({"used": report.used, "why": report.reason, "search and tuning s": round(report.seconds, 1)})
    facts.update(report.counters)
    facts["fastest"] = report.details
    return done


def resources(compiled: Any, inputs: list[Tensor]) -> dict[str, Any]:
    """Registers, spills and shared memory of each kernel, and a replay of a captured call against a plain one."""
    found: dict[str, Any] = {}
    for i, kernel in enumerate(compiled.run.prepare(*inputs)):
        kernel._init_handles()
        found[f"kernel {i}"] = (
            f"{kernel.n_regs} registers, {kernel.n_spills} spilled, {kernel.metadata.shared} bytes shared"
        )
    plain = compiled(*inputs)
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        kept.append(compiled(*inputs))
    kept[0].fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    found["replayed equals called"] = bool(torch.equal(kept[0], plain))
    return found


def serialise_autotuning() -> None:
    """torch.compile times its choices one after another across all processes, and never while another measures."""
    from torch._inductor.runtime import benchmarking

    from wager.graph.cuda_timer import alone

    owner = type(benchmarking.benchmarker)
    plain = owner.benchmark_gpu

    def held(self: Any, *args: Any, **kwargs: Any) -> Any:
        with alone():
            return plain(self, *args, **kwargs)

    owner.benchmark_gpu = held


def peer_of(function: Callable[..., Tensor], inputs: list[Tensor], mode: str) -> Callable[..., Tensor]:
    made = torch.compile(function, mode=mode, dynamic=False)
    with torch.no_grad():
        made(*inputs)
    torch.cuda.synchronize()
    return made


def measured(
    load: Workload, inputs: list[Tensor], contenders: dict[str, Callable[..., Tensor]], repeats: int
) -> list[dict[str, Any]]:
    """Rows against the first contender, warm and (where inputs are large enough) cold."""
    from wager.graph.cuda_timer import alone

    rows = []
    weight_bytes = sum(x.nbytes for x in inputs)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    sets = math.ceil(2 * cache / weight_bytes) + 1
    with alone():
        rows += replayed(load.title, [inputs], contenders, repeats)
        if sets <= MOST_SETS:
            others = [draw(load, "cuda", torch.float16, seed) for seed in range(1, sets)]
            rows += replayed(f"{load.title}, cold", [inputs, *others], contenders, repeats)
    return [asdict(row) for row in rows]


def replayed(
    title: str, sets: Sequence[list[Tensor]], contenders: dict[str, Callable[..., Tensor]], repeats: int
) -> list[Row]:
    from wager.graph.cuda_timer import capture, replay_s

    calls = max(CALLS, len(sets))
    runs: dict[str, Callable[[], float]] = {}
    for name, call in contenders.items():
        turns = [lambda call=call, xs=xs: call(*xs) for xs in sets]
        graph = capture([turns[i % len(turns)] for i in range(calls)])
        replay_s(graph)
        replays = max(1, math.ceil(SAMPLE_S / replay_s(graph)))
        runs[name] = lambda graph=graph, replays=replays: replay_s(graph, replays) / calls
    return compare(title, runs, repeats=repeats, warmup=1, unit="s", progress=None)


def errors(inputs: list[Tensor], contenders: dict[str, Callable[..., Tensor]], compiled: Any) -> dict[str, Any]:
    """Each contender's largest difference from the float64 result, as a part of the verifier's bound for float16."""
    from wager.graph.verify.floating import expected, judge

    traced = compiled.traced
    named = dict(zip(traced.user_inputs, inputs, strict=True)) | traced.constants
    wanted = expected(traced.program, [named[n].double().cpu().numpy() for n in traced.program.input_names], "float16")
    with torch.no_grad():
        worst = {n: judge(wanted, [c(*inputs).double().cpu().numpy()]).worst for n, c in contenders.items()}
    return {name: float(f"{w:.3g}") if math.isfinite(w) else "not finite" for name, w in worst.items()}


# ── all of them ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    parser = arguments("The Mirage workloads on a GPU.", device="cpu")
    parser.add_argument("--workloads", default="", help=f"some of {','.join(workloads())}, with commas")
    parser.add_argument(
        "--budget-s", type=float, default=100.0, help="seconds for everything; what is not done is stopped"
    )
    parser.add_argument("--samples", type=int, default=24, help="members that are compiled and timed per workload")
    parser.add_argument("--one", default="", help="run this workload here, for --into")
    parser.add_argument("--into", type=Path, default=None, help="file for the results of --one")
    args = parser.parse_args()
    repeats = args.repeats or (5 if args.quick else 21)
    if args.one:
        one(args.one, args.into, args.quick, repeats, args.samples)
        return
    if args.device != "cuda" or not torch.cuda.is_available():
        parser.error("these kernels run on a GPU: --device cuda, on a machine that has one")
    names = args.workloads.split(",") if args.workloads else ["rms-16", "lora-16"] if args.quick else list(workloads())
    if unknown := [n for n in names if n not in workloads()]:
        parser.error(f"unknown workloads {', '.join(unknown)}; known: {', '.join(workloads())}")
    with tempfile.TemporaryDirectory() as folder:
        found = run_all(names, Path(folder), args.budget_s, sys.argv[1:])
    report = assemble(found)
    print(report.table())
    for name, value in report.facts.items():
        if name.startswith(("geomean", "by workload")):
            print(f"{name}: {value}")
        else:
            say(f"{name}: {json.dumps(value, indent=1)}")
    failed = {name: part["errors"][0].strip().splitlines()[-1][:200] for name, part in found.items() if part["errors"]}
    for name, error in failed.items():
        print(f"{name}: {error}")
    if not args.quick:
        say(f"saved {report.save()}")
    sys.exit(1 if failed else 0)


def run_all(names: Sequence[str], folder: Path, budget_s: float, given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each workload's process wrote until the budget ended."""
    start = time.monotonic()
    threads = str(max(1, (os.cpu_count() or 2) // max(1, len(names))))
    env = {
        **os.environ,
        "WAGER_GPU_LOCK": str(folder / "gpu.lock"),
        "TORCHINDUCTOR_COMPILE_THREADS": str(max(2, int(threads))),
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
    }
    running = {}
    for name in names:
        command = [
            sys.executable,
            "-m",
            "benchmarks.compile.gpu",
            "--one",
            name,
            "--into",
            str(folder / f"{name}.json"),
        ]
        with open(folder / f"{name}.log", "w") as log:
            running[name] = subprocess.Popen(
                [*command, *given], env=env, stdout=log, stderr=log, start_new_session=True
            )
    found: dict[str, dict[str, Any]] = {}
    while running:
        over = time.monotonic() - start > budget_s
        for name, process in list(running.items()):
            if process.poll() is None and not over:
                continue
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
            del running[name]
            found[name] = gathered(folder, name, over, process.returncode)
            say(f"{time.monotonic() - start:.0f} s: {name} {'stopped' if over else 'done'}")
            print_rows(found[name])
            if "--quick" not in given:
                assemble(found).save()
        time.sleep(0.2)
    return found


def gathered(folder: Path, name: str, stopped: bool, code: int) -> dict[str, Any]:
    path, log = folder / f"{name}.json", folder / f"{name}.log"
    found = json.loads(path.read_text()) if path.exists() else {"rows": [], "facts": {}, "errors": []}
    if stopped:
        found["facts"]["stopped by"] = "the time budget"
    elif code:
        found["errors"].append(f"exit status {code}")
    for error in found["errors"]:
        say(f"{name}: {error}")
    if found["errors"] or stopped or not found["rows"]:
        say(f"{name}, end of its log:\n" + "\n".join(log.read_text().splitlines()[-25:]))
    return found


def print_rows(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        if row["ours"] != "eager":
            say(
                f"  {row['workload']}: {row['baseline']} {row['baseline_value'] * 1e6:.2f} us, {row['ours']} "
                f"{row['ours_value'] * 1e6:.2f} us, {row['ratio']:.2f}x, A/A {row['aa_noise']:.1%}"
            )
    for line in found["facts"].get("fastest", [])[:10]:
        say(f"  {line}")


def assemble(found: dict[str, dict[str, Any]]) -> Report:
    """One record: rows of ours against torch.compile; other contenders, in microseconds, are among the facts."""
    rows, facts = [], {}
    groups: dict[tuple[str, str], list[float]] = {}
    for name, part in found.items():
        load, mine = workloads()[name], dict(part["facts"])
        mine.pop("fastest", None)
        for plain in part["rows"]:
            row = Row(**plain)
            if row.ours == "wager":
                rows.append(row)
                groups.setdefault(("cold" if row.workload.endswith("cold") else "warm", load.group), []).append(
                    row.ratio
                )
            else:
                mine[f"{row.ours}, us{' cold' if row.workload.endswith('cold') else ''}"] = round(
                    row.ours_value * 1e6, 2
                )
        mine["errors"] = len(part["errors"])
        mine["fastest member"] = (part["facts"].get("fastest") or ["none"])[0]
        facts[load.title] = mine
    for state in ("warm", "cold"):
        per_group = {g: statistics.geometric_mean(r) for (s, g), r in groups.items() if s == state}
        barred = [per_group[g] for g in BARRED if g in per_group]
        if barred:
            facts[f"geomean of {len(barred)} without attention, {state}"] = round(statistics.geometric_mean(barred), 3)
        if per_group:
            facts[f"by workload, {state}"] = {g: round(r, 3) for g, r in per_group.items()}
    device = torch.cuda.get_device_name().split()[1].lower() if torch.cuda.is_available() else "cpu"
    return Report("compile", f"mirage_gpu_{device}", rows, facts)


if __name__ == "__main__":
    main()
