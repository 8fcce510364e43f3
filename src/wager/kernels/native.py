"""The C++ forms of the operators: float32 activations on a CPU, weights and pools in float32 or bfloat16,
pools also in float8 (e4m3).

Shape legend: T tokens, D width, I/O linear input/output, H query heads, G key/value heads, K key width, V value width, S pool slots, R pairs.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from wager.errors import UsageError
from wager.kernels.native_data import (
    SIGNATURES,
    embedding,
    group_by_key,
    likely_weights,
    pack_experts,
    penalise,
    race,
    sample,
    segment_reduce,
    sort_by_key,
)  # fmt: skip
from wager.native import build

__all__ = [
    "apply_rope", "embedding", "gelu_tanh_mul", "group_by_key", "layer_norm", "layer_norm_residual", "library", "likely_weights", "march",
    "pack_experts", "paged_attention", "penalise", "race", "rms_norm", "rms_norm_residual", "rope_write", "sample", "segment_reduce", "serves",
    "silu_mul", "sort_by_key", "write_kv",
]  # fmt: skip

SOURCES = [
    Path(__file__).parent / "cpp" / name
    for name in (
        "linear.cpp",
        "attention.cpp",
        "elementwise.cpp",
        "block.cpp",
        "pool.cpp",
        "segments.cpp",
        "experts.cpp",
        "sampling.cpp",
    )  # fmt: skip
]
MARCH = build.LEVELS
TILED = (MARCH["native"], MARCH["amx"])
# Fewest rows that go by AMX tiles. An argument, not a measurement: by vectors a core spends R cycles on R rows and a line of bfloat16 weights, so
# 8 rows at 3 GHz use 24 GB/s, about what memory gives a core; more of them would wait for arithmetic, and a tile takes 16 at once.
TILE_ROWS = 9
NO_TILES = {  # by what wager_use_tiles returns
    0: "the library was built without them: g++ knows them from version 11 on, clang++ from 12",
    -1: "this processor's TDPBF16PS sums otherwise than its manual says, so that a token's bits would depend on its batch",
}
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
POOL_SUFFIX = {**SUFFIX, torch.float8_e4m3fn: "fp8"}
LINEAR_SUFFIX = {**SUFFIX, torch.float16: "f16"}

_P, _L, _F, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "wager_linear": (_P,),
    "wager_block_input": (_P,),
    "wager_block_output": (_P,),
    "wager_pack_f32": (_P, _L, _L, _P, _I),
    "wager_pack_bf16": (_P, _L, _L, _P, _I),
    "wager_pack_wide_f32": (_P, _L, _L, _P, _I),
    "wager_pack_wide_bf16": (_P, _L, _L, _P, _I),
    "wager_rms_norm_f32": (_P, _L, _P, _P, _L, _L, _F, _F, _P, _I),
    "wager_rms_norm_bf16": (_P, _L, _P, _P, _L, _L, _F, _F, _P, _I),
    "wager_layer_norm_f32": (_P, _L, _P, _P, _P, _P, _L, _L, _F, _P, _I),
    "wager_layer_norm_bf16": (_P, _L, _P, _P, _P, _P, _L, _L, _F, _P, _I),
    "wager_rope_write_f32": (_P,),
    "wager_rope_write_bf16": (_P,),
    "wager_rope_write_fp8": (_P,),
    "wager_silu_mul": (_P, _L, _L, _P, _I),
    "wager_gelu_tanh_mul": (_P, _L, _L, _P, _I),
    "wager_rope": (_P, _L, _L, _P, _P, _L, _L, _L, _L, _I, _P, _I),
    "wager_write_f32": (_P, _L, _P, _L, _L, _P, _I),
    "wager_write_bf16": (_P, _L, _P, _L, _L, _P, _I),
    "wager_write_fp8": (_P, _L, _P, _L, _L, _P, _I),
    "wager_attention_f32": (_P,),
    "wager_attention_bf16": (_P,),
    "wager_attention_fp8": (_P,),
    **SIGNATURES,
}


class _RopeWriteArgs(ctypes.Structure):
    _fields_ = [
        *[(name, _P) for name in ("q", "k", "v", "cos", "sin", "slots", "y", "k_pool", "v_pool")],
        *[
            (name, ctypes.c_int64)
            for name in (
                "q_token",
                "k_token",
                "v_token",
                "tokens",
                "heads",
                "kv_heads",
                "key_dim",
                "value_dim",
                "pairs",
            )
        ],
        ("interleaved", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


class AttentionArgs(ctypes.Structure):
    _fields_ = [
        *[(name, _P) for name in ("q", "new_k", "new_v", "slots", "sinks")],
        *[(name, ctypes.c_int64) for name in ("q_token", "new_k_token", "new_v_token")],
        *[(name, _P) for name in ("k_pool", "v_pool")],
        *[(name, _L) for name in ("k_slot", "k_head", "v_slot", "v_head")],
        *[(name, _P) for name in ("tables", "starts", "contexts", "positions", "mask", "out")],
        *[
            (name, ctypes.c_int64)
            for name in (
                "tokens", "spans", "table_width", "heads", "kv_heads", "key_dim", "value_dim", "block_size", "window", "words",
            )
        ],
        ("scale", _F),
        ("softcap", _F),
        ("threads", _I),
    ]  # fmt: skip


def march() -> str:
    """The instruction set to compile for: this machine's, or the one that WAGER_ISA names. Raises UsageError if it cannot run here."""
    wanted = os.environ.get("WAGER_ISA") or "native"
    if wanted not in MARCH:
        raise UsageError(f"WAGER_ISA={wanted!r} is unknown; use one of {', '.join(MARCH)}")
    lacking = build.NEEDS.get(wanted, set()) - set(build.cpu_flags().split())
    if lacking:
        raise UsageError(f"WAGER_ISA={wanted} needs a processor with {' '.join(sorted(lacking))}; unset it")
    if wanted == "amx" and (reason := build.no_tiles()):
        raise UsageError(f"WAGER_ISA=amx cannot be had: {reason}; unset it")
    return MARCH[wanted]


