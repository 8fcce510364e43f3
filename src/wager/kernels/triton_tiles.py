"""How Triton linears are cut, by device and shape: tables that `python -m benchmarks.kernels.gpu --sweep` measures, and a plain default.

A one-token product is bound by reading the weight once: every program holds a few outputs and walks along the whole input in long pieces.
A product of some tokens goes to the matrix units; None in its table means torch's own linear (cuBLAS), for weights that are not quantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """outputs: of one program. inputs: read at a time. warps: of one program. stages: loads in flight ahead of their use, 1 is none."""

    outputs: int
    inputs: int
    warps: int
    stages: int = 1


Class = tuple[int, str]  # bits of a weight, and the shape's class
FEW_TOKENS = 16

DEFAULT_VECTOR = {16: Tile(4, 1024, 4), 8: Tile(8, 1024, 4), 4: Tile(8, 2048, 4)}
DEFAULT_MATRIX = {16: Tile(32, 128, 4, 4), 8: Tile(32, 128, 4, 4), 4: Tile(32, 128, 4, 3)}
MANY_TOKENS = Tile(64, 64, 4, 3)

# compute capability -> class -> tile
VECTOR: dict[tuple[int, int], dict[Class, Tile]] = {(9, 0): {}}
MATRIX: dict[tuple[int, int], dict[Class, Tile | None]] = {(9, 0): {}}


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """(0, 0) where there is no GPU, i.e. under Triton's interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the device; under Triton's interpreter those of a GPU that the forms were written for."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def shape_class(outputs: int, inputs: int, gated: bool = False) -> str:
    """gated: two outputs at a time; wide: very many outputs (a head); long: very many inputs; plain: the rest."""
    return "gated" if gated else "wide" if outputs >= 32768 else "long" if inputs >= 8192 else "plain"


def vector_tile(device: torch.device, bits: int, outputs: int, inputs: int, gated: bool) -> Tile:
    """For one token. outputs: rows of the weight, of the half if gated."""
    known = VECTOR.get(capability(device), {}).get((bits, shape_class(outputs, inputs, gated)))
    tile = known or DEFAULT_VECTOR[bits]
    while tile.inputs > max(64, inputs):
        tile = Tile(tile.outputs, tile.inputs // 2, tile.warps, tile.stages)
    return tile


def matrix_tile(device: torch.device, bits: int, outputs: int, inputs: int, tokens: int) -> Tile | None:
    """For several tokens; None is torch's linear."""
    on_gpu = device.type == "cuda"
    if tokens > FEW_TOKENS:
        return None if bits == 16 and on_gpu else MANY_TOKENS
    table, key = MATRIX.get(capability(device), {}), (bits, shape_class(outputs, inputs))
    if key in table:
        return table[key]
    return None if bits == 16 and on_gpu else DEFAULT_MATRIX[bits]
