"""From models.toml and offers.csv to what to rent.

models.toml may set max_nodes (machines of a replica, 3), memory_ratio (most memory of a replica over the model's size, 12), budget_units (stages may
take multiples of 1 / budget_units of the latency objective; without it all take the same) and start_up_share (start-up time over the time between two plans, 0). It has [[model]] with name, layers, hidden, layer_gb, kv_bytes (per token and layer), for a mixture of experts active_layer_gb, for
quantized weights weight_bytes (of one weight), and for each phase served an objective and a
demand: prefill_ms, prefill_tokens_per_s, decode_ms, decode_tokens_per_s; `roofline` has flops_efficiency, read_efficiency, fixed_s as fitted on
measured machines. offers.csv has region,device,count,usd_per_h,available; devices are those of the catalog.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wager.cluster.coral.allocate import Allocator
from wager.cluster.coral.market import Allocation, Key, Market, check, reconcile
from wager.cluster.coral.stage import PHASES, Configuration, Demand, throughput_table
from wager.cluster.coral.templates import Library, build, split
from wager.errors import UsageError
from wager.hardware import catalog
from wager.hardware.cluster import Link
from wager.hardware.layer_cost import ModelCard, Roofline


def read_demands(raw: Mapping[str, Any]) -> tuple[list[Demand], Roofline]:
    """Raises UsageError naming the model and the key that is wrong."""
    demands = []
    models = raw.get("model", [])
    if not isinstance(models, list):
        raise UsageError(f"model = {models!r} in the demand file is no list of [[model]] entries")
    for m in models:
        try:
            card = ModelCard(
                m["name"],
                m["layers"],
                m["hidden"],
                m["layer_gb"] * 1e9,
                m["kv_bytes"],
                m.get("active_layer_gb", 0.0) * 1e9,
                weight_bytes=m.get("weight_bytes", 2.0),
            )
            for phase in PHASES:
                if f"{phase}_tokens_per_s" in m:
                    demands.append(Demand(
                        card, phase, m[f"{phase}_ms"] / 1e3, m[f"{phase}_tokens_per_s"],
                        m.get("prompt_tokens", 1000), m.get("context_tokens", 1200),
                    ))  # fmt: skip
        except KeyError as error:
            raise UsageError(f"model {m.get('name', '?')} in the demand file lacks {error}") from None
        except TypeError as error:
            raise UsageError(
                f"model {m.get('name', '?')} in the demand file has a value of the wrong type: {error}"
            ) from None
    if not demands or "roofline" not in raw:
        raise UsageError("the demand file needs [[model]] entries with a demand, and [roofline] efficiencies")
    try:
        return demands, Roofline(**raw["roofline"])
    except TypeError as error:
        raise UsageError(f"[roofline] in the demand file: {error}") from None


def read_market(rows: Sequence[Mapping[str, str]]) -> Market:
    devices = catalog.load()
    try:
        regions = tuple(dict.fromkeys(r["region"] for r in rows))
        shapes = tuple(dict.fromkeys((r["device"], int(r["count"])) for r in rows))
        stock, price = np.zeros((len(regions), len(shapes))), np.full((len(regions), len(shapes)), 1e9)
        for r in rows:
            at = regions.index(r["region"]), shapes.index((r["device"], int(r["count"])))
            stock[at], price[at] = int(r["available"]), float(r["usd_per_h"])
    except (KeyError, ValueError) as error:
        raise UsageError(f"the offers need region,device,count,usd_per_h,available: {error!r}") from None
    return Market(regions, tuple(Configuration(devices.device(d), n) for d, n in shapes), stock, price)


def plan_rent(
    raw: Mapping[str, Any], rows: Sequence[Mapping[str, str]], current: str | Path | None = None
) -> tuple[list[str], list[str]]:
    """(lines of the plan file, lines for a person). current: the plan that runs now; what it has already costs no start-up."""
    (demands, roofline), market = read_demands(raw), read_market(rows)
    link = Link(raw.get("link_gb_per_s", 1.25) * 1e9, raw.get("link_latency_ms", 1.0) / 1e3)
    tables = [tables_of(d, market.configurations, roofline, link) for d in demands]
    libraries = [
        build(
            d, market.configurations, t, raw.get("max_nodes", 3), raw.get("memory_ratio", 12.0), raw.get("budget_units")
        )
        for d, t in zip(demands, tables, strict=True)
    ]
    running = {} if current is None else read_running(current, libraries, market)
    found = Allocator(libraries, market, raw.get("start_up_share", 0.0)).allocate(running)
    check(found, libraries, market)
    lines = [
        f"{found.usd_per_h:.2f} USD/h for {found.factor:.1%} of the demands; no plan costs less than {found.bound:.2f} (gap {found.gap:.2%}, "
        f"{found.columns} columns, {found.seconds:.1f} s)",
        *(
            [f"the stock is too scarce for all of them: no plan serves more than {found.most_factor:.1%}"]
            if found.factor < 1
            else []
        ),
        *(
            f"one more {name} in {region} would save {worth:.2f} USD/h"
            for (region, name), worth in found.scarcity.items()
        ),
        *([] if current is None else _changes(running, found, libraries, market)),
    ]
    return _file(found, libraries, market, tables), lines


def _changes(running: Mapping[Key, int], found: Allocation, libraries: Sequence[Library], market: Market) -> list[str]:
    change = reconcile(running, found.running)
    lines = []
    for what, keys in (("start", change.start), ("drain", change.drain)):
        for (d, r, u), n in sorted(keys.items()):
            lines.append(
                f"{what} {n} of {libraries[d].demand.name} in {market.regions[r]}: {_machines(libraries[d], u, market)}"
            )
    lines = lines or ["nothing changes: what runs is the best plan still"]
    return [*lines, f"start-up counts {found.penalty_usd:.2f} USD/h"]


def _machines(library: Library, u: int, market: Market) -> str:
    counts = library.counts_UC[u]
    return ", ".join(f"{int(counts[c])} of {market.configurations[c].name}" for c in np.flatnonzero(counts))


def read_running(path: str | Path, libraries: Sequence[Library], market: Market) -> dict[Key, int]:
    """What a plan file says that runs. Raises UsageError naming the line of an entry that is none of today's templates."""
    try:
        text = Path(path).read_text()
        entries = tomllib.loads(text).get("replicas", [])
    except OSError as error:
        raise UsageError(f"the plan {path} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the plan {path} is not TOML: {error}") from None
    starts = [number for number, line in enumerate(text.splitlines(), 1) if line.strip() == "[[replicas]]"]
    running: dict[Key, int] = {}
    for line, entry in zip(starts, entries, strict=False):
        key, count = _running_key(entry, f"line {line} of {path}", libraries, market)
        running[key] = running.get(key, 0) + count
    return running


