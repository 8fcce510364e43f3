"""SpotServe: serve one model on preemptible machines, changing the parallel layout and moving live state (arXiv 2311.15566).

A user rents spot machines at about half the price; they vanish after a short notice. The service keeps its tail latency: a new layout for
what is left (`controller`), weights and KV moved instead of reloaded (`mapper`, `migration`), requests that go on at their next token
(`arranger`). `simulate` replays availability and request traces under this policy and under what others do: reroute, or restart.

Exact: the device mapping is a maximum-weight matching; no token is generated twice. Approximate: the latency model, fitted to profiles.
"""
