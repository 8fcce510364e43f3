"""Packing of weights for `cpp/linear.cpp`, and the linear layer over a packed weight.

Shape legend: T tokens, I inputs, O outputs, N inputs padded to whole groups, P panels of 16 outputs, B groups.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from wager.errors import UsageError
from wager.kernels.quantize import GROUP, WIDE_GROUP, QuantizedWeight, not_finite, quantize, step_of
from wager.native.memory import huge_zeros

PANEL, SLACK = 16, 3
FORMAT = {
    "f32": 0, "bf16": 1, "int8": 2, "w16a16": 3, "w8a8": 4, "nf4": 5, "w4a8": 6, "q4a8": 6, "int4": 7, "q4": 7, "q8": 8, "q8a8": 9,
    "q4z": 10, "q4za8": 11, "f16": 12, "int16": 13,
}  # fmt: skip
GATE = {None: 0, "silu": 1, "gelu_tanh": 2}

_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class LinearArgs(ctypes.Structure):
    _fields_ = [
        *[(name, _P) for name in ("x", "weights", "bias", "scales", "table", "residual", "y")],
        *[(name, _L) for name in ("rows", "inputs", "outputs")],
        *[(name, _I) for name in ("format", "gate", "threads")],
    ]


class NativeLinear:
    """A weight packed in panels of 16 output rows, and its bias."""

    def __init__(
        self,
        weight_OI: Tensor | QuantizedWeight,
        bias_O: Tensor | None,
        quantization: str | None = None,
        flags: tuple[str, ...] = (),
    ):
        from wager.kernels.native import LINEAR_SUFFIX, SUFFIX, library

        lib, (self.outputs, self.inputs) = library(flags), weight_OI.shape
        self.scales = self.table = self.order = None
        at_once = quantization == "int16" and isinstance(weight_OI, Tensor) and weight_OI.dtype in SUFFIX
        if isinstance(weight_OI, Tensor) and quantization is not None and not at_once:
            weight_OI = quantize(weight_OI, quantization)
        if isinstance(weight_OI, Tensor) and at_once:
            self.mode, self.padding = "int16", -self.inputs % step_of("int16")
            self.weight = _packed_wide(weight_OI.contiguous(), lib)
        elif isinstance(weight_OI, Tensor):
            self.mode, self.padding = LINEAR_SUFFIX[weight_OI.dtype], 0
            self.weight = _packed_floats(weight_OI.contiguous(), lib)
        else:
            self.mode, self.order = weight_OI.mode, weight_OI.order
            self.padding = -self.inputs % step_of(self.mode)
            self.weight = pack_codes(weight_OI)
            if self.mode == "nf4":
                self.table = torch.tensor(weight_OI.table)
            elif weight_OI.scales is not None and weight_OI.scales.dim() == 1:
                self.scales = pad_outputs(weight_OI.scales)
        self.bias = pad_outputs(torch.zeros(self.outputs) if bias_O is None else bias_O.float())
        self._function = lib.wager_linear

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.weight, self.bias, self.scales, self.table) if t is not None)

    def __call__(self, x_TI: Tensor) -> Tensor:
        return self._run(x_TI, self.outputs, None, None)

    def add(self, x_TI: Tensor, residual_TO: Tensor) -> Tensor:
        """residual + linear(x)."""
        return self._run(x_TI, self.outputs, None, residual_TO)

    def gated(self, x_TI: Tensor, activation: str) -> Tensor:
        """act(gate) * up, where the weight's first half makes the gate and its second half the up projection."""
        width = self.outputs // 2
        if width % PANEL:
            from wager.kernels import native

            return (native.silu_mul if activation == "silu" else native.gelu_tanh_mul)(self(x_TI))
        return self._run(x_TI, width, activation, None)

    def arguments(
        self, x: Tensor, y_TO: Tensor, activation: str | None = None, residual: Tensor | None = None
    ) -> LinearArgs:
        """The C call's arguments; `x` and `residual` are contiguous, `x` padded to the format's step."""
        return LinearArgs(
            x.data_ptr(), self.weight.data_ptr(), self.bias.data_ptr(),
            None if self.scales is None else self.scales.data_ptr(), None if self.table is None else self.table.data_ptr(),
            None if residual is None else residual.data_ptr(), y_TO.data_ptr(),
            x.shape[0], self.inputs + self.padding, y_TO.shape[1], FORMAT[self.mode], GATE[activation], torch.get_num_threads(),
        )  # fmt: skip

    def _run(self, x_TI: Tensor, outputs: int, activation: str | None, residual_TO: Tensor | None) -> Tensor:
        if x_TI.dim() != 2 or x_TI.shape[1] != self.inputs:
            raise UsageError(
                f"this linear takes rows of {self.inputs} values, got a tensor of shape {tuple(x_TI.shape)}"
            )
        x_TI = x_TI.float()
        if self.order is not None:
            x_TI = x_TI[:, self.order]
        x = F.pad(x_TI, (0, self.padding)) if self.padding else x_TI.contiguous()
        residual = None if residual_TO is None else residual_TO.float().contiguous()
        y_TO = torch.empty(x.shape[0], outputs)
        if x.shape[0]:
            self._function(ctypes.byref(self.arguments(x, y_TO, activation, residual)))
        return y_TO


