"""Where operators keep their values when `Execution.device` names a torch device: rows and neighbour lists as float64 tensors there.

A plan uploads the rows once, leaves what its operators make on the device, and brings home only what detectors keep. An operator without
a form for the device runs on the processor, its inputs fetched. `cpu:0` is torch's name of the processor: the same code without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wager.detect.tod.batching import SHARE_OF_FREE_MEMORY, Execution
from wager.detect.tod.knn import Neighbors
from wager.errors import UsageError


@dataclass(frozen=True)
class Found:
    """`knn.Neighbors` as tensors of a device."""

    distance_RK: Tensor
    index_RK: Tensor
    facts: dict[str, Any] = field(default_factory=dict)


def check(execution: Execution) -> torch.device:
    """The device asked for. Raises UsageError if torch cannot see it."""
    try:
        device = torch.device(execution.device)
    except RuntimeError as error:
        raise UsageError(
            f"device {execution.device!r} is not one that torch knows ({error}); use cpu or cuda"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {execution.device!r} was asked for, but torch sees no GPU; use device='cpu'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {execution.device!r} was asked for, but torch sees {torch.cuda.device_count()} GPU(s)"
        )
    return device


def budget_bytes(execution: Execution) -> int:
    """What an operator may allocate on the device: the limit given, else a share of what is free there."""
    device = torch.device(execution.device)
    if execution.memory_bytes is not None or device.type != "cuda":
        return execution.budget_bytes
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(SHARE_OF_FREE_MEMORY * (torch.cuda.mem_get_info(device)[0] + cached))


def placed(value: Any, device: torch.device) -> Any:
    """Arrays and neighbour lists on the device; anything else as it is."""
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value, device=device)
    if isinstance(value, Neighbors):
        return Found(placed(value.distance_RK, device), placed(value.index_RK, device), value.facts)
    return value


def fetched(value: Any) -> Any:
    """The value with every tensor in it as an array."""
    if isinstance(value, Tensor):
        return value.cpu().numpy()
    if isinstance(value, Found):
        return Neighbors(fetched(value.distance_RK), fetched(value.index_RK), value.facts)
    if isinstance(value, tuple):
        return tuple(fetched(v) for v in value)
    return value


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
