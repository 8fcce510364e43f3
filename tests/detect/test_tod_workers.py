"""Row blocks on a real Ray cluster of two worker processes: the same bits, both workers at work, failures said."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from tests.detect.data import points
from wager.detect.tod import KNN, LOF, Execution, fit_many
from wager.detect.tod.knn import nearest
from wager.detect.tod.workers import run_blocks
from wager.errors import UsageError

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    source = str(Path(__file__).parents[2] / "src")
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"env_vars": {"PYTHONPATH": source}},
    )
    yield
    ray.shutdown()


class Meeting:
    """A searcher whose blocks end only when two workers have begun one each."""

    def __init__(self, folder):
        self.folder, self.k, self.base_ND = folder, 1, np.zeros((4, 1))

    def block(self, query_RD, start, stop):
        (self.folder / str(os.getpid())).touch()
        deadline = time.monotonic() + 60
        while len(list(self.folder.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        return np.zeros((stop - start, 1)), np.zeros((stop - start, 1), np.int64), {"pid": float(os.getpid())}


def test_two_workers_share_the_blocks(cluster, tmp_path):
    done = dict(run_blocks(Meeting(tmp_path), None, [(0, 2), (2, 4)], Execution(ray_address="auto")))
    workers = {facts["pid"] for _, _, facts in done.values()}
    assert len(workers) == 2 and os.getpid() not in workers


@pytest.mark.parametrize("search", ["scan", "tree"])
def test_ray_gives_the_same_bits(cluster, search, tmp_path):
    x = points(7, 300, 5, "duplicates")
    alone = nearest(None, x, 6, Execution(search=search))
    way = Execution(search=search, batch_rows=64, ray_address="auto", checkpoint=str(tmp_path))
    for _ in range(2):  # the second time from the checkpoint
        spread = nearest(None, x, 6, way)
        assert np.array_equal(alone.index_RK, spread.index_RK)
        assert np.array_equal(alone.distance_RK, spread.distance_RK)
    assert spread.facts["resumed_rows"] == 300


def test_a_plan_runs_on_ray(cluster):
    x = points(8, 200, 4, "plain")
    near, far = [KNN(), LOF()], [KNN(), LOF()]
    fit_many(near, x)
    fit_many(far, x, Execution(ray_address="auto", batch_rows=50))
    for a, b in zip(near, far, strict=True):
        assert np.array_equal(a.decision_scores_, b.decision_scores_)
    assert ray.is_initialized()  # a cluster that was joined before is left as it was


def test_an_absent_cluster_is_said_so(monkeypatch):
    def refuse(**_):
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UsageError, match="no Ray cluster at 'far:6379'.*ray start --head"):
        nearest(None, points(1, 20, 2, "plain"), 2, Execution(ray_address="far:6379"))
