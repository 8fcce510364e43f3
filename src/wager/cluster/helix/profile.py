"""T(k): tokens per second of a machine that holds k layers, under a typical load.

A machine's share of a request's round trip says how many of the requests whose KV it holds are in its batch at a time. That needs the speed
of all machines, which is what is being computed: so a fixed point, started from rough speeds. More layers can mean more throughput per
machine, because the batch changes in steps: nothing here is monotone in k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wager.errors import UsageError
from wager.hardware.layer_cost import MachineProfile, ModelCard

Throughput = Mapping[str, Mapping[int, float]]  # machine -> layers held -> tokens/s
ROUNDS = 10


@dataclass(frozen=True)
class Load:
    """What requests are like on average, and how full the KV may be kept."""

    input_tokens: int = 750
    output_tokens: int = 240
    kv_high_water: float = 0.3

    def __post_init__(self):
        if min(self.input_tokens, self.output_tokens) < 1 or not 0 < self.kv_high_water <= 1:
            raise UsageError(
                f"a load of {self.input_tokens} + {self.output_tokens} tokens at {self.kv_high_water} makes no sense"
            )


@dataclass(frozen=True)
class Start:
    """Where the fixed point begins: layer-tokens/s of each machine, and the layers it typically holds in a roomy and in a tight cluster."""

    speed: Mapping[str, float]
    roomy: Mapping[str, int]
    tight: Mapping[str, int]


STARTS = {
    "llama1_30b": Start(
        dict(a100=48, v100=25, l4=9, l4x2=15, t4=8, t4x2=15, t4x4=23),
        dict(a100=12, v100=4, l4=8, l4x2=14, t4=4, t4x2=10, t4x4=20),
        dict(a100=18, v100=7, l4=11, l4x2=22, t4=7, t4x2=15, t4x4=30),
    ),
    "llama2_70b": Start(
        dict(a100=80, v100=40, l4=20, l4x2=30, t4=12.5, t4x2=20, t4x4=30),
        dict(a100=8, v100=3, l4=4, l4x2=9, t4=3, t4x2=6, t4x4=12),
        dict(a100=12, v100=4, l4=7, l4x2=14, t4=4, t4x2=9, t4x4=18),
    ),
}
ROOMY = 1.2  # a cluster is roomy when its typical layers cover the model this many times


def default_start(profiles: Mapping[str, MachineProfile], load: Load) -> Start:
    """For a model without published values: speeds from one prompt beside a full decode batch, two thirds of the most layers."""
    pair = load.input_tokens + load.output_tokens
    speed = {m: pair / (p.prompt_s(load.input_tokens) + p.decode_s(load.output_tokens)) for m, p in profiles.items()}
    tight = {m: p.max_layers for m, p in profiles.items()}
    return Start(speed, {m: max(1, round(k * 2 / 3)) for m, k in tight.items()}, tight)


def typical_throughput(
    model: ModelCard, profiles: Mapping[str, MachineProfile], counts: Mapping[str, int], load: Load | None = None
) -> Throughput:
    """T(k) of each machine in `counts` before any placement is known. Raises UsageError for a machine without a profile."""
    load = load or Load()
    missing = sorted(set(counts) - set(profiles))
    if missing:
        raise UsageError(f"machine {missing[0]!r} has no profile for {model.name}; profiled are {', '.join(profiles)}")
    start = STARTS.get(model.name) or default_start(profiles, load)
    layers = start.roomy
    if sum(counts[m] * layers[m] for m in counts) < ROOMY * model.layers:
        layers = start.tight
    held = {m: (counts[m], layers[m]) for m in counts}
    speed = {m: start.speed[m] for m in counts}
    for _ in range(ROUNDS):
        mean_s = mean_layer_s(held, speed)
        speed = {m: k * node_throughput(profiles[m], k, speed[m], mean_s, model, load) for m, (_, k) in held.items()}
    mean_s = mean_layer_s(held, speed)
    return {
        m: {
            k: node_throughput(profiles[m], k, speed[m], mean_s, model, load)
            for k in range(1, profiles[m].max_layers + 1)
        }
        for m in counts
    }


def placed_throughput(
    model: ModelCard,
    profiles: Mapping[str, MachineProfile],
    held: Mapping[str, Mapping[int, int]],
    load: Load | None = None,
) -> Throughput:
    """T(k) when the cluster holds `held[machine][layers] = nodes`: the round trip is that of this placement, not of a typical one."""
    load = load or Load()
    flat = {(m, k): n for m, by_k in held.items() for k, n in by_k.items() if n}
    start = STARTS.get(model.name) or default_start(profiles, load)
    speed = {(m, k): start.speed[m] for m, k in flat}
    mean_s = 0.0
    for _ in range(ROUNDS):
        mean_s = sum(n * k / speed[m, k] for (m, k), n in flat.items()) / sum(n * k for (_, k), n in flat.items())
        speed = {(m, k): k * node_throughput(profiles[m], k, speed[m, k], mean_s, model, load) for m, k in flat}
    table: dict[str, dict[int, float]] = {}
    for m in held:
        own = {k: speed[m, k] for k in held[m] if held[m][k]}
        for k in range(1, profiles[m].max_layers + 1):
            near = min(own, key=lambda o: (abs(o - k), o)) if own else None
            guess = own[near] if near is not None else start.speed[m]
            table.setdefault(m, {})[k] = node_throughput(profiles[m], k, guess, mean_s, model, load)
    return table


def mean_layer_s(held: Mapping[str, tuple[int, int]], speed: Mapping[str, float]) -> float:
    """Mean seconds of a layer over the cluster, weighted by the layers that machines hold."""
    return sum(n * k / speed[m] for m, (n, k) in held.items()) / sum(n * k for n, k in held.values())


def node_throughput(
    profile: MachineProfile, layers: int, speed: float, mean_s: float, model: ModelCard, load: Load
) -> float:
    """Tokens/s through `layers` held layers, given this machine's speed (layer-tokens/s) and the mean layer time elsewhere."""
    here_s = layers / speed
    share = here_s / (here_s + (model.layers - layers) * mean_s)
    entries = int(load.kv_high_water * profile.kv_tokens(layers))
    requests = entries / (load.input_tokens + load.output_tokens) * share
    prompts = requests / load.output_tokens
    if prompts > 1:
        tokens = load.input_tokens + load.output_tokens
        return tokens / (layers * (profile.prompt_s(load.input_tokens) + profile.decode_s(load.output_tokens)))
    prompt_tokens, decodes, batches = round(prompts * load.input_tokens), round(requests), 1 / prompts
    seconds = profile.prompt_s(int(prompt_tokens * batches)) + batches * profile.decode_s(decodes)
    return batches * (prompt_tokens + decodes) / (layers * seconds)
