"""Measures a pair on held-out text: loss per domain, and how often the target would accept the draft's next token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wager.models.attend import causal_attention
from wager.models.demo.corpus import DOMAINS
from wager.models.loader import load_model


@torch.inference_mode()
def evaluate_pair(
    target: Path, draft: Path, streams: Path, window: int = 512, most_tokens: int = 32_768
) -> dict[str, Any]:
    """Per domain: nats per token of both models, and the acceptance of a drafted token at temperature 1 and 0.

    At temperature 1 the chance that rejection sampling keeps a draft token is sum(min(p, q)) (arXiv 2211.17192); at 0 it is the share
    of positions where both models have the same most likely token.
    """
    models = [load_model(path, torch.float32).model for path in (target, draft)]
    rows: dict[str, Any] = {}
    for domain in DOMAINS:
        file = streams / f"heldout-{domain}.npy"
        if not file.exists():
            continue
        stream = np.load(file)[: most_tokens + 1].astype(np.int64)
        sums = torch.zeros(4, dtype=torch.float64)
        count = 0
        for start in range(0, len(stream) - 1, window):
            tokens = torch.from_numpy(stream[start : start + window + 1])
            sums += _window(models, tokens)
            count += len(tokens) - 1
        target_nats, draft_nats, kept, same = (sums / count).tolist()
        rows[domain] = {
            "tokens": count,
            "target_nats": target_nats,
            "draft_nats": draft_nats,
            "acceptance_t1": kept,
            "acceptance_t0": same,
        }
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in zip(("target", "draft"), models, strict=True)}
    return {"parameters": sizes, "heldout": rows}


def _window(models: list[Any], tokens: Tensor) -> Tensor:
    inputs, successors = tokens[:-1], tokens[1:]
    target_TW, draft_TW = (
        F.log_softmax(m.logits(m(inputs, torch.arange(len(inputs)), causal_attention(m))), -1) for m in models
    )
    nats = [-scores.gather(1, successors[:, None]).sum() for scores in (target_TW, draft_TW)]
    kept = torch.minimum(target_TW.exp(), draft_TW.exp()).sum()
    same = (target_TW.argmax(-1) == draft_TW.argmax(-1)).sum()
    return torch.stack([*nats, kept, same.to(kept)]).double()


def format_table(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| held-out domain | tokens | target, nats (ppl) | draft, nats (ppl) | accepted, T=1 | accepted, T=0 |",
        "|---|---|---|---|---|---|",
    ]
    for domain, row in report["heldout"].items():
        losses = [f"{row[key]:.3f} ({math.exp(row[key]):.1f})" for key in ("target_nats", "draft_nats")]
        lines.append(
            f"| {domain} | {row['tokens']:,} | {losses[0]} | {losses[1]} | {row['acceptance_t1']:.1%} | {row['acceptance_t0']:.1%} |"
        )
    return "\n".join(lines)
