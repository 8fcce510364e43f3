"""What the rented machines are like: memory, networks, notices, prices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cloud:
    """Of a T4's 16 GB about 9 are left for weights and KV beside buffers: with them the fewest devices that hold each published model are the
    published ones. `rate_window_s`: the arrival rate is measured over this long, and taken to be at least `expected_rate`. `overload_factor`: a
    restarting service leaves a layout that cannot keep up with the load only for one with so many times its throughput.
    `background_share`: how much of the networks the weights of the next layout may take while the present one still serves; 0 moves nothing
    ahead. `regroup_s`: what forming the new communication groups takes, on top of the bytes. `min_gpus`: devices that a pipeline has at least, also
    where fewer would hold the model."""

    devices_per_node: int = 4
    device_memory_bytes: float = 9e9
    network_bytes_per_s: float = 50e9 / 8
    local_bytes_per_s: float = 10e9
    storage_bytes_per_s: float = 1e9
    engine_start_s: float = 10.0
    notice_s: float = 30.0
    spot_usd_per_h: float = 1.9
    on_demand_usd_per_h: float = 3.9
    rate_window_s: float = 30.0
    expected_rate: float = 0.0
    overload_factor: float = 1.25
    background_share: float = 0.5
    regroup_s: float = 0.5
    min_gpus: int = 1

    def devices(self, nodes: set[str]) -> list[str]:
        """ "node/0", "node/1", ... of every node."""
        return [f"{n}/{i}" for n in sorted(nodes) for i in range(self.devices_per_node)]
