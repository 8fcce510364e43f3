"""Exact sparse losses, injection, motif counts, metrics, layers."""

from dataclasses import replace
from itertools import combinations

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.detect.data import dense, graph
from wager.detect.bond import Graph, inject, losses
from wager.detect.bond.adversarial import disagreement
from wager.detect.bond.layers import GAT, GCN, GNA, Linear, edge_softmax
from wager.detect.bond.masks import Mask
from wager.detect.bond.metrics import eval_average_precision, eval_recall_at_k, eval_roc_auc, mean_interval, quality
from wager.detect.bond.motifs import motif_counts
from wager.errors import UsageError


def same(a, b, tolerance=1e-5):
    """Values and gradients agree relative to their largest entry."""
    assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def pair_of_gradients(fast, slow, *inputs):
    """Row errors and gradients of a random weighting of them, both ways."""
    weight = torch.randn(len(inputs[0]), generator=torch.Generator().manual_seed(1))
    found = []
    for function in (fast, slow):
        leaves = [t.clone().requires_grad_() for t in inputs]
        rows = function(*leaves)
        (rows * weight).sum().backward()
        found.append((rows.detach(), [t.grad for t in leaves]))
    same(found[0][0], found[1][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        same(a, b)


@given(st.integers(0, 10**6), st.booleans())
def test_linear_structure_error_is_the_dense_one(seed, two):
    g = graph(seed)
    s, structure = dense(g), losses.Structure(g)
    random = torch.Generator().manual_seed(seed)
    h, w = torch.randn(g.nodes, 4, generator=random), torch.randn(g.nodes, 4, generator=random)
    if two:
        pair_of_gradients(
            lambda h, w: losses.linear_rows(structure, h, w), lambda h, w: (s - h @ w.T).square().sum(1), h, w
        )
    else:
        pair_of_gradients(lambda h: losses.linear_rows(structure, h), lambda h: (s - h @ h.T).square().sum(1), h)


def test_linear_error_survives_cancellation():
    g = Graph(torch.zeros(40, 1), torch.combinations(torch.arange(40), 2).T)
    h = torch.ones(40, 1)
    rows = losses.linear_rows(losses.Structure(g), h)
    assert torch.equal(rows, (dense(g) - 1).square().sum(1).clamp(min=losses.TINY))


@given(st.integers(0, 10**6), st.sampled_from([0.5, 0.9]), st.sampled_from([1, 7, 64]))
def test_sigmoid_structure_error_is_the_dense_one(seed, positive, block):
    g = graph(seed)
    s, structure = dense(g), losses.Structure(g)

    def slow(z):
        square = (s - torch.sigmoid(z @ z.T)).square()
        return (square if positive == 0.5 else torch.where(s > 0, square * positive, square * (1 - positive))).sum(1)

    z = torch.randn(g.nodes, 3, generator=torch.Generator().manual_seed(seed))
    pair_of_gradients(lambda z: losses.sigmoid_rows(structure, z, positive, block), slow, z)


@pytest.mark.parametrize("kind, slow", [("softplus", F.softplus), ("negative softplus", lambda t: F.softplus(-t))])
def test_pair_sums_are_the_dense_ones(kind, slow):
    z = torch.randn(23, 3, generator=torch.Generator().manual_seed(0))
    pair_of_gradients(lambda z: losses.pair_sums(z, kind, 5), lambda z: slow(z @ z.T).sum(1), z)


def mixed(x):
    """MurmurHash3's finalizer on 32-bit numbers."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor) & np.uint64(2**32 - 1)
    return x ^ (x >> np.uint64(16))


def kept_pairs(mask, columns):
    """The mask as a dense matrix of 0 and 1, by its definition."""
    j, m, o = (a.astype(np.uint64) for a in (np.arange(columns), mask.multiplier_R[:, None], mask.offset_R[:, None]))
    signed = mixed((j * m + o) & np.uint64(2**32 - 1)).astype(np.int64)
    signed[signed >= 2**31] -= 2**32
    return torch.from_numpy(signed >= mask.limit).float()


@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.3, 0.9]), st.integers(1, 50), st.integers(10, 90))
def test_dropped_rows_have_value_and_gradient_of_their_own_mask(seed, share, width, nodes):
    g = graph(seed, n=nodes)
    structure, s = losses.Structure(g), dense(g)
    random = torch.Generator().manual_seed(seed)
    h, w = torch.randn(g.nodes, width, generator=random), torch.randn(g.nodes, width, generator=random)
    mask = kept_pairs(Mask.drawn(g.nodes, share, torch.Generator().manual_seed(9)), g.nodes)

    def fast(h, w):
        return losses.dropped_rows(structure, h, w, share, torch.Generator().manual_seed(9))

    pair_of_gradients(fast, lambda h, w: (s - (h @ w.T) * mask / (1 - share)).square().sum(1), h, w)


def test_masks_are_drawn_pair_by_pair():
    rows, columns, share = 300, 257, 0.3
    mask = Mask.drawn(rows, share, torch.Generator().manual_seed(0))
    kept = kept_pairs(mask, columns)
    i, j = np.indices((rows, columns)).reshape(2, -1)
    assert np.array_equal(mask.kept(i, j), kept.numpy().ravel().astype(bool))
    dropped, sigma = 1 - kept, (share * (1 - share)) ** 0.5
    assert abs(float(dropped.mean()) - share) < 4 * sigma / (rows * columns) ** 0.5
    for axis, count in ((0, rows), (1, columns)):  # rows and columns are binomial: the variance of their sums, too
        sums = dropped.sum(axis)
        assert abs(float(sums.var() / (count * sigma**2)) - 1) < 5 * (2 / len(sums)) ** 0.5
    centred = (dropped - share) / sigma
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1]), (centred[1:, 1:], centred[:-1, :-1])):
        assert abs(float((a * b).mean())) < 4 / a.numel() ** 0.5  # neighbours are uncorrelated
    again = kept_pairs(Mask.drawn(rows, share, torch.Generator().manual_seed(1)), columns)
    assert abs(float((centred * ((1 - again) - share) / sigma).mean())) < 4 / centred.numel() ** 0.5


def test_dropped_rows_have_the_mean_over_masks():
    g = graph(3)
    structure, s = losses.Structure(g), dense(g)
    random = torch.Generator().manual_seed(0)
    h, w = torch.randn(g.nodes, 4, generator=random), torch.randn(g.nodes, 4, generator=random)
    draws = torch.stack([losses.dropped_rows(structure, h, w, 0.3, random) for _ in range(400)])
    t = h @ w.T
    expected = ((s - t).square() + t.square() * 0.3 / 0.7).sum(1)
    same(losses.dropped_rows(structure, h, w, 0.3, random, drawn=False), expected)
    spread = draws.std(0) / 20
    assert ((draws.mean(0) - expected).abs() < 5 * spread).all()


def test_balance_follows_the_spread_of_both_errors():
    a, s = torch.rand(50) * 4, torch.rand(50)
    w = float(s.sqrt().std() / (a.sqrt().std() + s.sqrt().std()))
    same(losses.double_error(a, s, "auto"), w * a.sqrt() + (1 - w) * s.sqrt())
    same(losses.double_error(a, s, 0.8), 0.8 * a.sqrt() + 0.2 * s.sqrt())


def test_layers_are_their_dense_forms():
    g = graph(5)
    random = torch.Generator().manual_seed(0)
    into = dense(g).T
    looped = into + torch.diag((into.diagonal() == 0).float())
    root = looped.sum(1) ** -0.5
    spread = root[:, None] * looped * root
    layer = GCN([5, 3], 0.0, random)
    weight, bias = layer.layers[0].weight, layer.layers[0].bias
    same(layer(g.x, g.gcn()).detach(), (spread @ g.x @ weight.T + bias).detach())
    h = torch.randn(g.nodes, 3, generator=random)
    gap = (h[:, None] - h[None]).square().sum(2)
    same(disagreement(h, g.mean_in()), (into * gap).sum(1) / into.sum(1).clamp(min=1))

    gna, edges = GNA(5, 3, random), g.looped_edges()
    t = gna.other(g.x)
    score = ((t[edges[1]] - t[edges[0]]) @ gna.a).exp()  # the target's part cancels below
    out = gna.own(g.x).detach().clone()
    for v in range(g.nodes):
        into_v = edges[1] == v
        share = score[into_v] / score[into_v].sum()
        out[v] += (share[:, None] * t[edges[0][into_v]]).sum(0).detach()
    same(gna(g.x, edges).detach(), out, 1e-4)

    gat = GAT(5, 3, random)
    found, h = gat(g.x, edges).detach(), gat.linear(g.x)
    v = 4
    into_v = edges[1] == v
    value = F.leaky_relu(h[edges[0][into_v]] @ gat.source + h[v] @ gat.target, 0.2).softmax(0)
    same(found[v], ((value[:, None] * h[edges[0][into_v]]).sum(0) + gat.bias).detach(), 1e-4)
    assert torch.allclose(
        torch.zeros(g.nodes).index_add(0, edges[1], edge_softmax(torch.randn(edges.shape[1]), edges[1], g.nodes)),
        torch.ones(g.nodes),
    )
    assert Linear(4, 2, random, bias=False).bias is None


@given(st.integers(0, 10**6), st.integers(2, 9), st.floats(0.1, 1.0))
def test_motif_counts_are_those_of_isomorphism_tests(seed, n, density):
    rng = np.random.default_rng(seed)
    pairs = [p for p in combinations(range(n), 2) if rng.random() < density]
    edges = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    edges = torch.cat(
        [edges, edges[:, :2].flip(0), torch.zeros(2, 1, dtype=torch.long)], 1
    )  # repeats, directions, a loop
    g, counts = nx.Graph(pairs), np.zeros((n, 6))
    g.add_nodes_from(range(n))
    shapes = {
        0: nx.complete_graph(3),
        1: nx.path_graph(3),
        2: nx.complete_graph(4),
        3: nx.diamond_graph(),
        4: nx.cycle_graph(4),
    }
    for column, shape in shapes.items():
        for nodes in combinations(range(n), len(shape)):
            if nx.is_isomorphic(g.subgraph(nodes), shape):
                counts[list(nodes), column] += 1
    counts[:, 5] = [g.degree(v) for v in range(n)]
    found = motif_counts(Graph(torch.zeros(n, 1), edges), threads=2)
    assert np.array_equal(found, counts)


@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(0, 4))
def test_structural_injection_makes_complete_cliques(seed, m, n):
    g = graph(seed, n=40, messy=False)
    made, mask = inject.structural(g, m, n, torch.Generator().manual_seed(seed))
    again, _ = inject.structural(g, m, n, torch.Generator().manual_seed(seed))
    assert torch.equal(made.edge_index, again.edge_index)
    assert int(mask.sum()) == m * n and torch.equal(made.y == inject.STRUCTURAL, mask)
    assert torch.equal(made.x, g.x) and torch.equal(made.edge_index[:, : g.edge_index.shape[1]], g.edge_index)
    new = made.edge_index[:, g.edge_index.shape[1] :]
    assert new.shape[1] == n * m * (m - 1)
    cliques = nx.Graph(new.T.tolist())
    assert sorted(map(len, nx.connected_components(cliques))) == [m] * n and all(
        d == m - 1 for _, d in cliques.degree()
    )
    thinned, _ = inject.structural(g, m, n, torch.Generator().manual_seed(seed), p=0.5, directed=True)
    assert thinned.edge_index.shape[1] - g.edge_index.shape[1] == int(0.5 * n * m * (m - 1) / 2)


@given(st.integers(0, 10**6), st.integers(0, 10))
def test_contextual_injection_copies_from_afar(seed, n):
    g = graph(seed, n=40)
    made, mask = inject.contextual(g, n, 40, torch.Generator().manual_seed(seed))
    assert (
        int(mask.sum()) == n and torch.equal(made.x[~mask], g.x[~mask]) and torch.equal(made.edge_index, g.edge_index)
    )
    farthest = torch.cdist(g.x, g.x).max(1).values
    if n == 1:
        moved = (made.x[mask] - g.x[mask]).norm(dim=1)
        assert torch.allclose(moved, farthest[mask], rtol=1e-4)
    assert all(any(torch.equal(row, other) for other in g.x) for row in made.x[mask])


def test_injection_refuses_what_does_not_fit_and_generates_what_it_says():
    with pytest.raises(UsageError, match="cliques of 10"):
        inject.structural(graph(0), 10, 9, torch.Generator())
    with pytest.raises(UsageError, match="candidates"):
        inject.contextual(graph(0), 99, 5, torch.Generator())
    made = inject.generated(500, 3, m=5, n=4)
    assert made.nodes == 500 and 30 <= int((made.y > 0).sum()) <= 40
    inside = quality(made.y.numpy(), np.asarray(made.simple.sum(1)).ravel())
    assert inside["auc_structural"] > 0.6 and 4 <= made.edge_index.shape[1] / 500 <= 6


@given(st.integers(0, 10**6), st.integers(3, 60), st.integers(1, 5))
def test_metrics_by_counting(seed, n, levels):
    rng = np.random.default_rng(seed)
    y, score = rng.random(n) < 0.4, rng.integers(0, levels, n).astype(float)
    y[0], y[1] = True, False
    wins = [(a > b) + 0.5 * (a == b) for a in score[y] for b in score[~y]]
    assert eval_roc_auc(y, score) == pytest.approx(np.mean(wins))
    assert eval_roc_auc(y, np.exp(score)) == pytest.approx(eval_roc_auc(y, score))
    precision, recall = [], [0.0]
    for t in sorted(set(score), reverse=True):
        precision.append(y[score >= t].mean())
        recall.append(y[score >= t].sum() / y.sum())
    assert eval_average_precision(y, score) == pytest.approx(np.dot(np.diff(recall), precision))
    top = sorted(range(n), key=lambda i: (-score[i], i))[: y.sum()]
    assert eval_recall_at_k(y, score) == pytest.approx(y[top].mean())
    assert eval_roc_auc(y, np.ones(n)) == 0.5


def test_metrics_refuse_nonsense_and_the_interval_covers():
    for label, score in (([1, 1], [0, 1]), ([0, 1], [0, np.nan]), ([0, 1], [1])):
        with pytest.raises(UsageError):
            eval_roc_auc(np.array(label), np.array(score))
    rng = np.random.default_rng(0)
    inside = [low <= 0 <= high for low, high in (mean_interval(rng.normal(size=6)) for _ in range(2000))]
    assert abs(np.mean(inside) - 0.95) < 4 * np.sqrt(0.05 * 0.95 / 2000)


def test_graphs_are_checked(tmp_path):
    x, e = torch.zeros(3, 2), torch.tensor([[0, 1], [1, 2]])
    for bad, message in (
        ({"x": x}, "edge_index"),
        ({"x": x, "edge_index": e + 5}, "node 7"),
        ({"x": x / 0, "edge_index": e}, "NaN"),
        ({"x": x[0], "edge_index": e}, "shape"),
        (tmp_path / "none.npz", "does not exist"),
    ):
        with pytest.raises(UsageError, match=message):
            Graph.of(bad)
    assert Graph.of({"x": x, "edge_index": e}).both_directions().edge_index.shape[1] == 4


@given(st.integers(0, 10**6), st.sampled_from([0.5, 0.9]))
def test_sparse_attributes_have_the_dense_error(seed, positive):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 30, generator=random) * (torch.rand(40, 30, generator=random) < 0.015)
    g = Graph(x, torch.zeros(2, 1, dtype=torch.long))
    entries = losses.sparse_attributes(g)
    assert entries is not None and losses.sparse_attributes(Graph(x + 1, g.edge_index)) is None
    same(g.input(torch.eye(30)), x)
    changed = replace(g, x=g.x * 2)  # a graph made of another one remembers nothing of it
    assert torch.equal(losses.sparse_attributes(changed).square_N, 4 * entries.square_N)
    w = torch.randn(30, 4, generator=random)
    h = torch.randn(40, 4, generator=random)
    pair_of_gradients(
        lambda h, w: losses.weighted_rows(entries, h, w, positive),
        lambda h, w: losses.attribute_rows(x, h @ w.T, positive),
        h,
        w,
    )
