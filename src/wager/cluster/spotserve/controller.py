"""Chooses the next layout: the fastest one that keeps up with the arrivals, else the one with most throughput."""

from __future__ import annotations

from collections.abc import Iterator

from wager.cluster.spotserve.latency import Layout, ServedModel
from wager.errors import UsageError

NEAR = 0.02  # latencies this close count as equal; then fewer machines win


def layouts(model: ServedModel, devices: int, device_memory_bytes: float, tokens: int) -> Iterator[Layout]:
    """Every layout that fits `devices` devices of that memory with room for the KV of its batch at `tokens` tokens each."""
    for tensor in model.tensor_degrees:
        for pipeline in range(1, devices // tensor + 1):
            if pipeline > model.layers:
                break
            stage = -(-model.layers // pipeline)
            for batch in model.batches:
                held = stage * (model.layer_bytes + batch * model.kv_bytes(tokens)) / tensor
                if held <= device_memory_bytes:
                    for data in range(1, devices // (tensor * pipeline) + 1):
                        yield Layout(data, pipeline, tensor, batch)


def throughput(model: ServedModel, layout: Layout, output_tokens: int) -> float:
    """Requests/s when every pipeline always has a full batch."""
    return layout.data * layout.batch / model.times(layout).total(output_tokens)


def request_s(model: ServedModel, layout: Layout, output_tokens: int, rate: float) -> float:
    """Latency of a request at `rate` requests/s: serving, plus the wait of an M/D/c-like queue whose server is a pipeline's batch."""
    service = model.times(layout).total(output_tokens)
    busy = rate * service / (layout.data * layout.batch)
    if busy >= 1:
        return float("inf")
    return service + service * busy ** ((2 * (layout.data + 1)) ** 0.5) / (2 * layout.data * (1 - busy))


def choose(
    model: ServedModel, devices: int, rate: float, output_tokens: int, device_memory_bytes: float, context_tokens: int
) -> Layout | None:
    """The layout for `devices` devices at `rate` requests/s; None when the model does not fit them. Raises UsageError on a bad rate."""
    if rate < 0:
        raise UsageError(f"an arrival rate of {rate} requests/s is negative")
    fitting = list(layouts(model, devices, device_memory_bytes, context_tokens))
    if not fitting:
        return None
    keeping_up = [
        (request_s(model, c, output_tokens, rate), c) for c in fitting if throughput(model, c, output_tokens) > rate
    ]
    if keeping_up:
        fastest = min(latency for latency, _ in keeping_up)
        near = [(c.devices, latency, c) for latency, c in keeping_up if latency <= fastest * (1 + NEAR)]
        return min(near)[2]
    return max(fitting, key=lambda c: (throughput(model, c, output_tokens), -c.devices))


def arriving_throughput_is_met(model: ServedModel, layout: Layout, rate: float, output_tokens: int) -> bool:
    return throughput(model, layout, output_tokens) > rate
