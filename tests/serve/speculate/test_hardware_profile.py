"""Measured passes: what the planner may believe of them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from wager.serve.speculate.hardware_profile import HardwareProfile, rising


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=9))
def test_more_tokens_never_cost_less(times):
    made = np.array(rising(times))
    assert (np.diff(made) >= -1e-9).all() and np.isclose(made.mean(), np.mean(times))
    if (np.diff(times) >= 0).all():
        assert np.allclose(made, times)


def test_a_dip_does_not_make_more_tokens_free():
    """One token met a busy machine: its pass is as cheap as that of four at most, and a tree of four is not a bargain."""
    profile = HardwareProfile((1, 2, 4, 8), (1,), (rising((3.7, 3.75, 3.1, 3.8)),), ((0.2,) * 4,))
    assert profile.target_ms(1, 1) == profile.target_ms(1, 4) < profile.target_ms(1, 8)
    assert profile.step_ms(1, 4, (1, 1)) > profile.target_ms(1, 1)


def test_beyond_the_last_size_the_slope_goes_on():
    profile = HardwareProfile((1, 2, 4), (1, 2), ((1.0, 1.0, 3.0), (2.0, 2.0, 6.0)), ((0.0,) * 3,) * 2)
    assert profile.target_ms(1, 6) == 5.0 and profile.target_ms(2, 3) == 4.0 and profile.target_ms(1, 3) == 2.0
