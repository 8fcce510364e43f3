"""The Triton forms on a GPU: right on the shapes of models, and how near they come to the memory's speed.

    python -m benchmarks.kernels.gpu [--quick] [--sections numerics,linear,attention,operators] [--sweep]

numerics: every form against the torch reference in higher precision, relative error of the whole result; a failure is printed and counted.
linear: a decode step's products of an 8B model (Llama 3), GB/s of weights read, against a device copy (bytes read plus written) and against
cuBLAS, in the same rounds. attention, operators: against SDPA over gathered keys and torch eager, captured as graphs like ours.
--sweep tries tiles first, prints tables for `wager/kernels/triton_tiles.py` and goes on with the best.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_timing import copies_of, copy_contender, device_tag, graphed, rate, run_sections
from benchmarks.harness import Report, arguments
from benchmarks.kernels.gpu_bench import BITS, MODES, Bench, paged
from benchmarks.kernels.gpu_numerics import numerics
from benchmarks.kernels.gpu_sweep import sweep


def linear(bench: Bench) -> None:
    from wager.kernels.triton_linear import TritonLinear

    copy = copy_contender(1 << (28 if bench.quick else 30))
    for name, (outputs, inputs, gated) in bench.shapes.items():
        count = copies_of(outputs * inputs)
        weights = [bench.randn(outputs, inputs, std=0.02) for _ in range(max(1, count // 2))]
        packed = {
            m: [
                TritonLinear(w, None, q)
                for w in (weights * 4)[: copies_of(outputs * inputs * BITS[m] // 8)][: 4 * len(weights)]
            ]
            for m, q in MODES.items()
        }
        for tokens in (1, 8) if bench.quick else (1, 2, 4, 8, 16):
            x = bench.randn(tokens, inputs)
            seconds = {
                m: graphed([partial(one.gated, x, "silu") if gated else partial(one, x) for one in all_])
                for m, all_ in packed.items()
            }
            torch_form = [partial(gated_torch if gated else F.linear, x, w) for w in weights]
            cublas = graphed(torch_form)
            label = f"{name} {outputs}x{inputs} T={tokens}"
            rates = {m: rate(s, packed[m][0].nbytes) for m, s in seconds.items()}
            bench.compare(label, {"copy": copy, "cuBLAS bf16": rate(cublas, weights[0].nbytes), **rates}, "GB/s", True)
            bench.compare(f"{label}, time", {"cuBLAS bf16": cublas, **seconds})
        del weights, packed
        torch.cuda.empty_cache()


def attention(bench: Bench) -> None:
    from wager.kernels import triton_attention

    for name, spans in {
        "1 x 256": [(255, 1)], "1 x 8192": [(8191, 1)], "64 x 256": [(255, 1)] * 64, "64 x 1024": [(1023, 1)] * 64,
    }.items():  # fmt: skip
        keys = spans[0][0] + 1
        nbytes = len(spans) * keys * 8 * 128 * 2 * 2
        sets = [paged(bench, torch.bfloat16, spans, 32, 8, 128) for _ in range(copies_of(nbytes))]
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
        rows_made = bench.compare(f"attention {name}", contenders)
        bench.report.facts[f"attention {name} GB_s"] = nbytes / rows_made[0].ours_value / 1e9
        print(f"  {nbytes / rows_made[0].ours_value / 1e9:.0f} GB/s of keys and values", flush=True)
        del sets, gathered, contenders


def operators(bench: Bench) -> None:
    from wager.kernels import reference, triton_forms

    forms = {"torch eager": reference, "triton": triton_forms}
    for tokens in (1, 64):
        x, residual, weight = bench.randn(tokens, 4096), bench.randn(tokens, 4096), bench.randn(4096)
        gate_up = bench.randn(tokens, 28672)
        qkv, angles = bench.randn(tokens, 48, 128), bench.randn(tokens, 64, dtype=torch.float32)
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
            bench.compare(f"{name} T={tokens}", {n: graphed([c]) for n, c in both.items()})


def gated_torch(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = F.linear(x, weight).chunk(2, -1)
    return F.silu(gate) * up


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--sections", default="numerics,linear,attention,operators", help="which, in this order")
    parser.add_argument("--sweep", action="store_true", help="look for the best tiles first")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark measures GPU kernels, and torch sees no CUDA device")
    repeats = chosen.repeats or (3 if chosen.quick else 11)
    report = Report("kernels", f"gpu_{device_tag()}", [], {"device": torch.cuda.get_device_name()})
    bench = Bench(chosen.quick, repeats, report)
    sections = {
        section.__name__: partial(section, bench) for section in (sweep, numerics, linear, attention, operators)
    }
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
