"""Detectors against their definitions written out plainly, PyOD's interface, refusals, plans."""

import pickle
from itertools import combinations

import numpy as np
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist

from tests.detect.data import oracle, points
from wager.detect import tod
from wager.detect.registry import TABULAR
from wager.detect.tod import operators, plan
from wager.detect.tod.base import fit_many
from wager.detect.tod.batching import Execution
from wager.detect.tod.checks import DataError, NotFittedError
from wager.detect.tod.knn import Neighbors, nearest

FAST = {name: kind for name, kind in TABULAR.items()}


def make(name):
    seed = {"random_state": 3} if name in ("iforest", "loda", "feature_bagging", "lscp", "suod") else {}
    return TABULAR[name](**seed)


X = points(0, 90, 4, "plain")


def slow_lof(x, k):
    distance, index = oracle(x, x, k, True)
    reach = np.maximum(distance, distance[index, -1])
    density = 1 / (reach.mean(1) + 1e-10)
    return density[index].mean(1) / density


def slow_abod(x, k):
    square = cdist(x, x, "sqeuclidean")
    out = []
    for i, row in enumerate(square):
        near = [j for j in np.argsort(row, kind="stable")[:k] if not np.array_equal(x[j], x[i])]
        angles = [np.dot(x[a] - x[i], x[b] - x[i]) / row[a] / row[b] for a, b in combinations(near, 2)]
        out.append(-np.var(angles) if angles else 0.0)
    return np.array(out)


def slow_cof(x, k):
    distance = cdist(x, x)
    path = [[i, *[j for j in np.argsort(distance[i], kind="stable") if j != i][:k]] for i in range(len(x))]
    chain = np.array(
        [
            sum(2 * (k + 1 - t) / (k * (k + 1)) * min(distance[p[t], s] for s in p[:t]) for t in range(1, k + 1))
            for p in path
        ]
    )
    return np.array([chain[i] * k / chain[p[1:]].sum() for i, p in enumerate(path)])


def slow_loci(x, alpha=0.5, kappa=3):
    distance = cdist(x, x)
    scores = []
    for i in range(len(x)):
        positive = distance[i][distance[i] > 0]
        score = 0.0
        for r in np.sort(np.concatenate([positive, positive / alpha])):
            counts = (distance[distance[i] <= r] < alpha * r).sum(1)
            if counts.mean() >= 20:
                mdef, sigma = 1 - (distance[i] < alpha * r).sum() / counts.mean(), counts.std() / counts.mean()
                score = mdef / sigma if sigma else 0.0 if mdef == 0 else np.inf * np.sign(mdef)
                if mdef > kappa * sigma:
                    break
        scores.append(score)
    return np.array(scores)


def slow_sod(x, k=20, count=10, alpha=0.8):
    index = oracle(x, x, k, True)[1]
    out = []
    for i in range(len(x)):
        shared = [(-len(set(index[i]) & set(index[j])), j) for j in range(len(x)) if j != i]
        ref = x[[j for _, j in sorted(shared)[:count]]]
        variance = ref.var(0)
        low = variance < alpha * variance.sum() / x.shape[1]
        out.append(np.sqrt(((x[i] - ref.mean(0))[low] ** 2).sum() / low.sum()) if low.any() else 0.0)
    return np.array(out)


@pytest.mark.parametrize("kind", ["plain", "duplicates", "grid"])
def test_scores_follow_the_definitions(kind):
    x = points(1, 70, 3, kind)
    close = dict(rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(tod.LOF(n_neighbors=6).fit(x).decision_scores_, slow_lof(x, 6), **close)
    if kind == "plain":  # elsewhere the summation order decides between equal distances of cdist
        np.testing.assert_allclose(tod.ABOD(n_neighbors=6).fit(x).decision_scores_, slow_abod(x, 6), **close)
        np.testing.assert_allclose(tod.COF(n_neighbors=6).fit(x).decision_scores_, slow_cof(x, 6), **close)
        np.testing.assert_allclose(tod.ABOD(method="default").fit(x).decision_scores_, slow_abod(x, 70), **close)
    np.testing.assert_allclose(tod.SOD().fit(x).decision_scores_, slow_sod(x), **close)
    distance = oracle(x, x, 6, True)[0]
    for method, wanted in (
        ("largest", distance[:, -1]),
        ("mean", distance.mean(1)),
        ("median", np.median(distance, 1)),
    ):
        np.testing.assert_allclose(tod.KNN(n_neighbors=6, method=method).fit(x).decision_scores_, wanted, **close)


def test_loci_sweep_follows_the_definition():
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.normal(size=(45, 2)), rng.normal(size=(12, 2)) * 0.1 + 5, [[9.0, -9.0]]])
    found = tod.LOCI().fit(x).decision_scores_
    np.testing.assert_allclose(found, slow_loci(x), rtol=1e-9)
    assert found.max() > 3 and len(np.unique(found)) > 20


