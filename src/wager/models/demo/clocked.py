"""A target and drafts that foretell it, trained on one device in minutes: every stage is bounded by the clock and leaves its files.

The corpus is read by the other cores while this process compiles. The target learns the next token. Then it continues prompts from texts it
was trained on (functions cut after their docstring, places in any document), greedily and at temperature 0.6, and the drafts are drawn to
its whole distribution at that temperature over these texts and over the corpus, all of them from the same pass of the target. Last, every
draft is judged on the target's continuations of held-out prompts.
"""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch

from wager.errors import UsageError
from wager.models import demo as shipped
from wager.models.demo.batched import block
from wager.models.demo.distil import evaluate, make_texts, train_drafts
from wager.models.demo.export import save_description
from wager.models.demo.packages import Reading
from wager.models.demo.pretrain import compiled_block, train_target
from wager.models.demo.timed import Place, Plan, device_name, load

STAGES = ("corpus", "target", "texts", "drafts", "evaluate")


def run(
    plan: Plan, place: Place, packages: Path | None, data: Path | None, minutes: float, stages: tuple[str, ...] = STAGES
) -> None:
    """The stages one after another, each from the files of those before it. Raises UsageError for a stage that is not there."""
    if unknown := set(stages) - set(STAGES):
        raise UsageError(
            f"stage {', '.join(sorted(unknown))} is unknown; use some of {', '.join(STAGES)}", param="only"
        )
    (place.out / "streams").mkdir(parents=True, exist_ok=True)
    reading = _start_reading(plan, place, packages, data) if "corpus" in stages else None
    torch.set_float32_matmul_precision("high")
    layer_forward = compiled_block(plan, place) if "target" in stages else block
    if reading is not None:
        sizes = reading.write(place.out / "streams", place.seed)
        place.say("tokens: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
    seconds = [60 * minutes * share for share in plan.shares]
    if "target" in stages:
        train_target(plan, place, layer_forward, seconds[0])
        if place.device.type == "cuda":
            place.say(f"{device_name(place)}: at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB in use")
    target = load(place, plan.target[0]) if {"texts", "drafts", "evaluate"} & set(stages) else None
    if target is not None and "texts" in stages:
        make_texts(plan, place, target, seconds[1])
    if target is not None and "drafts" in stages:
        train_drafts(plan, place, target, seconds[2])
    if target is not None and "evaluate" in stages:
        report = evaluate(plan, place, target)
        (place.out / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
        place.say(json.dumps(report))


def _start_reading(plan: Plan, place: Place, packages: Path | None, data: Path | None) -> Reading:
    file = shipped.path("demo") / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    for name, config in (plan.target, *plan.drafts.items()):
        save_description(config, tokenizer, place.out / name)
    return Reading(packages, data, file, plan.corpus_bytes, plan.chats)
