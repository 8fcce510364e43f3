"""The Triton forms on a GPU: right on the shapes of models, and how near they come to the memory's speed.

    python -m benchmarks.kernels.gpu [--quick] [--sections numerics,linear,attention,operators] [--sweep]

numerics: every form against the torch reference in higher precision, relative error of the whole result; a failure is printed and counted.
linear: a decode step's products of an 8B model (Llama 3), GB/s of weights read, against a device copy (bytes read plus written) and against
cuBLAS, in the same rounds. attention, operators: against SDPA over gathered keys and torch eager, captured as graphs like ours.
--sweep tries tiles first, prints tables for `wager/kernels/triton_tiles.py` and goes on with the best.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_timing import copies_of, copy_contender, device_tag, graphed, rate, run_sections
from benchmarks.harness import Report, arguments, compare, say

SHAPES = {  # outputs, inputs, whether it is a stacked gate and up projection
    "qkv": (6144, 4096, False),
    "output": (4096, 4096, False),
    "gate-up": (28672, 4096, True),
    "down": (4096, 14336, False),
    "head": (128256, 4096, False),
}
MODES: dict[str, str | None] = {"bf16": None, "int8": "int8", "int4": "int4"}
BITS = {"bf16": 16, "int8": 8, "int4": 4}
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float32: 1e-4}


class Bench:
    def __init__(self, quick: bool, repeats: int, report: Report):
        self.quick, self.repeats, self.report = quick, repeats, report
        self.shapes = {k: v for k, v in SHAPES.items() if not quick or k in ("output", "gate-up")}
        self.generator = torch.Generator("cuda").manual_seed(0)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16, std: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda").normal_(0.0, std, generator=self.generator)

    def compare(self, workload: str, contenders: dict[str, Callable[[], float]], unit: str = "s", up: bool = False):
        rows = compare(
            workload, contenders, repeats=self.repeats, warmup=1, unit=unit, higher_is_better=up, progress=None
        )
        self.report.rows += rows
        each = "; ".join(f"{row.ours} {row.ours_value:.4g} {row.ratio:.3f}x" for row in rows)
        base = f"{rows[0].baseline} {rows[0].baseline_value:.4g} {unit}"
        print(f"{workload}: {base}; {each}; noise {rows[0].aa_noise:.1%}", flush=True)
        return rows

    # -- numerics ----------------------------------------------------------------------------------------------------------------

    def numerics(self) -> None:
        """All checks once in threads, for compiling is most of the time; what fails there is judged by a second run on its own."""
        checks = {
            f"{name} {str(dtype).removeprefix('torch.')}": (check, 2e-2 if "a8" in name else TOLERANCE[dtype])
            for dtype in (torch.bfloat16, torch.float32)
            for name, check in self.checks(dtype).items()
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
        self.report.facts["numerics"] = {"checks": len(checks), "failed": bad, "relative errors": results}
        print(f"numerics: {len(checks)} checks, {len(bad)} failed", flush=True)

    def checks(self, dtype: torch.dtype) -> dict[str, Callable[[], tuple[list[Tensor], list[Tensor]]]]:
        made: dict[str, Callable[[], tuple[list[Tensor], list[Tensor]]]] = {}
        for mode in (None, "int8", "int4", "nf4", "w8a8", "w4a8"):
            for outputs, inputs in ((1024, 4096), (512, 14336), (300, 1000)):
                for tokens in (1, 8, 100):
                    kinds = (
                        ("plain", "bias", "add", "gated", "normed") if tokens == 1 and inputs != 14336 else ("plain",)
                    )
                    for kind in ("plain",) if mode in ("w8a8", "w4a8") else kinds:
                        name = f"linear {mode} {outputs}x{inputs} T={tokens} {kind}"
                        made[name] = partial(self.linear_check, dtype, mode, outputs, inputs, tokens, kind)
        for rows, width in ((1, 4096), (64, 4096), (5, 1000)):
            made[f"norms {rows}x{width}"] = partial(self.norm_check, dtype, rows, width)
        for tokens, pairs in ((1, 64), (37, 32)):
            made[f"rope and write T={tokens} R={pairs}"] = partial(self.rope_check, dtype, tokens, pairs)
        for name, spans in {
            "decode 1x200": [(200, 1)], "decode 1x5000": [(5000, 1)], "decode 40x300": [(300 - i, 1) for i in range(40)],
            "prefill": [(0, 130), (64, 33)], "mixed": [(700, 1), (0, 50), (31, 3)],
        }.items():  # fmt: skip
            for window in (None, 100):
                made[f"attention {name} window={window}"] = partial(self.attention_check, dtype, spans, window)
        made["embedding"] = partial(self.embedding_check, dtype)
        if dtype == torch.float32:
            made["sampling"] = self.sampling_check
            made["sort and reduce"] = self.sort_check
        return made

    def linear_check(self, dtype: torch.dtype, mode: str | None, outputs: int, inputs: int, tokens: int, kind: str):
        from wager.kernels import reference
        from wager.kernels.fused import Norm
        from wager.kernels.quantize import quantize, round_activations
        from wager.kernels.triton_linear import TritonLinear

        weight, x = self.randn(outputs, inputs, dtype=dtype, std=0.02), self.randn(tokens, inputs, dtype=dtype)
        bias = self.randn(outputs, dtype=dtype) if kind == "bias" else None
        linear = TritonLinear(weight, bias, mode)
        exact = weight.float() if mode is None else quantize(weight, mode).dequantized()

        def want(value: Tensor) -> Tensor:
            rounded = value.float() if mode is None else round_activations(value.to(dtype), mode)
            return F.linear(rounded, exact, None if bias is None else bias.float())

        if kind == "add":
            residual = self.randn(tokens, outputs, dtype=dtype)
            return [linear.add(x, residual)], [residual.float() + want(x)]
        if kind == "gated":
            return [linear.gated(x, "silu")], [reference.silu_mul(want(x))]
        if kind == "normed":
            norm = Norm(self.randn(inputs, dtype=dtype), 1e-5)
            normed = reference.rms_norm(x.float(), norm.weight_D.float(), 1e-5)
            return [linear.normed(x, norm, "silu")], [reference.silu_mul(want(normed))]
        return [linear(x)], [want(x)]

    def norm_check(self, dtype: torch.dtype, rows: int, width: int):
        from wager.kernels import reference, triton_forms

        x, residual, weight, bias = (
            self.randn(*s, dtype=dtype) for s in ((rows, width), (rows, width), (width,), (width,))
        )
        got, want = [], []
        for form, out, cast in ((triton_forms, got, lambda t: t), (reference, want, lambda t: t.float())):
            a, r, w, b = map(cast, (x, residual, weight, bias))
            out += [form.rms_norm(a, w, 1e-5), *form.rms_norm_residual(a, r, w, 1e-5), form.layer_norm(a, w, b, 1e-5)]
            out += [*form.layer_norm_residual(a, r, w, b, 1e-5), form.silu_mul(a), form.gelu_tanh_mul(a)]
        return got, want

    def rope_check(self, dtype: torch.dtype, tokens: int, pairs: int):
        from wager.kernels import reference, triton_forms

        qkv = self.randn(tokens, 48, 128, dtype=dtype)
        angles = self.randn(tokens, pairs, dtype=torch.float32)
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

    def attention_check(self, dtype: torch.dtype, spans: list[tuple[int, int]], window: int | None):
        from wager.kernels import reference, triton_forms

        arguments = paged(self, dtype, spans, 32, 8, 128)
        q, k, v, *rest = arguments
        tables, starts, contexts, positions = rest
        where = (tables, starts, contexts, positions, 16, 128**-0.5, window)
        got = triton_forms.paged_attention(q, k, v, *where)
        want = reference.paged_attention(q.float(), k.float(), v.float(), *where)
        return [got], [want]

    def embedding_check(self, dtype: torch.dtype):
        from wager.kernels import triton_forms

        table, ids = self.randn(5000, 4096, dtype=dtype), torch.randint(5000, (17,), device="cuda")
        return [triton_forms.embedding(ids, table)], [table[ids]]

    def sampling_check(self):
        from wager.kernels import reference, triton_forms

        logits, n = 3 * self.randn(6, 4000, dtype=torch.float32), 6
        columns = [torch.tensor(c, device="cuda") for c in
                   ([0.7, 1.0, 1.3, 1.0, 1.0, 0.5], [0.0, 0.05, 0.0, 0.0, 0.0, 0.1], [0, 0, 50, 0, 9, 0], [1.0, 1.0, 1.0, 0.9, 0.5, 0.8])]  # fmt: skip
        uniforms = torch.rand(n, dtype=torch.float64, device="cuda")
        weights = [f.likely_weights(logits, *columns) for f in (triton_forms, reference)]
        drawn = [f.sample(logits, *columns, uniforms).float() for f in (triton_forms, reference)]
        return [weights[0], drawn[0]], [weights[1], drawn[1]]

    def sort_check(self):
        from wager.kernels import reference, triton_forms

        keys, values = torch.randint(7, (1000,), device="cuda"), self.randn(1000, 64, dtype=torch.float32)
        order = reference.sort_by_key(keys)
        starts = reference.segment_starts(keys[order], 9)
        both = (triton_forms, reference)
        made = [[f.sort_by_key(keys).float(), f.segment_reduce(values, starts, "mean", order)] for f in both]
        return made[0], made[1]

    # -- linear ------------------------------------------------------------------------------------------------------------------

    def linear(self) -> None:
        from wager.kernels.triton_linear import TritonLinear

        copy = copy_contender(1 << (28 if self.quick else 30))
        for name, (outputs, inputs, gated) in self.shapes.items():
            count = copies_of(outputs * inputs)
            weights = [self.randn(outputs, inputs, std=0.02) for _ in range(max(1, count // 2))]
            packed = {
                m: [
                    TritonLinear(w, None, q)
                    for w in (weights * 4)[: copies_of(outputs * inputs * BITS[m] // 8)][: 4 * len(weights)]
                ]
                for m, q in MODES.items()
            }
            for tokens in (1, 8) if self.quick else (1, 2, 4, 8, 16):
                x = self.randn(tokens, inputs)
                seconds = {
                    m: graphed([partial(one.gated, x, "silu") if gated else partial(one, x) for one in all_])
                    for m, all_ in packed.items()
                }
                torch_form = [partial(gated_torch if gated else F.linear, x, w) for w in weights]
                cublas = graphed(torch_form)
                label = f"{name} {outputs}x{inputs} T={tokens}"
                rates = {m: rate(s, packed[m][0].nbytes) for m, s in seconds.items()}
                self.compare(
                    label, {"copy": copy, "cuBLAS bf16": rate(cublas, weights[0].nbytes), **rates}, "GB/s", True
                )
                self.compare(f"{label}, time", {"cuBLAS bf16": cublas, **seconds})
            del weights, packed
            torch.cuda.empty_cache()

    def sweep(self) -> None:
        """Try tiles; keep the best of each class in the tables that the rest of the run uses, and print them."""
        from wager.kernels import triton_tiles
        from wager.kernels.triton_linear import SILU, TritonLinear

        found: dict[str, dict[str, Any]] = {}
        capability = torch.cuda.get_device_capability()
        for mode, quantization in MODES.items():
            bits, small = BITS[mode], self.randn(256, 4096, std=0.02)
            tiles, matrix_tiles = vector_candidates(bits), matrix_candidates(bits)
            probe, x1, x8 = TritonLinear(small, None, quantization), self.randn(1, 4096), self.randn(8, 4096)
            jobs = [partial(probe._one, x1, tile=t, gates=g) for t in tiles for g in (0, SILU)]
            compile_all(jobs + [partial(probe._many, x8, t) for t in matrix_tiles])
            for name, (outputs, inputs, gated) in self.shapes.items():
                linears = self.linears(outputs, inputs, bits, quantization)
                kind = triton_tiles.shape_class(outputs // 2 if gated else outputs, inputs, gated)
                x = self.randn(1, inputs)
                vector = partial(best_of, tiles, lambda t, ls=linears, x=x, g=SILU if gated else 0: [
                    partial(one._one, x, tile=t, gates=g) for one in ls])  # fmt: skip
                self.keep(found, f"vector {mode} {name} {kind}", vector(), linears[0].nbytes)
                x = self.randn(8, inputs)
                made = best_of(matrix_tiles, lambda t, ls=linears, x=x: [partial(one._many, x, t) for one in ls])
                if bits == 16:
                    made.append((best_seconds([partial(F.linear, x, one.weight) for one in linears]), None))
                made.sort(key=lambda pair: pair[0])
                self.keep(found, f"matrix {mode} {name} {kind}", made, linears[0].nbytes)
                del linears
        for table, which in ((triton_tiles.VECTOR, "vector"), (triton_tiles.MATRIX, "matrix")):
            known: dict = table.setdefault(capability, {})
            for label, entry in found.items():
                form, mode, _, kind = label.split()
                if form == which:
                    known.setdefault((BITS[mode], kind), entry["tile"])
            print(f"{which.upper()}[{capability}] = {known}", flush=True)
        self.report.facts["sweep"] = {k: {**v, "tile": str(v["tile"])} for k, v in found.items()}

    def linears(self, outputs: int, inputs: int, bits: int, quantization: str | None) -> list[Any]:
        from wager.kernels.triton_linear import TritonLinear

        weight = self.randn(outputs, inputs, std=0.02)
        made = [
            TritonLinear(weight.clone(), None, quantization) for _ in range(copies_of(outputs * inputs * bits // 8))
        ]
        return made

    def keep(self, found: dict, label: str, timed: list[tuple[float, Any]], nbytes: int) -> None:
        seconds, tile = timed[0]
        found[label] = {"tile": tile, "GB_s": nbytes / seconds / 1e9}
        short = "; ".join(f"{nbytes / s / 1e9:.0f} {brief(t)}" for s, t in timed[:4])
        print(f"{label}: {short}; worst {nbytes / timed[-1][0] / 1e9:.0f} GB/s", flush=True)

    # -- attention and operators -------------------------------------------------------------------------------------------------

    def attention(self) -> None:
        from wager.kernels import triton_attention

        for name, spans in {
            "1 x 256": [(255, 1)], "1 x 8192": [(8191, 1)], "64 x 256": [(255, 1)] * 64, "64 x 1024": [(1023, 1)] * 64,
        }.items():  # fmt: skip
            keys = spans[0][0] + 1
            nbytes = len(spans) * keys * 8 * 128 * 2 * 2
            sets = [paged(self, torch.bfloat16, spans, 32, 8, 128) for _ in range(copies_of(nbytes))]
            rows = torch.arange(len(spans), dtype=torch.int32, device="cuda")

            def ours(*where: Any, rows_T: Tensor = rows) -> Tensor:
                return triton_attention.paged_attention(*where, 16, 128**-0.5, spans_T=rows_T)  # type: ignore[call-arg]

            gathered = [
                (
                    q[:, :, None, :],
                    *(p[: len(spans) * keys].view(len(spans), keys, 8, 128).transpose(1, 2).contiguous() for p in kv),
                )
                for q, *kv in (s[:3] for s in sets)
            ]
            sdpa = partial(F.scaled_dot_product_attention, enable_gqa=True)
            contenders = {
                "SDPA": graphed([partial(sdpa, *g) for g in gathered]),
                "paged": graphed([partial(ours, *s) for s in sets]),
            }
            rows_made = self.compare(f"attention {name}", contenders)
            self.report.facts[f"attention {name} GB_s"] = nbytes / rows_made[0].ours_value / 1e9
            print(f"  {nbytes / rows_made[0].ours_value / 1e9:.0f} GB/s of keys and values", flush=True)
            del sets, gathered, contenders

    def operators(self) -> None:
        from wager.kernels import reference, triton_forms

        forms = {"torch eager": reference, "triton": triton_forms}
        for tokens in (1, 64):
            x, residual, weight = self.randn(tokens, 4096), self.randn(tokens, 4096), self.randn(4096)
            gate_up = self.randn(tokens, 28672)
            qkv, angles = self.randn(tokens, 48, 128), self.randn(tokens, 64, dtype=torch.float32)
            q, k, v = qkv.split((32, 8, 8), dim=1)
            pools = [torch.zeros(1024, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
            slots = torch.arange(tokens, device="cuda")
            cos, sin = angles.cos(), angles.sin()

            def eager_rope(q=q, k=k, v=v, cos=cos, sin=sin, pools=pools, slots=slots) -> Tensor:
                pools[0].index_copy_(0, slots, reference.apply_rope(k, cos, sin))
                pools[1].index_copy_(0, slots, v)
                return reference.apply_rope(q, cos, sin)

            calls: dict[str, dict[str, Callable[[], object]]] = {
                "norm with residual": {
                    n: partial(f.rms_norm_residual, x, residual, weight, 1e-5) for n, f in forms.items()
                },
                "silu mul": {n: partial(f.silu_mul, gate_up) for n, f in forms.items()},
                "rope and write": {
                    "torch eager": eager_rope,
                    "triton": partial(triton_forms.rope_write, q, k, v, cos, sin, *pools, slots),
                },
            }
            for name, both in calls.items():
                self.compare(f"{name} T={tokens}", {n: graphed([c]) for n, c in both.items()})


def gated_torch(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = F.linear(x, weight).chunk(2, -1)
    return F.silu(gate) * up


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


def paged(
    bench: Bench, dtype: torch.dtype, spans: list[tuple[int, int]], heads: int, kv_heads: int, width: int
) -> tuple[Tensor, ...]:
    """(q, k pool, v pool, tables, span starts, contexts, positions) of spans (context, length), blocks of 16 one after another."""
    blocks = [-(-(c + n) // 16) for c, n in spans]
    total, most = sum(blocks), max(blocks)
    tables = torch.full((len(spans), most), -1, dtype=torch.int32)
    first = 0
    for row, count in enumerate(blocks):
        tables[row, :count] = torch.arange(first, first + count)
        first += count
    lengths = torch.tensor([n for _, n in spans])
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).int()
    positions = torch.cat([torch.arange(c, c + n) for c, n in spans])
    k, v = (bench.randn(total * 16, kv_heads, width, dtype=dtype) for _ in range(2))
    contexts = torch.tensor([c for c, _ in spans], dtype=torch.int32)
    return (
        bench.randn(int(lengths.sum()), heads, width, dtype=dtype), k, v,
        *(t.cuda() for t in (tables, starts, contexts, positions)),
    )  # fmt: skip


def vector_candidates(bits: int) -> list[Any]:
    from wager.kernels.triton_tiles import Tile

    low, high = {16: (16, 64), 8: (32, 128), 4: (64, 256)}[bits]
    stages = (1, 3) if bits == 16 else (1,)
    return [
        Tile(o, i, w, s)
        for o in (1, 2, 4, 8, 16)
        for i in (512, 1024, 2048)
        for w in (2, 4, 8)
        for s in stages
        if low <= o * i // (32 * w) <= high and (s == 1 or (w == 4 and o in (2, 4, 8)))
    ]


def matrix_candidates(bits: int) -> list[Any]:
    from wager.kernels.triton_tiles import Tile

    return [
        Tile(o, i, w, s) for o, w in ((16, 2), (16, 4), (32, 2), (32, 4), (64, 4)) for i in (128, 256) for s in (3, 5)
        if not (o == 64 and i == 256 and s == 5)
    ]  # fmt: skip


def compile_all(jobs: Sequence[Callable[[], object]]) -> None:
    """Run each once, in threads: compiling is most of it, and lets go of the interpreter. What fails here fails again where it is timed."""

    def attempt(job: Callable[[], object]) -> None:
        try:
            job()
        except Exception as problem:
            say(f"not compiled: {type(problem).__name__}: {str(problem)[:200]}")

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(attempt, jobs))
    torch.cuda.synchronize()


def best_seconds(calls: list[Callable[[], object]]) -> float:
    run = graphed(calls)
    return min(run() for _ in range(4))


def best_of(tiles: list[Any], calls: Callable[[Any], list[Callable[[], object]]]) -> list[tuple[float, Any]]:
    """(seconds, tile) of those that run, the fastest first."""
    timed = []
    for tile in tiles:
        try:
            timed.append((best_seconds(calls(tile)), tile))
        except Exception as problem:
            say(f"{tile}: {type(problem).__name__}: {str(problem)[:120]}")
    return sorted(timed, key=lambda pair: pair[0])


def brief(tile: Any) -> str:
    return "cuBLAS" if tile is None else f"{tile.outputs}x{tile.inputs}w{tile.warps}s{tile.stages}"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.set_defaults(device="cuda")
    parser.add_argument("--sections", default="numerics,linear,attention,operators", help="which, in this order")
    parser.add_argument("--sweep", action="store_true", help="look for the best tiles first")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark measures GPU kernels, and torch sees no CUDA device")
    repeats = chosen.repeats or (3 if chosen.quick else 11)
    report = Report("kernels", f"gpu_{device_tag()}", [], {"device": torch.cuda.get_device_name()})
    bench = Bench(chosen.quick, repeats, report)
    sections = {name: getattr(bench, name) for name in ("sweep", "numerics", "linear", "attention", "operators")}
    wanted = (["sweep"] if chosen.sweep else []) + chosen.sections.split(",")
    unknown = set(wanted) - set(sections)
    if unknown:
        parser.error(f"unknown sections {sorted(unknown)}; there are {', '.join(sections)}")
    with torch.inference_mode():
        failed = run_sections(sections, wanted, report)
    print(json.dumps({"failed": failed, "seconds": report.facts["seconds"]}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
