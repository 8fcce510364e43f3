"""What passes of the engine's model cost on a CPU: one token against the read bandwidth, 8 and 16 tokens against one, a prompt against GEMM.

    python -m benchmarks.kernels.passes [--quick] [--modes default int16 w8a8] [--threads 2]

Model: Llama layout, 500 M random parameters in bfloat16 (100 M with --quick). A pass is what the engine does in a step: building the batch,
the model, the logits. Every comparison is interleaved: one token's weight bytes per second beside a stream read, n tokens of one request (a
draft that is verified) beside one token, and 512 prompt tokens beside torch's fastest matrix product on this machine. Mode `default` is what
serves a bfloat16 model here; the facts name it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Report, Row, arguments, compare, sample, say
from benchmarks.kernels.linear import stream_bandwidth
from benchmarks.serve.llama_100m import FULL, write_checkpoint
from wager import LLM
from wager.serve.runner import ModelRunner, SpanInput

LARGE = FULL | dict(hidden_size=1536, num_hidden_layers=20, intermediate_size=4096, tie_word_embeddings=False)
CONTEXT_TOKENS, PROMPT_TOKENS, GEMM_N = 128, 512, 2048


def passes(runner: ModelRunner, tokens: int, context: int, logit_rows: int) -> Callable[[], float]:
    """Seconds of a pass over `tokens` tokens of one request with `context` cached ones."""
    rng, name = np.random.default_rng(tokens), f"pass-{tokens}-{context}"
    runner.blocks.start(name, [0], (name, None))
    if not runner.blocks.reserve(name, context + tokens):
        raise ValueError(f"the cache has no room for {context + tokens} tokens")

    def run() -> float:
        ids = rng.integers(0, runner.model.vocab_size, tokens).tolist()
        start = time.perf_counter()
        batch = runner.build([SpanInput(name, ids, context, logit_rows=logit_rows)])
        runner.logits(runner.forward(batch), batch.logit_rows_L)
        return time.perf_counter() - start

    return run


def gemm(dtype: torch.dtype, n: int) -> Callable[[], float]:
    """Operations per second of a square product, a multiply and an add being two."""
    a_NN, b_NN = (torch.randn(n, n).to(dtype) for _ in range(2))

    def run() -> float:
        start = time.perf_counter()
        torch.mm(a_NN, b_NN)
        return 2 * n**3 / (time.perf_counter() - start) / 1e9

    return run


def fastest_gemm(n: int) -> tuple[str, Callable[[], float]]:
    candidates = {
        f"torch {dtype} GEMM".replace("torch.", ""): gemm(dtype, n) for dtype in (torch.float32, torch.bfloat16)
    }
    taken = sample(candidates, repeats=2, warmup=1, seed=0)
    best = max(candidates, key=lambda name: max(taken[name]))
    return best, candidates[best]


def measure(directory: Path, mode: str, threads: int, repeats: int, facts: dict[str, Any]) -> list[Row]:
    quantization = None if mode == "default" else mode
    llm = LLM(
        model=str(directory), quantization=quantization, max_model_len=1024, max_num_seqs=4, enable_prefix_caching=False,
        kv_cache_memory=512 << 20, skip_tokenizer_init=True,
    )  # fmt: skip
    runner = llm.engine.core.runner
    packed: list[Any] = [m.packed for m in runner.model.modules() if getattr(m, "packed", None) is not None]
    nbytes, weights = sum(p.nbytes for p in packed), sum(p.inputs * p.outputs for p in packed)
    facts |= {f"{mode}.linears": packed[0].mode, f"{mode}.weight_bytes": nbytes, "linear_parameters": weights}
    one, prompt = passes(runner, 1, CONTEXT_TOKENS, 1), passes(runner, PROMPT_TOKENS, 0, 1)
    stream, (best, product) = stream_bandwidth(threads), fastest_gemm(GEMM_N)
    head = packed[-1].inputs * packed[-1].outputs  # makes logits of one row only
    prompt_flops = 2 * (PROMPT_TOKENS * (weights - head) + head)
    reading = {"stream read": lambda: stream() / 1e9, "wager, one token": lambda: nbytes / one() / 1e9}
    rows = compare(f"{mode}: bytes read", reading, repeats=repeats, unit="GB/s", higher_is_better=True, progress=say)
    costs = {"1 token": one} | {f"{n} tokens": passes(runner, n, CONTEXT_TOKENS, n) for n in (8, 16)}
    costs_rows = compare(f"{mode}: one pass", costs, repeats=repeats, progress=say)
    filling = {best: product, f"wager, {PROMPT_TOKENS} tokens": lambda: prompt_flops / prompt() / 1e9}
    rows += costs_rows + compare(
        f"{mode}: prompt",
        filling,
        repeats=max(3, repeats // 3),
        warmup=1,
        unit="GFLOP/s",
        higher_is_better=True,
        progress=say,
    )
    return rows


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--modes", nargs="+", default=["default", "int16", "w8a8"])
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    repeats = chosen.repeats or (3 if chosen.quick else 11)
    rows, facts = [], {"threads": chosen.threads, "context_tokens": CONTEXT_TOKENS}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), FULL if chosen.quick else LARGE)
        for mode in chosen.modes:
            rows += measure(Path(folder), mode, chosen.threads, repeats, facts)
    for row in rows:
        if row.baseline == "1 token":
            facts[f"{row.workload.split(':')[0]}.cost_of_{row.ours.split()[0]}"] = 1 / row.ratio
        else:
            facts[f"{row.workload.split(':')[0]}.share_of_{row.baseline.replace(' ', '_')}"] = row.ratio
    report = Report("kernels", "passes", rows, facts)
    print(report.table())
    print(facts)
    if not chosen.quick:
        say(f"saved {report.save()}")


if __name__ == "__main__":
    main()
