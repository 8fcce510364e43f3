"""Coral: the cheapest mix of cloud machines and serving plans for several models at once (arXiv 2605.04357).

A user names models with demands and latency objectives, and what can be rented where at which price; the answer says which machines to rent,
which model runs on which of them and how its layers are split, at least cost. Mechanism: for a set of machines the best way to serve a model
does not depend on anything else, so it is computed once (`templates`); then only the numbers of templates are chosen (`allocate`), by column
generation over all of them and an integer program over those that can matter.

Exact: the split within a template; the allocation, whose bound is reported. Approximate: stage throughput (a profile or a roofline), the even
split of the latency budget over stages, and the cut of the library at `max_nodes` machines and `memory_ratio` times the model's size.
"""
