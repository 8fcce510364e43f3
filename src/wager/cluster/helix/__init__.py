"""Helix: serve one large model on a fixed set of unequal machines and links by solving a max-flow placement (arXiv 2406.01566).

A user who owns a mixed pile of machines learns which contiguous layers each should hold and how each request travels, for most tokens/s.
Mechanism: machines are vertices with capacity T(k) tokens/s when they hold k layers (`profile`), links are edges; the value of a placement
is the max flow from the coordinator to itself (`flow`). `cover` finds a placement by an exact layer-cover program, `milp` by the paper's own
program, `baselines` by what others do. At run time every request walks the graph by interleaved weighted round robin (`route`).

Exact: the optimum of the placement model with its bound, max flow, every path covers each layer once. Approximate: T(k) itself, which rests on
a typical load; so `plan` makes it consistent with the placement and picks among candidates by simulation.
"""
