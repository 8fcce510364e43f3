"""GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978) checkpoints in Hugging Face layout: four- or eight-bit codes packed into int32.

A linear `x` has x.qweight, x.qzeros, x.scales and, for GPTQ, x.g_idx (the group of each input); a value is scale * (code - zero point).
Codes are kept: symmetric weights become q4 or q8, others q4z, exactly. GPTQ's activation order is kept as an order of the inputs. What our
groups of 32 inputs cannot hold (eight bits with zero points, groups that cut across 32) is rounded to q8 anew, with one log line.

Shape legend: O outputs, I inputs, G groups, B groups of 32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wager.errors import CheckpointError
from wager.kernels.quantize import GROUP, QuantizedWeight, to_q8

log = logging.getLogger(__name__)

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # where output 8 j + AWQ_ORDER[i] stands: nibble i of word j
MODELS = (
    "Llama",
    "Mistral",
    "Qwen",
    "Phi3",
    "Gemma",
    "Olmo2",
    "Mixtral",
)  # families whose linears are stored as [output, input]


def unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """int32 [O codes] of int32 words that hold 32 / bits codes along `dim`, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2) if dim == 1 else codes.movedim(-1, 1).flatten(0, 1)


class PackedCheckpoint:
    """A checkpoint whose `tensor` gives quantised weights in codes. Raises CheckpointError for a variant that is not read."""

    def __init__(self, path: Path, raw: dict[str, Any], open_plain: Callable[[], Any]):
        self.path, settings = path, raw["quantization_config"]
        if not isinstance(settings, dict):
            raise CheckpointError(
                f"{path / 'config.json'} has quantization_config {settings!r}, which is no JSON object"
            )
        self.method = settings.get("quant_method")
        self.bits: int = settings.get("bits")  # type: ignore[assignment]  # checked below
        self.group = settings.get("group_size", 128)
        self._check(settings, raw)
        # The first generation of GPTQ files stores zero points less one.
        self.offset = 1 if self.method == "gptq" and settings.get("checkpoint_format", "gptq") == "gptq" else 0
        self._warned = False
        self.plain = open_plain()

    def _check(self, settings: dict[str, Any], raw: dict[str, Any]) -> None:
        def refuse(what: str) -> None:
            raise CheckpointError(
                f"{self.path} is quantized ({self.method}) with {what}, which is not read; use the float checkpoint, or a GPTQ one of 4 "
                "or 8 bits, or an AWQ one of 4 bits (gemm)"
            )

        if self.method not in ("gptq", "awq"):
            refuse(f"quant_method {self.method!r}")
        if self.bits not in ((4, 8) if self.method == "gptq" else (4,)):
            refuse(f"bits {self.bits!r}")
        if not isinstance(self.group, int) or (self.group != -1 and self.group < 1):
            refuse(f"group_size {self.group!r}")
        if self.method == "awq" and str(settings.get("version", "gemm")).lower() != "gemm":
            refuse(f"version {settings['version']!r}")
        if self.method == "awq" and not settings.get("zero_point", True):
            refuse("zero_point false")
        if settings.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2", "gemm"):
            refuse(f"checkpoint_format {settings['checkpoint_format']!r}")
        if settings.get("dynamic"):
            refuse("settings that differ by layer (dynamic)")
        names = raw.get("architectures") or [""]
        if not names[0].startswith(MODELS):
            refuse(f"architecture {names[0]!r}")

    def __contains__(self, name: str) -> bool:
        return name in self.plain or self._packed(name) in self.plain

    def names(self) -> list[str]:
        return self.plain.names()

    def _packed(self, name: str) -> str:
        return name.removesuffix(".weight") + ".qweight" if name.endswith(".weight") else name

    def tensor(self, name: str) -> Tensor | QuantizedWeight:
        if name in self.plain or self._packed(name) not in self.plain:
            return self.plain.tensor(name)
        stem = name.removesuffix(".weight")
        parts = {key: self.plain.tensor(f"{stem}.{key}") for key in ("qweight", "qzeros", "scales")}
        words, zero_words, scales_GO = parts["qweight"], parts["qzeros"], parts["scales"].float()
        if words.dtype != torch.int32 or zero_words.dtype != torch.int32:
            raise CheckpointError(f"tensors of {stem!r} in {self.path} are not packed in int32; quantize it again")
        if self.method == "awq":
            codes_IO, zeros_GO = (_awq_order(unpack(w, 4, 1)) for w in (words, zero_words))
        else:
            codes_IO, zeros_GO = unpack(words, self.bits, 0), unpack(zero_words, self.bits, 1) + self.offset
        group_of_I = self._groups(stem, codes_IO.shape[0])
        outputs = codes_IO.shape[1]
        if scales_GO.shape != zeros_GO.shape or scales_GO.shape[1] != outputs or group_of_I.max() >= len(scales_GO):
            raise CheckpointError(
                f"tensors of {stem!r} in {self.path} do not fit: qweight for {outputs} outputs in {int(group_of_I.max()) + 1} groups, "
                f"scales {tuple(scales_GO.shape)}, qzeros for {tuple(zeros_GO.shape)}"
            )
        return assemble(codes_IO.T, scales_GO.T, zeros_GO.T, group_of_I, self.bits, lambda why: self._say(stem, why))

    def _groups(self, stem: str, inputs: int) -> Tensor:
        if f"{stem}.g_idx" in self.plain:
            return self.plain.tensor(f"{stem}.g_idx").long()
        return torch.arange(inputs) // (inputs if self.group == -1 else self.group)

    def _say(self, stem: str, why: str) -> None:
        if not self._warned:
            self._warned = True
            log.info("%s: %s (%s and perhaps others) are rounded to int8 in groups of 32 anew", self.path, why, stem)

    def __enter__(self) -> PackedCheckpoint:
        self.plain.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.plain.__exit__(*exc)


