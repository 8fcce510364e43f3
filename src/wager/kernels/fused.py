"""The two halves of a transformer block around attention, each as one native call.

Built once per block from packed linears; None where a form does not apply (a reference linear, padded inputs, an MLP of another kind), and
then the block runs its operators one by one. Both ways give the same bits.

Shape legend: T tokens, D hidden, H query heads, G key/value heads, K head width, R rotated pairs.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wager.kernels import native
from wager.kernels.native_linear import PANEL, LinearArgs, NativeLinear

_P, _L, _F, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32
_NOTHING = torch.empty(0)


class NormArgs(ctypes.Structure):
    _fields_ = [("weight", _P), ("eps", _F), ("offset", _F), ("is_bf16", _I)]


class InputArgs(ctypes.Structure):
    _fields_ = [
        *[(name, _P) for name in ("x", "residual", "total")],
        ("norm", NormArgs),
        ("qkv", LinearArgs),
        ("q_norm", NormArgs),
        ("k_norm", NormArgs),
        *[(name, _P) for name in ("cos", "sin")],
        *[(name, _L) for name in ("heads", "kv_heads", "head_dim", "pairs")],
        ("interleaved", _I),
    ]


class OutputArgs(ctypes.Structure):
    _fields_ = [("output", LinearArgs), ("norm", NormArgs), ("gate_up", LinearArgs), ("down", LinearArgs)]


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm's weight and constants."""

    weight_D: Tensor
    eps: float
    offset: float = 0.0

    @property
    def arguments(self) -> NormArgs:
        return NormArgs(self.weight_D.data_ptr(), self.eps, self.offset, int(self.weight_D.dtype == torch.bfloat16))


def plain(linear: Any) -> bool:
    """Whether this is a packed linear that takes its inputs as they are."""
    return isinstance(linear, NativeLinear) and not linear.padding and linear.order is None


class BlockInput:
    """(q_THK, k_TGK, v_TGK, residual_TD) of a block's input: residual + x, norm, qkv, head norms, rotation."""

    def __init__(
        self,
        norm: Norm,
        qkv: NativeLinear,
        q_norm: Norm | None,
        k_norm: Norm | None,
        heads: int,
        kv_heads: int,
        head_dim: int,
    ):
        self.shape, self.keep = (heads, kv_heads, head_dim), (norm, qkv, q_norm, k_norm)
        none = NormArgs()
        self.template = InputArgs(
            None, None, None, norm.arguments, qkv.arguments(_NOTHING.view(0, 0), torch.empty(0, qkv.outputs)),
            none if q_norm is None else q_norm.arguments, none if k_norm is None else k_norm.arguments,
            None, None, heads, kv_heads, head_dim, 0, 0,
        )  # fmt: skip
        self.function = native.library().wager_block_input

    def __call__(
        self, x_TD: Tensor, residual_TD: Tensor | None, cos_TR: Tensor, sin_TR: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens, (heads, kv_heads, width) = x_TD.shape[0], self.shape
        x_TD, cos_TR, sin_TR = x_TD.contiguous(), cos_TR.contiguous(), sin_TR.contiguous()
        arguments = InputArgs.from_buffer_copy(self.template)
        arguments.x, total = x_TD.data_ptr(), x_TD
        if residual_TD is not None:
            residual_TD, total = residual_TD.contiguous(), torch.empty_like(x_TD)
            arguments.residual, arguments.total = residual_TD.data_ptr(), total.data_ptr()
        made = torch.empty(tokens, heads + 2 * kv_heads, width)
        qkv = arguments.qkv
        qkv.rows, qkv.y, qkv.threads = tokens, made.data_ptr(), torch.get_num_threads()
        arguments.cos, arguments.sin, arguments.pairs = cos_TR.data_ptr(), sin_TR.data_ptr(), cos_TR.shape[1]
        if tokens:
            self.function(ctypes.byref(arguments))
        q_THK, k_TGK, v_TGK = made.split((heads, kv_heads, kv_heads), dim=1)
        return q_THK, k_TGK, v_TGK, total


class BlockOutput:
    """(branch_TD, residual_TD) of a block's second half: output projection onto the stream, norm, gated MLP."""

    def __init__(self, output: NativeLinear, norm: Norm, gate_up: NativeLinear, down: NativeLinear, activation: str):
        self.width, self.keep = down.outputs, (output, norm, gate_up, down)
        empty = _NOTHING.view(0, 0)
        self.template = OutputArgs(
            output.arguments(empty, torch.empty(0, output.outputs)), norm.arguments,
            gate_up.arguments(empty, torch.empty(0, gate_up.outputs // 2), activation),
            down.arguments(empty, torch.empty(0, down.outputs)),
        )  # fmt: skip
        self.function = native.library().wager_block_output

    def __call__(self, attended_TX: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        attended_TX, residual_TD, tokens = attended_TX.contiguous(), residual_TD.contiguous(), attended_TX.shape[0]
        stream_TD, branch_TD = torch.empty(2, tokens, self.width)
        arguments, threads = OutputArgs.from_buffer_copy(self.template), torch.get_num_threads()
        output, down, gate_up = arguments.output, arguments.down, arguments.gate_up
        output.x, output.residual, output.y = attended_TX.data_ptr(), residual_TD.data_ptr(), stream_TD.data_ptr()
        output.rows = gate_up.rows = down.rows = tokens
        output.threads = gate_up.threads = down.threads = threads
        down.y = branch_TD.data_ptr()
        if tokens:
            self.function(ctypes.byref(arguments))
        return branch_TD, stream_TD


def block_input(
    norm: Norm, qkv: Any, q_norm: Norm | None, k_norm: Norm | None, heads: int, kv_heads: int, head_dim: int
) -> BlockInput | None:
    """The fused first half, or None where the qkv linear is not natively packed."""
    known = all(n is None or n.weight_D.dtype in native.SUFFIX for n in (norm, q_norm, k_norm))
    return BlockInput(norm, qkv, q_norm, k_norm, heads, kv_heads, head_dim) if known and plain(qkv) else None


def block_output(output: Any, norm: Norm, gate_up: Any, down: Any, activation: str) -> BlockOutput | None:
    """The fused second half, or None where a linear is not natively packed or the gate does not fall on a panel's edge."""
    fits = all(map(plain, (output, gate_up, down))) and (gate_up.outputs // 2) % PANEL == 0
    known = norm.weight_D.dtype in native.SUFFIX
    return BlockOutput(output, norm, gate_up, down, activation) if fits and known else None
