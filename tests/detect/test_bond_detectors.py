"""The fourteen detectors: they learn what they should, labels never reach them, seeds decide alone, nodes may be renamed."""

import numpy as np
import pytest
import torch

from tests.detect.data import dense, graph
from wager.detect import bond
from wager.detect.bond import Graph, inject, protocol
from wager.detect.bond.metrics import eval_roc_auc
from wager.detect.bond.residual import closed_form, start
from wager.errors import CapacityError, UsageError

G = inject.generated(200, 1, features=8, m=8, n=1, k=30)
SMALL = {"epoch": 4, "hid_dim": 8}
CONFIG = {
    "guide": {"epoch": 4, "hid_a": 8},
    "lof": {},
    "if": {},
    "scan": {},
    "radar": {"epoch": 4},
    "anomalous": {"epoch": 4},
}


def make(name, seed=3, **more):
    return protocol.make(name, CONFIG.get(name, SMALL) | more, seed)


@pytest.mark.parametrize("name", protocol.DETECTORS)
def test_scores_depend_on_the_graph_and_the_seed_alone(name):
    shuffled = Graph(G.x, G.edge_index, 3 - G.y)
    torch.manual_seed(0)
    first = make(name).fit(G).decision_score_
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    again = make(name).fit(shuffled, label=shuffled.y).decision_score_
    assert torch.equal(first, again) and first.shape == (200,) and torch.isfinite(first).all()
    assert torch.equal(state, torch.random.get_rng_state())  # nothing seeds or draws from the global stream


@pytest.mark.parametrize("name", ["radar", "mlpae", "gcnae", "dominant", "guide", "lof", "conad"])
def test_renaming_nodes_renames_scores(name):
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    place = torch.empty_like(order)
    place[order] = torch.arange(200)
    renamed = Graph(G.x[order], place[G.edge_index])
    more = {"r": 0.0} if name == "conad" else {}
    a, b = make(name, **more).fit(G).decision_score_, make(name, **more).fit(renamed).decision_score_
    assert torch.allclose(a[order], b, rtol=2e-3, atol=2e-4 * float(a.abs().max()))


def test_interface():
    det = bond.DOMINANT(**SMALL, seed=0).fit(G)
    label, score, prob, conf = det.predict(G, return_score=True, return_prob=True, return_conf=True)
    assert (
        torch.equal(label, (score > det.threshold_).long()) and ((prob >= 0) & (prob <= 1)).all() and len(conf) == 200
    )
    other = inject.generated(150, 2, features=8, m=8, n=1, k=30)
    assert det.decision_function(other).shape == (150,)
    assert det.predict(other, return_prob=True, prob_method="unify")[1].shape == (150,)
    with pytest.raises(UsageError, match="tied to the graph"):
        bond.DONE(**SMALL, seed=0).fit(G).decision_function(other)
    with pytest.raises(UsageError, match="not fitted"):
        bond.GAE().predict()
    with pytest.raises(UsageError, match="contamination"):
        bond.LOF(contamination=0.9).fit(G)
    with pytest.raises(UsageError, match="at least 2"):
        bond.DOMINANT(num_layers=1).fit(G)
    assert bond.GAE(symmetrize=True, epoch=1).fit(G).edges_ == "both directions"
    with pytest.raises(CapacityError, match="form='paper'"):
        bond.Radar().fit(Graph(torch.zeros(50_000, 1), torch.zeros(2, 1, dtype=torch.long)))


def test_injected_outliers_are_found_by_the_detectors_made_for_them():
    y = G.y.numpy()
    assert eval_roc_auc((y & 2) > 0, bond.DOMINANT(epoch=40, seed=0, weight=0.2).fit(G).decision_score_.numpy()) > 0.9
    assert eval_roc_auc((y & 2) > 0, bond.SCAN().fit(G).decision_score_.numpy()) > 0.9
    assert eval_roc_auc((y & 2) > 0, bond.GUIDE(epoch=40, seed=0, alpha=0.2).fit(G).decision_score_.numpy()) > 0.9


