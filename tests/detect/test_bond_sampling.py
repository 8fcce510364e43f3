"""Mini-batches: parts of a graph, detectors trained on them; the fused sums over pairs; conjugate gradients."""

import numpy as np
import pytest
import torch
from scipy.sparse import identity

from tests.detect.data import graph
from wager.detect import bond
from wager.detect.bond.layers import GCN, widths
from wager.detect.bond.losses import KINDS, Structure, _value, dropped_rows, pair_sums
from wager.detect.bond.residual import solve
from wager.detect.bond.sampling import Sampler
from wager.errors import UsageError

LEARNERS = ("GAE", "DOMINANT", "CONAD", "DONE", "AdONE", "AnomalyDAE", "GAAN", "GUIDE")


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def test_all_neighbours_give_the_whole_graphs_output():
    g = graph(0, n=90, d=6, edges=300)
    net = GCN(widths(6, 8, 5, 3), 0.0, source())
    whole, seen = net(g.x, g.gcn()), []
    for part in Sampler(g, [-1] * 3, source()).batches(40):
        assert torch.allclose(part.head(net(part.x, part.gcn())), whole[part.head(part.ids)], atol=1e-6)
        assert torch.equal(part.x, g.x[part.ids]) and len(part.ids.unique()) == part.nodes
        dense = torch.from_numpy(g.adjacency.toarray())
        assert np.array_equal(part.adjacency.toarray(), dense[part.ids][:, part.ids].numpy())
        seen.append(part.head(part.ids))
    assert torch.equal(torch.cat(seen), torch.arange(90))


def test_limits_hold_and_edges_are_real():
    g = graph(1, n=60, d=3, edges=900)
    real = set(map(tuple, g.edge_index.T.tolist()))
    for part in Sampler(g, [3, 2], source()).batches(20):
        into = torch.bincount(part.edge_index[1], minlength=part.nodes)
        assert int(into[:20].max()) == 3 and int(into[20:].max()) <= 2
        assert {(int(part.ids[a]), int(part.ids[b])) for a, b in part.edge_index.T} <= real


def test_neighbours_are_drawn_evenly():
    g = bond.Graph(torch.zeros(11, 1), torch.stack([torch.arange(1, 11), torch.zeros(10, dtype=torch.long)]))
    sampler, count = Sampler(g, [3], source()), torch.zeros(11)
    for _ in range(2000):
        count[sampler.part(torch.tensor([0])).ids[1:]] += 1
    assert (
        count.sum() == 6000 and float(((count[1:] - 600) ** 2 / (600 * 0.7)).sum()) < 45
    )  # chi-square, 9 degrees: 1e-6


@pytest.mark.parametrize("name", LEARNERS)
def test_detectors_learn_from_batches(name):
    g = graph(2, n=70, d=5, edges=250)
    kind = getattr(bond, name)
    whole = kind(epoch=2, seed=0).fit(g).decision_score_
    assert torch.equal(kind(epoch=2, seed=0, batch_size=500).fit(g).decision_score_, whole)
    parts = kind(epoch=2, seed=0, batch_size=23, num_neigh=4)
    score = parts.fit(g).decision_score_
    assert score.shape == (70,) and torch.isfinite(score).all() and not torch.equal(score, whole)
    assert torch.equal(kind(**parts.get_params()).fit(g).decision_score_, score)
    with pytest.raises(UsageError, match="batch_size"):
        kind(batch_size=1)
    with pytest.raises(UsageError, match="num_neigh"):
        kind(batch_size=9, num_neigh=0).fit(g)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "h"), [(1, 3), (37, 5), (530, 12)])
def test_pair_sums_and_their_gradient_are_those_of_the_matrix(kind, n, h):
    z = (torch.randn(n, h, generator=source(n)) * 1.5).requires_grad_()
    weight = torch.rand(n, generator=source())
    sums = pair_sums(z, kind)
    (sums * weight).sum().backward()
    exact = z.detach().double().requires_grad_()
    wanted = _value(exact @ exact.T, kind).sum(1)
    (wanted * weight).sum().backward()
    assert z.grad is not None and exact.grad is not None
    np.testing.assert_allclose(sums.detach().numpy(), wanted.detach().numpy(), rtol=2e-6)
    np.testing.assert_allclose(z.grad.numpy(), exact.grad.numpy(), rtol=2e-4, atol=1e-5 * float(exact.grad.abs().max()))


def test_expected_masks_are_the_mean_of_drawn_ones():
    g = graph(3, n=25, d=4)
    h, w = torch.randn(25, 3, generator=source(1)), torch.randn(25, 3, generator=source(2))
    structure, generator = Structure(g), source(5)
    drawn = torch.stack([dropped_rows(structure, h, w, 0.3, generator) for _ in range(800)]).double()
    expected = dropped_rows(structure, h, w, 0.3, generator, drawn=False)
    z = (drawn.mean(0) - expected) / (drawn.std(0) / 800**0.5)
    assert float(z.abs().max()) < 5.5


def test_conjugate_gradients_solve():
    g = graph(4, n=40, d=6)
    system = (1.01 * identity(40) + g.laplacian()).tocsr().astype(float)
    x = g.x.double().numpy()
    np.testing.assert_allclose(system @ solve(system, x), x, atol=1e-8)
    assert np.array_equal(solve(system, np.zeros((40, 2))), np.zeros((40, 2)))
