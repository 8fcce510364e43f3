"""The package declares what it imports, and one version of itself."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import wager

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s<>=!\[;~]", r)[0].lower().replace("-", "_") for r in requirements}


def imported_roots(*, at_module_level: bool) -> dict[str, str]:
    """Third-party packages that the sources import, with one file each; lazily imported ones only when asked."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "src" / "wager").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in tree.body if at_module_level else ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for root in (name.split(".")[0] for name in names):
                if root not in sys.stdlib_module_names and root != "wager":
                    found[root] = str(path.relative_to(ROOT))
    return found


def test_every_import_at_module_level_is_a_core_dependency():
    missing = {
        k: v
        for k, v in imported_roots(at_module_level=True).items()
        if k.lower() not in declared(PROJECT["dependencies"])
    }
    # starlette comes with fastapi and is its documented base; anyio and click likewise come with their users
    assert not {k: v for k, v in missing.items() if k not in {"starlette", "triton"}}


def test_every_lazy_import_is_declared_somewhere():
    extras = [r for group in PROJECT["optional-dependencies"].values() for r in group]
    # triton comes with torch's CUDA builds; scikit-learn and ray are asked for only by users who already use them
    known = declared(PROJECT["dependencies"] + extras) | {"starlette", "triton", "sklearn", "ray"}
    assert not {k: v for k, v in imported_roots(at_module_level=False).items() if k.lower() not in known}


def test_no_dependency_is_declared_in_vain():
    used = set(imported_roots(at_module_level=False))
    assert declared(PROJECT["dependencies"]) <= {u.lower() for u in used}


def test_versions_agree():
    assert PROJECT["version"] == wager.__version__
    assert PROJECT["name"] == "wager"
