"""Random numbers addressed by (seed, position) instead of drawn in sequence.

A request's token at position p always meets the same number, whatever else is in the batch, however often it was preempted, and whether
the token was guessed before or not.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection of uint64 that flips every output bit with probability one half (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_seed(seed: int, index: int) -> int:
    """The seed of continuation `index`, in [0, 2**64); continuation 0 keeps the caller's (any integer, taken modulo 2**64)."""
    seed &= 2**64 - 1
    if index == 0:
        return seed
    with np.errstate(over="ignore"):
        return int(mix(np.asarray(np.uint64(seed) + np.uint64(index) * _GOLDEN)))


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """float64 in [0, 1), one per (seed, position); both uint64 arrays of one shape."""
    with np.errstate(over="ignore"):
        bits = mix(mix(seeds + _GOLDEN) + positions * _GOLDEN + _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
