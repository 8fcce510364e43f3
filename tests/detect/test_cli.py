"""`wager detect` from file to picture, and what it refuses."""

import numpy as np
import pytest

from tests.detect.data import points
from wager import cli
from wager.detect.bond import inject
from wager.detect.tables import read_rows
from wager.errors import UsageError


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        cli.main(["detect", *map(str, arguments)])
    captured = capsys.readouterr()
    return left.value.code, captured.out, captured.err


@pytest.fixture
def table(tmp_path):
    x = np.concatenate([points(0, 60, 3, "plain"), [[9.0, 9, 9]]])
    path = tmp_path / "t.csv"
    path.write_text(
        "a,b,c,bad\n" + "".join(",".join(map(repr, map(float, r))) + f",{int(i == 60)}\n" for i, r in enumerate(x))
    )
    return path


def test_fit_then_score(capsys, table, tmp_path):
    out, model, picture = (tmp_path / n for n in ("s.csv", "m.pkl", "p.svg"))
    code, text, _ = run(
        capsys, "fit", table, "--detector", "knn,lof", "--param", "knn.n_neighbors=3", "--label", "bad", "--standardize",
        "--out", out, "--save", model, "--plot", picture, "--top", 1,
    )  # fmt: skip
    assert code == 0 and "1.0000" in text and "│ 60" in text and picture.read_text().startswith("<?xml")
    lines = out.read_text().splitlines()
    assert lines[0] == "row,knn_score,knn_outlier,lof_score,lof_outlier" and len(lines) == 62
    code, text, _ = run(capsys, "score", table, "--model", model, "--label", "bad")
    assert code == 0 and "ROC-AUC" in text
    assert "first(k=5)" in run(capsys, "fit", table, "--detector", "knn,lof", "--explain")[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("fit", "none.csv"), "none.csv does not exist"),
        (("fit", "T", "--detector", "knn,foo"), "unknown detector foo"),
        (("fit", "T", "--param", "knn=3"), "DETECTOR.NAME=VALUE"),
        (("fit", "T", "--label", "zzz"), "no column 'zzz'"),
        (("fit", "T", "--memory", "lots"), "not a size"),
        (("score", "T", "--model", "none.pkl"), "none.pkl does not exist"),
        (("score", "T", "--model", "T"), "was not written by"),
        (("bench", "graph", "--data", "."), "no .npz file"),
        (("table", "none.jsonl"), "none.jsonl does not exist"),
    ],
)
def test_refusals_are_one_line(capsys, table, arguments, message):
    code, _, err = run(capsys, *(table if a == "T" else a for a in arguments))
    assert code == 2 and message in err and err.count("\n") == 1


def test_files_say_what_is_wrong(tmp_path):
    for text, message in (("a,b\n1,x\n", "column 'b' holds 'x'"), ("a,b\n1\n", "line 2 has 1 cells"), ("", "is empty")):
        (tmp_path / "f.csv").write_text(text)
        with pytest.raises(UsageError, match=message):
            read_rows(tmp_path / "f.csv")
    (tmp_path / "f.csv").write_text("1,2\n3,4\n")
    assert read_rows(tmp_path / "f.csv").x_ND.tolist() == [[1, 2], [3, 4]]
    (tmp_path / "f.doc").write_text("x")
    with pytest.raises(UsageError, match="cannot read .doc"):
        read_rows(tmp_path / "f.doc")


def test_benchmarks_run_and_say_the_same_again(capsys, tmp_path):
    x = points(0, 80, 3, "plain")
    x[:5] += 6
    np.savez(tmp_path / "small.npz", X=x, y=np.arange(80) < 5)
    code, text, _ = run(capsys, "bench", "tabular", "--data", tmp_path, "--detector", "knn,iforest")
    assert code == 0 and "| small | 80 | 3 | 1.0000" in text
    graphs = tmp_path / "graphs"
    graphs.mkdir()
    g = inject.generated(60, 1, features=6, m=4, n=2, k=10)
    np.savez(graphs / "inj_a.npz", x=g.x.numpy(), edge_index=g.edge_index.numpy(), y=g.y.numpy())
    out = tmp_path / "r.jsonl"
    options = (
        "bench",
        "graph",
        "--data",
        graphs,
        "--detectors",
        "lof,scan,gcnae",
        "--trials",
        2,
        "--epochs",
        2,
        "--out",
        out,
    )
    code, text, err = run(capsys, *options)
    assert code == 0 and "| degree+norm |" in text and "5/5" in err
    code, again, err = run(capsys, *options)
    assert code == 0 and again == text and err == ""
    assert run(capsys, "table", out, "--data", graphs)[1] == text
    assert "+0.00" in run(capsys, "compare", out, out)[1]
    assert run(capsys, "inject", graphs / "inj_a.npz", tmp_path / "more.npz", "--m", 3, "--n", 2, "--k", 9)[0] == 0
    with np.load(tmp_path / "more.npz") as made:
        assert (made["y"] & 2).astype(bool).sum() == 6
