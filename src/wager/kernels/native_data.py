"""The C++ forms of the operators around the network: gathering, sorting and reducing by key, experts, sampling. See `reference_data`.

Shape legend: N rows, M picked rows, S segments, D width, V vocabulary, T tokens, C experts chosen per token, L rows of logits, W vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wager.errors import UsageError
from wager.kernels.native_linear import PANEL, LinearArgs, NativeLinear

_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
SIGNATURES = {
    "wager_embedding_f32": (_P, _P, _L, _L, _P, _I),
    "wager_embedding_bf16": (_P, _P, _L, _L, _P, _I),
    "wager_sort_by_key": (_P, _L, _P, _I),
    "wager_segment_starts": (_P, _L, _L, _P),
    "wager_segment_reduce": (_P, _P, _P, _L, _L, _I, _P, _I),
    "wager_experts": (_P,),
    "wager_sample": (_P,),
    "wager_penalise": (_P, _P, _P, _L, _L, _P, _P, _P, _I),
}
MODES = {"sum": 0, "mean": 1, "max": 2}


class _SamplingArgs(ctypes.Structure):
    _fields_ = [
        ("logits", _P),
        *[(name, _L) for name in ("rows", "vocabulary", "stride")],
        *[(name, _P) for name in ("temperature", "min_p", "top_p", "top_k", "uniforms", "seeds", "positions", "tokens", "kept")],
        ("threads", _I),
    ]  # fmt: skip


class _Expert(ctypes.Structure):
    _fields_ = [("gate_up", LinearArgs), ("down", LinearArgs)]


class _ExpertArgs(ctypes.Structure):
    _fields_ = [
        *[(name, _P) for name in ("x", "weights", "chosen", "y", "experts")],
        *[(name, _L) for name in ("tokens", "choices", "count", "width")],
        ("threads", _I),
    ]


def _library() -> ctypes.CDLL:
    from wager.kernels.native import library

    return library()


def embedding(ids_T: Tensor, table_VD: Tensor) -> Tensor:
    """Raises IndexError, as torch does, for an id outside the table."""
    from wager.kernels.native import SUFFIX

    ids, table_VD = ids_T.long().contiguous(), table_VD.contiguous()
    y = torch.empty(*ids.shape, table_VD.shape[1])
    if ids.numel():
        low, high = ids.aminmax()
        if int(low) < 0 or int(high) >= table_VD.shape[0]:
            raise IndexError(
                f"token {int(low) if int(low) < 0 else int(high)} is outside a table of {table_VD.shape[0]} rows"
            )
        function = getattr(_library(), f"wager_embedding_{SUFFIX[table_VD.dtype]}")
        function(
            table_VD.data_ptr(), ids.data_ptr(), ids.numel(), table_VD.shape[1], y.data_ptr(), torch.get_num_threads()
        )
    return y


def sort_by_key(keys_N: Tensor) -> Tensor:
    keys, order_N = keys_N.long().contiguous(), torch.empty(len(keys_N), dtype=torch.int64)
    _library().wager_sort_by_key(keys.data_ptr(), len(keys), order_N.data_ptr(), torch.get_num_threads())
    return order_N


def group_by_key(keys_N: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    keys, starts_S1 = keys_N.long().contiguous(), torch.empty(num_keys + 1, dtype=torch.int64)
    _library().wager_segment_starts(keys.data_ptr(), len(keys), num_keys, starts_S1.data_ptr())
    return sort_by_key(keys), starts_S1


def segment_reduce(values_ND: Tensor, starts_S1: Tensor, mode: str = "sum", rows_M: Tensor | None = None) -> Tensor:
    values, starts = values_ND.contiguous(), starts_S1.long().contiguous()
    rows = None if rows_M is None else rows_M.long().contiguous()
    y_SD = torch.empty(len(starts) - 1, values.shape[1])
    _library().wager_segment_reduce(
        values.data_ptr(), None if rows is None else rows.data_ptr(), starts.data_ptr(), len(starts) - 1, values.shape[1],
        MODES[mode], y_SD.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y_SD


class Experts:
    """`experts(x_TD, weights_TC, chosen_TC, start_TD)`: all chosen experts of a batch in one call."""

    def __init__(self, networks: Sequence[tuple[NativeLinear, NativeLinear]], activation: str):
        self.keep, self.width = networks, networks[0][1].outputs
        table = (_Expert * len(networks))()
        for entry, (gate_up, down) in zip(table, networks, strict=True):
            empty = torch.empty(0, 0)
            entry.gate_up = gate_up.arguments(empty, torch.empty(0, gate_up.outputs // 2), activation)
            entry.down = down.arguments(empty, torch.empty(0, down.outputs))
        self.table, self.function = table, _library().wager_experts

    def __call__(self, x_TD: Tensor, weights_TC: Tensor, chosen_TC: Tensor, start_TD: Tensor) -> Tensor:
        x, weights, chosen = x_TD.contiguous(), weights_TC.float().contiguous(), chosen_TC.long().contiguous()
        y_TD = start_TD.clone(memory_format=torch.contiguous_format)
        arguments = _ExpertArgs(
            x.data_ptr(), weights.data_ptr(), chosen.data_ptr(), y_TD.data_ptr(), ctypes.addressof(self.table),
            x.shape[0], chosen.shape[1], len(self.table), self.width, torch.get_num_threads(),
        )  # fmt: skip
        if x.shape[0]:
            self.function(ctypes.byref(arguments))
        return y_TD


def pack_experts(networks: Sequence[tuple[Any, Any]], activation: str) -> Experts | None:
    """None where a linear is not packed natively without padding, or a gate does not fall on a panel's edge."""
    plain = all(isinstance(n, NativeLinear) and not n.padding for pair in networks for n in pair)
    fits = plain and all((gate_up.outputs // 2) % PANEL == 0 for gate_up, _ in networks)
    return Experts(networks, activation) if fits else None


def penalise(
    logits_LW: Tensor,
    counts_LW: Tensor,
    prompt_LW: Tensor,
    repetition_L: Tensor,
    frequency_L: Tensor,
    presence_L: Tensor,
) -> Tensor:
    y_LW, counts, prompt = (
        logits_LW.clone(memory_format=torch.contiguous_format),
        counts_LW.contiguous(),
        prompt_LW.contiguous(),
    )
    columns = [c.float().contiguous() for c in (repetition_L, frequency_L, presence_L)]
    _library().wager_penalise(
        y_LW.data_ptr(),
        counts.data_ptr(),
        prompt.data_ptr(),
        *y_LW.shape,
        *(c.data_ptr() for c in columns),
        torch.get_num_threads(),
    )
    return y_LW


def likely_weights(
    logits_LW: Tensor, temperature_L: Tensor, min_p_L: Tensor, top_k_L: Tensor, top_p_L: Tensor
) -> Tensor:
    kept_LW = torch.empty(logits_LW.shape)
    _sample(logits_LW, (temperature_L, min_p_L, top_k_L, top_p_L), kept=kept_LW)
    return kept_LW


def sample(
    logits_LW: Tensor, temperature_L: Tensor, min_p_L: Tensor, top_k_L: Tensor, top_p_L: Tensor, uniforms_L: Tensor
) -> Tensor:
    tokens_L = torch.empty(len(logits_LW), dtype=torch.int64)
    _sample(
        logits_LW,
        (temperature_L, min_p_L, top_k_L, top_p_L),
        uniforms=uniforms_L.double().contiguous(),
        tokens=tokens_L,
    )
    return tokens_L


def race(
    logits_LW: Tensor, temperature_L: Tensor, min_p_L: Tensor, top_k_L: Tensor, top_p_L: Tensor, seeds_L: Tensor, positions_L: Tensor
) -> Tensor:  # fmt: skip
    tokens_L = torch.empty(len(logits_LW), dtype=torch.int64)
    numbers = {"seeds": seeds_L.long().contiguous(), "positions": positions_L.long().contiguous()}
    _sample(logits_LW, (temperature_L, min_p_L, top_k_L, top_p_L), tokens=tokens_L, **numbers)
    return tokens_L


def _sample(logits_LW: Tensor, filters: tuple[Tensor, Tensor, Tensor, Tensor], **pointers: Tensor) -> None:
    rows, vocabulary = logits_LW.shape
    if vocabulary == 0:
        raise UsageError("a token cannot be drawn from an empty vocabulary")
    logits = logits_LW if logits_LW.stride(1) == 1 else logits_LW.contiguous()
    temperature, min_p, top_p = (filters[i].float().contiguous() for i in (0, 1, 3))
    top_k = filters[2].long().contiguous()
    arguments = _SamplingArgs(
        logits.data_ptr(), rows, vocabulary, logits.stride(0), temperature.data_ptr(), min_p.data_ptr(), top_p.data_ptr(), top_k.data_ptr(),
        threads=torch.get_num_threads(), **{name: t.data_ptr() for name, t in pointers.items()},
    )  # fmt: skip
    _library().wager_sample(ctypes.byref(arguments))
