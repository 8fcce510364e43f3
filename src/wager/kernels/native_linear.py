"""Packing of weights for `cpp/linear.cpp`, and the linear layer over a packed weight.

Shape legend: T tokens, I inputs, O outputs, N inputs padded to whole groups, P panels of 16 outputs, B groups.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from wager.errors import UsageError
from wager.kernels.quantize import QuantizedWeight, quantize, step_of
from wager.native.memory import huge_zeros

PANEL, SLACK = 16, 3
FORMAT = {"f32": 0, "bf16": 1, "int8": 2, "w16a16": 3, "w8a8": 4, "int4": 5, "nf4": 5, "w4a8": 6}
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
        self, weight_OI: Tensor, bias_O: Tensor | None, quantization: str | None = None, flags: tuple[str, ...] = ()
    ):
        from wager.kernels.native import SUFFIX, library

        lib, (self.outputs, self.inputs) = library(flags), weight_OI.shape
        self.mode = quantization or SUFFIX[weight_OI.dtype]
        self.padding = -self.inputs % step_of(quantization) if quantization else 0
        self.scales = self.table = None
        panels = -(-self.outputs // PANEL) + SLACK
        if quantization is None:
            weight = weight_OI.contiguous()
            self.weight = huge_zeros(panels * PANEL * self.inputs * weight.element_size())
            pack = getattr(lib, f"wager_pack_{self.mode}")
            pack(weight.data_ptr(), self.outputs, self.inputs, self.weight.data_ptr(), torch.get_num_threads())
        else:
            quantized = quantize(weight_OI, quantization)
            packed = pack_codes(quantized)
            self.weight = huge_zeros(packed.nbytes)
            self.weight.copy_(packed.view(-1))
            if quantized.table is not None:
                self.table = torch.tensor(quantized.table)
            elif quantized.scales is not None:
                self.scales = pad_outputs(quantized.scales)
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
        x = F.pad(x_TI, (0, self.padding)) if self.padding else x_TI.contiguous()
        residual = None if residual_TO is None else residual_TO.contiguous()
        y_TO = torch.empty(x.shape[0], outputs)
        if x.shape[0]:
            self._function(ctypes.byref(self.arguments(x, y_TO, activation, residual)))
        return y_TO


def pack_codes(weight: QuantizedWeight) -> Tensor:
    """Bytes [P, ...] in the layout of cpp/formats.h, panels past the last output zero."""
    codes = pad_outputs(weight.codes_ON)
    panels_P16N = codes.unflatten(0, (-1, PANEL))
    if weight.mode == "int8":
        return panels_P16N.transpose(1, 2).contiguous().view(torch.uint8)
    if weight.mode == "w16a16":
        return panels_P16N.unflatten(2, (-1, 2)).transpose(1, 2).contiguous().view(torch.uint8)
    if weight.mode == "w8a8":
        unsigned = panels_P16N.view(torch.uint8) ^ 0x80  # two's complement plus 128
        return unsigned.unflatten(2, (-1, 4)).transpose(1, 2).contiguous()
    return _pack_four_bits(panels_P16N, weight)


def _pack_four_bits(panels_P16N: Tensor, weight: QuantizedWeight) -> Tensor:
    """Per group of 32: 16 bfloat16 scales, then four words of eight nibbles for each output."""
    assert weight.scales is not None
    nibbles = panels_P16N.unflatten(2, (-1, 4, 2, 4))  # [P, 16, B, word, low or high, byte]
    bytes_ = nibbles[..., 0, :] | nibbles[..., 1, :] << 4
    words = bytes_.permute(0, 2, 3, 1, 4).flatten(2)  # [P, B, 4 * 16 * 4]
    scales = pad_outputs(weight.scales).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous().bfloat16()
    return torch.cat((scales.view(torch.uint8), words), dim=2)


def pad_outputs(rows: Tensor) -> Tensor:
    """Zero rows up to whole panels, and the slack panels that a tile may read."""
    missing = (-(-rows.shape[0] // PANEL) + SLACK) * PANEL - rows.shape[0]
    return torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:])))
