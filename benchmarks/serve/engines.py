"""Engines behind one face, each in a process of its own: `python engines.py wager|transformers|vllm MODEL DTYPE [QUANTIZATION]`.

Operations: `generate(prompts, max_tokens)` completes all prompts greedily to exactly max_tokens tokens and returns seconds, tokens per
second and the first output; `one_by_one` the same, one prompt after the other; `share` (wager) tells where the time of the last call went.
Imports nothing of wager at module level: the vLLM worker runs in an environment that does not have it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.worker import serve

Prompts = list[list[int]]


class WagerEngine:
    def __init__(self, model: str, dtype: str, quantization: str | None = None):
        from wager import LLM, SamplingParams

        self.log = StepTotals()
        self.llm = LLM(model, dtype=dtype, quantization=quantization, observers=[self.log], enable_prefix_caching=False)
        self.params = lambda n: SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True)

    def complete(self, prompts: Prompts, max_tokens: int) -> list[list[int]]:
        self.log.reset()
        outputs = self.llm.generate(prompts, self.params(max_tokens))  # type: ignore[arg-type]
        return [o.outputs[0].token_ids for o in outputs]


class StepTotals:
    """Adds up the engine's step log: milliseconds per phase."""

    PHASES = ("schedule_ms", "forward_ms", "sample_ms", "output_ms", "step_ms")

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.totals = dict.fromkeys(self.PHASES, 0.0)
        self.steps = 0

    def on_step(self, record: Any) -> None:
        self.steps += 1
        for phase in self.PHASES:
            self.totals[phase] += getattr(record, phase)

    def on_tokens(self, request: Any, num_new_tokens: int, now_s: float) -> None: ...

    def on_finished(self, request: Any) -> None: ...


class TransformersEngine:
    def __init__(self, model: str, dtype: str):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    def complete(self, prompts: Prompts, max_tokens: int) -> list[list[int]]:
        """One padded batch; the prompts are of equal length, so nothing is padded."""
        ids = self.torch.tensor(prompts)
        with self.torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return out[:, ids.shape[1] :].tolist()


class VllmEngine:
    def __init__(self, model: str, dtype: str):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

        self.llm = LLM(
            model, dtype=dtype, skip_tokenizer_init=True, max_model_len=512, max_num_seqs=64, enable_prefix_caching=False, disable_log_stats=True
        )  # fmt: skip
        self.params = lambda n: SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False)

    def complete(self, prompts: Prompts, max_tokens: int) -> list[list[int]]:
        inputs = [{"prompt_token_ids": p} for p in prompts]
        outputs = self.llm.generate(inputs, self.params(max_tokens), use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs]


ENGINES = {"wager": WagerEngine, "transformers": TransformersEngine, "vllm": VllmEngine}


def measured(outputs: list[list[int]], seconds: float, max_tokens: int) -> dict[str, Any]:
    """Refuses outputs of the wrong length: contenders must do the same work."""
    wrong = [len(o) for o in outputs if len(o) != max_tokens]
    if wrong:
        raise ValueError(f"{len(wrong)} outputs have {wrong[0]} tokens instead of {max_tokens}")
    tokens = sum(map(len, outputs))
    return {"seconds": seconds, "tokens_per_s": tokens / seconds, "first": outputs[0]}


def main() -> None:
    name, *settings = sys.argv[1:]
    engine: Any = None
    wall_s = 0.0

    def load() -> str:
        nonlocal engine
        engine = ENGINES[name](*settings)
        return name

    def generate(prompts: Prompts, max_tokens: int) -> dict[str, Any]:
        nonlocal wall_s
        start = time.perf_counter()
        outputs = engine.complete(prompts, max_tokens)
        wall_s = time.perf_counter() - start
        return measured(outputs, wall_s, max_tokens)

    def one_by_one(prompts: Prompts, max_tokens: int) -> dict[str, Any]:
        start = time.perf_counter()
        outputs = [engine.complete([p], max_tokens)[0] for p in prompts]
        return measured(outputs, time.perf_counter() - start, max_tokens)

    def share() -> dict[str, float]:
        """Shares of the last generate's wall time; "text" is what happens outside the steps: detokenising and handing over."""
        totals, wall_ms = engine.log.totals, 1e3 * wall_s
        parts = {phase: totals[f"{phase}_ms"] / wall_ms for phase in ("schedule", "forward", "sample", "output")}
        return parts | {"text": 1 - totals["step_ms"] / wall_ms, "steps": engine.log.steps}

    serve({"load": load, "generate": generate, "one_by_one": one_by_one, "share": share})


if __name__ == "__main__":
    main()
