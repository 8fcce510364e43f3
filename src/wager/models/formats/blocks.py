"""GGUF's blocks of quantised weights, decoded into `kernels.quantize.QuantizedWeight`.

| block | values                                                     | becomes | error                                                  |
|-------|------------------------------------------------------------|---------|--------------------------------------------------------|
| Q8_0  | 32 int8, one float16 scale                                 | q8      | none                                                   |
| Q4_0  | 32 four-bit codes less 8, one float16 scale                | q4      | none                                                   |
| Q4_K  | 256 in groups of 32: d * scale * code - dmin * minimum     | q4z     | 1/100 of a step: scales and zero points become float16 |
| Q6_K  | 256 in groups of 16: d * scale * (code - 32)               | q8      | 1/254 of the largest magnitude of 32 neighbours        |

Source: the GGUF file format of the ggml library, whose blocks these are.
Shape legend: O outputs, I inputs, S super-blocks of 256.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wager.kernels.quantize import GROUP, QuantizedWeight, to_q8

BLOCK_BYTES = {"Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_K": (256, 144), "Q6_K": (256, 210)}  # inputs, bytes
INEXACT = {
    "Q4_K": "scales and minima of Q4_K become float16 (error up to about 1/100 of a step)",
    "Q6_K": "Q6_K becomes int8 in groups of 32 (error up to 1/254 of a group's largest weight)",
}


def decode(kind: str, data_OB: np.ndarray) -> QuantizedWeight:
    """A weight from its rows of bytes, [O, bytes of a row]."""
    inputs_of_block, block_bytes = BLOCK_BYTES[kind]
    rows, row_bytes = data_OB.shape
    blocks = torch.from_numpy(np.array(data_OB)).view(rows, row_bytes // block_bytes, block_bytes)
    inputs = blocks.shape[1] * inputs_of_block
    return _DECODERS[kind](blocks, inputs)


def _halves(bytes_: Tensor) -> Tensor:
    """float32 values of float16 numbers, two bytes each, in the last axis."""
    return bytes_.contiguous().view(torch.float16).float()


def _q8_0(blocks: Tensor, inputs: int) -> QuantizedWeight:
    return QuantizedWeight(
        "q8", blocks[..., 2:].contiguous().view(torch.int8).flatten(1), _halves(blocks[..., :2])[..., 0], inputs
    )


def _q4_0(blocks: Tensor, inputs: int) -> QuantizedWeight:
    codes = blocks[..., 2:]
    both = torch.cat((codes & 15, codes >> 4), dim=-1)
    return QuantizedWeight("q4", both.flatten(1), _halves(blocks[..., :2])[..., 0], inputs)


def _q4_k(blocks: Tensor, inputs: int) -> QuantizedWeight:
    d, dmin = _halves(blocks[..., 0:2]), _halves(blocks[..., 2:4])  # [O, S, 1]
    packed = blocks[..., 4:16].unflatten(-1, (3, 4))  # 8 scales and 8 minima of six bits
    low_scale, low_min, rest = packed.unbind(-2)
    scales = torch.cat((low_scale & 63, (rest & 15) | (low_scale >> 2) & 48), dim=-1)
    minima = torch.cat((low_min & 63, (rest >> 4) | (low_min >> 2) & 48), dim=-1)
    codes = blocks[..., 16:].unflatten(-1, (4, 32))
    codes = torch.stack((codes & 15, codes >> 4), dim=-2)  # [O, S, 4, 2, 32]
    scale = (d * scales.float()).flatten(1)  # [O, B]
    offset = (dmin * minima.float()).flatten(1)
    codes = codes.reshape(scale.shape[0], -1)
    # A group without a scale is constant: code 0 with the scale that puts the offset at a zero point of 8.
    constant = scale == 0
    codes = torch.where(constant.repeat_interleave(GROUP, 1), 0, codes).to(torch.uint8)
    scale = torch.where(constant, offset / 8, scale).half().float()
    zeros = torch.where(scale == 0, 0, offset / torch.where(scale == 0, 1, scale)) - 8
    return QuantizedWeight("q4z", codes, scale, inputs, zeros.half().float())


def _q6_k(blocks: Tensor, inputs: int) -> QuantizedWeight:
    return to_q8(q6_k_values(blocks))


def q6_k_values(blocks: Tensor) -> Tensor:
    """float32 [O, I]."""
    low, high = blocks[..., :128].unflatten(-1, (2, 64)), blocks[..., 128:192].unflatten(-1, (2, 32))
    low = torch.stack((low & 15, low >> 4), dim=-2).reshape(*blocks.shape[:2], 8, 32)
    high = torch.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=-2).reshape(*blocks.shape[:2], 8, 32)
    codes = (low | high << 4).to(torch.int8) - 32
    scales = blocks[..., 192:208].contiguous().view(torch.int8).float() * _halves(blocks[..., 208:210])
    return (codes.float().reshape(*blocks.shape[:2], 16, 16) * scales[..., None]).flatten(1)


_DECODERS = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_K": _q4_k, "Q6_K": _q6_k}
