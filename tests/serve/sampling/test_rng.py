"""Counter-based random numbers: uniform, independent between seeds and positions, and the same wherever they are asked for."""

import numpy as np
import pytest
from scipy import stats

from wager.serve.sampling.rng import derive_seed, few_uniforms, mix, uniforms


def grid(seeds, positions):
    s, p = np.meshgrid(np.asarray(seeds, np.uint64), np.asarray(positions, np.uint64), indexing="ij")
    return uniforms(s, p)


def test_known_values_of_the_mixer():
    """SplitMix64 from state 0 (its published test vector): increments of the golden gamma, mixed."""
    gamma = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = np.arange(1, 4, dtype=np.uint64) * gamma
    assert [hex(v) for v in mix(state).tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


@pytest.mark.parametrize(
    "seeds", [np.arange(64), np.arange(64) * 2**32, np.uint64(2**64 - 1) - np.arange(64, dtype=np.uint64)]
)
def test_numbers_are_uniform_and_inside_the_interval(seeds):
    values = grid(seeds, np.arange(500))
    assert values.min() >= 0.0 and values.max() < 1.0
    assert stats.kstest(values.ravel(), "uniform").pvalue > 1e-4


def test_neighbours_are_independent():
    """Chi-square over pairs of successive positions and of successive seeds: what a bad counter scheme gets wrong."""
    values = grid(np.arange(300), np.arange(300))
    for first, second in ((values[:, :-1], values[:, 1:]), (values[:-1], values[1:])):
        cells = np.histogram2d(first.ravel(), second.ravel(), bins=10)[0]
        assert stats.chisquare(cells.ravel()).pvalue > 1e-4
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02


def test_the_independence_test_has_power():
    """Adding seed and position before mixing repeats the same numbers along diagonals."""
    s, p = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(300, dtype=np.uint64), indexing="ij")
    values = (mix(s + p) >> np.uint64(11)).astype(float) * 2.0**-53
    cells = np.histogram2d(values[:-1, 1:].ravel(), values[1:, :-1].ravel(), bins=10)[0]
    assert stats.chisquare(cells.ravel()).pvalue < 1e-6
    good = grid(np.arange(300), np.arange(300))
    cells = np.histogram2d(good[:-1, 1:].ravel(), good[1:, :-1].ravel(), bins=10)[0]
    assert stats.chisquare(cells.ravel()).pvalue > 1e-4


def test_a_number_depends_on_its_address_only():
    one = uniforms(np.array([7], np.uint64), np.array([3], np.uint64))[0]
    many = uniforms(np.array([1, 7, 9], np.uint64), np.array([3, 3, 3], np.uint64))
    assert many[1] == one and len({*many}) == 3


def test_derived_seeds_are_distinct_and_the_first_keeps_the_callers():
    assert derive_seed(11, 0) == 11
    assert len({derive_seed(seed, index) for seed in range(200) for index in range(50)}) == 200 * 50
    for seed in (-1, 2**64, -(2**70)):
        assert 0 <= derive_seed(seed, 0) < 2**64 and 0 <= derive_seed(seed, 3) < 2**64


def test_numbers_made_one_by_one_are_those_of_arrays():
    rng = np.random.default_rng(0)
    for seed, index in zip(rng.integers(0, 2**63, 200).tolist(), rng.integers(1, 2**40, 200).tolist(), strict=True):
        with np.errstate(over="ignore"):
            arrays = int(mix(np.asarray(np.uint64(seed) + np.uint64(index) * np.uint64(0x9E3779B97F4A7C15))))
        assert derive_seed(seed, index) == arrays
        whole = uniforms(np.full(5, seed, np.uint64), np.arange(5, dtype=np.uint64))
        assert np.array_equal(few_uniforms(seed, 5), whole)
