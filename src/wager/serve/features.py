"""What the engine can do, as data: every technique of the serving survey (arXiv 2312.15234) and of today's servers.

A feature that names an implementation is claimed; the tests check that the implementation and every test it names exist, and docs,
`wager features` and the check of conflicts are made from the same rows. Rows live in `feature_table/`; another system adds
its own with `register`.
"""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import typer

from wager.errors import UsageError

if TYPE_CHECKING:
    from wager.serve.config import EngineConfig


class Exactness(StrEnum):
    """EXACT: same tokens. DISTRIBUTION: same distribution of tokens. APPROXIMATE: may change quality. NONE: computes nothing."""

    EXACT = "exact"
    DISTRIBUTION = "same distribution"
    APPROXIMATE = "approximate"
    NONE = "–"


@dataclass(frozen=True)
class Feature:
    """One technique.

    Attributes:
        id: stable name, e.g. "prefix_cache".
        branch: place in the survey's taxonomy, e.g. "system/memory".
        title: what it is, in the field's words.
        exactness: what it does to the output.
        knobs: the engine options or request fields that control it.
        implementation: "module:name" of the code; empty when the engine does not have it.
        test_ids: pytest ids that fail when it breaks.
        bench_ids: benchmark modules that measure it.
        note: for a feature that is absent, why; otherwise what to know.
        conflicts: (id, reason) of features it cannot be enabled with.
        enabled_when: whether a configuration enables it; None: always on or chosen per request.
    """

    id: str
    branch: str
    title: str
    exactness: Exactness = Exactness.EXACT
    knobs: tuple[str, ...] = ()
    implementation: str = ""
    test_ids: tuple[str, ...] = ()
    bench_ids: tuple[str, ...] = ()
    note: str = ""
    conflicts: tuple[tuple[str, str], ...] = ()
    enabled_when: Callable[[EngineConfig], bool] | None = None

    @property
    def available(self) -> bool:
        return bool(self.implementation)


_REGISTRY: dict[str, Feature] = {}


def register(*features: Feature) -> None:
    """Add features. Raises ValueError for an id that is taken: two rows would disagree."""
    for feature in features:
        if feature.id in _REGISTRY:
            raise ValueError(f"feature {feature.id!r} is registered twice")
        _REGISTRY[feature.id] = feature


def registry() -> dict[str, Feature]:
    """Every known feature by id, in the order of the taxonomy."""
    for branch in ("algorithm", "system", "service"):
        importlib.import_module(f"wager.serve.feature_table.{branch}")  # registers its rows when first imported
    return dict(_REGISTRY)


def enabled_features(config: EngineConfig) -> frozenset[str]:
    """The features that this configuration turns on, those that are always on included."""
    return frozenset(
        f.id for f in registry().values() if f.available and (f.enabled_when is None or f.enabled_when(config))
    )


def check_conflicts(enabled: Iterable[str]) -> None:
    """Raises UsageError naming the first two enabled features that cannot work together, why, and how to turn each off."""
    known = registry()
    chosen = [known[id_] for id_ in sorted(enabled)]
    for a, b in itertools.permutations(chosen, 2):
        reason = dict(a.conflicts).get(b.id)
        if reason:
            raise UsageError(
                f"{a.title} ({', '.join(a.knobs)}) cannot be combined with {b.title} ({', '.join(b.knobs)}): {reason}; "
                "turn one of them off",
                param=a.knobs[0] if a.knobs else None,
            )


def markdown() -> str:
    """The body of docs/features.md: for each branch of the taxonomy what is here, then what is not and why."""
    parts = []
    for branch, group in itertools.groupby(registry().values(), key=lambda f: f.branch):
        rows = list(group)
        parts.append(f"## {branch.replace('/', ': ').capitalize()}\n")
        here = [f for f in rows if f.available]
        if here:
            parts += [
                "| feature | output | controlled by | proved by |",
                "|---|---|---|---|",
                *map(markdown_row, here),
                "",
            ]
        away = [f"- {f.title}: {f.note}" for f in rows if not f.available]
        if away:
            parts += ["Not here:\n", *away, ""]
    return "\n".join(parts)


def markdown_row(feature: Feature) -> str:
    knobs = ", ".join(f"`{k}`" for k in feature.knobs)
    tests = ", ".join(t.rsplit("::", 1)[1].removeprefix("test_").replace("_", " ") for t in feature.test_ids)
    note = f". {feature.note[0].upper()}{feature.note[1:]}" if feature.note else ""
    return f"| {feature.title}{note} | {feature.exactness.value} | {knobs} | {tests} |"


def as_json() -> list[dict[str, Any]]:
    """The registry as plain data, for `--json` and the server's /v1/features."""
    rows = []
    for feature in registry().values():
        row = asdict(feature) | {"available": feature.available}
        del row["enabled_when"]
        rows.append(row)
    return rows


app = typer.Typer(add_completion=False)


@app.callback()
def _group() -> None: ...


@app.command()
def features(
    json_: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
    missing: bool = typer.Option(False, "--missing", help="Also list what the engine does not have, and why."),
) -> None:
    """List what the engine can do, exact or approximate, and its tests."""
    if json_:
        print(json.dumps(as_json(), indent=1))
        return
    rows = [f for f in registry().values() if f.available or missing]
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{sum(f.available for f in rows)} features", title_justify="left")
    for column in ("feature", "output", "controlled by", "tests"):
        table.add_column(column)
    for branch, group in itertools.groupby(rows, key=lambda f: f.branch):
        table.add_section()
        table.add_row(f"[bold]{branch}[/bold]")
        for f in group:
            state = f.exactness.value if f.available else "no"
            table.add_row(f.title, state, ", ".join(f.knobs) if f.available else f.note, str(len(f.test_ids) or ""))
    Console().print(table)
