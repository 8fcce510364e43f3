"""Our paged attention against torch's grouped scaled_dot_product_attention, keys and values out of cache, interleaved.

    python -m benchmarks.kernels.attention [--quick] [--threads 2]

Baseline: SDPA over contiguous bfloat16 keys and values, with the query heads that share a key/value head laid out as query rows (its fastest
form for grouped heads; `enable_gqa` repeats keys instead). It sees one length for all requests and no pages, which flatters it. Pools rotate
over several copies, so that no keys are in the cache. Facts: bytes of keys and values per second beside the machine's stream read.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, arguments, compare, sample, say
from benchmarks.kernels.linear import stream_bandwidth, timed
from wager.kernels import native
from wager.native.memory import huge_zeros

BLOCK = 16


@dataclass(frozen=True)
class Workload:
    """`requests` spans of `new` tokens each, behind `cached` tokens."""

    name: str
    requests: int
    new: int
    cached: int
    heads: int
    kv_heads: int
    width: int

    @property
    def kv_bytes(self) -> int:
        return self.requests * (self.cached + self.new) * self.kv_heads * self.width * 2 * 2


WORKLOADS = (
    Workload("decode 64 x 192 keys, GQA 3:1", 64, 1, 191, 12, 4, 64),
    Workload("decode 1 x 32k keys, GQA 4:1", 1, 1, 32767, 32, 8, 128),
    Workload("verify 16 after 4k keys, GQA 4:1", 1, 16, 4096, 32, 8, 128),
    Workload("prefill 512, GQA 3:1", 1, 512, 0, 12, 4, 64),
)


def pool(slots: int, load: Workload, generator: torch.Generator) -> Tensor:
    memory = huge_zeros(slots * load.kv_heads * load.width * 2).view(torch.bfloat16)
    return memory.view(slots, load.kv_heads, load.width).normal_(generator=generator)


def pages(load: Workload, generator: torch.Generator) -> Callable[[], Tensor]:
    """Our kernel over a pool whose blocks lie in random order, as in a server that has run for a while."""
    per_request = -(-(load.cached + load.new) // BLOCK)
    tables = torch.randperm(load.requests * per_request, generator=generator).view(load.requests, -1).int()
    k, v = (pool(load.requests * per_request * BLOCK, load, generator) for _ in "kv")
    tokens = load.requests * load.new
    q = torch.randn(tokens, load.heads, load.width, generator=generator)
    starts = torch.arange(0, tokens + 1, load.new, dtype=torch.int32)
    contexts = torch.full((load.requests,), load.cached, dtype=torch.int32)
    positions = torch.arange(load.cached, load.cached + load.new).repeat(load.requests)
    return lambda: native.paged_attention(q, k, v, tables, starts, contexts, positions, BLOCK, scale=load.width**-0.5)


def grouped_sdpa(load: Workload, generator: torch.Generator) -> Callable[[], Tensor]:
    keys, group = load.cached + load.new, load.heads // load.kv_heads
    k, v = (torch.randn(load.requests, load.kv_heads, keys, load.width, generator=generator).bfloat16() for _ in "kv")
    q = torch.randn(load.requests, load.kv_heads, group * load.new, load.width, generator=generator).bfloat16()
    mask = None
    if load.new > 1:
        sees = torch.ones(load.new, keys, dtype=torch.bool).tril(load.cached)
        mask = sees.repeat(group, 1)
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contender")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    repeats = chosen.repeats or (5 if chosen.quick else 25)
    rows, facts = [], {"threads": chosen.threads}
    for load in WORKLOADS:
        ours = timed(lambda load=load: pages(load, torch.Generator().manual_seed(0)), load.kv_bytes)
        theirs = timed(lambda load=load: grouped_sdpa(load, torch.Generator().manual_seed(0)), load.kv_bytes)
        rows += compare(load.name, {"grouped SDPA": theirs, "wager": ours}, repeats=repeats, progress=None)
        taken = sample({"stream": stream_bandwidth(chosen.threads), "ours": ours}, repeats=repeats, warmup=1, seed=0)
        rate = load.kv_bytes / statistics.median(taken["ours"])
        facts[f"{load.name}: GB/s"] = rate / 1e9
        facts[f"{load.name}: share of stream"] = rate / statistics.median(taken["stream"])
        say(f"{load.name}: {rate / 1e9:.1f} GB/s, {facts[f'{load.name}: share of stream']:.0%} of stream")
    report = Report("kernels", "attention", rows, facts)
    print(report.table())
    if not chosen.quick:
        say(f"saved {report.save()}")


if __name__ == "__main__":
    main()
