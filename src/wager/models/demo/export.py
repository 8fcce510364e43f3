"""Writes a trained model as a checkpoint in Hugging Face layout, file by file under a temporary name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

from wager.models.demo.tokenizer import END_OF_TEXT, TURN_END, tokenizer_config
from wager.models.llama import Llama
from wager.models.loader import pieces_of

WEIGHTS = "model.safetensors"


def checkpoint_tensors(model: Llama, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The weights under their checkpoint names, stacked projections taken apart; a tied head is left out."""
    tensors: dict[str, Tensor] = {}
    done: set[int] = set()
    for module in model.modules():
        for parameter, pieces in pieces_of(module):
            if id(parameter) not in done:
                done.add(id(parameter))
                split = parameter.detach().to("cpu", dtype).split([rows for _, rows in pieces])
                tensors.update({name: rows.contiguous() for (name, _), rows in zip(pieces, split, strict=True)})
    return tensors


def save_weights(model: Llama, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    temporary = out / f".{WEIGHTS}.{os.getpid()}"
    save_file(checkpoint_tensors(model, dtype), temporary, metadata={"format": "pt"})
    temporary.replace(out / WEIGHTS)


def save_description(config: dict[str, Any], tokenizer: tokenizers.Tokenizer, out: Path) -> None:
    """config.json, generation_config.json, tokenizer.json and tokenizer_config.json."""
    out.mkdir(parents=True, exist_ok=True)
    stops = [tokenizer.token_to_id(TURN_END), tokenizer.token_to_id(END_OF_TEXT)]
    ids = {"bos_token_id": stops[1], "eos_token_id": stops, "pad_token_id": stops[1]}
    _write_json(out / "config.json", {**config, **ids})
    _write_json(out / "generation_config.json", {**ids, "temperature": 0.7, "top_p": 0.9, "do_sample": True})
    _write_json(out / "tokenizer_config.json", tokenizer_config(config["max_position_embeddings"]))
    temporary = out / f".tokenizer.json.{os.getpid()}"
    tokenizer.save(str(temporary), pretty=False)
    temporary.replace(out / "tokenizer.json")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
