"""Every operator of the registry: the C++ form against torch eager and torch.compile, weights and rows out of cache, interleaved.

    python -m benchmarks.kernels.operators [--quick] [--threads 2]

Shapes are those of one decode step of a Llama-shaped model with 0.5 B parameters at batch 8 (linears: 1 row), or what the operator's users
bring (sorting: a million keys). Both baselines are torch: eager calls of the plain formula, and the same formula under torch.compile (dynamic
shapes off). Operators whose result depends on the data in ways torch.compile cannot follow (sorting, experts, paged attention) have eager only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Report, arguments, compare, say
from benchmarks.kernels.linear import SETTLE_S
from wager.kernels import native, reference, registry
from wager.kernels.native_linear import NativeLinear

COPIES_BYTES = 48 << 20


@dataclass(frozen=True)
class Workload:
    """`make()` gives the inputs of a call, many times over so that they leave the cache; `compiles`: torch.compile follows the formula."""

    name: str
    make: Callable[[int], tuple[Any, ...]]
    torch_form: Callable[..., Any]
    ours: Callable[..., Any]
    nbytes: int
    compiles: bool = True


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def workloads(quick: bool) -> list[Workload]:
    width, inner, vocabulary, batch = (256, 704, 8000, 8) if quick else (1024, 2816, 64000, 8)
    return [
        *_linears(width, inner),
        *_rows(width, inner, batch),
        *_attention(quick),
        *_data(quick, width, vocabulary, batch),
    ]


def _linears(width: int, inner: int) -> list[Workload]:
    def made(dtype: torch.dtype, outputs: int):
        def make(seed: int) -> tuple[Any, ...]:
            weight = (randn(seed, outputs, width) * 0.02).to(dtype)
            return randn(seed + 1, 1, width), weight, NativeLinear(weight, None)

        return make

    call = lambda x, weight, packed: packed(x)
    gated = lambda x, weight, packed: packed.gated(x, "silu")
    return [
        Workload("linear float32, 1 row", made(torch.float32, inner), lambda x, w, p: torch.nn.functional.linear(x, w), call, 4 * width * inner),
        Workload(
            "linear bfloat16, 1 row", made(torch.bfloat16, inner),
            lambda x, w, p: torch.nn.functional.linear(x.bfloat16(), w), call, 2 * width * inner,
        ),
        Workload(
            "gate, up, silu*mul bfloat16, 1 row", made(torch.bfloat16, 2 * inner),
            lambda x, w, p: reference.silu_mul(torch.nn.functional.linear(x.bfloat16(), w)), gated, 4 * width * inner,
        ),
    ]  # fmt: skip


def _rows(width: int, inner: int, batch: int) -> list[Workload]:
    weight, bias, angles = randn(0, width), randn(1, width), randn(2, batch, 32)
    cos, sin, slots = angles.cos(), angles.sin(), torch.arange(batch)
    pools = [torch.zeros(64, 4, 64) for _ in range(2)]
    row, heads = (lambda s: (randn(s, batch, width), randn(s + 1, batch, width))), lambda s: (randn(s, batch, 24, 64),)
    both = lambda form, name, *rest: lambda *inputs: getattr(form, name)(*inputs, *rest)
    written = lambda form: lambda x: form.rope_write(x[:, :16], x[:, 16:20], x[:, 20:], cos, sin, *pools, slots)
    one = lambda form, name, *rest: lambda x, r: getattr(form, name)(x, *rest)
    size = 4 * batch * width
    return [
        Workload("RMSNorm", row, one(reference, "rms_norm", weight, 1e-6), one(native, "rms_norm", weight, 1e-6), size),
        Workload("RMSNorm + residual", row, both(reference, "rms_norm_residual", weight, 1e-6), both(native, "rms_norm_residual", weight, 1e-6), 2 * size),
        Workload("LayerNorm", row, one(reference, "layer_norm", weight, bias, 1e-5), one(native, "layer_norm", weight, bias, 1e-5), size),
        Workload("LayerNorm + residual", row, both(reference, "layer_norm_residual", weight, bias, 1e-5), both(native, "layer_norm_residual", weight, bias, 1e-5), 2 * size),
        Workload("silu*mul", lambda s: (randn(s, batch, 2 * inner),), both(reference, "silu_mul"), both(native, "silu_mul"), 8 * batch * inner),
        Workload("gelu*mul", lambda s: (randn(s, batch, 2 * inner),), both(reference, "gelu_tanh_mul"), both(native, "gelu_tanh_mul"), 8 * batch * inner),
        Workload("rope", heads, both(reference, "apply_rope", cos, sin), both(native, "apply_rope", cos, sin), 4 * batch * 24 * 64),
        Workload("rope + KV write", heads, written(reference), written(native), 4 * batch * 24 * 64, compiles=False),
    ]  # fmt: skip


def _attention(quick: bool) -> list[Workload]:
    context, size, heads, groups, dim = (256 if quick else 4096), 16, 16, 4, 64
    blocks = context // size + 1
    table = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).to(torch.int32)[None]
    rest = (
        table,
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([context], dtype=torch.int32),
        torch.tensor([context]),
        size,
        0.125,
    )

    def make(seed: int) -> tuple[Any, ...]:
        return randn(seed, 1, heads, dim), *(randn(seed + i, blocks * size, groups, dim) for i in (1, 2))

    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Torch's fused attention over the gathered pages, heads of a group as query rows."""
        index = (table[0].long()[:, None] * size + torch.arange(size)).flatten()[: context + 1]
        rows = q.view(1, groups, heads // groups, dim)
        keys, values = (t[index].transpose(0, 1)[None] for t in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(rows, keys, values, scale=0.125).reshape(1, heads, dim)

    ours = lambda q, k, v: native.paged_attention(q, k, v, *rest)
    return [
        Workload(
            f"paged attention, {context} cached", make, grouped, ours, 8 * blocks * size * groups * dim, compiles=False
        )
    ]


def _data(quick: bool, width: int, vocabulary: int, batch: int) -> list[Workload]:
    keys, count = (20_000 if quick else 1_000_000), 16
    filters = [torch.full((batch,), v) for v in (0.8, 0.0)] + [torch.full((batch,), 50), torch.full((batch,), 0.95)]
    plain = [torch.ones(batch), torch.zeros(batch), torch.zeros(batch, dtype=torch.int64), torch.ones(batch)]
    table = (randn(3, vocabulary, width) * 0.02).bfloat16()
    sample = lambda form, columns: lambda logits, u: form.sample(logits, *columns, u)
    logits = lambda s: (
        2 * randn(s, batch, vocabulary),
        torch.rand(batch, dtype=torch.float64, generator=torch.Generator().manual_seed(s)),
    )
    drawn = lambda s: (torch.randint(100_000, (keys,), generator=torch.Generator().manual_seed(s)),)
    rows = lambda s: (
        randn(s, keys // 16, 64),
        torch.randint(500, (keys // 16,), generator=torch.Generator().manual_seed(s)),
    )
    summed = lambda values, by: values.new_zeros(500, 64).index_add(0, by, values)
    moe = _moe(width, count)
    return [
        Workload("embedding, bfloat16 table", lambda s: (torch.randint(vocabulary, (512,), generator=torch.Generator().manual_seed(s)),), lambda ids: reference.embedding(ids, table), lambda ids: native.embedding(ids, table), 2 * 512 * width),
        Workload("sampling, plain", logits, sample(reference, plain), sample(native, plain), 4 * batch * vocabulary),
        Workload("sampling, top-k 50, top-p 0.95", logits, sample(reference, filters), sample(native, filters), 4 * batch * vocabulary),
        Workload(f"stable sort of {keys} keys", drawn, reference.sort_by_key, native.sort_by_key, 8 * keys, compiles=False),
        Workload("segment sum by key", rows, summed, lambda v, by: registry.reduce_by_key(v, by, 500), 16 * keys, compiles=False),
        Workload(f"{count} experts, 2 chosen, batch {batch}", moe[0], moe[1], moe[2], COPIES_BYTES, compiles=False),
    ]  # fmt: skip


def _moe(width: int, count: int) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    inner = width // 2
    weights = [((randn(2 * e, 2 * inner, width) * 0.02), (randn(2 * e + 1, width, inner) * 0.02)) for e in range(count)]
    packed = [(NativeLinear(g, None), NativeLinear(d, None)) for g, d in weights]
    fused = native.pack_experts(packed, "silu")
    assert fused is not None
    linear = torch.nn.functional.linear
    networks: list[Any] = [lambda x, g=g, d=d: linear(reference.silu_mul(linear(x, g)), d) for g, d in weights]

    def make(seed: int) -> tuple[Any, ...]:
        weights_TC, chosen_TC = randn(seed, 8, count).softmax(-1).topk(2)
        return randn(seed + 1, 8, width), weights_TC, chosen_TC, torch.zeros(8, width)

    return make, lambda x, w, c, y: reference.experts(x, w, c, y, networks), fused


def contender(call: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> Callable[[], float]:
    """Mean seconds of a call while the copies of the inputs take turns; before it other contenders' threads fall asleep and its own wake."""
    turns = cycle(inputs)
    calls = max(1, min(len(inputs), 16))

    def run() -> float:
        chosen = [next(turns) for _ in range(calls)]
        time.sleep(SETTLE_S)
        call(*next(turns))
        start = time.perf_counter()
        for arguments_ in chosen:
            call(*arguments_)
        return (time.perf_counter() - start) / calls

    return run


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contender")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows, facts = [], {"threads": chosen.threads}
    with torch.inference_mode():
        for work in workloads(chosen.quick):
            copies = max(2, min(64, COPIES_BYTES // max(1, work.nbytes) + 1))
            inputs = [work.make(3 * i) for i in range(copies)]
            contenders = {"torch eager": contender(work.torch_form, inputs)}
            if work.compiles and not chosen.quick:
                contenders["torch.compile"] = contender(torch.compile(work.torch_form, dynamic=False), inputs)
            contenders["wager"] = contender(work.ours, inputs)
            made = compare(work.name, contenders, repeats=chosen.repeats or (3 if chosen.quick else 9), progress=say)
            rows += made
            if len(made) == 2:
                facts[f"{work.name}: against torch.compile"] = round(made[0].ours_value / made[1].ours_value, 3)
    report = Report("kernels", "operators", rows, facts)
    print(report.table())
    if not chosen.quick:
        say(f"saved {report.save()}")


if __name__ == "__main__":
    main()
