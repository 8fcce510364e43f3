"""Coral's plans and the baselines' serve the same requests in simulation: Poisson arrivals, lengths of a trace, both phases with their queues.

Plans are made for more than the load that comes (`MARGIN`): a plan for exactly the mean load has no room for its bursts. A request is good when its
first token came within twice the prefill objective (a prompt waits for the batch under way, then takes its own) and its mean gap between tokens is
within the decode objective.
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
    plans |= {policy: baselines.scaled(wanted, market, policy) for policy in baselines.POLICIES}
    lengths = [
        (a.prompt_tokens, a.output_tokens)
        for a in read_trace(data / "serving-traces" / f"{pool.trace}.csv", max_prompt=8192)
    ]
    rng = np.random.default_rng(0)
    arrivals = {m: poisson(lengths, rate, ARRIVING_S, rng) for m, rate in pool.rates.items()}
    found: dict = {"pool": pool.name, "margin": MARGIN, "requests": sum(map(len, arrivals.values()))}
    for name, plan in plans.items():
        check(plan, wanted, market)
        timelines = serve_plan(plan, wanted, market, roofline, pools.LINK, arrivals, ARRIVING_S + AFTER_S)
        found[name] = {"usd_per_h": plan.usd_per_h, "factor": plan.factor} | measured(timelines)
    return found


def measured(timelines: dict[str, Timeline]) -> dict:
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
    return {"good": sum(s * n for s, n in good) / total, "worst_model": min(s for s, _ in good), "models": models}


def lines(rows: list[dict]) -> list[list[str]]:
    """A table: what each policy pays, and which share of the requests is in time."""
    policies = ("coral", *baselines.POLICIES)
    head = ["served", "requests", *(f"{p} {what}" for p in policies for what in ("USD/h", "in time", "worst model"))]
    return [head, *(
        [r["pool"], str(r["requests"]), *(
            text
            for p in policies
            for text in (f"{r[p]['usd_per_h']:.1f}", f"{r[p]['good']:.1%}", f"{r[p]['worst_model']:.1%}")
        )]
        for r in rows
    )]  # fmt: skip
