"""The compiler of tensor programs: searches that propose, prices that are measured, proofs that decide.

The module is callable: `wager.compile(function, example_inputs)` is `wager.compile.api.compile`. `wager.compile.backend` plugs into torch.compile.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_HOME = {name: "wager.compile.api" for name in ("Compiled", "Report", "backend", "load")}


class _Face(ModuleType):
    """A package that can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from wager.compile.api import compile as run

        return run(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOME[name]), name)


sys.modules[__name__].__class__ = _Face