def slow_scan(g, eps, mu):
    """Written from the description: sets of out-neighbours, cores in order of index, one expansion."""
    neighbor = [set(g.edge_index[1][g.edge_index[0] == v].tolist()) for v in range(g.nodes)]

    def near(v):
        found = []
        for u in g.edge_index[1][g.edge_index[0] == v].tolist():
            common = neighbor[u] & neighbor[v]
            if common and (len(common) + 2) / np.sqrt((len(neighbor[u]) + 1) * (len(neighbor[v]) + 1)) > eps:
                found.append(u)
        return found

    member = np.zeros(g.nodes)
    for v in range(g.nodes):
        if not member[v] and len(near(v)) > mu:
            member[v] = 1
            for w in near(v):
                member[[w, *near(w)]] = 1
    return member


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("eps, mu", [(0.3, 2), (0.6, 1)])
def test_scan_follows_its_description(seed, eps, mu):
    g = graph(seed, n=20, edges=110)
    assert np.array_equal(bond.SCAN(eps, mu).fit(g).decision_score_.numpy(), slow_scan(g, eps, mu))
    full = bond.SCAN(eps, mu, expand="full").fit(g).decision_score_.numpy()
    assert set(np.unique(full)) <= {0, 1}


def test_scan_grows_through_a_chain_of_cores_only_when_asked():
    cliques = [torch.combinations(torch.arange(a, a + 5)) for a in (0, 4, 8, 12)]  # neighbours share one node
    g = Graph(torch.zeros(17, 1), torch.cat(cliques).T).both_directions()
    assert bond.SCAN(0.1, 2, expand="full").fit(g).decision_score_.sum() == 17
    assert bond.SCAN(0.99, 2).fit(g).decision_score_.sum() < 17


@pytest.mark.parametrize("kind", ["radar", "anomalous"])
@pytest.mark.parametrize("sparse", [False, True])
def test_residual_detectors_are_the_dense_reference(kind, sparse):
    g = graph(2)
    if sparse:
        g = Graph(torch.zeros(g.nodes, 120).scatter(1, torch.arange(g.nodes)[:, None], 1.0), g.edge_index)
    s = torch.maximum(dense(g), dense(g).T)
    laplacian = torch.diag(s.sum(1)) - s
    r = torch.linalg.solve(1.01 * torch.eye(g.nodes) + laplacian, g.x)
    assert torch.allclose(start(g, 1.0, 0.01), r, atol=1e-5)
    x, n = g.x, g.nodes
    random = torch.Generator().manual_seed(0)
    w = torch.eye(n) if kind == "radar" else torch.randn(x.shape[1], n, generator=random)
    w, r = w.requires_grad_(), r.requires_grad_()
    optimizer = torch.optim.Adam([w, r], lr=0.02, weight_decay=0.01)
    for _ in range(12):
        optimizer.zero_grad()
        explained = w @ x if kind == "radar" else x @ w @ x
        (torch.linalg.norm(x - explained - r) + torch.trace(r.T @ laplacian @ r)).backward()
        optimizer.step()
    made = {"radar": bond.Radar, "anomalous": bond.ANOMALOUS}[kind](weight_decay=0.01, lr=0.02, epoch=12, seed=0)
    assert torch.allclose(made.fit(g).decision_score_, r.detach().square().sum(1), rtol=2e-3, atol=1e-4)


