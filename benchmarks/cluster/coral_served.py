"""Coral's plans and the published baselines' serve the same requests in simulation: Poisson arrivals, lengths of a trace, both phases with their queues.

Plans are made for more than the load that comes (`MARGIN`): a plan for exactly the mean load has no room for its bursts. Where stock is scarce a plan lets in
the share of each model's requests that it has room for, and the others count as not served. A request is good when its first token came within twice the prefill
objective (a prompt waits for the batch under way, then takes its own) and its mean gap between tokens is within the decode objective.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.cluster import coral_pools as pools
from wager.cluster.coral import baselines
from wager.cluster.coral.allocate import Allocator
from wager.cluster.coral.market import Allocation, Market, check
from wager.cluster.coral.serve import serve_plan
from wager.cluster.coral.templates import Library
from wager.hardware.layer_cost import Roofline
from wager.simulate.timeline import Timeline
from wager.simulate.trace import poisson, read_trace

MARGIN = 1.25
WARM_UP_S, ARRIVING_S, AFTER_S = 20.0, 120.0, 60.0
WAITING = 2.0  # of the prefill objective, within which a first token is in time


def served(pool: pools.Pool, libraries: Sequence[Library], market: Market, data: Path, roofline: Roofline) -> dict:
    """policy -> cost and goodput, of all models and of the worst."""
    more = dataclasses.replace(pool, rates={m: MARGIN * r for m, r in pool.rates.items()})
    wanted = pools.rated(libraries, more, data)
    plans: dict[str, Allocation] = {"coral": Allocator(wanted, market).allocate()}
    plans |= {policy: baselines.scaled(wanted, market, policy) for policy in baselines.PUBLISHED}
    lengths = [
        (a.prompt_tokens, a.output_tokens)
        for a in read_trace(data / "serving-traces" / f"{pool.trace}.csv", max_prompt=8192)
    ]
    found: dict = {"pool": pool.name, "margin": MARGIN, "asked_per_s": sum(pool.rates.values())}
    for name, plan in plans.items():
        check(plan, wanted, market)
        rng = np.random.default_rng(0)
        let_in = {m: share * pool.rates[m] for m, share in shares(plan, wanted).items()}
        arrivals = {m: poisson(lengths, rate, ARRIVING_S, rng) for m, rate in let_in.items()}
        timelines = serve_plan(plan, wanted, market, roofline, pools.LINK, arrivals, ARRIVING_S + AFTER_S)
        found[name] = {"usd_per_h": plan.usd_per_h, "factor": plan.factor} | measured(timelines, let_in)
    return found


def shares(plan: Allocation, libraries: Sequence[Library]) -> dict[str, float]:
    """Of each model's demand, what both phases have room for, at most 1; models without room are left out."""
    room = np.zeros(len(libraries))
    for (d, _, u), n in plan.running.items():
        room[d] += n * libraries[d].rates_U[u] / libraries[d].demand.tokens_per_s
    found: dict[str, float] = {}
    for lib, share in zip(libraries, room, strict=True):
        found[lib.demand.model.name] = min(found.get(lib.demand.model.name, 1.0), float(share))
    return {model: share for model, share in found.items() if share > 0}


def measured(timelines: dict[str, Timeline], let_in: dict[str, float]) -> dict:
    """let_in: requests/s of each model that come."""
    good, models = [], {}
    for name, timeline in timelines.items():
        _, prefill_ms, decode_ms = pools.SERVED[name]
        share = timeline.goodput(WAITING * prefill_ms / 1e3, decode_ms / 1e3, WARM_UP_S)
        counted = sum(r.arrival_s >= WARM_UP_S for r in timeline.records)
        good.append((share, counted))
        models[name] = {
            "good": share,
            "first_token_s_p99": timeline.quantile(timeline.first_token_latencies(WARM_UP_S), 0.99),
            "gap_s_p99": timeline.quantile(timeline.inter_token_latencies(WARM_UP_S), 0.99),
        }
    total = sum(n for _, n in good)
    return {
        "good": sum(s * n for s, n in good) / total if total else 0.0,
        "worst_model": min((s for s, _ in good), default=0.0),
        "goodput_per_s": sum(rate * models[m]["good"] for m, rate in let_in.items()),
        "models": models,
    }


def lines(rows: list[dict]) -> list[list[str]]:
    """A table: what each policy pays, how much it serves in time, and which share of what it lets in."""
    policies = ("coral", *baselines.PUBLISHED)
    head = [
        "served",
        "requests/s",
        *(f"{p} {what}" for p in policies for what in ("USD/h", "good/s", "in time", "worst model")),
    ]
    return [head, *(
        [r["pool"] + (", uneven budget" if r.get("units") else "") + (", scarce" if r.get("scarce") else ""), f"{r['asked_per_s']:.0f}", *(
            text
            for p in policies
            for text in (f"{r[p]['usd_per_h']:.1f}", f"{r[p]['goodput_per_s']:.1f}", f"{r[p]['good']:.1%}", f"{r[p]['worst_model']:.1%}")
        )]
        for r in rows
    )]  # fmt: skip