def test_tails_follow_the_definition():
    x = points(3, 50, 3, "grid")
    left = -np.log((x[None] <= x[:, None]).mean(1))
    right = -np.log((x[None] >= x[:, None]).mean(1))
    third = ((x - x.mean(0)) ** 3).mean(0)
    pointed = np.where(third < 0, left, np.where(third > 0, right, left + right))
    np.testing.assert_allclose(tod.ECOD().fit(x).decision_scores_, np.maximum.reduce([left, right, pointed]).sum(1))
    np.testing.assert_allclose(tod.COPOD().fit(x).decision_scores_, np.maximum((left + right) / 2, pointed).sum(1))


def test_histogram_score_counts_every_row_once_and_treats_strays():
    x = points(4, 60, 2, "plain")
    hbos = tod.HBOS().fit(x)
    for height, edge in zip(hbos.hist_, hbos.bin_edges_, strict=True):
        assert np.isclose((height * np.diff(edge)).sum(), 1)
    width = np.array([e[1] - e[0] for e in hbos.bin_edges_])
    low = np.array([e[0] for e in hbos.bin_edges_])
    near, far = hbos.decision_function(np.stack([low - 0.4 * width, low - 0.6 * width]))
    first = -sum(np.log2(h[0] + 0.1) for h in hbos.hist_)
    rarest = -sum(np.log2(h.min() + 0.1) for h in hbos.hist_)
    assert np.isclose(near, first) and np.isclose(far, rarest)


