"""Generated pages say what the code and the recorded results say."""

import json
import re

import pytest

from scripts import generate_docs, results_page
from wager import systems


@pytest.mark.parametrize("name", generate_docs.PAGES)
def test_generated_page_is_up_to_date(name):
    written = (generate_docs.DOCS / name).read_text()
    assert written == generate_docs.PAGES[name](), f"docs/{name} is stale: run `make docs`"


def test_readme_and_docs_link_to_files_that_exist():
    root = generate_docs.DOCS.parent
    for page in [root / "README.md", root / "CONTRIBUTING.md", *generate_docs.DOCS.glob("*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name} links to {link}, which does not exist"


def test_rows_of_systems_are_unique_and_complete():
    rows = systems.SYSTEMS
    assert len({s.name for s in rows}) == len({s.module for s in rows}) == len(rows) >= 42
    assert all(s.does.endswith(".") for s in rows)
    assert all(s.arxiv.count(".") == 1 for s in rows if s.arxiv)


def test_a_system_works_only_when_its_module_exists():
    by_name = {s.name: s for s in systems.SYSTEMS}
    assert by_name["Engine"].works and by_name["Engine"].shown_command == "wager serve MODEL"
    absent = systems.System("x", "p", "1.2", "d.", "serve.no_such_room", "x")
    assert not absent.works and absent.shown_command == "" and absent.status == "not yet"


def test_measured_ratio_comes_from_the_result_file(tmp_path, monkeypatch):
    monkeypatch.setattr(systems, "RESULTS", tmp_path)
    system = systems.System("x", "p", "1.2", "d.", "serve.core", "x")
    assert systems.measured(system) == ""
    (tmp_path / "serve").mkdir()
    row = {"ratio": 2.126, "baseline": "transformers", "workload": "batch 64"}
    (tmp_path / "serve" / "core.json").write_text(json.dumps({"rows": [row]}))
    assert systems.measured(system) == "2.13x transformers (batch 64)"


def a_record(system, rows=(), facts=None):
    return {"wing": "serve", "system": system, "command": "python -m x", "date": "2026-01-02T00:00:00", "machine": {"cores": 2},
            "facts": facts or {}, "rows": list(rows)}  # fmt: skip


def a_row(ratio, unit="s", workload="batch"):
    return {"workload": workload, "baseline": "other", "ours": "wager", "unit": unit, "baseline_value": ratio,
            "ours_value": 1.0, "ratio": ratio, "ratio_low": ratio, "ratio_high": ratio, "aa_noise": 0.01}  # fmt: skip


def test_results_begin_with_medians_by_contender_and_unit(tmp_path):
    rows = [a_row(1.0), a_row(2.0), a_row(9.0), a_row(0.0, "share")]
    page = results_page.page([a_record("fast_one", rows), a_record("plain", facts={"a": 1})], tmp_path)
    top, full = page.split("## Every record")
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in top.splitlines() if line.startswith("|")]
    assert cells[2] == ["[fast one](#serve-fast-one)", "wager", "other", "s", "3", "2.00x (1.00 to 9.00)"]
    assert cells[3] == ["", "wager", "other", "share", "1", "0.00x"]
    assert "Numbers without a contender: [plain](#serve-plain)." in top
    assert "### serve: fast one" in full and full.count("| batch") == 4 and "cores 2" in full


def test_long_tables_are_folded_and_lose_no_row(tmp_path):
    rows = [a_row(1.0, workload=f"w{i}.") for i in range(results_page.OPEN_LINES + 1)]
    page = results_page.page([a_record("x", rows, {f"f{i}.": i for i in range(40)})], tmp_path)
    for line in ("<summary>13 comparisons</summary>", "<summary>40 numbers and settings</summary>"):
        assert page.count(line) == 1
    assert all(f"| w{i}." in page for i in range(len(rows))) and all(f"| f{i}." in page for i in range(40))
    assert "<details" not in results_page.page([a_record("x", rows[:3])], tmp_path)


@pytest.mark.parametrize(
    ("facts", "plain", "sheets"),
    [
        ({"a": 1, "b": {"c": 2}}, {"a": 1, "b.c": 2}, {}),
        ({"t": [["n", "v"], ["x", 1]]}, {}, {"t": [["n", "v"], ["x", "1"]]}),
        ({"t": [["kill", 1.5], ["kill", 2.5]]}, {}, {"t": [["", ""], ["kill", "1.5"], ["kill", "2.5"]]}),
        ({"t": [{"n": 1, "m": {"k": 2}}] * 2}, {}, {"t": [["n", "m.k"], ["1", "2"], ["1", "2"]]}),
        ({"w1": {"a": 1, "b": 2}, "w2": {"a": 3}}, {}, {"numbers": [["", "a", "b"], ["w1", "1", "2"], ["w2", "3", ""]]}),
        ({"w1": {"a": 1}, "w2": {"b": 3}}, {"w1.a": 1, "w2.b": 3}, {}),
        ({"x": {"w1": {"a": 1}, "w2": {"a": 3}}}, {}, {"x": [["", "a"], ["w1", "1"], ["w2", "3"]]}),
    ],
)  # fmt: skip
def test_facts_are_tables_where_their_names_repeat(facts, plain, sheets):
    assert results_page.split_facts(facts) == (plain, sheets)


def test_tables_are_turned_where_that_is_narrower():
    wide = {name: {f"n{i}": i for i in range(20)} for name in ("w1", "w2")}
    assert results_page.crossed(wide)[:2] == [["", "w1", "w2"], ["n0", "0", "0"]]
    assert results_page.crossed({f"w{j}": {f"n{i}": i for i in range(20)} for j in range(20)}) is None
    assert results_page.show(list(range(9))) == "9 values, in the file of the record"
