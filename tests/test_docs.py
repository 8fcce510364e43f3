"""Generated pages say what the code and the recorded results say."""

import json
import re

import pytest

from scripts import generate_docs
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
