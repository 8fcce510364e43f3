"""What tests of Coral share: random throughput tables, and libraries made by the slow search or by hand."""

import numpy as np
from hypothesis import strategies as st

from wager.cluster.coral.reference import best_of_partitions
from wager.cluster.coral.stage import Configuration, Demand
from wager.cluster.coral.templates import Library, multisets
from wager.hardware.cluster import Device
from wager.hardware.layer_cost import ModelCard

CARD = ModelCard("m", 5, 64, 1e9, 1e3)
CONFIGURATIONS = tuple(
    Configuration(Device(n, mem, 1e12, 1e14), c) for n, mem in (("x", 8e9), ("y", 5e9)) for c in (1,)
)
DEMAND = Demand(CARD, "decode", 1.0, 100.0)


@st.composite
def tables(draw, configurations=2, layers=4):
    """Random non-rising tokens/s by layers, per number of equal stages."""
    rows = {}
    for stages in range(1, 5):
        table = [
            [0.0, *sorted((draw(st.integers(0, 60)) for _ in range(layers)), reverse=True)]
            for _ in range(configurations)
        ]
        rows[stages] = np.array(table, float)
    return rows


def library(rates_by_counts, demand=DEMAND):
    counts = np.array(list(rates_by_counts))
    nothing = np.zeros((len(counts), 3), int)
    return Library(demand, counts, np.array(list(rates_by_counts.values()), float), nothing, nothing.astype(float))


def complete_library(table, demand, max_nodes=3):
    """Every multiset of two kinds that serves anything; table: stages -> [C, 5] tokens/s."""
    counts = {}
    for row in multisets(2, max_nodes):
        machines = [int(c) for c in row if c < 2]
        best = best_of_partitions(machines, lambda share: table[round(1 / share)], 4)
        if best > 0:
            counts[machines.count(0), machines.count(1)] = best
    return library(counts, demand) if counts else None
