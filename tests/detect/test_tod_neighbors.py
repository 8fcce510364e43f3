"""The neighbour search is exact: whatever proposes, in whatever tiles, float64 decides."""

import itertools
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.detect.data import KINDS, oracle, points
from wager.detect.tod import bounds, native, quantize, scan
from wager.detect.tod.batching import Execution, parse_bytes, scan_column_bytes, scan_row_bytes
from wager.detect.tod.knn import exact_neighbors, nearest
from wager.detect.tod.torch_knn import TorchScan
from wager.errors import CapacityError, UsageError

WAYS = [
    Execution(search="scan"),
    Execution(search="tree"),
    Execution(search="scan", batch_rows=7),
    Execution(precision="fp16", batch_rows=16),
    Execution(precision="bf16"),
]
HAS_INT8 = bool(native.library().wager_knn_has_int8())
SCANS = [Execution(search="scan", precision="fp32")] + (
    [Execution(search="scan", precision="int8")] if HAS_INT8 else []
)


@given(st.integers(0, 10**6), st.integers(2, 70), st.integers(1, 21), st.sampled_from(KINDS), st.data())
def test_every_way_gives_the_bits_of_the_definition(seed, n, d, kind, data):
    x = points(seed, n, d, kind)
    k = data.draw(st.integers(1, n - 1))
    wanted = exact_neighbors(x, x, k, 0)
    for way in WAYS:
        found = nearest(None, x, k, way)
        assert np.array_equal(found.index_RK, wanted.index_RK), (way, kind)
        assert np.array_equal(found.distance_RK, wanted.distance_RK), (way, kind)


@given(st.integers(0, 10**6), st.integers(100, 500), st.integers(1, 45), st.sampled_from(KINDS), st.integers(1, 30))
def test_boxes_and_levels_rule_out_no_neighbour(seed, n, d, kind, k):
    x = points(seed, n, d, kind)
    wanted = exact_neighbors(x, x, k, 0)
    query = np.concatenate([x[::7], points(seed + 1, 20, d, kind), 40 * points(seed + 2, 5, d, "plain")])
    wanted_new = exact_neighbors(query, x, k)
    with patch.object(scan, "BOXES_MIN_ROWS", 1):
        for way in SCANS:
            found, new = nearest(None, x, k, way), nearest(query, x, k, way)
            assert np.array_equal(found.index_RK, wanted.index_RK) and np.array_equal(
                found.distance_RK, wanted.distance_RK
            )
            assert np.array_equal(new.index_RK, wanted_new.index_RK) and np.array_equal(
                new.distance_RK, wanted_new.distance_RK
            )


@pytest.mark.parametrize("way", SCANS)
@pytest.mark.parametrize("ulps", [0, 1, 1000, 10**9])
def test_near_ties_among_thousands(way, ulps):
    """Integer points with many equal distances, moved by some units in the last place: the k-th neighbour is one of many, and tiles, boxes
    and levels all see ties."""
    rng = np.random.default_rng(ulps)
    x = rng.integers(0, 3, (3000, 6)).astype(np.float64) * 64 + 1000
    x += rng.integers(-1, 2, x.shape) * ulps * np.spacing(1000.0)
    wanted = exact_neighbors(x, x, 9, 0)
    for more in (
        {},
        {"batch_rows": 700},
        {"batch_rows": 500, "memory_bytes": 500 * scan_row_bytes(6, 9, 100) + 1300 * scan_column_bytes(6)},
    ):
        found = nearest(None, x, 9, Execution(search="scan", precision=way.precision, **more))
        assert np.array_equal(found.index_RK, wanted.index_RK) and np.array_equal(found.distance_RK, wanted.distance_RK)


