"""`python -m wager.models.demo --out DIR`: train a target and its draft from nothing, and measure them.

The default is the shipped pair; `--preset large` makes a bigger one, for a GPU or for patience; `--preset deep` grows the shipped target to
four times its depth (33 million parameters) and trains it and its draft on from there, for a CPU; with `--target-minutes 0
--draft-minutes 0` it only grows it: a target that computes what the shipped one computes at 3.5 times the cost. `--preset gpu` trains 104
million parameters and three drafts on one device within `--minutes`, from the packages that are installed (`clocked.py`).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tokenizers
import torch
import typer

from wager.models import demo as shipped
from wager.models.demo.clocked import STAGES, run
from wager.models.demo.corpus import documents
from wager.models.demo.dataset import write_streams
from wager.models.demo.evaluate import evaluate_pair, format_table
from wager.models.demo.export import save_description
from wager.models.demo.timed import Place, Plan
from wager.models.demo.tokenizer import train_tokenizer
from wager.models.demo.train import Recipe, train


@dataclass(frozen=True)
class Size:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class Preset:
    vocab: int
    target: Size
    draft: Size
    target_tokens: int
    draft_tokens: int
    starts: bool = False  # from the shipped pair and its vocabulary
    learning_rate: float = 3e-3
    batch_tokens: int = 16_384
    window: int = 2048
    short_window: int = 1024


PRESETS = {
    "demo": Preset(4096, Size(384, 1024, 5, 6, 2), Size(192, 512, 2, 3, 1), 16_000_000, 8_000_000),
    "large": Preset(8192, Size(640, 1792, 10, 10, 2), Size(256, 704, 2, 4, 2), 200_000_000, 60_000_000),
    "deep": Preset(
        4096,
        Size(384, 1024, 20, 6, 2),
        Size(192, 512, 2, 3, 1),
        8_000_000,
        8_000_000,
        starts=True,
        learning_rate=5e-4,
        batch_tokens=4096,
        window=512,
        short_window=256,  # minutes on a CPU: many small steps
    ),  # fmt: skip
}


def plans() -> dict[str, Plan]:
    """Presets that are bounded by the clock; gpu-tiny is the same in seconds on a CPU."""
    tiny = {"t": model_config(Size(64, 128, 2, 4, 2), 4096, 256), "d": model_config(Size(32, 64, 1, 2, 1), 4096, 256)}
    return {
        "gpu": Plan(
            ("demo-104m", model_config(Size(768, 2048, 16, 12, 4), 4096, 1024)),
            {
                "draft-2m": model_config(Size(192, 512, 2, 3, 1), 4096, 1024),
                "draft-3m": model_config(Size(256, 704, 3, 4, 2), 4096, 1024),
                "draft-11m": model_config(Size(384, 1024, 6, 6, 2), 4096, 1024),
            },
        ),
        "gpu-tiny": Plan(
            ("target", tiny["t"]), {"draft": tiny["d"]}, corpus_bytes=400_000, chats=200, window=64, batch_tokens=1024, most_rows=8,
            learning_rate=1e-2, draft_learning_rate=1e-2, draft_batch_rows=16, text_rows=32, text_tokens=48, contexts=(16, 12), steps=200,
        ),
    }  # fmt: skip


def model_config(size: Size, vocab: int, max_positions: int = 2048) -> dict[str, Any]:
    """config.json of a Llama-layout model with tied embeddings."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.hidden // size.heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "bfloat16",
    }


