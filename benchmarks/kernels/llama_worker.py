"""llama-cpp-python in an environment of its own, behind `benchmarks.worker`: decode speed and logits of a GGUF file."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.pop(0)  # the folder of this file: its llama_cpp.py would hide the peer
sys.path.insert(0, str(Path(__file__).parents[1]))
import worker

held: dict = {}


def load(path: str, threads: int, logits_all: bool = False) -> bool:
    from llama_cpp import Llama  # pyright: ignore[reportAttributeAccessIssue]  # of the peer's environment

    held[path] = Llama(
        path, n_ctx=512, n_threads=threads, n_threads_batch=threads, logits_all=logits_all, verbose=False
    )
    return True


def decode(path: str, prompt: list[int], tokens: int) -> float:
    """Tokens per second of greedy single-stream decoding after the prompt."""
    model = held[path]
    model.reset()
    model.eval(prompt)
    start = time.perf_counter()
    for _ in range(tokens):
        model.eval([int(model.sample(temp=0.0))])
    return tokens / (time.perf_counter() - start)


def logits(path: str, prompt: list[int]) -> list[list[float]]:
    model = held[path]
    model.reset()
    model.eval(prompt)
    return [[float(v) for v in row] for row in model.scores[: len(prompt)]]


worker.serve({"load": load, "decode": decode, "logits": logits})