def _running_key(entry: Mapping[str, Any], where: str, libraries: Sequence[Library], market: Market) -> tuple[Key, int]:
    try:
        asked, region, count = (entry["model"], entry["phase"]), entry["region"], entry["count"]
        machines = [name for stage in entry["stages"] for name in stage["machines"]]
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{where}: replicas need model, phase, region, count and stages with machines: {error}"
        ) from None
    if not isinstance(count, int) or count < 0:
        raise UsageError(f"{where}: count = {count!r} is no number of replicas")
    d = next((i for i, l in enumerate(libraries) if (l.demand.model.name, l.demand.phase) == asked), None)
    if d is None or region not in market.regions:
        what = f"region {region!r}" if d is not None else f"the {asked[1]} phase of {asked[0]!r}"
        raise UsageError(f"{where}: {what} is not in today's demands and offers; remove the entry")
    names = [c.name for c in market.configurations]
    stray = next((name for name in machines if name not in names), None)
    if stray is not None:
        raise UsageError(f"{where}: machine {stray!r} is not offered; offered are {', '.join(names)}")
    counts = np.array([machines.count(name) for name in names])
    rows = np.flatnonzero((libraries[d].counts_UC == counts).all(1))
    if not len(rows):
        raise UsageError(
            f"{where}: these machines make no replica that keeps the objective; remove the entry or allow larger replicas"
        )
    return (d, market.regions.index(region), int(rows[0])), count


def tables_of(demand: Demand, configurations: Sequence[Configuration], roofline: Roofline, link: Link):
    """share of the objective -> [C, L + 1] tokens/s, each computed once."""
    known: dict[float, np.ndarray] = {}

    def table(share: float) -> np.ndarray:
        if share not in known:
            known[share] = throughput_table(demand, configurations, share, roofline, link)
        return known[share]

    return table


def _file(found: Allocation, libraries: Sequence[Library], market: Market, tables: Sequence[Any]) -> list[str]:
    lines = [f"usd_per_h = {found.usd_per_h!r}", f"bound = {found.bound!r}", f"factor = {found.factor!r}"]
    for (d, r, u), replicas in sorted(found.running.items()):
        lines += [
            "",
            "[[replicas]]",
            f'model = "{libraries[d].demand.model.name}"',
            f'phase = "{libraries[d].demand.phase}"',
        ]
        lines += [
            f'region = "{market.regions[r]}"',
            f"count = {replicas}",
            f"tokens_per_s = {float(libraries[d].rates_U[u])!r}",
            "stages = [",
        ]
        for machines, layers, _ in split(libraries[d], u, tables[d]):
            names = ", ".join(f'"{market.configurations[c].name}"' for c in machines)
            lines.append(f"  {{ layers = {layers}, machines = [{names}] }},")
        lines.append("]")
    return lines
