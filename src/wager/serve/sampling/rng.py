"""Random numbers addressed by (seed, position) instead of drawn in sequence.

A request's token at position p always meets the same number, whatever else is in the batch, however often it was preempted, and whether
the token was guessed before or not.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_WORD, _STEP = 2**64 - 1, int(_GOLDEN)


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection of uint64 that flips every output bit with probability one half (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix_one(x: int) -> int:
    """`mix` of one number, without arrays."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _WORD
    return x ^ (x >> 31)


def derive_seed(seed: int, index: int) -> int:
    """The seed of continuation `index`, in [0, 2**64); continuation 0 keeps the caller's (any integer, taken modulo 2**64)."""
    seed &= _WORD
    return seed if index == 0 else mix_one(seed + index * _STEP & _WORD)


def few_uniforms(seed: int, count: int) -> np.ndarray:
    """`uniforms` of one seed at positions 0 .. count - 1; sooner done than arrays are made while there are few."""
    start = mix_one(seed + _STEP & _WORD) + _STEP
    return np.array([(mix_one(start + i * _STEP & _WORD) >> 11) * 2.0**-53 for i in range(count)])


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """float64 in [0, 1), one per (seed, position); both uint64 arrays of one shape."""
    with np.errstate(over="ignore"):
        bits = mix(mix(seeds + _GOLDEN) + positions * _GOLDEN + _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
