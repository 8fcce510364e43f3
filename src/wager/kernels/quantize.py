"""Weights in four or eight bits: what the codes mean, and how they are chosen. This is the definition that every kernel is judged against.

| mode   | weights                                        | activations              | bits per weight |
|--------|------------------------------------------------|--------------------------|-----------------|
| int8   | int8, one scale per output                     | float32                  | 8               |
| int4   | 16 evenly spaced values, a scale per 32 inputs | float32                  | 4.5             |
| nf4    | the 16 values of NF4, a scale per 32 inputs    | float32                  | 4.5             |
| w8a8   | as int8                                        | int8, scale per 64 inputs| 8               |
| w4a8   | as int4                                        | int8, scale per 32 inputs| 4.5             |
| w16a16 | bfloat16                                       | bfloat16                 | 16              |
| int16  | 14 bits and a power of two per 64 inputs       | 13 bits, scale per 64    | 16.25           |

int16 is for processors that have no products of bfloat16 but multiply and add two pairs of int16 in one step. A bfloat16 weight keeps all its
bits while it is at least 1/32 of its group's largest; smaller ones are off by at most 1/8192 of that, activations of 1/8190 of theirs.

Files bring codes of their own (GGUF, GPTQ, AWQ), which are kept. They stand for scale * code, or scale * (code - zero point):

| mode   | weights                                                       | activations               | bits per weight |
|--------|---------------------------------------------------------------|---------------------------|-----------------|
| q8     | int8, a scale per 32 inputs                                   | float32                   | 8.5             |
| q8a8   | as q8                                                         | int8, scale per 32 inputs | 8.5             |
| q4     | as int4                                                       | float32                   | 4.5             |
| q4a8   | as w4a8                                                       | int8, scale per 32 inputs | 4.5             |
| q4z    | 16 evenly spaced values, a scale and a zero point per 32      | float32                   | 5               |
| q4za8  | as q4z                                                        | int8, scale per 32 inputs | 5               |

Scales and zero points of groups are float16 numbers.

All are approximate: they change logits. Weight-only modes lose what rounding the weights loses; the others round activations too, row by
row, so that a row still does not depend on its batch. Sums are kept in float32 (integer products exactly, in int32).

Sources: NF4 from QLoRA (arXiv 2305.14314); symmetric int8 products from LLM.int8() (arXiv 2208.07339).
Shape legend: T tokens, O outputs, I inputs, N inputs padded to whole groups, B groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from wager.errors import UsageError

GROUP = 32  # inputs that share a scale in the four-bit modes
WIDE_GROUP = 64  # the same for int16, and the inputs whose products are summed in an int32
WIDE_BITS = 13  # magnitudes of int16 weights; 8192 * 4095 * 64 < 2^31
ACTIVATION_GROUP = {"w8a8": 64, "w4a8": 32, "q8a8": 32, "q4a8": 32, "q4za8": 32, "int16": WIDE_GROUP}
ACTIVATION_LEVELS = {"int16": 4095}  # steps from zero to a group's largest activation; else 127
FILE_MODES = {"q8": "q8a8", "q4": "q4a8", "q4z": "q4za8"}  # and what they become with int8 activations
MODES = ("int8", "int4", "nf4", "w8a8", "w4a8", "w16a16", "int16")
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FOUR_BITS = ("int4", "nf4", "w4a8", "q4", "q4a8", "q4z", "q4za8")
INT4 = tuple(float(i) for i in range(-8, 8))
SCALE_TRIALS = (1.08, 1.0, 0.93, 0.86, 0.79)  # clipping the largest weight a little often lowers the error of the rest
VALUES_AT_ONCE_ON_GPU = 1 << 26  # enough for few launches, some gigabytes in all
VALUES_AT_ONCE = 1 << 18  # few enough for the trials of a scale to stay in the cache


def not_finite(name: str = "scales") -> UsageError:
    return UsageError(f"a weight has {name} that are not finite and cannot be quantized; load it without quantization")


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [O, inputs] in codes.

    codes_ON: int8 values (int8, w8a8, q8), table numbers 0 .. 15 as uint8 (four-bit modes), bfloat16 (w16a16) or int16.
    scales: [O] (int8, w8a8), [O, B] (grouped modes), None (w16a16), always float32 with values that float16 holds in grouped modes, int16's
        excepted, which are powers of two.
    zeros: [O, B] zero points less 8, so that a value is scale * (number - 8 - zero), float32 with values that float16 holds; None where there
        are none.
    order: [inputs] where each column's input stands in x; None: in order. Columns sorted by group make groups contiguous.
    """

    mode: str
    codes_ON: Tensor
    scales: Tensor | None
    inputs: int
    zeros: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self):
        for name, values in (("scales", self.scales), ("zero points", self.zeros)):
            if values is not None and not bool(torch.isfinite(values).all()):
                raise not_finite(name)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.codes_ON.shape[0], self.inputs))

    @property
    def device(self) -> torch.device:
        return self.codes_ON.device

    def rows(self, index: slice | Tensor) -> QuantizedWeight:
        """Some of the outputs, in the order of `index`."""
        pick = lambda t: None if t is None else t[index]
        return replace(self, codes_ON=self.codes_ON[index], scales=pick(self.scales), zeros=pick(self.zeros))

    def __getitem__(self, index: slice | Tensor) -> QuantizedWeight:
        return self.rows(index)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes_ON, self.scales, self.zeros) if t is not None)

    @property
    def table(self) -> tuple[float, ...] | None:
        return NF4 if self.mode == "nf4" else INT4 if self.mode in FOUR_BITS else None

    def to(self, device: torch.device | str) -> QuantizedWeight:
        move = lambda t: None if t is None else t.to(device)
        moved = {name: move(getattr(self, name)) for name in ("scales", "zeros", "order")}
        return replace(self, codes_ON=self.codes_ON.to(device), **moved)

    def dequantized(self) -> Tensor:
        """The weight that the codes stand for, float32 [O, inputs], inputs in the order of x."""
        values = self._columns()
        if self.order is None:
            return values
        return torch.empty_like(values).index_copy_(1, self.order, values)

    def _columns(self) -> Tensor:
        if self.scales is None:
            return self.codes_ON[:, : self.inputs].float()
        if self.scales.dim() == 1:
            return (self.codes_ON.float() * self.scales[:, None])[:, : self.inputs]
        if self.mode == "nf4":
            values = torch.tensor(NF4, device=self.codes_ON.device)[self.codes_ON.int()]
        else:  # by arithmetic: a table would be copied to the device, which no CUDA graph can hold
            values = self.codes_ON.float() - (8 if self.mode in FOUR_BITS else 0)
        values = values.unflatten(1, (self.scales.shape[1], -1))
        if self.zeros is not None:
            values = values - self.zeros[:, :, None]
        return (values * self.scales[:, :, None]).flatten(1)[:, : self.inputs]


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise UsageError(f"quantization {mode!r} is unknown; use one of {', '.join(MODES)}", param="quantization")