def _packed_floats(weight_OI: Tensor, lib: ctypes.CDLL) -> Tensor:
    outputs, inputs = weight_OI.shape
    packed = huge_zeros((-(-outputs // PANEL) + SLACK) * PANEL * inputs * weight_OI.element_size())
    pack = lib.wager_pack_f32 if weight_OI.dtype == torch.float32 else lib.wager_pack_bf16  # any sixteen bits
    pack(weight_OI.data_ptr(), outputs, inputs, packed.data_ptr(), torch.get_num_threads())
    return packed


def _packed_wide(weight_OI: Tensor, lib: ctypes.CDLL) -> Tensor:
    """int16 panels straight from the weight, without the codes in between; the same bytes as `pack_codes` makes of them."""
    from wager.kernels.native import SUFFIX

    outputs, inputs = weight_OI.shape
    group_bytes = 2 * PANEL * (1 + WIDE_GROUP)
    packed = huge_zeros((-(-outputs // PANEL) + SLACK) * -(-inputs // WIDE_GROUP) * group_bytes)
    pack = getattr(lib, f"wager_pack_wide_{SUFFIX[weight_OI.dtype]}")
    if pack(weight_OI.data_ptr(), outputs, inputs, packed.data_ptr(), torch.get_num_threads()):
        raise not_finite()
    return packed


def pack_codes(weight: QuantizedWeight) -> Tensor:
    """Bytes in the layout of cpp/formats.h, panels past the last output zero. Packed some panels at a time: little memory beyond the result."""
    outputs = weight.codes_ON.shape[0]
    panels, at_once = -(-outputs // PANEL) + SLACK, 32
    first = _pack_rows(weight.rows(slice(0, PANEL)))
    packed = huge_zeros(panels * first.nbytes)
    start = 0
    for row in range(0, outputs, at_once * PANEL):
        part = _pack_rows(weight.rows(slice(row, row + at_once * PANEL))).reshape(-1)
        packed[start : start + len(part)] = part
        start += len(part)
    return packed


def _pack_rows(weight: QuantizedWeight) -> Tensor:
    """Whole panels of the rows, [P, bytes]."""
    panels_P16N = _whole_panels(weight.codes_ON).unflatten(0, (-1, PANEL))
    if weight.mode == "int8":
        return panels_P16N.transpose(1, 2).contiguous().view(torch.uint8).flatten(1)
    if weight.mode == "w16a16":
        return panels_P16N.unflatten(2, (-1, 2)).transpose(1, 2).contiguous().view(torch.uint8).flatten(1)
    if weight.mode == "w8a8":
        return _words(panels_P16N).flatten(1)
    if weight.mode == "int16":
        assert weight.scales is not None
        head = _whole_panels(weight.scales).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous().bfloat16()
        pairs = (
            panels_P16N.unflatten(2, (head.shape[1], WIDE_GROUP // 2, 2)).permute(0, 2, 3, 1, 4).flatten(2).contiguous()
        )
        return torch.cat((head.view(torch.uint8), pairs.view(torch.uint8)), dim=2).flatten(1)
    heads = [_whole_panels(t) for t in (weight.scales, weight.zeros) if t is not None]
    heads = [t.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous().half().view(torch.uint8) for t in heads]
    if weight.mode in ("q8", "q8a8"):
        words = _words(panels_P16N).unflatten(1, (-1, GROUP // 4)).flatten(2)  # [P, B, 8 * 16 * 4]
    else:
        nibbles = panels_P16N.unflatten(2, (-1, 4, 2, 4))  # [P, 16, B, word, low or high, byte]
        bytes_ = nibbles[..., 0, :] | nibbles[..., 1, :] << 4
        words = bytes_.permute(0, 2, 3, 1, 4).flatten(2)  # [P, B, 4 * 16 * 4]
    return torch.cat((*heads, words), dim=2).flatten(1)


def _words(panels_P16N: Tensor) -> Tensor:
    """[P, N / 4, 16, 4] unsigned bytes: two's complement plus 128."""
    return (panels_P16N.view(torch.uint8) ^ 0x80).unflatten(2, (-1, 4)).transpose(1, 2)


def _whole_panels(rows: Tensor) -> Tensor:
    missing = -rows.shape[0] % PANEL
    return torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))) if missing else rows


def pad_outputs(rows: Tensor) -> Tensor:
    """Zero rows up to whole panels, and the slack panels that a tile may read."""
    missing = (-(-rows.shape[0] // PANEL) + SLACK) * PANEL - rows.shape[0]
    return torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:])))
