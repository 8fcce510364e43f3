"""Our linears against torch's on the shapes of a decode step, a verified draft and a prefill, weights out of cache, interleaved.

    python -m benchmarks.kernels.linear [--quick] [--threads 2]

Baselines: torch.nn.functional.linear in bfloat16 (its fastest CPU form for these weights). Ours: every packed mode. Weights rotate over
several copies, so that none is in the cache. Facts: bytes per second read at one token beside the machine's stream read, and what 8 and 16
tokens cost in units of one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle

import torch
import torch.nn.functional as F

from benchmarks.harness import Report, arguments, compare, sample, say
from wager.kernels import native
from wager.kernels.registry import pack_linear

MODES = ("bf16", "w16a16", "int16", "int8", "w8a8", "int4", "w4a8")
CACHE_BYTES = 48 << 20
SETTLE_S = 0.01


def timed(make: Callable[[], Callable[[], object]], nbytes: int) -> Callable[[], float]:
    """Seconds of one call; copies that read `nbytes` each take turns until together they exceed the cache. Before it the threads of whoever
    was measured last fall asleep (torch's spin on their cores for milliseconds), and a call that is not timed wakes the contender's own."""
    copies = cycle([make() for _ in range(max(1, CACHE_BYTES // nbytes + 1))])

    def run() -> float:
        time.sleep(SETTLE_S)
        next(copies)()
        call = next(copies)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return run


def contender(
    make: Callable[[], Callable[[torch.Tensor], torch.Tensor]], nbytes: int, x: torch.Tensor
) -> Callable[[], float]:
    return timed(lambda: partial(make(), x), nbytes)


def stream_bandwidth(threads: int) -> Callable[[], float]:
    data = torch.zeros(48 << 20)

    def run() -> float:
        time.sleep(SETTLE_S)
        start = time.perf_counter()
        native.library().wager_stream_read(data.data_ptr(), data.numel(), threads)
        return data.nbytes / (time.perf_counter() - start)

    return run


def layer(weight: torch.Tensor, mode: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return pack_linear(weight.bfloat16() if mode == "bf16" else weight, None, None if mode == "bf16" else mode)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contender")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    repeats = chosen.repeats or (5 if chosen.quick else 15)
    inputs, outputs = (512, 2048) if chosen.quick else (2048, 8192)
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) * 0.02
    rows, facts = [], {"threads": chosen.threads, "inputs": inputs, "outputs": outputs}
    for tokens in (1, 8, 16, 64 if chosen.quick else 512):
        x = torch.randn(tokens, inputs)
        contenders = {"torch bf16": contender(lambda: _torch_layer(weight), 2 * weight.numel(), x)}
        for mode in MODES:
            bits = {"bf16": 16, "w16a16": 16, "int16": 16.25, "int8": 8, "w8a8": 8}.get(mode, 4.5)
            contenders[mode] = contender(lambda mode=mode: layer(weight, mode), int(weight.numel() * bits / 8), x)
        rows += compare(f"{tokens} tokens", contenders, repeats=repeats, progress=say)
    facts |= ratios(weight, inputs, chosen.threads, repeats)
    report = Report("kernels", "linear", rows, facts)
    print(report.table())
    print(facts)
    if not chosen.quick:
        say(f"saved {report.save()}")


def _torch_layer(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    held = weight.bfloat16()
    return lambda x: F.linear(x.bfloat16(), held)


def ratios(weight: torch.Tensor, inputs: int, threads: int, repeats: int) -> dict[str, float]:
    """Share of the stream's bandwidth at one token, and the cost of 8 and 16 tokens in units of one, measured in the same rounds."""
    found: dict[str, float] = {}
    for mode in MODES:
        size = layer(weight, mode)
        nbytes = size.weight.nbytes  # type: ignore[attr-defined]
        contenders: dict = {"stream": stream_bandwidth(threads)}
        for tokens in (1, 8, 16):
            contenders[str(tokens)] = contender(
                lambda mode=mode: layer(weight, mode), nbytes, torch.randn(tokens, inputs)
            )
        taken = {k: statistics.median(v) for k, v in sample(contenders, repeats=repeats, warmup=2, seed=0).items()}
        found |= {
            f"{mode}.read_GB_s": nbytes / taken["1"] / 1e9,
            f"{mode}.share_of_stream": nbytes / taken["1"] / taken["stream"],
            f"{mode}.cost_of_8": taken["8"] / taken["1"],
            f"{mode}.cost_of_16": taken["16"] / taken["1"],
        }
    return found


if __name__ == "__main__":
    main()
