"""Chooses the next layout: the fastest one that keeps up with the arrivals, else the one with most throughput."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from wager.cluster.spotserve.latency import Layout, ServedModel
from wager.errors import UsageError

NEAR = 0.02  # latencies this close count as equal; then fewer machines win


def layouts(
    model: ServedModel, devices: int, device_memory_bytes: float, tokens: int, least: int = 1
) -> Iterator[Layout]:
    """Every layout that fits `devices` devices of that memory with room for the KV of its batch at `tokens` tokens each; a pipeline has `least`
    devices or more."""
    for tensor in model.tensor_degrees:
        for pipeline in range(-(-max(1, least) // tensor), devices // tensor + 1):
            if pipeline > model.layers:
                break
            stage = -(-model.layers // pipeline)
            for batch in model.batches:
                held = stage * (model.layer_bytes + batch * model.kv_bytes(tokens)) / tensor
                if held <= device_memory_bytes:
                    for data in range(1, devices // (tensor * pipeline) + 1):
                        yield Layout(data, pipeline, tensor, batch)


@dataclass(frozen=True)
class _Sizes:
    """A continuous pipeline by measured batch size: seconds of a step, of a prefill beside the steps of so many, and by how much these become
    longer in all; `first`: a prefill alone."""

    sizes: list[int]
    steps: list[float]
    beside: list[float]
    longer: list[float]
    first: float


def _by_size(model: ServedModel, layout: Layout) -> _Sizes:
    key = layout.pipeline, layout.tensor, layout.batch
    if key not in model.memo:
        model.memo[key] = _measure(model, *key)
    return model.memo[key]


def _measure(model: ServedModel, pipeline: int, tensor: int, batch: int) -> _Sizes:
    sizes = [b for b in model.batches if b <= batch]
    times = [model.times(Layout(1, pipeline, tensor, b)) for b in sizes]
    first, beside, longer = times[0], [], []
    for one in times if pipeline > 1 else ():
        step, progress = one.beside(first)
        count = first.prefill / progress
        beside.append(count * step)
        longer.append(count * (step - one.step))
    return _Sizes(sizes, [t.step for t in times], beside, longer, first.prefill)


def request_alone_s(model: ServedModel, layout: Layout, output_tokens: int, together: float) -> float:
    """Seconds of a request of a continuous service whose pipeline serves `together` requests at a time: the steps of that size, its own prefill,
    and what the prefill of each that joins meanwhile holds it up: a stop, in a pipeline of several stages longer steps."""
    known = _by_size(model, layout)
    own = stop = known.first
    if layout.pipeline > 1:
        own, stop = join_s(model, layout, together)
    return own + (together - 1) * stop + output_tokens * _between(together, known.sizes, known.steps)


def join_s(model: ServedModel, layout: Layout, together: float) -> tuple[float, float]:
    """(seconds that a prefill takes beside the steps of `together - 1` others, by how much these become longer in all)."""
    known = _by_size(model, layout)
    others = max(0.0, together - 1)
    beside = _between(others, known.sizes, known.beside)
    own = known.first + min(1.0, others) * max(0.0, beside - known.first)  # alone it has the stages to itself
    return own, _between(others, known.sizes, known.longer)


def _between(x: float, sizes: list[int], values: list[float]) -> float:
    """Linear interpolation; the first and last value beyond the ends."""
    i = bisect_right(sizes, x)
    if i == 0 or i == len(sizes):
        return values[min(i, len(sizes) - 1)]
    share = (x - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
    return values[i - 1] + share * (values[i] - values[i - 1])


def throughput(model: ServedModel, layout: Layout, output_tokens: int, continuous: bool = False) -> float:
    """Requests/s when every pipeline is always full."""
    if continuous:
        full = layout.batch / request_alone_s(model, layout, output_tokens, layout.batch)
        if layout.pipeline > 1:
            full = min(full, 1 / join_s(model, layout, layout.batch)[0])  # one prefill after another
        return layout.data * full
    return layout.data * layout.batch / model.times(layout).total(output_tokens)


def request_s(model: ServedModel, layout: Layout, output_tokens: int, rate: float, continuous: bool = False) -> float:
    """Latency of a request at `rate` requests/s: serving, plus the wait of an M/D/c-like queue. In whole batches a server is a pipeline;
    continuously it is a slot of one, and a pipeline serves as many together as Little's law says. Infinite when it cannot keep up."""
    if continuous:
        together = _together(model, layout, output_tokens, rate / layout.data)
        service, servers, busy = (
            request_alone_s(model, layout, output_tokens, max(1.0, together)),
            layout.data * layout.batch,
            together / layout.batch,
        )
    else:
        service, servers = model.times(layout).total(output_tokens), layout.data
        busy = rate * service / (layout.data * layout.batch)
    if busy >= 1 or (continuous and rate >= throughput(model, layout, output_tokens, True)):
        return float("inf")
    return service + service * busy ** ((2 * (servers + 1)) ** 0.5) / (2 * servers * (1 - busy))


def _together(model: ServedModel, layout: Layout, output_tokens: int, rate: float) -> float:
    """Requests at a time in one pipeline at `rate`, the batch when it cannot keep up: n = rate * seconds(n), by bisection."""
    low, high = 0.0, float(layout.batch)
    if rate * request_alone_s(model, layout, output_tokens, high) >= high:
        return high
    for _ in range(30):
        middle = (low + high) / 2
        if rate * request_alone_s(model, layout, output_tokens, max(1.0, middle)) > middle:
            low = middle
        else:
            high = middle
    return high


def choose(
    model: ServedModel, devices: int, rate: float, output_tokens: int, device_memory_bytes: float, context_tokens: int,
    continuous: bool = False, least: int = 1, shape: Layout | None = None,
) -> Layout | None:  # fmt: skip
    """The layout for `devices` devices at `rate` requests/s; None when the model does not fit them. Raises UsageError on a bad rate.

    continuous: of otherwise equal layouts the one with most slots, for a slot that is not used costs no time. least: devices of a pipeline at least.
    shape: only more or fewer pipelines of this shape."""
    if rate < 0:
        raise UsageError(f"an arrival rate of {rate} requests/s is negative")
    fitting = list(layouts(model, devices, device_memory_bytes, context_tokens, least))
    if shape is not None:
        fitting = [c for c in fitting if (c.pipeline, c.tensor, c.batch) == (shape.pipeline, shape.tensor, shape.batch)]
    if not fitting:
        return None
    if continuous:
        most = {(c.data, c.pipeline, c.tensor): c for c in sorted(fitting)}  # the largest batch comes last
        fitting = list(most.values())
    keeping_up = [
        (request_s(model, c, output_tokens, rate, continuous), c)
        for c in fitting
        if throughput(model, c, output_tokens, continuous) > rate
    ]
    if keeping_up:
        fastest = min(latency for latency, _ in keeping_up)
        near = [(c.devices, latency, c) for latency, c in keeping_up if latency <= fastest * (1 + NEAR)]
        return min(near)[2]
    return max(fitting, key=lambda c: (throughput(model, c, output_tokens, continuous), -c.devices))
