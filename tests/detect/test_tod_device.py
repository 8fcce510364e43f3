"""The code that runs on a GPU, here through torch on the processor (`cpu:0`): neighbours to the bit, scores to rounding, the budget kept."""

import pickle
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.detect.data import KINDS, points
from tests.interpreter import inside, outside, run_inside
from wager.detect import tod
from wager.detect.registry import TABULAR
from wager.detect.tod import device, device_knn, device_operators, native, operators, plan
from wager.detect.tod.base import fit_many
from wager.detect.tod.batching import Execution
from wager.detect.tod.checks import DataError
from wager.detect.tod.device_knn import DeviceSearch, Distinct, Level
from wager.detect.tod.knn import Neighbors, exact_neighbors, nearest
from wager.errors import CapacityError, UsageError

THERE = "cuda" if torch.cuda.is_available() else "cpu:0"
WAYS = [Execution(THERE), Execution(THERE, precision="fp64"), Execution(THERE, batch_rows=17)]


def same(found, wanted, note=""):
    assert np.array_equal(found.index_RK, wanted.index_RK), note
    assert np.array_equal(found.distance_RK, wanted.distance_RK), note


@given(st.integers(0, 10**6), st.integers(2, 90), st.integers(1, 21), st.sampled_from(KINDS), st.data())
def test_neighbours_have_the_bits_of_the_definition(seed, n, d, kind, data):
    x = points(seed, n, d, kind)
    k = data.draw(st.integers(1, n - 1))
    query = np.concatenate([points(seed + 1, 9, d, kind), x[:3], 40 * points(seed + 2, 3, d, "plain")])
    wanted, wanted_new = exact_neighbors(x, x, k, 0), exact_neighbors(query, x, k)
    for way in WAYS:
        with patch.object(device_knn, "TILE_PAIRS", 700):
            same(nearest(None, x, k, way), wanted, (way, kind))
            same(nearest(query, x, k, way), wanted_new, (way, kind))


@pytest.mark.parametrize("ulps", [0, 1, 1000, 10**9])
@pytest.mark.parametrize("groups", [32, 256])
def test_near_ties_among_thousands(ulps, groups):
    """The k-th neighbour is one of many that lie within some units in the last place of each other, many of them copies."""
    rng = np.random.default_rng(ulps)
    x = rng.integers(0, 3, (2500, 6)).astype(np.float64) * 64 + 1000
    x += rng.integers(-1, 2, x.shape) * ulps * np.spacing(1000.0)
    wanted = exact_neighbors(x, x, 9, 0)
    with patch.object(device_knn, "GROUPS", groups):
        for way in WAYS[:2]:
            same(nearest(None, x, 9, way), wanted, way)


