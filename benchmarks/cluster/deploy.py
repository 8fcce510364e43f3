"""A pipeline of processes against one process: `python -m benchmarks.cluster.deploy [--quick] [--launcher local|ray]`.

The demo model and a larger random model of the same family, as one process with one thread, one process with two, and as two stages of one
thread each in processes of their own. Tokens must be identical; the run fails otherwise. Throughput is output tokens per second of the same
requests. The pipeline moves activations over loopback and keeps both cores busy with two micro-batches.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Report, Row, arguments, compare, say
from wager.cluster.deploy.engine import deploy_engine, run_all, stage_layers
from wager.errors import WagerError
from wager.models.loader import build_model, pieces_of
from wager.serve.config import EngineConfig
from wager.serve.llm import LLM
from wager.serve.params import SamplingParams

LARGER = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2048,
    "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip


def write_larger(folder: Path) -> str:
    """A random checkpoint of 90 M parameters."""
    from safetensors.torch import save_file

    model = build_model(LARGER, torch.bfloat16)
    tensors: dict[str, torch.Tensor] = {}
    for module in model.modules():
        for parameter, pieces in pieces_of(module):
            start = 0
            for name, rows in pieces:
                tensors.setdefault(name, parameter.data[start : start + rows].clone())
                start += rows
    tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(LARGER))
    return str(folder)


def measure(name: str, model: str, layers: int, args: Any, launcher: Any) -> tuple[list[Row], dict[str, Any]]:
    requests, tokens = (6, 16) if args.quick else (16, 64)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(4, 4000, int(n)).tolist() for n in rng.integers(16, 128, requests)]
    params = [
        SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=tokens, ignore_eos=True) for i in range(requests)
    ]
    options: dict[str, Any] = dict(
        max_num_seqs=16,
        max_model_len=512,
        skip_tokenizer_init=True,
        kv_cache_memory=128_000_000,
        enable_prefix_caching=False,
    )
    one = LLM(model, **options)
    engine, replica = deploy_engine(
        EngineConfig(model=model, **options), stage_layers(layers, 2), launcher, name, threads=1
    )
    expected = [o.outputs[0].token_ids for o in one.generate(prompts, params)]
    got = [o.outputs[0].token_ids for o in run_all(engine, prompts, params)]
    if got != expected:
        raise WagerError(f"{name}: two stages did not generate the tokens of one process")
    total = sum(map(len, expected))

    def single(threads: int) -> float:
        torch.set_num_threads(threads)
        begun = time.perf_counter()
        one.generate(prompts, params)
        return total / (time.perf_counter() - begun)

    def pipeline() -> float:
        torch.set_num_threads(1)
        begun = time.perf_counter()
        run_all(engine, prompts, params)
        return total / (time.perf_counter() - begun)

    cores = os.cpu_count() or 1
    contenders = {
        "one process, 1 thread": lambda: single(1),
        f"one process, {cores} threads": lambda: single(cores),
        "2 stages, 1 thread each": pipeline,
    }
    repeats = args.repeats or (3 if args.quick else 7)
    rows = compare(
        f"{name}, {requests} requests x {tokens} tokens",
        contenders,
        repeats=repeats,
        warmup=1,
        unit="tok/s",
        higher_is_better=True,
        progress=say,
    )
    held = [p.spec.last - p.spec.first for p in replica.places]
    replica.close()
    return rows, {"identical": True, "layers_by_stage": held, "bytes_by_stage": [p.size for p in replica.places]}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--launcher", default="local", choices=("local", "ray"), help="what starts the stages")
    args = parser.parse_args()
    from wager.cluster.deploy.cli import make_launcher

    launcher = make_launcher(args.launcher, None)
    facts: dict[str, Any] = {"launcher": args.launcher}
    rows, facts["demo"] = measure("demo", "demo", 5, args, launcher)
    if not args.quick:
        with tempfile.TemporaryDirectory() as folder:
            more, facts["random-90M"] = measure("random-90M", write_larger(Path(folder)), 12, args, launcher)
        rows += more
    launcher.close()
    report = Report("cluster", "deploy" if args.launcher == "local" else f"deploy_{args.launcher}", rows, facts)
    print(report.table())
    print(report.save())


if __name__ == "__main__":
    main()
