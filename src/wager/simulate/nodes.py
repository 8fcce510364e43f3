"""The simulated machine: how long a batch takes, how much KV it holds, what one batch may contain."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from wager.errors import UsageError

BLOCK_TOKENS = 16
CONCATENATE_BYTES_PER_S, COPY_BYTES_PER_S = 4e9, 5e9  # gathering a batch's activations, then copying them to the device


@dataclass(frozen=True)
class NodeModel:
    """A machine that holds layers [first, last).

    prompt_s[n], decode_s[n]: seconds of one layer for n prompt tokens and for n decoding sequences (longer batches than the table go on
    with its last step). kv_blocks: blocks of 16 tokens it has for each of its layers. overhead_s_per_token: paid once a batch.
    """

    name: str
    first: int
    last: int
    prompt_s: tuple[float, ...]
    decode_s: tuple[float, ...]
    kv_blocks: int
    max_prompt_requests: int = 1
    max_prompt_tokens: int = 2048
    max_decodes: int = 256
    overhead_s_per_token: float = 0.0
    usd_per_h: float = 0.0
    machine: str = ""

    def __post_init__(self):
        if not 0 <= self.first < self.last or self.kv_blocks < 1 or min(len(self.prompt_s), len(self.decode_s)) < 2:
            raise UsageError(
                f"node {self.name}: layers [{self.first}, {self.last}) with {self.kv_blocks} KV blocks make no machine"
            )

    @property
    def layers(self) -> int:
        return self.last - self.first

    @property
    def kv_capacity(self) -> int:
        """Block-layers in all."""
        return self.kv_blocks * self.layers

    def layer_s(self, prompt_tokens: int, decodes: int) -> float:
        return look_up(self.prompt_s, prompt_tokens) + look_up(self.decode_s, decodes)


def look_up(table: tuple[float, ...], size: int) -> float:
    last = len(table) - 1
    if size <= last:
        return table[size]
    return table[last] + (table[last] - table[last - 1]) * (size - last)


def copy_overhead_s(activation_bytes: float) -> float:
    """Seconds per token of assembling a batch."""
    return activation_bytes * (1 / CONCATENATE_BYTES_PER_S + 1 / COPY_BYTES_PER_S)


@dataclass(frozen=True)
class Stage:
    """A stop of a request: it runs layers [first, last) on `node`."""

    node: str
    first: int
    last: int


Path = tuple[Stage, ...]


def check_path(path: Path, nodes: Mapping[str, NodeModel], layers: int) -> None:
    """Every layer once, in order, each on a node that holds it. Raises UsageError naming the stage that is wrong."""
    at = 0
    for stage in path:
        node = nodes.get(stage.node)
        if node is None or stage.first != at or not node.first <= stage.first < stage.last <= node.last:
            raise UsageError(f"stage {stage} does not continue at layer {at} on a node that holds it")
        at = stage.last
    if at != layers:
        raise UsageError(f"a path ends at layer {at} of {layers}")


@dataclass(eq=False)
class Live:
    """A node in the simulation. `queue` holds flights in order of arrival."""

    model: NodeModel
    joined_s: float
    queue: deque = field(default_factory=deque)
    batch: list | None = None
    kv_used: int = 0
    kv_peak: int = 0
    busy_s: float = 0.0
    batches: int = 0
    left_s: float | None = None
    busy: list[tuple[float, float, int]] = field(default_factory=list)
