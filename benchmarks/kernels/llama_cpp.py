"""Single-stream decoding against llama.cpp at equal bits, on the same GGUF files of random weights, two threads each, interleaved.

    python -m benchmarks.kernels.llama_cpp --llama-python /path/to/venv/bin/python [--quick]

Rows: llama.cpp's F16, Q8_0 and Q4_0 against ours on the same file (Q8_0 and Q4_0 with int8 activations, as llama.cpp rounds them too), for
about 100 M and 500 M parameters. Facts: the largest difference of logits on a small file, weight bytes read per second beside the stream read
measured in the same run.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Report, arguments, compare, say
from benchmarks.kernels import gguf_file
from benchmarks.kernels.linear import stream_bandwidth
from benchmarks.worker import Worker
from wager import LLM, SamplingParams
from wager.models.attend import causal_attention
from wager.models.loader import load_model

MODELS = {"100 M": gguf_file.LLAMA_100M, "500 M": gguf_file.LLAMA_500M}
KINDS: dict[str, str | None] = {"F16": None, "Q8_0": "w8a8", "Q4_0": "w4a8"}
PROMPT = list(range(300, 316))


def ours(path: Path, quantization: str | None, tokens: int) -> tuple[Callable[[], float], int]:
    """(tokens per second after the first token, bytes of packed weights)."""
    llm = LLM(
        model=str(path), quantization=quantization, max_model_len=512, max_num_seqs=1, enable_prefix_caching=False,
        kv_cache_memory=256 << 20, skip_tokenizer_init=True,
    )  # fmt: skip

    def seconds(count: int) -> float:
        start = time.perf_counter()
        llm.generate([PROMPT], SamplingParams(max_tokens=count, temperature=0, ignore_eos=True))
        return time.perf_counter() - start

    def run() -> float:
        first = seconds(1)  # the prompt and one token
        return tokens / (seconds(tokens + 1) - first)

    modules: list[Any] = list(llm.engine.core.runner.model.modules())
    nbytes = sum(m.packed.nbytes for m in modules if getattr(m, "packed", None) is not None)
    return run, nbytes


def logit_difference(worker: Worker, directory: Path, threads: int) -> float:
    """Largest difference, relative to the largest logit, on a small float32 file."""
    config = gguf_file.llama_config(64, 2, 4, 2, 96, 400)
    path = gguf_file.write(directory / "small.gguf", config, "F32", std=0.2)
    worker.call("load", path=str(path), threads=threads, logits_all=True)
    theirs = torch.tensor(worker.call("logits", path=str(path), prompt=PROMPT))
    model = load_model(path, "float32", packed=True).model
    with torch.no_grad():
        mine = model.logits(model(torch.tensor(PROMPT), torch.arange(len(PROMPT)), causal_attention(model)))
    return float((mine - theirs).abs().max() / theirs.abs().max())


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--llama-python", required=True, help="python of an environment that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    repeats, tokens = chosen.repeats or (2 if chosen.quick else 5), 16 if chosen.quick else 48
    rows, facts = [], {"threads": chosen.threads, "tokens": tokens}
    with (
        tempfile.TemporaryDirectory() as folder,
        Worker([chosen.llama_python, str(Path(__file__).parent / "llama_worker.py")]) as peer,
    ):
        facts["logits.difference"] = logit_difference(peer, Path(folder), chosen.threads)
        for size, config in list(MODELS.items())[: 1 if chosen.quick else None]:
            for kind, quantization in KINDS.items():
                path = gguf_file.write(Path(folder) / f"{kind}.gguf", config, kind)
                rows += _pair(peer, path, size, kind, quantization, chosen.threads, tokens, repeats, facts)
                path.unlink()
    report = Report("kernels", "llama_cpp", rows, facts)
    print(report.table())
    print(facts)
    if not chosen.quick:
        say(f"saved {report.save()}")


def _pair(
    peer: Worker, path: Path, size: str, kind: str, quantization: str | None, threads: int, tokens: int, repeats: int,
    facts: dict[str, Any],
) -> list[Any]:  # fmt: skip
    peer.call("load", path=str(path), threads=threads)
    run, nbytes = ours(path, quantization, tokens)
    found = compare(
        f"{size} {kind}", {"llama.cpp": lambda: peer.call("decode", path=str(path), prompt=PROMPT, tokens=tokens), "wager": run},
        repeats=repeats, warmup=1, unit="tok/s", higher_is_better=True, progress=say,
    )  # fmt: skip
    stream = stream_bandwidth(threads)
    bandwidth = statistics.median(stream() for _ in range(7))
    read = nbytes * found[0].ours_value
    facts |= {f"{size}.{kind}.read_GB_s": read / 1e9, f"{size}.{kind}.share_of_stream": read / bandwidth}
    return found


if __name__ == "__main__":
    main()
