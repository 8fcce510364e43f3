"""Ensembles against their definitions written out plainly."""

import warnings
from collections import Counter

import numpy as np
import pytest

from tests.detect.data import oracle, points
from wager.detect import tod
from wager.detect.tod.checks import DataError
from wager.detect.tod.ensembles import agreement, fullest_bin

X = points(3, 80, 5, "plain")


def test_bagging_is_the_mean_over_members_on_their_features():
    det = tod.FeatureBagging(n_estimators=6, random_state=3).fit(X)
    alone = [tod.LOF().fit(X[:, list(f)]).decision_scores_ for f in det.estimators_features_]
    np.testing.assert_allclose(det.decision_scores_, np.mean(alone, 0), rtol=1e-12)
    assert all(2 <= len(set(f)) == len(f) <= 5 for f in det.estimators_features_)
    largest = tod.FeatureBagging(n_estimators=6, random_state=3, combination="max").fit(X)
    np.testing.assert_allclose(largest.decision_scores_, np.max(alone, 0), rtol=1e-12)


def slow_lscp(det, members):
    train = np.stack([m.decision_scores_ for m in members], 1)
    asked = np.stack([m.decision_function(X) for m in members], 1)
    own, asked = (train - train.mean(0)) / train.std(0), (asked - train.mean(0)) / train.std(0)
    counts = [Counter() for _ in X]
    for features in det.subspaces_:
        part = X[:, list(features)]
        near = oracle(part, part, det.local_region_size, False)[1]
        for row, found in zip(counts, near, strict=True):
            row.update(found.tolist())
    out = []
    for row, score in zip(counts, asked, strict=True):
        region = [j for j, c in row.items() if c > 10]
        corr = np.array([np.corrcoef(own[region].max(1), own[region, m])[0, 1] for m in range(len(members))])
        count, edge = np.histogram(corr, len(members))
        chosen = [
            m
            for b in np.flatnonzero(count == count.max())
            for m in np.flatnonzero((corr >= edge[b]) & (corr <= edge[b + 1]))
        ]
        out.append(score[chosen].mean())
    return np.array(out)


def test_local_selection_follows_the_definition():
    members = [tod.LOF(5), tod.LOF(20), tod.KNN(), tod.HBOS()]
    det = tod.LSCP(members, random_state=1).fit(X)
    wanted = slow_lscp(det, [m.fit(X) for m in members])
    assert (np.abs(det.decision_scores_ - wanted) < 1e-9).mean() > 0.97  # a correlation may lie on a border of bins
    again = det.decision_function(X)
    np.testing.assert_allclose(again, det.decision_scores_, rtol=1e-9)


def test_parts_of_local_selection():
    weight = fullest_bin(np.array([[0.0, 0.1, 0.9, 1.0], [0.5, 0.5, 0.5, 0.5]]), 4)
    assert (weight > 0).all()
    assert fullest_bin(np.array([[0.0, 0.9, 0.95, 1.0]]), 4).tolist() == [[0, 1, 1, 1]]
    scores = np.array([[1.0, 1], [2, 2], [3, 0]])
    found = agreement(np.array([[0, 1, 2] * 11, [0] * 33]), scores, 10)
    np.testing.assert_allclose(found[0], np.corrcoef(np.c_[scores.max(1), scores].T)[0, 1:])
    assert found[1].tolist() == [0, 0]  # one row agrees with nothing


def test_suod_projects_only_wide_neighbour_detectors():
    wide = points(1, 70, 30, "plain")
    det = tod.SUOD(random_state=0).fit(wide)
    assert [m is None for m in det.matrices_] == [False, False, True, True]
    exact = tod.SUOD([tod.KNN(), tod.HBOS()], project=False).fit(wide)
    each = [m.fit(wide).decision_scores_ for m in (tod.KNN(), tod.HBOS())]
    np.testing.assert_allclose(exact.decision_scores_, np.mean([(s - s.mean()) / s.std() for s in each], 0))


def test_refusals():
    for det, message in (
        (tod.FeatureBagging(max_features=1), "at least half"),
        (tod.FeatureBagging(combination="min"), "combination"),
        (tod.LSCP([tod.KNN()]), "at least 2"),
        (tod.SUOD([]), "empty"),
    ):
        with pytest.raises(DataError, match=message), warnings.catch_warnings():
            det.fit(X)
    for kind in (tod.FeatureBagging, tod.LSCP):
        with pytest.raises(DataError, match="at least 2"):
            kind().fit(X[:, :1])