def test_papers_radar_descends_to_the_minimum_of_its_objective():
    g, alpha, beta, gamma = inject.generated(60, 4, features=5, m=5, n=1, k=20), 0.7, 0.4, 0.3
    x, laplacian, eye = g.x.double(), torch.from_numpy(g.laplacian().toarray()).double(), torch.eye(60).double()

    def value(w, r):
        fit = (x - w.T @ x - r).square().sum() + gamma * torch.trace(r.T @ laplacian @ r)
        return fit + alpha * w.norm(dim=1).sum() + beta * r.norm(dim=1).sum()

    first = torch.linalg.solve((1 + beta) * eye + gamma * laplacian, x)  # one round by the N x N formulas
    w = torch.linalg.solve(x @ x.T + alpha * eye, x @ x.T - x @ first.T)
    r = torch.linalg.solve((1 + beta) * eye + gamma * laplacian, x - w.T @ x)
    score, objective = closed_form(g, alpha, beta, gamma, 1)
    assert objective[0] == pytest.approx(float(value(w, r)), rel=1e-8)
    assert torch.allclose(score, r.norm(dim=1).float(), rtol=1e-5)

    score, objective = closed_form(g, alpha, beta, gamma, 400, tolerance=0.0)
    assert all(b <= a * (1 + 1e-9) for a, b in zip(objective, objective[1:], strict=False))
    w, r = (t.contiguous().clone().requires_grad_() for t in (w, r))
    optimizer = torch.optim.LBFGS([w, r], max_iter=300, history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = value(w, r)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = value(w, r).item()  # convex, but with corners, where a general solver slows down
    assert found * 0.9 < objective[-1] < found * 1.001
    assert bond.Radar(form="paper", epoch=50).fit(g).decision_score_.shape == (60,)
    with pytest.raises(UsageError, match="form"):
        bond.Radar(form="other")


def test_dominant_step_is_the_dense_reference():
    g = graph(4)
    det = bond.DOMINANT(hid_dim=6, weight=0.3)
    model = det.build(g, torch.Generator().manual_seed(0))
    loss, score = det.step(model, det.state(g), torch.Generator())
    h = model["encoder"](g.x, g.gcn())
    x_, z = model["attributes"](h, g.gcn()), model["structure"](h, g.gcn())
    wanted = 0.3 * (g.x - x_).norm(dim=1) + 0.7 * (dense(g) - z @ z.T).norm(dim=1)
    assert torch.allclose(score, wanted, rtol=1e-5) and torch.allclose(loss, wanted.mean())


def test_done_terms_are_the_dense_reference():
    g = graph(6)
    det = bond.DONE(hid_dim=6)
    model = det.build(g, torch.Generator().manual_seed(0)).eval()
    _, score = det.step(model, det.state(g), torch.Generator())
    h_a, h_s = model["encoder_a"](g.x), model["encoder_s"](dense(g))
    dx = (g.x - model["decoder_a"](h_a)).square().sum(1)
    ds = (dense(g) - model["decoder_s"](h_s)).square().sum(1)
    into = dense(g).T

    def apart(h):
        return (into * (h[:, None] - h[None]).square().sum(2)).sum(1) / into.sum(1).clamp(min=1)

    terms = [dx + apart(h_a), ds + apart(h_s), (h_a - h_s).square().sum(1)]
    assert torch.allclose(score, sum(t / t.sum() for t in terms) / 3, rtol=1e-4, atol=1e-7)


def test_conad_augments_equal_kinds():
    g = inject.generated(2000, 5, features=4, n=0)
    det = bond.CONAD(r=0.4, m=20)
    changed, mark = det.augmented(g, torch.Generator().manual_seed(0))
    degree = torch.bincount(changed.edge_index[0], minlength=2000)
    before = torch.bincount(g.edge_index[0], minlength=2000)
    moved = (changed.x != g.x).any(1)
    dense_share = float(((degree != before) & (degree > 0)).float().mean())
    bare_share = float(((degree == 0) & (before > 0)).float().mean())
    for share in (dense_share, bare_share, float(moved.float().mean()) / 2, float(mark.mean()) / 4):
        assert abs(share - 0.1) < 5 * np.sqrt(0.1 * 0.9 / 2000)
    assert torch.equal(bond.CONAD(r=0.0).augmented(g, torch.Generator())[0].x, g.x)


def test_gaan_and_adone_variants_differ_and_unknown_ones_are_refused():
    for kind, key, values in (
        (bond.GAAN, "pairs", ("edges", "rows")),
        (bond.AdONE, "pairing", ("own", "all")),
        (bond.CONAD, "ranking", ("reference", "distance")),
    ):
        a, b = (kind(**SMALL, seed=0, **{key: v}).fit(G).decision_score_ for v in values)
        assert not torch.equal(a, b)
        with pytest.raises(UsageError, match=key):
            kind(**{key: "other"})


def test_gaan_judges_rows_as_dense_indexing_does():
    g = graph(7)
    det = bond.GAAN(hid_dim=4, pairs="rows")
    z = torch.randn(g.nodes, 4, generator=torch.Generator().manual_seed(0))
    a = torch.sigmoid(z @ z.T)[g.edge_index]
    wanted = torch.nn.functional.binary_cross_entropy(a, torch.zeros_like(a))
    assert torch.allclose(det.judged(det.state(g), z, False), wanted, rtol=1e-3)  # its sigmoid saturates, ours does not


@pytest.mark.parametrize("name", [n for n, entry in protocol.DETECTORS.items() if entry.learns])
def test_sparse_attributes_train_as_dense_ones(name, monkeypatch):
    x = (torch.rand(90, 60, generator=torch.Generator().manual_seed(0)) < 0.04).float()
    edges = torch.randint(90, (2, 300), generator=torch.Generator().manual_seed(1))
    fast = make(name, dropout=0.0, epoch=2).fit(Graph(x, edges)).decision_score_
    monkeypatch.setattr("wager.detect.bond.graph.SPARSE_SHARE", 0.0)
    slow = make(name, dropout=0.0, epoch=2).fit(Graph(x, edges)).decision_score_
    assert torch.allclose(slow, fast, rtol=2e-3)  # Adam makes steps of rounding where a gradient is nearly zero