def test_copies_are_searched_once_and_counted_all():
    rng = np.random.default_rng(3)
    x = points(4, 300, 3, "plain")[rng.integers(0, 300, 3000)]
    x[:700] = x[0]  # more copies than neighbours
    found = nearest(None, x, 12, Execution(THERE))
    assert found.facts["distinct"] <= 300 and found.facts["distinct_rows_asked"] == found.facts["distinct"]
    same(found, exact_neighbors(x, x, 12, 0))
    signed = np.array([[0.0, 1.0], [-0.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    assert len(Distinct(torch.from_numpy(signed)).rows_GD) == 2


def test_clusters_that_float32_cannot_tell_apart_go_to_float64():
    rng = np.random.default_rng(0)
    x = 1e4 * np.ones((900, 3)) * rng.choice([-1, 1], (900, 1)) + rng.normal(size=(900, 3)) * 1e-2
    found = nearest(None, x, 2, Execution(THERE))
    assert found.facts["fp64_rows"] == 900
    assert found.facts["verified_pairs"] < 900 * 40  # and there hardly more than the neighbours are left
    same(found, exact_neighbors(x, x, 2, 0))


def test_rows_beyond_every_bound_are_compared_with_all():
    x = points(0, 60, 4, "plain") * 1e-150
    query = np.concatenate([x[:3], np.full((1, 4), 1e30), np.full((1, 4), -1e149)])
    same(nearest(query, x, 6, Execution(THERE)), exact_neighbors(query, x, 6))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 3, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lower_bounds_lie_below_and_not_far(kind, d, dtype):
    x = points(d, 120, d, kind)
    search = DeviceSearch(x, 3, Execution(THERE))
    search.distinct()
    scaled = search.scaled(torch.as_tensor(x, device=search.device))
    level = Level.of(scaled, dtype, 256)
    asked, square, safe = level.asked(scaled)
    lower = level.lower(asked, 0, 120).cpu().numpy().astype(np.longdouble)
    exact = (x - device.fetched(search._made["centre"])).astype(np.longdouble) * search._made["scale"]
    true = ((exact[:, None] - exact[None]) ** 2).sum(2)
    reach = device.fetched(square[:, None] + square[None])
    assert safe.all() and (lower <= true + level.tiny).all()
    assert (true <= lower + 4 * level.slack * (1 + 2.0**-20) * reach + level.tiny).all()


@pytest.mark.parametrize("name", TABULAR)
@pytest.mark.parametrize("kind", ["plain", "duplicates", "constant", "grid"])
def test_scores_are_those_of_the_processor(name, kind):
    seed = {"random_state": 3} if name in ("iforest", "loda", "feature_bagging", "lscp", "suod") else {}
    x = points(7, 150, 5, kind)
    if name == "loda" and kind != "plain":
        x = x + points(8, 150, 5, "plain") * 1e-3  # values on the border of a bin go by rounding
    for settings in ({}, {"batch_rows": 40}):
        wanted = TABULAR[name](**seed).fit(x)
        found = TABULAR[name](execution=Execution(THERE, **settings), **seed).fit(x)
        np.testing.assert_allclose(found.decision_scores_, wanted.decision_scores_, rtol=1e-9, atol=1e-11)
        new = points(9, 40, 5, "plain")
        np.testing.assert_allclose(found.decision_function(new), wanted.decision_function(new), rtol=1e-9, atol=1e-11)
        assert isinstance(found.decision_scores_, np.ndarray)
        pickle.loads(pickle.dumps(found))


@pytest.mark.parametrize("method", ["mean", "median"])
@pytest.mark.parametrize("k", [4, 5])
def test_aggregations(method, k):
    x = points(3, 80, 3, "plain")
    wanted = tod.KNN(n_neighbors=k, method=method).fit(x).decision_scores_
    found = tod.KNN(n_neighbors=k, method=method, execution=Execution(THERE)).fit(x).decision_scores_
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_more_options_of_columns_and_axes():
    x = points(5, 300, 6, "plain")
    for made in (
        lambda e: tod.HBOS(n_bins="auto", execution=e), lambda e: tod.LODA(n_bins="auto", random_state=1, execution=e),
        lambda e: tod.PCA(n_components=4, n_selected_components=2, weighted=False, execution=e),
        lambda e: tod.PCA(standardization=False, execution=e), lambda e: tod.ABOD(method="default", execution=e),
    ):  # fmt: skip
        rows = x[:60] if "default" in repr(made(None)) else x
        np.testing.assert_allclose(
            made(Execution(THERE)).fit(rows).decision_scores_, made(None).fit(rows).decision_scores_, rtol=1e-9
        )
    with pytest.raises(DataError, match="constant"):
        tod.PCA(execution=Execution(THERE)).fit(np.ones((40, 3)))


def test_a_symmetric_column_points_nowhere():
    half = np.random.default_rng(0).normal(size=(200, 3))
    x = np.concatenate([half, -half])
    assert np.array_equal(device_operators.skewness_sign(torch.from_numpy(x)).numpy(), operators.skewness_sign(x))


def test_one_plan_searches_once_and_runs_its_steps_there():
    x = points(1, 200, 4, "duplicates")
    names = ["knn", "lof", "abod", "cof", "sod", "hbos", "ecod", "copod", "pca"]
    together = [TABULAR[n]() for n in names]
    asked = []
    real = DeviceSearch.own
    with patch.object(DeviceSearch, "own", lambda self, a, b: asked.append(self.k) or real(self, a, b)):
        done = fit_many(together, x, Execution(THERE))
    assert asked == [20] and "knn(k=20)" in done.seconds and done.facts["knn(k=20)"]["method"].startswith("products")
    for name, det in zip(names, together, strict=True):
        alone = TABULAR[name](execution=Execution(THERE)).fit(x)
        assert np.array_equal(det.decision_scores_, alone.decision_scores_), name
    for name in ("knn", "first", "aggregate", "local_density", "density_ratio", "angle_variance", "chaining", "chain_ratio",
                 "histograms", "histogram_score", "tail_probability", "tail_score", "axes", "axes_score", "path_score"):  # fmt: skip
        assert plan.OPERATORS[name].on_device is not None, name


def test_with_self_among_copies():
    x = np.array([[0.0], [0.0], [1.0], [3.0], [0.0]])
    found = nearest(None, x, 3)
    there = plan.OPERATORS["with_self"].on_device(
        Execution(THERE), device.placed(found, device.check(Execution(THERE)))
    )
    same(device.fetched(there), found.with_self())
    assert isinstance(device.fetched(there), Neighbors)


class Largest(torch.overrides.TorchFunctionMode):
    """The largest tensor that any call returned, in bytes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple) else (out,):
            if isinstance(one, torch.Tensor):
                self.bytes = max(self.bytes, one.numel() * one.element_size())
        return out


def test_tiles_follow_the_budget_and_a_tiny_one_is_refused():
    x = points(3, 3000, 8, "plain")
    wanted = exact_neighbors(x, x, 5, 0)
    for memory in (3_000_000, 1_500_000):
        search = DeviceSearch(x, 5, Execution(THERE, memory_bytes=memory))
        rows, columns, _ = search.tile(torch.float32, 8)
        assert rows * (4 * columns + 3000) < memory
        with Largest() as largest:
            same(nearest(None, x, 5, Execution(THERE, memory_bytes=memory)), wanted, memory)
        assert largest.bytes < memory
    assert columns < 3072 and rows >= 1  # the last budget cut columns, too
    with pytest.raises(CapacityError, match="memory budget of 400000 bytes"):
        nearest(None, x, 5, Execution(THERE, memory_bytes=400_000))
    for name in ("abod", "cof", "ecod", "hbos", "loda", "iforest", "pca"):
        seed = {"random_state": 3} if name in ("iforest", "loda") else {}
        wide = TABULAR[name](execution=Execution(THERE), **seed).fit(x).decision_scores_
        tight = TABULAR[name](execution=Execution(THERE, memory_bytes=2_000_000), **seed)
        with Largest() as largest:
            tight.fit(x)
        assert largest.bytes <= 2_000_000 and np.allclose(tight.decision_scores_, wide, rtol=1e-9), name


@pytest.mark.skipif(THERE != "cuda", reason="needs a GPU")
def test_peak_memory_on_the_gpu():
    x = points(3, 40_000, 8, "plain")
    for memory in (60_000_000, 400_000_000):
        nearest(None, x, 20, Execution(THERE, memory_bytes=memory))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        nearest(None, x, 20, Execution(THERE, memory_bytes=memory))
        beside = x.nbytes + 40_000 * 21 * 16
        assert torch.cuda.max_memory_allocated() - before <= memory + 2 * beside


def test_processes_and_checkpoints_and_half_precision_take_the_same_way(tmp_path):
    x = points(4, 120, 6, "duplicates")
    wanted = exact_neighbors(x, x, 4, 0)
    for way in (
        Execution(THERE, batch_rows=50, checkpoint=str(tmp_path)), Execution(THERE, precision="bf16"), Execution(THERE, search="fp64"),
    ):  # fmt: skip
        same(nearest(None, x, 4, way), wanted)
        same(plan.run([plan.node("knn", plan.data(), k=4)], x, way).values[0], wanted)
    again = pickle.loads(pickle.dumps(DeviceSearch(x, 4, Execution(THERE))))
    assert np.array_equal(again.block(None, 0, 120)[1], wanted.index_RK)


def test_refusals():
    for wrong, message in (("nonsense", "torch knows"), ("cuda:99", "sees")):
        with pytest.raises(UsageError, match=message):
            fit_many([tod.KNN()], np.eye(8), Execution(wrong))
    with pytest.raises(UsageError, match="GPU search"):
        nearest(None, np.eye(8), 2, Execution(THERE, precision="int8"))


# -- the kernel that decides on a GPU ----------------------------------------------------------------------------------------------------


@outside
def test_the_kernel_under_the_interpreter():
    run_inside(__file__, "-k", "kernel_sums")


@inside
@pytest.mark.parametrize("d", [1, 3, 8, 9, 62])
def test_the_kernel_sums_as_the_processor_does(d):
    from wager.detect.tod import triton_pairs

    there = "cuda" if torch.cuda.is_available() else "cpu"
    rng = np.random.default_rng(d)
    row, column = np.sort(rng.integers(0, 20, 150)), rng.integers(0, 30, 150)
    for query, base in (
        (rng.normal(size=(20, d)), rng.normal(size=(30, d))),
        (rng.integers(0, 9, (20, d)) * 1.0, rng.integers(0, 9, (30, d)) * 1.0),
    ):
        found = torch.empty(150, dtype=torch.float64, device=there)
        triton_pairs.squared(*(torch.as_tensor(v, device=there) for v in (query, base, row, column)), found)
        wanted = np.empty(150)
        native.call(
            "wager_squared_distances", np.ascontiguousarray(query[row]), base, np.ascontiguousarray(column[:, None]), 150, 1, d, wanted
        )  # fmt: skip
        if there == "cuda":  # the interpreter multiplies and adds in two roundings
            assert np.array_equal(found.cpu().numpy(), wanted)
        np.testing.assert_allclose(found.cpu().numpy(), wanted, rtol=1e-15)
