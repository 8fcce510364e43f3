"""Every Triton form against the torch reference in higher precision, on the shapes of models."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import say
from benchmarks.kernels.gpu_bench import Bench, paged

TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float32: 1e-4}


def numerics(bench: Bench) -> None:
    """All checks once in threads, for compiling is most of the time; what fails there is judged by a second run on its own."""
    checks = {
        f"{name} {str(dtype).removeprefix('torch.')}": (check, 2e-2 if "a8" in name else TOLERANCE[dtype])
        for dtype in (torch.bfloat16, torch.float32)
        for name, check in checks_of(bench, dtype).items()
    }
    error_of(checks["embedding bfloat16"][0])  # makes the driver ready before threads ask for it
    with ThreadPoolExecutor(12) as pool:
        results = dict(zip(checks, pool.map(error_of, [check for check, _ in checks.values()]), strict=True))
    torch.cuda.synchronize()
    for label, (check, bound) in checks.items():
        if not below(results[label], bound):
            say(f"again: {label} was {results[label]}")
            results[label] = error_of(check)
            if not below(results[label], bound):
                print(f"FAIL {label}: {results[label]} (bound {bound})", flush=True)
    bad = [label for label, (_, bound) in checks.items() if not below(results[label], bound)]
    bench.report.facts["numerics"] = {"checks": len(checks), "failed": bad, "relative errors": results}
    print(f"numerics: {len(checks)} checks, {len(bad)} failed", flush=True)


def checks_of(bench: Bench, dtype: torch.dtype) -> dict[str, Callable[[], tuple[list[Tensor], list[Tensor]]]]:
    made: dict[str, Callable[[], tuple[list[Tensor], list[Tensor]]]] = {}
    for mode in (None, "int8", "int4", "nf4", "w8a8", "w4a8"):
        for outputs, inputs in ((1024, 4096), (512, 14336), (300, 1000)):
            for tokens in (1, 8, 100):
                kinds = ("plain", "bias", "add", "gated", "normed") if tokens == 1 and inputs != 14336 else ("plain",)
                for kind in ("plain",) if mode in ("w8a8", "w4a8") else kinds:
                    name = f"linear {mode} {outputs}x{inputs} T={tokens} {kind}"
                    made[name] = partial(linear_check, bench, dtype, mode, outputs, inputs, tokens, kind)
    for rows, width in ((1, 4096), (64, 4096), (5, 1000)):
        made[f"norms {rows}x{width}"] = partial(norm_check, bench, dtype, rows, width)
    for tokens, pairs in ((1, 64), (37, 32)):
        made[f"rope and write T={tokens} R={pairs}"] = partial(rope_check, bench, dtype, tokens, pairs)
    for name, spans in {
        "decode 1x200": [(200, 1)], "decode 1x5000": [(5000, 1)], "decode 40x300": [(300 - i, 1) for i in range(40)],
        "prefill": [(0, 130), (64, 33)], "mixed": [(700, 1), (0, 50), (31, 3)],
    }.items():  # fmt: skip
        for window in (None, 100):
            made[f"attention {name} window={window}"] = partial(attention_check, bench, dtype, spans, window)
    made["embedding"] = partial(embedding_check, bench, dtype)
    if dtype == torch.float32:
        made["sampling"] = partial(sampling_check, bench)
        made["sort and reduce"] = partial(sort_check, bench)
    return made


def linear_check(bench: Bench, dtype: torch.dtype, mode: str | None, outputs: int, inputs: int, tokens: int, kind: str):
    from wager.kernels import reference
    from wager.kernels.fused import Norm
    from wager.kernels.quantize import quantize, round_activations
    from wager.kernels.triton_linear import TritonLinear

    weight, x = bench.randn(outputs, inputs, dtype=dtype, std=0.02), bench.randn(tokens, inputs, dtype=dtype)
    bias = bench.randn(outputs, dtype=dtype) if kind == "bias" else None
    linear = TritonLinear(weight, bias, mode)
    exact = weight.float() if mode is None else quantize(weight, mode).dequantized()

    def want(value: Tensor) -> Tensor:
        rounded = value.float() if mode is None else round_activations(value.to(dtype), mode)
        return F.linear(rounded, exact, None if bias is None else bias.float())

    if kind == "add":
        residual = bench.randn(tokens, outputs, dtype=dtype)
        return [linear.add(x, residual)], [residual.float() + want(x)]
    if kind == "gated":
        return [linear.gated(x, "silu")], [reference.silu_mul(want(x))]
    if kind == "normed":
        norm = Norm(bench.randn(inputs, dtype=dtype), 1e-5)
        normed = reference.rms_norm(x.float(), norm.weight_D.float(), 1e-5)
        return [linear.normed(x, norm, "silu")], [reference.silu_mul(want(normed))]
    return [linear(x)], [want(x)]


def norm_check(bench: Bench, dtype: torch.dtype, rows: int, width: int):
    from wager.kernels import reference, triton_forms

    x, residual, weight, bias = (
        bench.randn(*s, dtype=dtype) for s in ((rows, width), (rows, width), (width,), (width,))
    )
    got, want = [], []
    for form, out, cast in ((triton_forms, got, lambda t: t), (reference, want, lambda t: t.float())):
        a, r, w, b = map(cast, (x, residual, weight, bias))
        out += [form.rms_norm(a, w, 1e-5), *form.rms_norm_residual(a, r, w, 1e-5), form.layer_norm(a, w, b, 1e-5)]
        out += [*form.layer_norm_residual(a, r, w, b, 1e-5), form.silu_mul(a), form.gelu_tanh_mul(a)]
    return got, want


def rope_check(bench: Bench, dtype: torch.dtype, tokens: int, pairs: int):
    from wager.kernels import reference, triton_forms

    qkv = bench.randn(tokens, 48, 128, dtype=dtype)
    angles = bench.randn(tokens, pairs, dtype=torch.float32)
    slots = torch.randperm(128, device="cuda")[:tokens]
    if tokens > 1:
        slots[-1] = -1
    made: list[list[Tensor]] = []
    for form in (triton_forms, reference):
        q, k, v = qkv.split((32, 8, 8), dim=1)
        pools = [torch.zeros(128, 8, 128, dtype=dtype, device="cuda") for _ in range(2)]
        turned = form.rope_write(q, k, v, angles.cos(), angles.sin(), *pools, slots)
        made.append([turned, *pools, form.apply_rope(q, angles.cos(), angles.sin(), True)])
    return made[0], made[1]


def attention_check(bench: Bench, dtype: torch.dtype, spans: list[tuple[int, int]], window: int | None):
    from wager.kernels import reference, triton_forms

    arguments = paged(bench, dtype, spans, 32, 8, 128)
    q, k, v, *rest = arguments
    tables, starts, contexts, positions = rest
    where = (tables, starts, contexts, positions, 16, 128**-0.5, window)
    got = triton_forms.paged_attention(q, k, v, *where)
    want = reference.paged_attention(q.float(), k.float(), v.float(), *where)
    return [got], [want]


def embedding_check(bench: Bench, dtype: torch.dtype):
    from wager.kernels import triton_forms

    table, ids = bench.randn(5000, 4096, dtype=dtype), torch.randint(5000, (17,), device="cuda")
    return [triton_forms.embedding(ids, table)], [table[ids]]


def sampling_check(bench: Bench):
    from wager.kernels import reference, triton_forms

    logits, n = 3 * bench.randn(6, 4000, dtype=torch.float32), 6
    columns = [torch.tensor(c, device="cuda") for c in
               ([0.7, 1.0, 1.3, 1.0, 1.0, 0.5], [0.0, 0.05, 0.0, 0.0, 0.0, 0.1], [0, 0, 50, 0, 9, 0], [1.0, 1.0, 1.0, 0.9, 0.5, 0.8])]  # fmt: skip
    uniforms = torch.rand(n, dtype=torch.float64, device="cuda")
    weights = [f.likely_weights(logits, *columns) for f in (triton_forms, reference)]
    drawn = [f.sample(logits, *columns, uniforms).float() for f in (triton_forms, reference)]
    return [weights[0], drawn[0]], [weights[1], drawn[1]]


def sort_check(bench: Bench):
    from wager.kernels import reference, triton_forms

    keys, values = torch.randint(7, (1000,), device="cuda"), bench.randn(1000, 64, dtype=torch.float32)
    order = reference.sort_by_key(keys)
    starts = reference.segment_starts(keys[order], 9)
    both = (triton_forms, reference)
    made = [[f.sort_by_key(keys).float(), f.segment_reduce(values, starts, "mean", order)] for f in both]
    return made[0], made[1]


def error_of(check: Callable[[], tuple[list[Tensor], list[Tensor]]]) -> float | str:
    """The largest relative error, or what went wrong."""
    try:
        with torch.inference_mode():
            error = max(relative(got, want) for got, want in zip(*check(), strict=True))
        return error if math.isfinite(error) else str(error)
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem)[:300]}"


def below(error: float | str, bound: float) -> bool:
    return isinstance(error, float) and error < bound


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    assert got.shape == want.shape, (got.shape, want.shape)
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12))
