"""wager: bet cheaply, verify exactly.

`from wager import LLM, SamplingParams` loads the engine (and torch) on first use; `import wager` alone stays light.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wager import compile as compile
    from wager.serve.llm import LLM, AsyncLLM
    from wager.serve.outputs import CompletionOutput, RequestOutput
    from wager.serve.params import SamplingParams, StructuredOutputs

__version__ = "0.1.0"

# Before torch is loaded: its OpenMP threads must sleep between their regions, not spin. A spinning one takes the core on which our own
# kernels' threads (or a neighbour) could work; on two cores that halves the engine's speed. Whoever sets the variable is heard.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_HOME = {
    "LLM": "wager.serve.llm",
    "AsyncLLM": "wager.serve.llm",
    "SamplingParams": "wager.serve.params",
    "StructuredOutputs": "wager.serve.params",
    "RequestOutput": "wager.serve.outputs",
    "CompletionOutput": "wager.serve.outputs",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "__version__",
    "compile",
]


def __getattr__(name: str) -> Any:
    if name == "compile":  # a callable package: wager.compile(function, example_inputs)
        return importlib.import_module("wager.compile")
    if name not in _HOME:
        raise AttributeError(f"module 'wager' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