def _awq_order(codes: Tensor) -> Tensor:
    inverse = torch.tensor(AWQ_ORDER).argsort()
    return codes.unflatten(1, (-1, 8))[:, :, inverse].flatten(1)


def assemble(
    codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor, group_of_I: Tensor, bits: int, say: Callable[[str], None]
) -> QuantizedWeight:
    """scale * (code - zero point) in our groups of 32 inputs; `say` is told when that needs rounding, and why."""
    outputs, inputs = codes_OI.shape
    order = None
    if not bool((group_of_I.diff() >= 0).all()):
        order = group_of_I.argsort(stable=True)
        codes_OI, group_of_I = codes_OI[:, order], group_of_I[order]
    padding = -inputs % GROUP
    blocks = torch.cat((group_of_I, group_of_I[-1:].expand(padding))).view(-1, GROUP)
    middle = 1 << (bits - 1)
    whole = bool((blocks == blocks[:, :1]).all())
    symmetric = bool((zeros_OG == middle).all())
    if not whole or (bits == 8 and not symmetric):
        say("groups that cut across 32 inputs" if not whole else "eight-bit weights with zero points")
        exact = torch.empty(outputs, inputs)
        for rows in torch.arange(outputs).split(512):
            scale, zero = scales_OG[rows][:, group_of_I], zeros_OG[rows][:, group_of_I]
            exact[rows] = scale * (codes_OI[rows] - zero)
        made = to_q8(exact)
        return QuantizedWeight("q8", made.codes_ON, made.scales, inputs, order=order)
    scales_OB, zeros_OB = scales_OG[:, blocks[:, 0]].half().float(), zeros_OG[:, blocks[:, 0]]
    if bits == 8:
        codes_ON = torch.nn.functional.pad((codes_OI - middle).to(torch.int8), (0, padding))
        return QuantizedWeight("q8", codes_ON, scales_OB, inputs, order=order)
    # Padded inputs are zero, so that their codes do not matter; those of q4 still stand for zero.
    codes_ON = torch.nn.functional.pad(codes_OI.to(torch.uint8), (0, padding), value=middle)
    zeros = None if symmetric else (zeros_OB - middle).float()
    return QuantizedWeight("q4" if symmetric else "q4z", codes_ON, scales_OB, inputs, zeros, order)
