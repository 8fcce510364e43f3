"""The harness: trials depend on their names alone, failures stay, a killed run goes on, tables say what was measured."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy.stats import norm

from wager.detect.bond import inject, protocol, report, runner
from wager.errors import UsageError


@pytest.fixture
def folder(tmp_path):
    for name, nodes in (("inj_tiny", 60), ("books", 50)):
        g = inject.generated(nodes, 1, features=6, m=4, n=2, k=10)
        np.savez(tmp_path / f"{name}.npz", x=g.x.numpy(), edge_index=g.edge_index.numpy(), y=g.y.numpy())
    return {p.stem: p for p in tmp_path.glob("*.npz")}


def rows_of(trials, folder):
    return [runner.attempt(t, folder[t.dataset], {}) for t in trials]


def stable(rows):
    return [{k: r.get(k) for k in ("config", "trial_seed", "status", "metrics")} for r in rows]


def test_any_order_gives_the_same_rows(folder):
    trials = runner.plan(["dominant", "gaan", "scan", "lof"], list(folder), 2, 7, "bond-2022", 3, False)
    assert sum(t.detector == "lof" for t in trials) == 2  # nothing to draw: once for each data set
    assert stable(rows_of(trials, folder)) == stable(rows_of(trials[::-1], folder))[::-1]


def test_every_detector_of_both_protocols_runs_its_draw(folder):
    for name in protocol.PROTOCOLS:
        for row in rows_of(runner.plan(list(protocol.DETECTORS), ["inj_tiny"], 1, 0, name, 2, False), folder):
            assert row["status"] in ("ok", "nan"), row


def test_protocols_draw_what_they_say():
    assert protocol.grid("dominant", "inj_cora", "bond-2022")["weight"] == ("auto",)
    assert protocol.grid("dominant", "inj_cora", "pygod-1")["weight"] == (0.8, 0.5, 0.2)
    assert protocol.grid("dominant", "books", "bond-2022")["weight"] == (0.8, 0.5, 0.2)
    assert protocol.grid("guide", "enron", "bond-2022")["hid_a"] == (8, 12, 16)
    assert protocol.grid("conad", "books", "pygod-1")["ranking"] == ("reference",)
    draws = [protocol.trial_config("dominant", "books", "pygod-1", t, 0)[0]["lr"] for t in range(600)]
    counts = np.array([draws.count(v) for v in (0.1, 0.05, 0.01)])
    assert ((counts - 200) ** 2 / 200).sum() < norm.ppf(1 - 1e-6) * 4  # uniform
    for wrong in (
        lambda: protocol.grid("x", "y", "pygod-1"),
        lambda: protocol.grid("lof", "y", "z"),
        lambda: runner.plan(["lof"], ["a"], 0, 0, "pygod-1", 1, False),
    ):
        with pytest.raises(UsageError):
            wrong()


def test_resume_limits_and_failures(folder, tmp_path):
    out = tmp_path / "r.jsonl"
    trials = runner.plan(["mlpae", "scan"], ["books"], 2, 0, "bond-2022", 2, False)
    first = [asdict(t) | runner.attempt(t, folder["books"], {}) for t in trials[:2]]
    out.write_text("".join(json.dumps(r) + "\n" for r in first) + '{"detector": "cut')  # killed while writing
    ran = []
    rows = runner.run(trials, folder, out, runner.Limits(), lambda done, total, row: ran.append(row["detector"]))
    assert rows[:2] == json.loads(json.dumps(first)) and ran == ["scan", "scan"] and len(runner.read(out)) == 4
    assert all(
        r["peak_bytes"] > 10**7 and r["seconds"] > 0 and r["versions"]["torch"] == torch.__version__ for r in rows
    )
    slow = runner.plan(["dominant"], ["books"], 1, 0, "bond-2022", 10**6, False)
    assert runner.run(slow, folder, tmp_path / "s.jsonl", runner.Limits(time_s=3.0))[0]["status"] == "timeout"


def test_random_scores_are_worth_a_half():
    rng = np.random.default_rng(0)
    y = np.arange(100) < 10
    from wager.detect.bond.metrics import eval_roc_auc

    values = [eval_roc_auc(y, rng.random(100)) for _ in range(500)]
    assert abs(np.mean(values) - 0.5) < 4 * np.std(values) / np.sqrt(500)


def fake(detector, dataset, trial, auc, status="ok"):
    row = {"detector": detector, "dataset": dataset, "trial": trial, "status": status, "seconds": 1.0}
    return row | ({"metrics": {"auc": auc}} if status == "ok" else {})


def test_tables_keep_failures_and_flag_leaks(folder, tmp_path):
    rows = [fake("a", "s", t, v) for t, v in enumerate((0.6, 0.8))] + [
        fake("a", "s", 2, 0, "oom"),
        fake("b", "s", 0, 0, "timeout"),
    ]
    text = report.table([*rows, fake("degree+norm", "s", 0, 0.75)])
    assert (
        "70.0±10.0 (80.0)* oom×1" in text
        and "| b | timeout×1 |" in text
        and "| degree+norm | 75.0±0.0 (75.0) |" in text
    )
    cell = report.cells(rows, "auc")["a", "s"]
    assert cell["interval"][0] < 70 < cell["interval"][1]
    with pytest.raises(UsageError, match="unknown metric"):
        report.table(rows, "f1")
    from wager.detect.bond import Graph

    leaks = {r["detector"]: r["metrics"] for r in report.leak_rows("inj_tiny", Graph.of(folder["inj_tiny"]))}
    assert set(leaks) == {"degree", "norm", "degree+norm"} and "auc_structural" in leaks["degree"]
    report.plot(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_comparison_is_paired_and_ranks_have_a_critical_difference():
    a = [fake("x", "s", t, 0.5 + 0.1 * t) for t in range(4)]
    b = [fake("x", "s", t, 0.51 + 0.1 * t) for t in range(4)]
    assert "| x | s | 4 | +1.00 | +1.00 to +1.00 |" in report.compare(a, b)
    with pytest.raises(UsageError, match="in common"):
        report.compare(a, [fake("z", "s", 0, 0.5)])
    rows = [fake(d, s, 0, v) for d, v in (("x", 0.9), ("y", 0.6), ("z", 0.3)) for s in "abcd"]
    order, critical = report.ranks(rows)
    assert order == {"x": 1.0, "y": 2.0, "z": 3.0} and critical == pytest.approx(2.343 * np.sqrt(3 * 4 / 24), rel=1e-3)
    assert json.dumps(order)
