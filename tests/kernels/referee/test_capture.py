"""Capture: every architecture runs, every record makes inputs the baseline takes, and the oracle tells honest from half precision."""

import pytest
import torch

from wager.errors import UsageError, WagerError
from wager.kernels.referee import oracle
from wager.kernels.referee.architectures import FAMILIES, architecture, architectures
from wager.kernels.referee.capture import capture, load, merge, save, select


@pytest.fixture(scope="module")
def cases():
    return [c for a in architectures().values() for held in (False, True) for c in capture(a, held)]


def test_breadth(cases):
    known = architectures()
    assert len(known) >= 25 and {a.family for a in known.values()} == set(FAMILIES)
    assert {c.operator for c in cases} == set(oracle.operator_names())
    with pytest.raises(UsageError, match="llamma.*mixtral"):
        architecture("llamma")


def test_architectures_are_different_networks(cases):
    """Not one transformer under many names: hardly any two use the same set of operators."""
    sets = {name: frozenset(c.operator for c in cases if name in c.sources) for name in architectures()}
    assert len(set(sets.values())) >= 25, "too many share their operators"


def test_round_trip(cases, tmp_path):
    merged = merge(cases)
    save(merged, tmp_path / "capture.json")
    assert load(tmp_path / "capture.json") == merged
    assert sum(c.count for c in merged) == sum(c.count for c in cases)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(WagerError, match="not a capture"):
        load(tmp_path / "bad.json")


@pytest.mark.parametrize("operator", oracle.operator_names())
def test_every_record_is_rebuilt_and_the_baseline_is_right(cases, operator):
    timed, held = select(cases, operator)
    assert timed and len(timed) <= 5
    right = 0
    for case in timed + held:
        inputs, state = case.make_inputs(200), oracle.make_state(case, 200)
        for spec, made in zip(case.inputs, inputs, strict=True):
            assert (spec is None) == (made is None)
            assert spec is None or (tuple(made.shape) == spec.shape and str(made.dtype) == f"torch.{spec.dtype}")
        module = oracle.baseline_class(operator)(**case.init)
        module.load_state_dict(state)
        with torch.no_grad():
            right += oracle.expect(case, state, inputs).worst(oracle.flatten(module(*inputs))) <= 1
    assert right == len(timed + held)


@pytest.mark.parametrize(
    "operator",
    ["Linear", "RMSNorm", "LayerNorm", "SiluAndMul", "GELU", "Softmax", "DenseAttention", "Conv2d", "SelectiveScan"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_lies_outside(cases, operator, dtype):
    for case in select(cases, operator)[0]:
        inputs, state = case.make_inputs(201), oracle.make_state(case, 201)
        module = oracle.baseline_class(operator)(**case.init)
        module.load_state_dict(state)
        with torch.no_grad():
            low = oracle.flatten(
                module.to(dtype)(*[t.to(dtype) if t is not None and t.is_floating_point() else t for t in inputs])
            )
        assert oracle.expect(case, state, inputs).worst([t.float() for t in low]) > 1, case.label


def test_memory_order_is_kept():
    case = next(c for c in capture(architecture("llama")) if c.operator == "DenseAttention")
    q = case.make_inputs(0)[0]
    assert q.stride() != torch.empty(q.shape).stride(), "heads were transposed in the run, so they are here"
