"""Chooses between an operator's forms: native C++ for float32 activations on a CPU, Triton on a GPU, the torch reference for the rest.

WAGER_KERNELS=reference forces the reference everywhere, native and triton insist on the form of that name. When native code cannot be
built, or Triton is absent on a machine with a GPU, one warning says why and the reference serves.

Shape legend: T tokens, D width, I/O linear input/output, H query heads, G key/value heads, K key width, V value width, S pool slots,
R rotated pairs (spans in `paged_attention`), B blocks of a table row, P mask words.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wager.errors import BuildError, UsageError
from wager.kernels import native, reference
from wager.kernels.fused import BlockInput, BlockOutput, Norm, block_input, block_output
from wager.kernels.native_linear import NativeLinear
from wager.kernels.quantize import QuantizedWeight, check_mode, quantize, round_activations
from wager.native import amx, build

__all__ = [
    "BlockInput", "BlockOutput", "Choice", "Norm", "apply_rope", "block_input", "block_output", "choice", "embedding", "gelu_tanh_mul",
    "gpu_choice", "group_by_key", "has_fast_form", "layer_norm", "layer_norm_residual", "likely_weights", "one_token_block", "pack_experts",
    "pack_linear", "paged_attention", "penalise",
    "race", "reduce_by_key", "rms_norm", "rms_norm_residual", "rope_write", "sample", "segment_reduce", "silu_mul", "sort_by_key",
    "usual_mode", "write_kv",
]  # fmt: skip

log = logging.getLogger(__name__)

WHOLE_ROW = ("likely_weights", "sample", "race")  # Triton forms that hold a row of logits in one program,
WIDEST_ROW = 32768  # up to this many of them


@dataclass(frozen=True)
class Choice:
    """The form that serves CPU tensors, and why."""

    form: str
    reason: str


@cache
def choice() -> Choice:
    """Decided once per process. Raises BuildError when native is forced but cannot be built."""
    forced = os.environ.get("WAGER_KERNELS")
    if forced not in (None, "", "native", "reference", "triton"):
        raise UsageError(f"WAGER_KERNELS={forced!r} is unknown; use native, reference or triton")
    if forced == "reference":
        return Choice("reference", "forced by WAGER_KERNELS")
    try:
        native.library()
    except BuildError as error:
        if forced == "native":
            raise
        log.warning("native kernels are off, the slower torch reference serves: %s", error)
        return Choice("reference", str(error))
    reason = native.no_tiles()
    if reason and set(amx.FEATURES) <= set(build.cpu_flags().split()) and native.march() in native.TILED:
        log.warning("this processor has AMX but linears do without it, AVX-512 serves: %s", reason)
    how = "forced by WAGER_KERNELS" if forced == "native" else "built with the system compiler"
    tiles = "" if reason else " with AMX tiles"
    return Choice("native", f"{how} for {os.environ.get('WAGER_ISA') or build.isa()}{tiles}")


@cache
def gpu_choice() -> Choice:
    """The form that serves CUDA tensors, and why. Raises UsageError when Triton is forced but cannot be imported."""
    forced = os.environ.get("WAGER_KERNELS")
    if forced == "reference":
        return Choice("reference", "forced by WAGER_KERNELS")
    if forced != "triton" and not torch.cuda.is_available():
        return Choice("reference", "torch sees no CUDA device")
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        if forced == "triton":
            raise UsageError(
                f"WAGER_KERNELS=triton, but Triton cannot be imported ({error}); install it or unset WAGER_KERNELS"
            ) from None
        log.warning("Triton cannot be imported, the much slower torch reference serves on the GPU: %s", error)
        return Choice("reference", f"Triton cannot be imported: {error}")
    how = "forced by WAGER_KERNELS" if forced == "triton" else "compiled on first use"
    return Choice("triton", f"{how} by Triton {triton.__version__}")


@cache
def gpu_forms() -> Any:
    """The module of Triton forms where they serve CUDA tensors, else None."""
    return importlib.import_module("wager.kernels.triton_forms") if gpu_choice().form == "triton" else None


def _use_native(*tensors: Tensor) -> bool:
    return native.serves(*tensors) and choice().form == "native"


class ReferenceLinear:
    """A weight as the checkpoint has it; on a CPU widened once to the activations' float32. Quantized weights are kept as codes."""

    def __init__(self, weight_OI: Tensor | QuantizedWeight, bias_O: Tensor | None, quantization: str | None = None):
        self.weight: Tensor | QuantizedWeight
        if isinstance(weight_OI, QuantizedWeight):
            self.weight, self.bias = weight_OI, bias_O
            return
        dtype = torch.float32 if weight_OI.device.type == "cpu" else weight_OI.dtype
        self.bias = None if bias_O is None else bias_O.to(dtype)
        self.weight = weight_OI.to(dtype) if quantization is None else quantize(weight_OI, quantization)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x_TI: Tensor) -> Tensor:
        if isinstance(self.weight, Tensor):
            return reference.linear(x_TI, self.weight, self.bias)
        x = round_activations(x_TI, self.weight.mode).to(x_TI.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return reference.linear(x, self.weight.dequantized().to(x.dtype), bias)

    def add(self, x_TI: Tensor, residual_TO: Tensor) -> Tensor:
        """residual + linear(x)."""
        return residual_TO + self(x_TI)

    def gated(self, x_TI: Tensor, activation: str) -> Tensor:
        """act(gate) * up, where the weight's first half makes the gate and its second half the up projection."""
        return (reference.silu_mul if activation == "silu" else reference.gelu_tanh_mul)(self(x_TI))


def pack_linear(
    weight_OI: Tensor | QuantizedWeight, bias_O: Tensor | None = None, quantization: str | None = None
) -> Any:
    """A linear layer `x_TI -> y_TO` over a weight laid out for this machine; `quantization` is one of `quantize.MODES`, None for a weight
    that is in codes already.

    Beside calling it, `add(x, residual)` and `gated(x, activation)` fuse what usually follows. Raises UsageError for an unknown mode.
    """
    if quantization is not None:
        check_mode(quantization)
    if isinstance(weight_OI, QuantizedWeight):
        return (NativeLinear if weight_OI.device.type == "cpu" and choice().form == "native" else ReferenceLinear)(
            weight_OI, bias_O
        )
    if weight_OI.device.type == "cpu" and weight_OI.dtype in native.LINEAR_SUFFIX and choice().form == "native":
        return NativeLinear(weight_OI, bias_O, quantization)
    if weight_OI.device.type == "cuda" and quantization == "int16":
        raise UsageError("int16 weights are for CPUs; use w16a16, or no quantization, on a GPU", param="quantization")
    if weight_OI.device.type == "cuda" and (forms := gpu_forms()) is not None:
        return forms.TritonLinear(weight_OI, bias_O, quantization)
    return ReferenceLinear(weight_OI, bias_O, quantization)


def usual_mode(dtype: torch.dtype, device: torch.device) -> str | None:
    """How weights of `dtype` are multiplied unless the user says otherwise; a value of `quantization`, None for float32 activations.

    bfloat16 weights meet bfloat16 activations where the processor multiplies such pairs in one instruction, as in every other engine
    that runs a bfloat16 model; elsewhere rounding the activations would gain nothing.
    """
    paired = "avx512_bf16" in build.cpu_flags().split() and os.environ.get("WAGER_ISA", "avx512") in (
        "avx512",
        "amx",
        "native",
    )
    if dtype == torch.bfloat16 and device.type == "cpu" and paired and choice().form == "native":
        return "w16a16"
    return None


def _form(
    name: str, x: Tensor, *others: Tensor, dtypes: Mapping[torch.dtype, str] = native.SUFFIX
) -> Callable[..., Any]:
    """The function that serves these tensors; gradients and dtypes that are not among `dtypes` go to the reference."""
    if x.device.type == "cpu":
        known = all(t.dtype in dtypes and not t.requires_grad for t in others)
        return getattr(native if known and _use_native(x) else reference, name)
    if name in WHOLE_ROW and x.shape[-1] > WIDEST_ROW:
        return getattr(reference, name)
    forms = gpu_forms() if x.device.type == "cuda" and not any(t.requires_grad for t in (x, *others)) else None
    return getattr(forms or reference, name)


def _either(name: str) -> Callable[..., Any]:
    """An operator whose first argument decides the form; weights must be of a dtype the native form knows."""

    def operator(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return _form(name, x, *[a for a in args if isinstance(a, Tensor)])(x, *args, **kwargs)

    operator.__name__ = operator.__qualname__ = name
    operator.__doc__ = getattr(reference, name).__doc__
    return operator


rms_norm = _either("rms_norm")
rms_norm_residual = _either("rms_norm_residual")
layer_norm = _either("layer_norm")
layer_norm_residual = _either("layer_norm_residual")
silu_mul = _either("silu_mul")
gelu_tanh_mul = _either("gelu_tanh_mul")
apply_rope = _either("apply_rope")


def write_kv(new_TGK: Tensor, pool_SGK: Tensor, slots_T: Tensor) -> None:
    _form("write_kv", new_TGK, pool_SGK, dtypes=native.POOL_SUFFIX)(new_TGK, pool_SGK, slots_T)


def paged_attention(
    q_THK: Tensor, k_pool_SGK: Tensor, v_pool_SGV: Tensor, *args: Any, spans_T: Tensor | None = None, **kwargs: Any
) -> Tensor:
    form = _form("paged_attention", q_THK, k_pool_SGK, dtypes=native.POOL_SUFFIX)
    if spans_T is not None and q_THK.device.type == "cuda" and form is not reference.paged_attention:
        kwargs["spans_T"] = spans_T
    return form(q_THK, k_pool_SGK, v_pool_SGV, *args, **kwargs)


def rope_write(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    k_pool_SGK: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    form = _form("rope_write", q_THK, k_TGK, v_TGV, k_pool_SGK, dtypes=native.POOL_SUFFIX)
    return form(q_THK, k_TGK, v_TGV, cos_TR, sin_TR, k_pool_SGK, *args, **kwargs)


def embedding(ids_T: Tensor, table_VD: Tensor) -> Tensor:
    return _of_device("embedding", table_VD, table_VD.dtype in native.SUFFIX)(ids_T, table_VD)


def sort_by_key(keys_N: Tensor) -> Tensor:
    return _of_device("sort_by_key", keys_N, not keys_N.dtype.is_floating_point)(keys_N)


def group_by_key(keys_N: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """(order, starts): rows of key k are order[starts[k]:starts[k + 1]], as they came, for k in 0 .. num_keys - 1. Both int64."""
    if keys_N.device.type == "cpu" and not keys_N.dtype.is_floating_point and choice().form == "native":
        return native.group_by_key(keys_N, num_keys)
    order_N = sort_by_key(keys_N)
    return order_N, reference.segment_starts(keys_N[order_N], num_keys)


def segment_reduce(values_ND: Tensor, starts_S1: Tensor, mode: str = "sum", rows_M: Tensor | None = None) -> Tensor:
    if mode not in ("sum", "mean", "max"):
        raise UsageError(f"segments cannot be reduced by {mode!r}; use sum, mean or max")
    return _form("segment_reduce", values_ND)(values_ND, starts_S1, mode, rows_M)


def reduce_by_key(values_ND: Tensor, keys_N: Tensor, num_keys: int, mode: str = "sum") -> Tensor:
    """[num_keys, D]: sum, mean or max of the rows that have each key 0 .. num_keys - 1, in their order. The bits do not depend on threads."""
    order_N, starts_S1 = group_by_key(keys_N, num_keys)
    return segment_reduce(values_ND, starts_S1, mode, order_N)


def pack_experts(networks: Sequence[tuple[Any, Any]], activation: str) -> Any:
    """`experts(x_TD, weights_TC, chosen_TC, start_TD)` over packed (gate and up, down) linears; None where they must run one by one."""
    on_cpu = bool(networks) and networks[0][0].weight.device.type == "cpu"
    if on_cpu and choice().form == "native":
        return native.pack_experts(networks, activation)
    forms = gpu_forms() if networks and networks[0][0].weight.device.type == "cuda" else None
    return None if forms is None else forms.pack_experts(networks, activation)


def one_token_block(
    first_norm: Norm, qkv: Any, output: Any, second_norm: Norm, gate_up: Any, down: Any, activation: str
) -> Any:
    """`inputs(x_1D)` and `outputs(attended, stream)` of a block over one token on a GPU, its products fused with what stands beside them;
    None where they run one by one."""
    if getattr(qkv, "weight", torch.empty(0)).device.type != "cuda" or (forms := gpu_forms()) is None:
        return None
    return forms.one_token_block(first_norm, qkv, output, second_norm, gate_up, down, activation)


def _of_device(name: str, x: Tensor, known: bool) -> Callable[..., Any]:
    """As `_form`, for a first argument that is not an activation."""
    if x.device.type == "cpu" and known and not x.requires_grad and choice().form == "native":
        return getattr(native, name)
    forms = gpu_forms() if x.device.type == "cuda" and not x.requires_grad else None
    return getattr(forms or reference, name)


def penalise(logits_LW: Tensor, *columns: Tensor) -> Tensor:
    return _form("penalise", logits_LW)(logits_LW, *columns)


def likely_weights(logits_LW: Tensor, *columns: Tensor) -> Tensor:
    return _form("likely_weights", logits_LW)(logits_LW, *columns)


def sample(logits_LW: Tensor, *columns: Tensor) -> Tensor:
    return _form("sample", logits_LW)(logits_LW, *columns)


def race(logits_LW: Tensor, *columns: Tensor) -> Tensor:
    return _form("race", logits_LW)(logits_LW, *columns)


def has_fast_form(name: str, x: Tensor) -> bool:
    """Whether something faster than the reference serves this tensor."""
    return _form(name, x) is not getattr(reference, name)


for _name in (
    "embedding",
    "likely_weights",
    "penalise",
    "race",
    "rope_write",
    "sample",
    "segment_reduce",
    "sort_by_key",
):
    globals()[_name].__doc__ = getattr(reference, _name).__doc__
write_kv.__doc__ = reference.write_kv.__doc__
paged_attention.__doc__ = reference.paged_attention.__doc__

if os.environ.get("WAGER_CANDIDATES"):
    importlib.import_module("wager.kernels.referee.injection").install(globals())