def test_what_is_tried_first_changes_nothing():
    x = points(3, 2500, 48, "plain")
    found, wanted = nearest(None, x, 5, Execution()), exact_neighbors(x, x, 5, 0)
    assert np.array_equal(found.index_RK, wanted.index_RK)
    assert ("int8_time" in found.facts) == HAS_INT8
    copies = np.repeat(points(4, 700, 3, "plain"), 3, axis=0)
    found, wanted = nearest(None, copies, 5, Execution()), exact_neighbors(copies, copies, 5, 0)
    assert found.facts["method"] == "tree" and np.array_equal(found.index_RK, wanted.index_RK)


@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 9), st.booleans())
def test_definition_agrees_with_numpy_where_arithmetic_is_exact(seed, n, d, own):
    x = points(seed, n, d, "grid")
    query = x if own else points(seed + 1, 9, d, "grid")
    k = min(5, n - own)
    found = exact_neighbors(query, x, k, 0 if own else -1)
    distance, index = oracle(query, x, k, own)
    assert np.array_equal(found.index_RK, index)
    assert np.array_equal(found.distance_RK, distance)


@pytest.mark.parametrize("way", WAYS)
def test_new_rows_even_far_outside_the_base(way):
    x = points(0, 60, 4, "plain")
    query = np.concatenate([points(1, 10, 4, "plain"), x[:3], np.full((1, 4), 1e30), np.full((1, 4), -1e120)])
    found, wanted = nearest(query, x, 6, way), exact_neighbors(query, x, 6)
    assert np.array_equal(found.index_RK, wanted.index_RK)
    assert found.index_RK[10, 0] == 0 and found.distance_RK[10, 0] == 0


@pytest.mark.parametrize("way", SCANS)
def test_lists_full_of_near_ties_are_settled_in_float64(way):
    rng = np.random.default_rng(0)
    x = 1e4 * np.ones((400, 3)) * rng.choice([-1, 1], (400, 1)) + rng.normal(size=(400, 3)) * 1e-5
    found = nearest(None, x, 2, way)
    assert found.facts["settled_pairs"] > 0 and found.facts["fp64_rows"] == 0
    assert np.array_equal(found.index_RK, exact_neighbors(x, x, 2, 0).index_RK)


def test_a_budget_cuts_columns_too_and_a_tiny_one_is_refused():
    x = points(3, 500, 8, "duplicates")
    budget = 64 * scan_row_bytes(8, 5, 84) + 100 * scan_column_bytes(8)
    found = nearest(None, x, 5, Execution(search="scan", memory_bytes=budget, batch_rows=64))
    assert np.array_equal(found.index_RK, exact_neighbors(x, x, 5, 0).index_RK)
    with pytest.raises(CapacityError, match="memory budget of 1000 bytes"):
        nearest(None, x, 5, Execution(search="scan", memory_bytes=1000))


def test_processes_and_checkpoints_give_the_same_bits(tmp_path):
    x = points(4, 200, 6, "duplicates")
    plain = nearest(None, x, 4, Execution(search="scan"))
    shared = nearest(None, x, 4, Execution(search="scan", workers=2, batch_rows=50, checkpoint=str(tmp_path)))
    assert np.array_equal(plain.index_RK, shared.index_RK) and np.array_equal(plain.distance_RK, shared.distance_RK)
    files = sorted(tmp_path.glob("*.npz"))
    assert len(files) == 4
    files[1].unlink()  # killed before this block was kept
    again = nearest(None, x, 4, Execution(search="scan", batch_rows=50, checkpoint=str(tmp_path)))
    assert np.array_equal(plain.index_RK, again.index_RK) and again.facts["resumed_rows"] == 150
    other = nearest(None, x + 1, 4, Execution(search="scan", batch_rows=50, checkpoint=str(tmp_path)))
    assert "resumed_rows" not in other.facts


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 3, 64, 300])
def test_bound_holds_and_is_not_absurd(precision, kind, d):
    x = points(d, 120, d, kind)
    scan = TorchScan(x, 3, Execution(precision=precision))
    computed, error = scan.tile(scan.low(x), 0, len(x))
    scaled = (x - scan.centre_D).astype(np.longdouble) * scan.scale
    true = ((scaled[:, None] - scaled[None]) ** 2).sum(2)
    ratio = np.abs(computed.numpy().astype(np.longdouble) - true) / error.numpy()
    assert ratio.max() <= 1
    if (
        kind == "plain" and 1 < d <= 64
    ):  # a bound for any order of summation grows with d, the usual error with its root
        assert np.median(ratio) >= 1e-3


