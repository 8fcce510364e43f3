"""What a compilation says about itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """What a compilation did. `reason` says why the original is kept, or what proves the replacement."""

    search: str
    used: str
    reason: str
    original_ms: float
    compiled_ms: float
    noise: float
    seconds: float
    counters: dict[str, Any] = field(default_factory=dict)
    details: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        ratio = self.original_ms / self.compiled_ms if self.compiled_ms else 1.0
        lines = [
            f"{self.used}: {ratio:.2f}x ({self.original_ms:.3f} -> {self.compiled_ms:.3f} ms, noise {self.noise:.1%})",
            self.reason,
        ]
        lines += [f"{name}: {value}" for name, value in self.counters.items()]
        return "\n".join([*lines, *self.details])
