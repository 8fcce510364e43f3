"""Log-likelihoods that lm-eval gets from `wager serve` against those of transformers on the same checkpoint.

    python -m benchmarks.serve.lm_eval_check [--model demo] [--limit 40]

lm-eval's own `local-completions` client asks the server; the reference is a teacher-forced pass of transformers in float32. Fails (exit 1)
when a sum of log-probabilities differs by more than 1e-3 or a greedy flag differs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, arguments, say
from benchmarks.serve.server import Server

TOLERANCE = 1e-3
CONTEXTS = (
    "The quick brown fox",
    "def add(a, b):",
    "import os\n\ndef main():",
    "In the year 1969, the first",
    "The function returns a list of",
    "Größe, naïve, café:",
)
CONTINUATIONS = (
    " jumps over the lazy dog.",
    "\n    return a + b",
    " people walked on the moon",
    " all keys in the dictionary",
    " 1, 2, 3",
    " x",
)


def main() -> None:
    parser = arguments("lm-eval log-likelihoods against transformers.", repeats=False)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--limit", type=int, default=40, help="pairs of context and continuation")
    args = parser.parse_args()
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
    from lm_eval.models.openai_completions import LocalCompletionsAPI  # pyright: ignore[reportMissingImports]

    api: Any = LocalCompletionsAPI  # a factory as far as its types go

    path = checkpoint(args.model)
    pairs = [(c, t) for c in CONTEXTS for t in CONTINUATIONS][: args.limit]
    with Server(args.model, ["--dtype", "float32", "--served-model-name", "checked"]) as server:
        client = api(
            model="checked", base_url=f"{server.url}/v1/completions", tokenizer_backend="huggingface", tokenizer=str(path), max_length=256
        )  # fmt: skip
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        served = client.loglikelihood(requests, disable_tqdm=True)
    expected = reference(path, [client._encode_pair(c, t) for c, t in pairs])
    worst = max(abs(a[0] - b[0]) for a, b in zip(served, expected, strict=True))
    flags = sum(a[1] != b[1] for a, b in zip(served, expected, strict=True))
    say(f"{len(pairs)} pairs: largest difference {worst:.2e}, greedy flags that differ {flags}")
    if not args.quick:
        facts = {"model": args.model, "pairs": len(pairs), "largest_difference": worst, "greedy_flags_differing": flags}
        print(f"written: {Report('serve', 'lm_eval_check', [], facts=facts).save()}")
    sys.exit(0 if worst <= TOLERANCE and flags == 0 else 1)


def checkpoint(model: str) -> Path:
    """The directory behind a model name."""
    from wager.models import demo

    return Path(demo.path(model)) if demo.is_demo(model) else Path(model)


def reference(path: Path, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """(sum of log p, whether every token is the likeliest) of each continuation after its context."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = []
    for context, continuation in pairs:
        ids = torch.tensor([context + continuation])
        with torch.inference_mode():
            logprobs_TV = model(ids[:, :-1]).logits[0].float().log_softmax(-1)[-len(continuation) :]
        wanted = torch.tensor(continuation)
        total = logprobs_TV.gather(1, wanted[:, None]).sum().item()
        found.append((total, bool((logprobs_TV.argmax(-1) == wanted).all())))
    return found


if __name__ == "__main__":
    main()
