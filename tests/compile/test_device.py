"""Programs on a GPU: sizes chosen for the device, launches, strides, half precision, and the benchmark's record. Under Triton's interpreter."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.compile import gpu
from benchmarks.harness import compare
from tests.interpreter import DEVICE, inside, outside, run_inside
from wager.compile import api, device
from wager.compile.fused import Settings
from wager.compile.mirage.generate import Limits
from wager.compile.prism import search as symbolic
from wager.errors import UsageError
from wager.graph import cuda_timer, published
from wager.graph.lower import triton, triton_source
from wager.graph.program import BlockBuilder, Builder
from wager.graph.trace import trace
from wager.graph.verify.floating import expected, judge

SMALL = gpu.workloads(64)


@outside
def test_under_the_interpreter():
    run_inside(__file__)


@pytest.fixture
def small_device(monkeypatch):
    """A device of four multiprocessors and few launches: the interpreter runs blocks one after another."""
    for name, value in {
        "MULTIPROCESSORS": 4, "LEAST_BLOCKS": 4, "GRIDS": (2, 4, 8), "KEPT_AFTER_FIRST": 1, "WARPS": (4, 8), "STAGES": (1, 2),
    }.items():  # fmt: skip
        monkeypatch.setattr(device, name, value)


class Clock:
    """Runs what it is given, and says that each is slower than the one before."""

    def __init__(self):
        self.ran = itertools.count(1)

    def __call__(self, run) -> float:
        run()
        return float(next(self.ran))


def found_for(load: gpu.Workload, dtype=torch.float16, samples: int = 3, cache: bool = False, clock=None):
    inputs = gpu.draw(load, DEVICE, dtype, 0)
    traced = api.freeze(trace(load.function, inputs))
    settings = Settings("prism", Limits(load.max_block_ops, budget_s=3600), samples, cache=cache)
    return inputs, traced, device.superoptimize(traced, inputs, settings, clock=clock or Clock())


def values(tensors) -> list[np.ndarray]:
    return [t.double().cpu().numpy() for t in tensors]


@inside
@pytest.mark.parametrize("name", list(SMALL))
def test_every_workload_against_float64(name, small_device):
    """Not the winner alone: every member that was timed, in half precision, within the bound for half precision."""
    load = SMALL[name]
    inputs, traced, (run, program, report) = found_for(load)
    assert report.used == "prism" and "proved" in report.reason and len(program.kernels) == 1
    wanted = expected(traced.program, values(inputs), "float16")
    verdict = judge(wanted, values(run(*inputs)))
    assert verdict, verdict
    assert judge(wanted, values([load.function(*inputs)]))  # the bound holds for eager torch too


@inside
def test_members_that_lose_are_right_too(small_device):
    load = SMALL["gated-8"]
    inputs = gpu.draw(load, DEVICE, torch.float16, 1)
    traced = api.freeze(trace(load.function, inputs))
    program = device.absorb(traced.program)
    families = symbolic.search(program, Limits(load.max_block_ops, budget_s=3600)).families
    raced = device.race(device.members(families, program, 2, 3), traced.program, {}, inputs, Clock())
    wanted = expected(traced.program, values(inputs), "float16")
    assert len(raced) > 3  # with other launches
    assert [r.seconds for r in raced] == sorted(r.seconds for r in raced)
    for one in raced[::3]:
        assert judge(wanted, values(one.run(*inputs)))


@inside
def test_a_member_that_fails_is_skipped(small_device):
    load = SMALL["lora-16"]
    inputs = gpu.draw(load, DEVICE, torch.float16, 1)
    traced = api.freeze(trace(load.function, inputs))
    program = device.absorb(traced.program)
    some = device.members(symbolic.search(program, Limits(10, budget_s=3600)).families, program, 2, 4)
    turns = itertools.count()

    def clock(run) -> float:
        if next(turns) == 0:
            raise RuntimeError("out of resource: shared memory")
        return 1.0

    assert len(device.race(some, traced.program, {}, inputs, clock, tune=False)) == len(some) - 1


@inside
def test_an_answer_found_before_is_taken_from_disk(small_device, monkeypatch, tmp_path):
    monkeypatch.setenv("WAGER_CACHE", str(tmp_path / "native"))
    load = SMALL["lora-16"]
    clock = Clock()
    _, _, (_, first, _) = found_for(load, cache=True, clock=clock)
    timed = next(clock.ran)
    again = Clock()
    inputs, traced, (run, second, report) = found_for(load, cache=True, clock=again)
    assert second == first and next(again.ran) == 2 < timed
    assert judge(expected(traced.program, values(inputs), "float16"), values(run(*inputs)))


@inside
def test_other_shapes_are_refused(small_device):
    inputs, _, (run, _, _) = found_for(SMALL["ntrans-8"], samples=1)
    with pytest.raises(UsageError, match="compiled for"):
        run(*(x[:4] for x in inputs))


@inside
def test_strided_arguments_are_read_where_they_lie(rng):
    """Transposed, and every second row of something larger."""
    build = Builder()
    x, w = build.input((8, 32)), build.input((32, 48))
    block = BlockBuilder([(8, 32), (32, 48)], (3, 1, 1), 2)
    tile = block.matmul(block.input(0, (-1, -1, -1), 1), block.input(1, (1, -1, -1), 0))
    block.output(block.accum(tile), (1, -1, -1))
    program = triton.TritonProgram(build.build(*build.kernel([x, w], block.build())))
    left = torch.tensor(rng.standard_normal((16, 32)), dtype=torch.float32, device=DEVICE)[::2]
    right = torch.tensor(rng.standard_normal((48, 32)), dtype=torch.float32, device=DEVICE).T
    assert not left.is_contiguous() and not right.is_contiguous()
    torch.testing.assert_close(program(left, right)[0], left @ right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(program(left.contiguous(), right.contiguous())[0], left @ right, rtol=1e-4, atol=1e-4)


@inside
def test_what_a_kernel_leaves_for_the_next_is_float32():
    """Partial sums of 4096 ones a part would be rounded (or infinite) in half precision."""
    build = Builder()
    x = build.input((2, 131072))
    first = BlockBuilder([(2, 131072)], (4, 1, 1), 4)
    first.output(first.accum_sum(first.input(0, (1, -1, -1), 1)), (1, -1, -1))
    (parts,) = build.kernel([x], first.build())
    second = BlockBuilder([(2, 4)], (1, 1, 1), 1)
    second.output(second.scale(second.accum_sum(second.input(0, (-1, -1, -1))), value=1 / 131072), (-1, -1, -1))
    program = triton.TritonProgram(build.build(*build.kernel([parts], second.build())))
    x = torch.full((2, 131072), 3.0, dtype=torch.float16, device=DEVICE)
    (got,) = program(x)
    assert got.dtype == torch.float16 and got.tolist() == [[3.0], [3.0]]  # a part sums to 98304, more than half holds


def test_the_source_adds_products_in_place_and_keeps_half_operands():
    program = published.gated_mlp(8, 64, 64)
    family = symbolic.search(program, Limits(10, budget_s=3600)).families[0]
    member = device.members([family], program, 2, 1)[0].program.kernels[0]
    text = triton_source.block_source(member.block, program.input_shapes, kinds=[torch.float16] * 3)
    assert text.count("acc=t") == 2 and ".to(tl.float32)" not in text
    compile(text, "kernel", "exec")


@pytest.mark.parametrize(
    "name, ops, has",
    [
        ("rms-16", 7, {"accum_rms", "matmul", "div"}),
        ("gated-8", 10, {"matmul", "silu", "mul"}),
        ("lora-16", 10, {"matmul", "add"}),
        ("gqa-16", 10, {"exp", "accum_sum", "div"}),
    ],
)
def test_members_at_the_published_sizes(name, ops, has):
    """The cheapest by price are one fused kernel that fills the device and fits it."""
    load = gpu.workloads()[name]
    traced = trace(load.function, [torch.empty(s, device="meta", dtype=torch.float16) for s in load.shapes])
    program = device.absorb(traced.program)
    some = device.members(symbolic.search(program, Limits(ops, budget_s=3600)).families, program, 2, 12)
    assert [m.price for m in some] == sorted(m.price for m in some)
    for member in some:
        (block,) = (k.block for k in member.program.kernels)
        assert block is not None and block.blocks >= device.LEAST_BLOCKS
        for launch in device.launches_of(block, 2):
            assert (
                launch.stages == 1 or launch.stages * triton_source.loaded_bytes(block, 2) <= triton_source.SHARED_BYTES
            )
    (best,) = (k.block for k in some[0].program.kernels)
    assert best is not None and has <= {n.op for n in best.nodes} and best.blocks >= 64


def test_rows_that_cannot_be_cut_run_in_few_blocks():
    program = published.ntrans(8, 128)
    families = symbolic.search(program, Limits(11, budget_s=3600)).families
    assert {m.program.kernels[0].block.blocks for m in device.members(families, program, 2, 4)} == {8}


def test_half_precision_has_its_own_bound(rng):
    program = published.lora(8, 32, 4, 48)
    inputs = [rng.standard_normal(s).astype(np.float16).astype(np.float64) for s in program.input_shapes]
    half = [w.value.astype(np.float16) for w in expected(program, inputs)]
    assert not judge(expected(program, inputs), half)  # rounding to half is more than float32's bound
    wanted = expected(program, inputs, "float16")
    assert judge(wanted, half)
    assert judge(expected(program, inputs, "bfloat16"), half).worst < judge(wanted, half).worst
    wrong = half[0].copy()
    wrong[3, 5] += 0.25 * np.abs(half[0]).max()
    assert not judge(wanted, [wrong])


def test_devices_and_types_that_have_no_form_are_named():
    with pytest.raises(UsageError, match="float16 on cpu"):
        api.kind_of([torch.zeros(2, dtype=torch.float16)])
    with pytest.raises(UsageError, match="int"):
        api.kind_of([torch.zeros(2), 3])
    with pytest.raises(UsageError, match="float32 CPU"):
        api.kind_of([torch.zeros(2), torch.zeros(2, device="meta")])
    assert api.kind_of([torch.zeros(2)]) == ("cpu", torch.float32)
    settings = Settings("mirage", Limits(5))
    with pytest.raises(UsageError, match="use prism"):
        device.superoptimize(api.freeze(trace(lambda x: x.exp(), [torch.zeros(2, 2)])), [torch.zeros(2, 2)], settings)


def test_rms_norm_is_one_operator_without_epsilon_and_spelled_out_with():
    x, w = torch.randn(4, 8), torch.randn(8)
    plain = trace(lambda x: F.rms_norm(x, (8,), eps=0.0), [x]).program
    assert [n.op for n in plain.nodes] == ["input", "rms_norm"]
    spelled = trace(lambda x, w: F.rms_norm(x, (8,), w, eps=1e-3), [x, w])
    want = F.rms_norm(x, (8,), w, eps=1e-3)
    got = expected(spelled.program, [x.double().numpy(), w.double().numpy()])[0].value
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-5)
    default = trace(lambda x: F.rms_norm(x, (8,)), [1e-4 * x])
    got = expected(default.program, [1e-4 * x.double().numpy()])[0].value
    np.testing.assert_allclose(got, F.rms_norm(1e-4 * x, (8,)).numpy(), rtol=1e-5)


def test_the_lock_may_be_taken_twice_in_a_process(monkeypatch, tmp_path):
    monkeypatch.setenv("WAGER_GPU_LOCK", str(tmp_path / "lock"))
    taken = [sys.executable, "-c", "import fcntl,sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"]
    with cuda_timer.alone():
        with cuda_timer.alone():
            pass
        assert subprocess.run([*taken, str(tmp_path / "lock")], capture_output=True).returncode != 0
    assert subprocess.run([*taken, str(tmp_path / "lock")], capture_output=True).returncode == 0


def test_the_record_has_one_row_a_workload_and_means_by_workload():
    def rows(title, ratio):
        clock = {"torch.compile": lambda: ratio * 1e-5, "wager": lambda: 1e-5, "eager": lambda: 9e-5}
        return [asdict(row) for row in compare(title, clock, repeats=3, warmup=0, unit="s")]

    part = {"facts": {"fastest": ["10.00 us: grid 128x1x1"]}, "errors": []}
    loads = gpu.workloads()
    ratios = {"rms-2": 1.0, "rms-16": 4.0, "lora-16": 2.0, "gqa-16": 10.0}
    report = gpu.assemble({name: {**part, "rows": rows(loads[name].title, r)} for name, r in ratios.items()})
    assert [round(row.ratio, 3) for row in report.rows] == [1.0, 4.0, 2.0, 10.0]
    assert {row.ours for row in report.rows} == {"wager"}
    assert report.facts["geomean of 2 without attention, warm"] == pytest.approx(2.0)  # RMSNorm's two batches are one
    assert report.facts["by workload, warm"]["GQA"] == pytest.approx(10.0)
    assert report.facts[loads["rms-2"].title]["eager, us"] == pytest.approx(90.0)
