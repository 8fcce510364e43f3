"""How far a squared distance computed in low precision can lie from the true one.

Points a, b are rounded to a format of unit roundoff u (fp16 2^-11, bf16 2^-8, tf32 2^-11, fp32 2^-24) after centring and after a power-of-two scaling
that puts max|x| at 1; then |a|^2 + |b|^2 - 2<a,b> is accumulated in float32 in any order. With N = |a| + |b| and D the true squared distance,
rounding moves the distance by at most u N, and accumulation moves the computed value by at most gamma N^2:

    |D^ - D| <= 2 sqrt(D) u N + u^2 N^2 + gamma(d + 16) N^2 + underflow,        gamma(n) = n 2^-24 / (1 - n 2^-24)

16 instead of the textbook 3 covers the rounding of the norms, of the bound itself, of its comparison, and of the float64 decision. D is
not known, but D <= D^ + bound gives a fixed point that one conservative step solves: sqrt(D) <= sqrt(max(D^,0) + gamma N^2) + 2 u N.
Source: TOD (arXiv 2110.14007) for the idea; the bound here is derived for matrix-product distances.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wager.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

ACCUMULATOR = 2.0**-24
ROUNDOFF = {"fp16": 2.0**-11, "bf16": 2.0**-8, "tf32": 2.0**-11, "fp32": 2.0**-24}
SMALLEST = {"fp16": 2.0**-25, "bf16": 2.0**-134, "tf32": 2.0**-127, "fp32": 2.0**-150}


def gamma(terms: int) -> float:
    """Relative error of `terms` float32 roundings."""
    product = terms * ACCUMULATOR
    if product >= 0.5:
        raise UsageError(f"{terms} features are too many for a float32 accumulator; use precision='fp64'")
    return product / (1 - product)


def slack(features: int) -> float:
    """The float32 bound with sqrt(D) <= N put in: |D^ - D| <= slack N^2. Used where one multiplication per pair is all there is time for."""
    return gamma(features + 16) + 2.01 * ROUNDOFF["fp32"] + features * 2.0**-100


def bound(approximate_RC: Tensor, reach_RC: Tensor, features: int, precision: str) -> Tensor:
    """Bound on |D^ - D| for computed squared distances D^ (float32) and norm sums N (float32)."""
    u, noise = ROUNDOFF[precision], gamma(features + 16)
    underflow = features**0.5 * SMALLEST[precision] * 2
    step = u * reach_RC + underflow
    root = (approximate_RC.clamp(min=0) + noise * reach_RC**2).sqrt() + 2 * step
    return (2 * root * step + step**2 + noise * reach_RC**2) * (1 + 2.0**-20) + 2.0**-126
