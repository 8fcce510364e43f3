"""Weights in four or eight bits: what the codes mean, and how they are chosen. This is the definition that every kernel is judged against.

| mode   | weights                                        | activations              | bits per weight |
|--------|------------------------------------------------|--------------------------|-----------------|
| int8   | int8, one scale per output                     | float32                  | 8               |
| int4   | 16 evenly spaced values, a scale per 32 inputs | float32                  | 4.5             |
| nf4    | the 16 values of NF4, a scale per 32 inputs    | float32                  | 4.5             |
| w8a8   | as int8                                        | int8, scale per 64 inputs| 8               |
| w4a8   | as int4                                        | int8, scale per 32 inputs| 4.5             |
| w16a16 | bfloat16                                       | bfloat16                 | 16              |

All are approximate: they change logits. Weight-only modes lose what rounding the weights loses; the others round activations too, row by
row, so that a row still does not depend on its batch. Sums are kept in float32 (integer products exactly, in int32).

Sources: NF4 from QLoRA (arXiv 2305.14314); symmetric int8 products from LLM.int8() (arXiv 2208.07339).
Shape legend: T tokens, O outputs, I inputs, N inputs padded to whole groups, B groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wager.errors import UsageError

GROUP = 32  # inputs that share a scale in the four-bit modes
ACTIVATION_GROUP = {"w8a8": 64, "w4a8": 32}
MODES = ("int8", "int4", "nf4", "w8a8", "w4a8", "w16a16")
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
INT4 = tuple(float(i) for i in range(-8, 8))
SCALE_TRIALS = (1.08, 1.0, 0.93, 0.86, 0.79)  # clipping the largest weight a little often lowers the error of the rest
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [O, inputs] in codes.

    codes_ON: int8 values (int8, w8a8), table numbers 0 .. 15 as uint8 (int4, nf4, w4a8) or bfloat16 (w16a16).
    scales: [O] (int8, w8a8), [O, B] (four-bit modes), None (w16a16), always float32 with values that bfloat16 holds in four-bit modes.
    """

    mode: str
    codes_ON: Tensor
    scales: Tensor | None
    inputs: int

    @property
    def nbytes(self) -> int:
        return self.codes_ON.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def table(self) -> tuple[float, ...] | None:
        return {"int4": INT4, "w4a8": INT4, "nf4": NF4}.get(self.mode)

    def dequantized(self) -> Tensor:
        """The weight that the codes stand for, float32 [O, inputs]."""
        if self.scales is None:
            return self.codes_ON[:, : self.inputs].float()
        if self.table is None:
            return (self.codes_ON.float() * self.scales[:, None])[:, : self.inputs]
        values = torch.tensor(self.table, device=self.codes_ON.device)[self.codes_ON.long()]
        scaled = values.unflatten(1, (-1, GROUP)) * self.scales[:, :, None]
        return scaled.flatten(1)[:, : self.inputs]


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise UsageError(f"quantization {mode!r} is unknown; use one of {', '.join(MODES)}", param="quantization")


def step_of(mode: str) -> int:
    """Inputs are padded to a multiple of this."""
    return {"int8": 1, "w16a16": 2, "w8a8": 64}.get(mode, GROUP)


def quantize(weight_OI: Tensor, mode: str) -> QuantizedWeight:
    """Choose codes for a weight, some rows at a time. Raises UsageError for an unknown mode or a weight that is not finite."""
    check_mode(mode)
    parts = [_quantize_rows(rows.float(), mode) for rows in weight_OI.split(ROWS_AT_ONCE)]
    codes = torch.cat([codes for codes, _ in parts])
    scales = None if mode == "w16a16" else torch.cat([s for _, s in parts if s is not None])
    if scales is not None and not bool(torch.isfinite(scales).all()):
        raise UsageError(
            "a weight has values that are not finite and cannot be quantized; load it without quantization"
        )
    return QuantizedWeight(mode, codes, scales, weight_OI.shape[1])


def _quantize_rows(weight_OI: Tensor, mode: str) -> tuple[Tensor, Tensor | None]:
    weight_ON = torch.nn.functional.pad(weight_OI, (0, -weight_OI.shape[1] % step_of(mode)))
    if mode == "w16a16":
        return weight_ON.bfloat16(), None
    if mode in ("int8", "w8a8"):
        scales_O = weight_ON.abs().amax(1) / 127
        codes = torch.round(weight_ON / scales_O.clamp_min(1e-30)[:, None])
        return codes.clamp(-127, 127).to(torch.int8), scales_O
    return _four_bit_rows(weight_ON, mode)


def _four_bit_rows(weight_ON: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Per group the scale, out of a few, that leaves the least squared error; evenly spaced codes put the extreme value on -8."""
    groups = weight_ON.unflatten(1, (-1, GROUP))
    index = groups.abs().argmax(-1, keepdim=True)
    extreme = groups.gather(-1, index)[..., 0]
    full = extreme.abs() if mode == "nf4" else -extreme / 8
    best_error = torch.full_like(full, torch.inf)
    codes, scales = torch.zeros_like(groups, dtype=torch.uint8), full.bfloat16().float()
    for trial in SCALE_TRIALS:
        scale = (full * trial).bfloat16().float()
        tried = _nearest(groups / torch.where(scale == 0, 1.0, scale)[..., None], mode)
        values = torch.tensor(NF4 if mode == "nf4" else INT4, device=groups.device)[tried.long()]
        error = (values * scale[..., None] - groups).square().sum(-1)
        better = error < best_error
        codes, scales = torch.where(better[..., None], tried, codes), torch.where(better, scale, scales)
        best_error = torch.where(better, error, best_error)
    return codes.flatten(1), scales


def _nearest(ratio: Tensor, mode: str) -> Tensor:
    if mode != "nf4":
        return (torch.round(ratio).clamp(-8, 7) + 8).to(torch.uint8)
    table = torch.tensor(NF4, device=ratio.device)
    return torch.bucketize(ratio, (table[1:] + table[:-1]) / 2).to(torch.uint8)


def round_activations(x_TI: Tensor, mode: str) -> Tensor:
    """The activations that the mode multiplies with, in float32: unchanged, bfloat16, or int8 codes times their group's scale."""
    if mode == "w16a16":
        return x_TI.bfloat16().float()
    if mode not in ACTIVATION_GROUP:
        return x_TI.float()
    group = ACTIVATION_GROUP[mode]
    padded = torch.nn.functional.pad(x_TI.float(), (0, -x_TI.shape[1] % group)).unflatten(1, (-1, group))
    top = padded.abs().amax(-1, keepdim=True)
    inverse = torch.where(
        top > 1e-30, torch.full_like(top, 127) / top, 0
    )  # 127 / top would be 127 * (1 / top), rounded twice
    rounded = torch.round(padded * inverse) * (top / 127)
    return rounded.flatten(1)[:, : x_TI.shape[1]]