def test_native_scan_bound_covers_its_own_arithmetic():
    """With k = n - 1 every pair is a candidate and its interval must contain the float64 distance."""
    for kind, d, way in itertools.product(KINDS, (2, 33), SCANS):
        x = points(5, 64, d, kind)
        low, slack = bounds.slack(d), bounds.gamma(d + 16)
        assert low > slack  # the uniform form includes the rounding of the inputs
        wanted, found = exact_neighbors(x, x, 63, 0), nearest(None, x, 63, way)
        assert np.array_equal(found.index_RK, wanted.index_RK)


def test_rounding_is_monotone_over_all_fp16_neighbours():
    bits = torch.arange(0, 0x7C00, dtype=torch.int32).to(torch.int16)
    halves = bits.view(torch.float16).double()
    for shift in (0.0, 0.25, 0.5, 0.75):
        between = halves[:-1] + shift * (halves[1:] - halves[:-1])
        assert (between.to(torch.float16).double().diff() >= 0).all()


@given(st.integers(0, 10**6), st.integers(2, 40), st.sampled_from(["fp16", "bf16", "fp32"]), st.data())
def test_order_operator_is_exact_in_low_precision(seed, n, precision, data):
    rng = np.random.default_rng(seed)
    values = (
        1 + rng.integers(0, 6, (8, n)) * 2.0**-40 if seed % 2 else rng.normal(size=(8, n)) * 10.0 ** rng.integers(-9, 9)
    )
    k = data.draw(st.integers(1, n))
    found = quantize.smallest(torch.from_numpy(values), k, precision)
    assert np.array_equal(found.value.numpy(), np.argsort(values, axis=1, kind="stable")[:, :k])
    if seed % 2 and k < n:
        assert found.verified_share > 0.5  # all values round to 1: low precision decides nothing


@given(st.lists(st.integers(-40, 40), max_size=30), st.lists(st.integers(-40, 40), max_size=30))
def test_intersection_survives_rounding(a, b):
    a_N, b_M = (torch.tensor(v, dtype=torch.float64) + 2049.25 for v in (a, b))  # fp16 merges neighbours here
    found = quantize.intersect(a_N, b_M).value
    assert found.tolist() == sorted({v + 2049.25 for v in set(a) & set(b)})


@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from(["fp16", "bf16", "fp32"]))
def test_neighbours_within_a_range_are_exact(seed, kind, precision):
    x = points(seed, 50, 4, kind)
    radius = float(exact_neighbors(x, x, 5, 0).distance_RK[7, 4])  # a pair lies exactly on the border
    found, share = quantize.within(x, x, radius, precision, tile=16)
    square = np.empty((50, 50))
    native.call("wager_squared_distances", x, x, np.tile(np.arange(50), (50, 1)), 50, 50, 4, square)
    for row, hits in zip(np.sqrt(square) <= radius, found, strict=True):
        assert np.array_equal(np.flatnonzero(row), hits)
    assert 0 <= share <= 1


def test_settings_are_checked():
    for wrong in ({"precision": "fp8"}, {"search": "magic"}, {"batch_rows": 0}, {"workers": 0}):
        with pytest.raises(UsageError):
            Execution(**wrong)
    assert parse_bytes("2GB") == 2 * 10**9 and parse_bytes("1.5 MiB") == 3 * 2**19 and parse_bytes("77") == 77
    with pytest.raises(UsageError, match="not a size"):
        parse_bytes("lots")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no GPU"):
            nearest(None, np.ones((4, 2)), 1, Execution(device="cuda"))