@cache
def library(flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The compiled kernels; `flags` are further ones for the compiler, for a search over constants. Raises BuildError."""
    lib = build.load("wager_kernels", SOURCES, flags, march=march())
    for name, arguments in _SIGNATURES.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, None
    lib.wager_use_tiles.argtypes, lib.wager_use_tiles.restype = (_I,), _I
    lib.wager_pack_wide_f32.restype = lib.wager_pack_wide_bf16.restype = _L
    lib.wager_stream_read.argtypes, lib.wager_stream_read.restype = (_P, _L, _I), ctypes.c_double
    if march() in TILED and build.no_tiles() is None:
        lib.wager_use_tiles(TILE_ROWS)
    return lib


@cache
def no_tiles() -> str | None:
    """Why linears of many rows do without AMX tiles; None when they use them. Raises BuildError."""
    if march() not in TILED:
        return f"WAGER_ISA={os.environ['WAGER_ISA']} is without them"
    return build.no_tiles() or NO_TILES.get(library().wager_use_tiles(TILE_ROWS))


def serves(*tensors: Tensor) -> bool:
    """Whether these activations are of the kind the native forms take."""
    return all(t.device.type == "cpu" and t.dtype == torch.float32 and not t.requires_grad for t in tensors)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Rows may be strided views as long as they are evenly spaced; heads of a fused projection are."""
    width = x.shape[-1]
    x = x if x.stride(-1) == 1 and x.dim() == 2 else x.contiguous()
    rows = x.numel() // width
    y = torch.empty(x.shape)
    function = getattr(library(), f"wager_rms_norm_{SUFFIX[weight_D.dtype]}")
    stride = x.stride(0) if x.dim() == 2 else width
    function(
        x.data_ptr(), stride, None, weight_D.data_ptr(), rows, width, eps, offset, y.data_ptr(), torch.get_num_threads()
    )
    return y


def rms_norm_residual(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The sum is made in a copy of the residual, so the caller's tensors stay as they are."""
    rows, width = x_TD.shape
    x_TD = x_TD if x_TD.stride(-1) == 1 else x_TD.contiguous()
    y, total = torch.empty(rows, width), residual_TD.clone(memory_format=torch.contiguous_format)
    function = getattr(library(), f"wager_rms_norm_{SUFFIX[weight_D.dtype]}")
    function(
        x_TD.data_ptr(), x_TD.stride(0), total.data_ptr(), weight_D.data_ptr(), rows, width, eps, offset, y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y, total


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    return _layer_norm(x, None, weight_D, bias_D, eps)[0]


def layer_norm_residual(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return _layer_norm(x_TD, residual_TD.contiguous(), weight_D, bias_D, eps)


def _layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    x, width = x if x.stride(-1) == 1 and x.dim() == 2 else x.contiguous(), x.shape[-1]
    y, total = torch.empty(x.shape), x if residual is None else torch.empty(x.shape)
    getattr(library(), f"wager_layer_norm_{SUFFIX[weight.dtype]}")(
        x.data_ptr(), x.stride(0) if x.dim() == 2 else width, _pointer(residual), total.data_ptr(), weight.data_ptr(), _pointer(bias),
        x.numel() // width, width, eps, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y, total


def _gated(name: str, gate_up: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(rows, width)
    getattr(library(), name)(gate_up.data_ptr(), rows, width, y.data_ptr(), torch.get_num_threads())
    return y


def silu_mul(gate_up_TI: Tensor) -> Tensor:
    return _gated("wager_silu_mul", gate_up_TI)


def gelu_tanh_mul(gate_up_TI: Tensor) -> Tensor:
    return _gated("wager_gelu_tanh_mul", gate_up_TI)


def apply_rope(x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool = False) -> Tensor:
    x = x_THK if x_THK.stride(-1) == 1 else x_THK.contiguous()
    tokens, heads, width = x.shape
    y = torch.empty(tokens, heads, width)
    cos, sin = cos_TR.contiguous(), sin_TR.contiguous()
    library().wager_rope(
        x.data_ptr(), x.stride(0), x.stride(1), cos.data_ptr(), sin.data_ptr(), tokens, heads, cos.shape[1], width,
        int(interleaved), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def write_kv(new_TGK: Tensor, pool_SGK: Tensor, slots_T: Tensor) -> None:
    new = new_TGK if new_TGK.stride(-1) == 1 and new_TGK.stride(1) == new_TGK.shape[2] else new_TGK.contiguous()
    function = getattr(library(), f"wager_write_{POOL_SUFFIX[pool_SGK.dtype]}")
    width = pool_SGK.shape[1] * pool_SGK.shape[2]
    function(
        new.data_ptr(),
        new.stride(0),
        slots_T.data_ptr(),
        len(slots_T),
        width,
        pool_SGK.data_ptr(),
        torch.get_num_threads(),
    )


def rope_write(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, cos_TR: Tensor, sin_TR: Tensor, k_pool_SGK: Tensor, v_pool_SGV: Tensor,
    slots_T: Tensor, interleaved: bool = False,
) -> Tensor:  # fmt: skip
    q, k, v = (_token_rows(t) for t in (q_THK, k_TGK, v_TGV))
    cos, sin, slots, y_THK = cos_TR.contiguous(), sin_TR.contiguous(), slots_T.contiguous(), torch.empty(q_THK.shape)
    arguments = _RopeWriteArgs(
        *(t.data_ptr() for t in (q, k, v, cos, sin, slots, y_THK, k_pool_SGK, v_pool_SGV)), q.stride(0), k.stride(0), v.stride(0),
        len(slots), q.shape[1], k.shape[1], k.shape[2], v.shape[2], cos.shape[1], int(interleaved), torch.get_num_threads(),
    )  # fmt: skip
    getattr(library(), f"wager_rope_write_{POOL_SUFFIX[k_pool_SGK.dtype]}")(ctypes.byref(arguments))
    return y_THK


def paged_attention(
    q_THK: Tensor,
    k_pool_SGK: Tensor,
    v_pool_SGV: Tensor,
    tables_RB: Tensor,
    span_starts: Tensor,
    contexts_R: Tensor,
    positions_T: Tensor,
    block_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    mask_TP: Tensor | None = None,
    sinks_H: Tensor | None = None,
    new: tuple[Tensor, Tensor | None, Tensor] | None = None,
) -> Tensor:
    """`new` = (k_TGK, v_TGV or None, slots_T) is stored before attending."""
    q, tables = _token_rows(q_THK), tables_RB.contiguous()
    mask = None if mask_TP is None else mask_TP.contiguous()
    sinks = None if sinks_H is None else sinks_H.float().contiguous()
    new_k, new_v, slots = (None, None, None) if new is None else new
    new_k, new_v = (None if t is None else _token_rows(t) for t in (new_k, new_v))
    out_THV = torch.empty(q.shape[0], q.shape[1], v_pool_SGV.shape[2])
    arguments = AttentionArgs(
        q.data_ptr(), _pointer(new_k), _pointer(new_v), _pointer(slots), _pointer(sinks),
        q.stride(0), 0 if new_k is None else new_k.stride(0), 0 if new_v is None else new_v.stride(0),
        k_pool_SGK.data_ptr(), v_pool_SGV.data_ptr(),
        k_pool_SGK.stride(0), k_pool_SGK.stride(1), v_pool_SGV.stride(0), v_pool_SGV.stride(1),
        tables.data_ptr(), span_starts.data_ptr(), contexts_R.data_ptr(), positions_T.data_ptr(),
        _pointer(mask), out_THV.data_ptr(),
        q.shape[0], tables.shape[0], tables.shape[1], q.shape[1], k_pool_SGK.shape[1], q.shape[2], v_pool_SGV.shape[2],
        block_size, window or 0, 0 if mask is None else mask.shape[1],
        scale, softcap or 0.0, torch.get_num_threads(),
    )  # fmt: skip
    getattr(library(), f"wager_attention_{POOL_SUFFIX[k_pool_SGK.dtype]}")(ctypes.byref(arguments))
    return out_THV


def _token_rows(x_THK: Tensor) -> Tensor:
    """A view whose heads lie side by side in a token; tokens may be further apart, as in a fused projection."""
    return x_THK if x_THK.stride(2) == 1 and x_THK.stride(1) == x_THK.shape[2] else x_THK.contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