def test_forest_isolates_an_outlier_and_depends_on_the_seed_alone():
    x = np.concatenate([points(5, 200, 3, "plain"), [[9.0, 9, 9]]])
    a, b, c = (tod.IForest(random_state=s).fit(x).decision_scores_ for s in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert a.argmax() == c.argmax() == 200


def test_pca_is_blind_to_directions_without_variance():
    x = points(6, 80, 4, "plain")
    doubled = np.concatenate([x, x[:, :1]], 1)
    scores = tod.PCA(standardization=False).fit(doubled).decision_scores_
    assert np.isfinite(scores).all() and scores.max() / scores.min() < 1e3
    assert (
        tod.PCA().fit(np.column_stack([x, np.ones(80)])).decision_scores_.argmax()
        == tod.PCA().fit(x).decision_scores_.argmax()
    )


@pytest.mark.parametrize("name", FAST)
def test_interface(name):
    det = make(name)
    assert det.fit(X, np.zeros(len(X))) is det
    assert det.decision_scores_.shape == (90,) and np.isfinite(det.decision_scores_).all()
    assert det.threshold_ == pytest.approx(np.percentile(det.decision_scores_, 90))
    assert np.array_equal(det.labels_, det.decision_scores_ > det.threshold_)
    again = pickle.loads(pickle.dumps(det))
    new = points(9, 40, 4, "plain")
    assert np.array_equal(again.decision_function(new), det.decision_function(new))
    labels, confidence = det.predict(new, return_confidence=True)
    assert set(labels) <= {0, 1} and ((confidence >= 0) & (confidence <= 1)).all()
    for method in ("linear", "unify"):
        proba = det.predict_proba(new, method=method)
        assert proba.shape == (40, 2) and np.allclose(proba.sum(1), 1)
    twin = type(det)(**det.get_params())
    assert twin.get_params() == det.get_params() and np.array_equal(twin.fit(X).decision_scores_, det.decision_scores_)
    assert "contamination=0.2" in repr(det.set_params(contamination=0.2))


@pytest.mark.parametrize("name", FAST)
def test_refusals_are_clear_value_errors(name):
    det = make(name)
    with pytest.raises(NotFittedError, match="not fitted"):
        det.decision_function(X)
    bad = X.copy()
    bad[3, 1] = np.nan
    cases = [
        (bad, r"NaN \(first at row 3, column 1\)"),
        (np.full((5, 2), np.inf), "infinity"),
        (sparse.csr_matrix(X), "sparse"),
        (X[0], "reshape"),
        (np.array([["a", "b"]]), "numbers"),
        (X[:0], "at least"),
        (X * 1e200, "1e150"),
    ]
    for data, message in cases:
        with pytest.raises(ValueError, match=message):
            det.fit(data)
    det.fit(X)
    with pytest.raises(DataError, match="4"):
        det.predict(X[:, :2])
    with pytest.raises(DataError, match="contamination"):
        det.set_params(contamination=0.9).fit(X)
    with pytest.raises(DataError, match="no parameter 'colour'"):
        det.set_params(colour=1)


@pytest.mark.parametrize("name", FAST)
def test_dull_data_gives_finite_scores(name):
    for x in (np.ones((40, 3)), np.repeat([[0.0, 1], [1, 0]], 20, 0)):
        if name == "pca" and x.shape[1] == 3:
            with pytest.raises(DataError, match="constant"):
                make(name).fit(x)
        else:
            assert np.isfinite(make(name).fit(x).decision_scores_).all()


def test_too_many_neighbours():
    with pytest.raises(DataError, match="only 9 others"):
        tod.KNN(n_neighbors=10).fit(X[:10])
    with pytest.warns(UserWarning, match="9 are used"):
        assert tod.LOF(n_neighbors=30).fit(X[:10]).n_neighbors_ == 9
    with pytest.raises(DataError, match="metric"):
        tod.KNN(metric="manhattan").fit(X)


@pytest.mark.parametrize("name", ["knn", "lof", "abod", "cof", "sod"])
def test_permuting_rows_permutes_scores_and_moving_them_changes_nothing(name):
    order = np.random.default_rng(0).permutation(len(X))
    scores = make(name).fit(X).decision_scores_
    if name != "sod":  # its ties go by index
        np.testing.assert_allclose(make(name).fit(X[order]).decision_scores_, scores[order], rtol=1e-9)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    if name != "sod":  # subspaces follow the axes
        np.testing.assert_allclose(make(name).fit(X @ turn + 10).decision_scores_, scores, rtol=1e-7)


def test_one_plan_gives_the_bits_of_single_fits_and_searches_once(monkeypatch):
    searches = []
    real = operators.nearest
    monkeypatch.setattr(operators, "nearest", lambda *a, **k: searches.append(a[2]) or real(*a, **k))
    names = ["knn", "lof", "abod", "cof", "sod", "hbos", "ecod", "copod", "pca", "iforest"]
    together = [make(n) for n in names]
    done = fit_many(together, X)
    assert searches == [20] and "knn(k=20)" in done.seconds
    for name, det in zip(names, together, strict=True):
        assert np.array_equal(det.decision_scores_, make(name).fit(X).decision_scores_), name


def test_parts_give_the_bits_of_the_whole():
    whole, parts = tod.ABOD().fit(X), tod.ABOD(execution=Execution(batch_rows=11)).fit(X)
    assert np.array_equal(whole.decision_scores_, parts.decision_scores_)
    tight = Execution(memory_bytes=16 * 20)
    node = plan.node("angle_variance", plan.data(), plan.node("knn", plan.data(), k=5))
    assert plan.part_rows(plan.OPERATORS["angle_variance"], 90, 4, {}, tight.budget_bytes) <= 20
    found = nearest(None, X, 5)
    assert np.array_equal(plan.call(node, [X, found], X.shape, tight), operators.angles(tight, X, found))


def test_explain_names_shared_steps_and_unknown_operators_are_refused():
    text = tod.explain([tod.KNN(), tod.LOF(), tod.COF()], X)
    assert text.count("= knn(") == 1 and "first(k=5)" in text and "MB" in text
    with pytest.raises(Exception, match="unknown operator 'nonsense'"):
        plan.node("nonsense", plan.data())


def test_an_own_operator_joins_the_plan():
    @tod.operator(
        "test_spread",
        bytes=lambda n, d: 8 * n,
        map=lambda i, a, b: np.ptp(i[0].distance_RK[a:b], 1),
        merge=operators.join,
    )
    def spread(execution, found):
        return np.ptp(found.distance_RK, 1)

    class Spread(tod.Detector):
        def __init__(self, contamination=0.1):
            self.contamination = contamination

        def graph(self, x, n, d):
            return {"score": plan.node("test_spread", plan.node("knn", x, k=7))}

    det = Spread()
    done = fit_many([det, tod.KNN(n_neighbors=9)], X, Execution(batch_rows=13))
    assert "knn(k=9)" in done.seconds and det.decision_scores_.shape == (90,)
    del plan.OPERATORS["test_spread"]


def test_with_self_puts_duplicates_in_index_order():
    x = np.array([[0.0], [0.0], [1.0], [3.0]])
    found = nearest(None, x, 2).with_self()
    assert isinstance(found, Neighbors) and found.index_RK.tolist() == [[0, 1], [0, 1], [2, 0], [3, 2]]


def test_scikit_learn_clones_and_pipes_them():
    base = pytest.importorskip("sklearn.base")
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    copy = base.clone(tod.LOF(n_neighbors=7))
    assert copy.n_neighbors == 7 and base.is_outlier_detector(copy)
    pipe = make_pipeline(StandardScaler(), copy).fit(X)
    assert pipe.predict(X).shape == pipe.decision_function(X).shape == (90,)
