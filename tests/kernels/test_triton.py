"""The Triton forms against the reference: on a GPU where there is one, else in a process of their own under Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
INSIDE = os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
present = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@present
@pytest.mark.skipif(INSIDE, reason="already inside the interpreter or on a GPU")
def test_under_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist",
         "--override-ini=addopts=--import-mode=importlib", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


inside = pytest.mark.skipif(not INSIDE, reason="runs inside test_under_the_interpreter")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@present
@inside
def test_norms_gates_and_rotation():
    from wager.kernels import reference, triton_forms

    for rows, width in ((0, 8), (3, 8), (5, 100)):
        x, residual, weight = randn(1, rows, width), randn(2, rows, width), randn(3, width)
        torch.testing.assert_close(
            triton_forms.rms_norm(x, weight, 1e-5, 1.0), reference.rms_norm(x, weight, 1e-5, 1.0)
        )
        got, want = (form.rms_norm_residual(x, residual, weight, 1e-5) for form in (triton_forms, reference))
        torch.testing.assert_close(got, want)
        wide = 3 * randn(4, rows, 2 * width)
        for name in ("silu_mul", "gelu_tanh_mul"):
            torch.testing.assert_close(
                getattr(triton_forms, name)(wide), getattr(reference, name)(wide), atol=1e-5, rtol=1e-5
            )
    x, angles = randn(5, 7, 10, 24)[:, 2:5], randn(6, 7, 8)
    for interleaved in (False, True):
        got, want = (form.apply_rope(x, angles.cos(), angles.sin(), interleaved) for form in (triton_forms, reference))
        torch.testing.assert_close(got, want)


@present
@inside
def test_writes():
    from wager.kernels import reference, triton_forms

    # values that bfloat16 holds: the interpreter truncates where a GPU rounds to nearest
    new, slots = randn(7, 6, 2, 16).bfloat16().float(), torch.tensor([3, -1, 0, 9, 5, -1], device=DEVICE)
    pools = [torch.zeros(12, 2, 16, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    for form, pool in zip((triton_forms, reference), pools, strict=True):
        form.write_kv(new, pool, slots)
    assert torch.equal(*pools)


@present
@inside
@pytest.mark.parametrize("mode", [None, "int8", "int4", "nf4", "w8a8", "w4a8", "w16a16"])
@pytest.mark.parametrize("rows,inputs,outputs", [(1, 64, 64), (5, 96, 40), (20, 130, 70)])
def test_linears(mode, rows, inputs, outputs):
    from wager.kernels import triton_forms
    from wager.kernels.registry import ReferenceLinear

    x, weight, bias = randn(0, rows, inputs), randn(1, outputs, inputs) * 0.2, randn(2, outputs)
    got = triton_forms.TritonLinear(weight, bias, mode)(x)
    torch.testing.assert_close(got, ReferenceLinear(weight, bias, mode)(x), atol=2e-4, rtol=2e-4)


@present
@inside
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention(window, tree, sinks):
    from tests.kernels.test_native import build
    from wager.kernels import reference, triton_forms

    case = dict(
        spans=[(40, 1), (0, 5), (13, 7)], heads=6, kv_heads=2, key_dim=20, value_dim=12, block_size=4, window=window,
        softcap=5.0 if tree else None, dtype=torch.float32, latent=False, tree=tree, seed=3,
    )  # fmt: skip
    arguments = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in build(case)]
    sink = randn(5, 6) if sinks else None
    got, want = (form.paged_attention(*arguments, sink) for form in (triton_forms, reference))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
