"""The operators that matter, behind one face. Importing this module is light; torch comes with the first call."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wager.kernels.fused import BlockInput, BlockOutput, Norm
    from wager.kernels.registry import (
        apply_rope,
        block_input,
        block_output,
        embedding,
        gelu_tanh_mul,
        gpu_choice,
        group_by_key,
        has_fast_form,
        layer_norm,
        layer_norm_residual,
        likely_weights,
        one_token_block,
        pack_experts,
        pack_linear,
        paged_attention,
        penalise,
        race,
        reduce_by_key,
        rms_norm,
        rms_norm_residual,
        rope_write,
        sample,
        segment_reduce,
        silu_mul,
        sort_by_key,
        usual_mode,
        write_kv,
    )

__all__ = [
    "BlockInput",
    "BlockOutput",
    "Norm",
    "apply_rope",
    "block_input",
    "block_output",
    "embedding",
    "gelu_tanh_mul",
    "gpu_choice",
    "group_by_key",
    "has_fast_form",
    "layer_norm",
    "layer_norm_residual",
    "likely_weights",
    "one_token_block",
    "pack_experts",
    "pack_linear",
    "paged_attention",
    "penalise",
    "race",
    "reduce_by_key",
    "rms_norm",
    "rms_norm_residual",
    "rope_write",
    "sample",
    "segment_reduce",
    "silu_mul",
    "sort_by_key",
    "usual_mode",
    "write_kv",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'wager.kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module("wager.kernels.registry"), name)
    globals()[name] = value
    return value
