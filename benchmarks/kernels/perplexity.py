"""What each mode of the weights costs in quality: perplexity of the demo model per mode on one held-out text.

    python -m benchmarks.kernels.perplexity --data DIR [--quick]

DIR holds wikitext2/test_first_half.txt. The same windows go through every mode; the change against float32 is exact for this text, no noise.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.harness import Report, arguments, format_table, say
from wager.models import demo
from wager.models.attend import causal_attention
from wager.models.loader import load_model
from wager.serve.text.tokenizer import Tokenizer

MODES = ("int8", "w8a8", "int4", "w4a8", "nf4", "w16a16", "int16")
BARS = {"int8": 0.005, "int4": 0.03}
WINDOW_TOKENS = 512


@torch.inference_mode()
def perplexity(mode: str | None, tokens: torch.Tensor) -> float:
    model = load_model(demo.path("demo"), torch.float32, packed=True, quantization=mode).model
    total = 0.0
    for window in tokens.split(WINDOW_TOKENS):
        hidden = model(window[:-1], torch.arange(len(window) - 1), causal_attention(model))
        total += F.cross_entropy(model.logits(hidden), window[1:], reduction="sum").item()
    return math.exp(total / (len(tokens) - len(tokens.split(WINDOW_TOKENS))))


def main() -> None:
    parser = arguments(__doc__ or "", repeats=False)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2/")
    chosen = parser.parse_args()
    text = (chosen.data / "wikitext2" / "test_first_half.txt").read_text(encoding="utf-8")
    ids = Tokenizer.load(demo.path("demo")).encode(
        text[: 40_000 if chosen.quick else 200_000], add_special_tokens=False
    )
    tokens = torch.tensor(ids)[: len(ids) // WINDOW_TOKENS * WINDOW_TOKENS]
    exact = perplexity(None, tokens)
    table, facts = [["mode", "perplexity", "change", "bar"]], {"tokens": len(tokens), "float32": exact}
    for mode in MODES:
        value = perplexity(mode, tokens)
        change = value / exact - 1
        say(f"{mode}: {value:.3f}")
        bar = f"within {BARS[mode]:.1%}: {'held' if change <= BARS[mode] else 'missed'}" if mode in BARS else ""
        table.append([mode, f"{value:.3f}", f"{change:+.2%}", bar])
        facts |= {mode: value, f"{mode}.change": change}
    print(format_table([table[0], ["float32", f"{exact:.3f}", "", ""], *table[1:]]))
    if not chosen.quick:
        say(f"saved {Report('kernels', 'perplexity', [], facts).save()}")


if __name__ == "__main__":
    main()