def main(
    out: Annotated[Path, typer.Option(help="where the pair and the token streams go")],
    preset: Annotated[str, typer.Option(help=f"one of {', '.join(PRESETS)}, gpu, gpu-tiny")] = "demo",
    data: Annotated[
        Path | None, typer.Option(help="folder with wikitext2/valid.txt; without it only Python's own library is read")
    ] = None,
    target_minutes: Annotated[float | None, typer.Option(help="wall-clock limit of the target's training")] = None,
    draft_minutes: Annotated[float | None, typer.Option(help="wall-clock limit of the draft's training")] = None,
    scale: Annotated[float, typer.Option(help="factor on the training tokens")] = 1.0,
    processes: Annotated[
        int | None, typer.Option(help="data-parallel processes; default: one a core, one in all on a GPU")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="corpus, target, draft or evaluate: run one stage on what is already there; for gpu presets some of "
            f"{', '.join(STAGES)}, separated by commas"
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(help="gpu presets: for target, texts and drafts together")] = 4.0,
    packages: Annotated[
        Path | None, typer.Option(help="gpu presets: site-packages to read; default: where torch is installed")
    ] = None,
    device: Annotated[str | None, typer.Option(help="gpu presets: cpu or cuda; default: cuda if there is one")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="gpu presets: torch.compile on a GPU")
    ] = True,
) -> None:
    """Corpus, tokenizer, target, draft, held-out losses: each stage leaves its files in --out."""
    if preset in (clocked := plans()):
        if (target_minutes, draft_minutes, processes, scale) != (None, None, None, 1.0):
            raise typer.BadParameter(
                "this preset is bounded by --minutes and runs in one process", param_hint="--preset"
            )
        where = torch.device(device or ("cuda" if torch.cuda.device_count() else "cpu"))
        stages = STAGES if only is None else tuple(only.split(","))
        return run(
            clocked[preset], Place(out, where, compiled and where.type == "cuda"), packages, data, minutes, stages
        )
    if preset not in PRESETS:
        known = ", ".join((*PRESETS, *clocked))
        raise typer.BadParameter(f"{preset!r} is unknown; use one of {known}", param_hint="--preset")
    _pair(PRESETS[preset], out, data, (target_minutes, draft_minutes), scale, processes, only)


def _pair(
    chosen: Preset,
    out: Path,
    data: Path | None,
    minutes: tuple[float | None, float | None],
    scale: float,
    processes: int | None,
    only: str | None,
) -> None:
    """The stages of a preset that is bounded by its tokens. minutes: most of the target's training and of the draft's."""
    cuda = torch.cuda.is_available()
    common: dict[str, Any] = {
        "device": "cuda" if cuda else "cpu",
        "processes": processes or (1 if cuda else os.cpu_count() or 1),
        "learning_rate": chosen.learning_rate,
        "batch_tokens": chosen.batch_tokens,
        "window": chosen.window,
        "short_window": chosen.short_window,
    }
    starts = {name: str(shipped.path(name)) if chosen.starts else None for name in ("demo", "demo-draft")}
    streams = out / "streams"
    streams.mkdir(parents=True, exist_ok=True)
    stages = {only} if only else {"corpus", "target", "draft", "evaluate"}
    configs = {
        "demo": model_config(chosen.target, chosen.vocab),
        "demo-draft": model_config(chosen.draft, chosen.vocab),
    }
    if "corpus" in stages:
        _corpus(chosen, data, streams, {out / name: config for name, config in configs.items()})
    target = Recipe(int(chosen.target_tokens * scale), minutes=minutes[0], start=starts["demo"], **common)
    if "target" in stages:
        train(configs["demo"], streams / "train.npy", out / "demo", target)
    if "draft" in stages:
        draft = Recipe(
            int(chosen.draft_tokens * scale), minutes=minutes[1], seed=1, teacher=str(out / "demo"),
            start=starts["demo-draft"], **common,
        )  # fmt: skip
        train(configs["demo-draft"], streams / "train.npy", out / "demo-draft", draft)
    if "evaluate" in stages:
        report = evaluate_pair(out / "demo", out / "demo-draft", streams)
        (out / "evaluation.json").write_text(json.dumps({"recipe": asdict(target), **report}, indent=2) + "\n")
        typer.echo(format_table(report))


def _corpus(preset: Preset, data: Path | None, streams: Path, configs: dict[Path, dict[str, Any]]) -> None:
    corpus = list(documents(data))
    tokenizer: tokenizers.Tokenizer
    if preset.starts:
        tokenizer = tokenizers.Tokenizer.from_file(str(shipped.path("demo") / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer((d.text for d in corpus if not d.held_out), preset.vocab)
    for directory, config in configs.items():
        save_description(config, tokenizer, directory)
    sizes = write_streams(corpus, tokenizer, streams)
    typer.echo("tokens: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))


if __name__ == "__main__":
    typer.run(main)