def step_of(mode: str) -> int:
    """Inputs are padded to a multiple of this."""
    return {"int8": 1, "w16a16": GROUP, "w8a8": 64, "int16": WIDE_GROUP}.get(mode, GROUP)


def quantize(weight_OI: Tensor, mode: str) -> QuantizedWeight:
    """Choose codes for a weight, some rows at a time. Raises UsageError for an unknown mode or a weight that is not finite."""
    check_mode(mode)
    at_once = VALUES_AT_ONCE if weight_OI.device.type == "cpu" else VALUES_AT_ONCE_ON_GPU
    parts = [_quantize_rows(rows.float(), mode) for rows in weight_OI.split(max(1, at_once // weight_OI.shape[1]))]
    codes = torch.cat([codes for codes, _ in parts])
    scales = None if mode == "w16a16" else torch.cat([s for _, s in parts if s is not None])
    return QuantizedWeight(mode, codes, scales, weight_OI.shape[1])


def to_q8(weight_OI: Tensor) -> QuantizedWeight:
    """The nearest q8 weight: a group's largest magnitude becomes 127. An error of at most half a step, 1/254 of that magnitude."""
    codes, scales = [], []
    for rows in weight_OI.split(max(1, VALUES_AT_ONCE // weight_OI.shape[1])):
        groups = F.pad(rows.float(), (0, -rows.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
        scale = (groups.abs().amax(-1) / 127).half().float()
        rounded = torch.round(groups / torch.where(scale == 0, 1.0, scale)[..., None]).clamp(-128, 127)
        codes.append(rounded.to(torch.int8).flatten(1))
        scales.append(scale)
    return QuantizedWeight("q8", torch.cat(codes), torch.cat(scales), weight_OI.shape[1])


def widen(weight: QuantizedWeight) -> QuantizedWeight:
    """A q4 weight as q8, the same values exactly; q8 as it is. So that linears of different modes can be stacked."""
    if weight.mode == "q8":
        return weight
    if weight.mode != "q4":
        return replace(to_q8(weight._columns()), order=weight.order)
    return replace(weight, mode="q8", codes_ON=(weight.codes_ON.to(torch.int8) - 8))


def with_zeros(weight: QuantizedWeight) -> QuantizedWeight:
    """A q4 weight as q4z, the same values; q4z as it is."""
    assert weight.scales is not None
    return weight if weight.mode == "q4z" else replace(weight, mode="q4z", zeros=torch.zeros_like(weight.scales))


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def _in_order(weight: QuantizedWeight) -> QuantizedWeight:
    return weight if weight.order is None and weight.mode == "q8" else to_q8(weight.dequantized())


def stack(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Outputs of several weights over the same inputs, in the widest mode among them."""
    modes, first = {w.mode for w in weights}, weights[0]
    same_order = all(w.order is first.order or _equal(w.order, first.order) for w in weights)
    if len(modes) > 1 or not same_order:
        change = with_zeros if modes <= {"q4", "q4z"} and same_order else widen if same_order else _in_order
        weights = [change(w) for w in weights]
    join = lambda parts: torch.cat(parts) if parts[0] is not None else None
    return replace(
        weights[0],
        codes_ON=torch.cat([w.codes_ON for w in weights]),
        scales=join([w.scales for w in weights]),
        zeros=join([w.zeros for w in weights]),
    )


def _quantize_rows(weight_OI: Tensor, mode: str) -> tuple[Tensor, Tensor | None]:
    weight_ON = F.pad(weight_OI, (0, -weight_OI.shape[1] % step_of(mode)))
    if mode == "w16a16":
        return weight_ON.bfloat16(), None
    if mode in ("int8", "w8a8"):
        scales_O = weight_ON.abs().amax(1) / 127
        codes = torch.round(weight_ON / scales_O.clamp_min(1e-30)[:, None])
        return codes.clamp(-127, 127).to(torch.int8), scales_O
    return _wide_rows(weight_ON) if mode == "int16" else _four_bit_rows(weight_ON, mode)


def _wide_rows(weight_ON: Tensor) -> tuple[Tensor, Tensor]:
    """A group's largest magnitude, between 2^e and 2^(e + 1), becomes a code between 2^12 and 2^13."""
    groups = weight_ON.unflatten(1, (-1, WIDE_GROUP))
    largest = groups.abs().amax(-1)
    scales = torch.exp2(torch.frexp(largest).exponent.clamp_min(-100).float() - WIDE_BITS)
    codes = torch.round(groups / scales[..., None]).to(torch.int16)
    return codes.flatten(1), torch.where(torch.isfinite(largest), scales, torch.inf)


def _four_bit_rows(weight_ON: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Per group the scale, out of a few, that leaves the least squared error; evenly spaced codes put the extreme value on -8."""
    groups = weight_ON.unflatten(1, (-1, GROUP))
    index = groups.abs().argmax(-1, keepdim=True)
    extreme = groups.gather(-1, index)[..., 0]
    full = extreme.abs() if mode == "nf4" else -extreme / 8
    best_error = torch.full_like(full, torch.inf)
    codes, scales = torch.zeros_like(groups, dtype=torch.uint8), full.half().float()
    for trial in SCALE_TRIALS:
        scale = (full * trial).half().float()
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
    """The activations that the mode multiplies with, in float32: unchanged, bfloat16, or integers times their group's scale."""
    if mode == "w16a16":
        return x_TI.bfloat16().float()
    if mode not in ACTIVATION_GROUP:
        return x_TI.float()
    group, levels = ACTIVATION_GROUP[mode], ACTIVATION_LEVELS.get(mode, 127)
    padded = F.pad(x_TI.float(), (0, -x_TI.shape[1] % group)).unflatten(1, (-1, group))
    top = padded.abs().amax(-1, keepdim=True)
    inverse = torch.where(
        top > 1e-30, torch.full_like(top, levels) / top, 0
    )  # levels / top would be levels * (1 / top), rounded twice
    rounded = torch.round(padded * inverse) * (top / levels)
    return rounded.flatten(1)[:, : x_TI.shape[1]]
