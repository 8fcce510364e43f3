"""The page of recorded results: first what was measured against what and how much better, by wing; then every record in full."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.harness import PICTURES, format_table, rows_table

OPEN_LINES = 12  # of a table that is shown; longer ones are folded
MOST_COLUMNS = 10  # of a table of facts
MOST_VALUES = 8  # of a list in a cell
LEAST_FILLED = 0.6  # of its cells

Record = Mapping[str, Any]
Line = list[str]

INTRO = """# Results

Recorded runs; [Benchmarks](benchmarks.md) says how they are taken. A ratio above 1 means better than the baseline that is named beside it,
measured in the same run. The tables give the median over the workloads, the lowest and the highest. The section that a name links to has
every workload with its interval and the noise of the machine, the other numbers, and the machine.
"""


def page(records: Iterable[Record], docs: Path) -> str:
    """`docs`: the folder that pictures are linked from."""
    wings = [(wing, list(group)) for wing, group in groupby(records, key=lambda r: r["wing"])]
    if not wings:
        return INTRO + "\nNothing has been recorded yet.\n"
    parts = [INTRO]
    for wing, group in wings:
        parts.append(f"## {wing.capitalize()}\n\n{summary(group)}\n")
    parts += ["## Every record\n", *(section(record, docs) for _, group in wings for record in group)]
    return "\n".join(parts)


def title(record: Record) -> str:
    return f"{record['wing']}: {record['system'].replace('_', ' ')}"


def link(record: Record) -> str:
    """The name of a record, linked to its section."""
    anchor = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title(record)).strip().lower())
    return f"[{record['system'].replace('_', ' ')}](#{anchor})"


def summary(records: Sequence[Record]) -> str:
    """One line for each contender, baseline and unit of each record; then the records that compare nothing."""
    lines = [["record", "ours", "baseline", "measured in", "workloads", "ratio (lowest to highest)"]]
    for record in records:
        pairs: dict[tuple[str, str, str], list[float]] = {}
        for row in record["rows"]:
            pairs.setdefault((row["ours"], row["baseline"], row["unit"]), []).append(row["ratio"])
        for names, ratios in pairs.items():
            first = link(record) if names == next(iter(pairs)) else ""
            span = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
            lines.append([first, *map(show, names), str(len(ratios)), f"{statistics.median(ratios):.2f}x{span}"])
    others = ", ".join(link(record) for record in records if not record["rows"])
    tables = [format_table(lines)] if len(lines) > 1 else []
    return "\n\n".join([*tables, *([f"Numbers without a contender: {others}."] if others else [])])


def section(record: Record, docs: Path) -> str:
    """One record in full: its rows, picture, facts and machine."""
    parts = [f"### {title(record)}\n", f"`{record['command']}`, {record['date'][:10]}\n"]
    if record["rows"]:
        table, count = rows_table(record["rows"]), len(record["rows"])
        parts.append(f"{table}\n" if count <= OPEN_LINES else folded(f"{count} comparisons", table))
    picture = PICTURES / f"{record['wing']}-{record['system']}.svg"
    if picture.exists():
        parts.append(f"![{record['system']}]({picture.relative_to(docs)})\n")
    plain, sheets = split_facts(record["facts"])
    if plain:
        body = format_table([["", "value"], *([name, show(value)] for name, value in plain.items())])
        parts.append(f"{body}\n" if len(plain) <= OPEN_LINES else folded(f"{len(plain)} numbers and settings", body))
    for name, lines in sheets.items():
        table = format_table(lines)
        parts.append(
            f"{name}:\n\n{table}\n" if len(lines) <= OPEN_LINES else folded(f"{name}: {len(lines) - 1} lines", table)
        )
    machine = ", ".join(f"{name} {show(value)}" for name, value in flatten(record["machine"]).items())
    parts.append(f"Machine: {machine}.\n")
    return "\n".join(parts)


def folded(name: str, body: str) -> str:
    return f'<details markdown="1">\n<summary>{name}</summary>\n\n{body}\n\n</details>\n'


def split_facts(facts: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], dict[str, list[Line]]]:
    """Single values under dotted names, and tables by name: lists of lines, and mappings of mappings with mostly the same names."""
    plain: dict[str, Any] = {}
    sheets: dict[str, list[Line]] = {}
    alike = {name: value for name, value in facts.items() if isinstance(value, Mapping) and value}
    if len(alike) > 1 and (lines := crossed(alike)):
        sheets[prefix.removesuffix(".") or "numbers"] = lines
        facts = {name: value for name, value in facts.items() if name not in alike}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            inner, tables = split_facts(value, f"{prefix}{name}.")
            plain |= inner
            sheets |= tables
        elif isinstance(value, list) and (lines := listed(value)):
            sheets[prefix + name] = lines
        else:
            plain[prefix + name] = value
    return plain, sheets


def listed(value: Sequence[Any]) -> list[Line] | None:
    """A table of a list of lists, of which the first may be the head, or of mappings."""
    if len(value) < 2:
        return None
    if all(isinstance(v, list) and len(v) == len(value[0]) and not any(map(nested, v)) for v in value):
        named = all(isinstance(cell, str) for cell in value[0]) and value[0] not in value[1:]
        return [*([] if named else [[""] * len(value[0])]), *([show(cell) for cell in line] for line in value)]
    if not all(isinstance(v, Mapping) for v in value):
        return None
    return arranged([("", flatten(v)) for v in value])


def crossed(value: Mapping[str, Mapping[str, Any]]) -> list[Line] | None:
    """A table of mappings with mostly the same names."""
    members = [(name, flatten(v)) for name, v in value.items()]
    names = {name for _, member in members for name in member}
    if sum(len(member) for _, member in members) < LEAST_FILLED * len(names) * len(members):
        return None
    return arranged(members)


def arranged(members: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Line] | None:
    """Each member a line, or a column where that is the narrower way; None where both are too wide."""
    names = list(dict.fromkeys(name for _, member in members for name in member))
    lines = [["", *names], *([name, *(show(member.get(n, "")) for n in names)] for name, member in members)]
    if not any(name for name, _ in members):
        lines = [line[1:] for line in lines]
    if len(lines[0]) > MOST_COLUMNS:
        lines = [list(line) for line in zip(*lines, strict=True)]
    return lines if len(lines[0]) <= MOST_COLUMNS else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def nested(value: Any) -> bool:
    return isinstance(value, dict | list)


def show(value: Any) -> str:
    """One cell; long lists are counted, their values are in the JSON file."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        if len(value) > MOST_VALUES or any(map(nested, value)):
            return f"{len(value)} values, in the file of the record"
        return ", ".join(show(v) for v in value) or "none"
    return str(value).replace("|", "\\|")
