"""The measurements are of this machine, are consistent with one another, and refuse what cannot be measured."""

import json

import pytest
import torch

from wager import cli
from wager.errors import UsageError
from wager.hardware import measure


def test_machine_describes_this_process_and_is_plain_json():
    found = measure.machine()
    assert found["torch"] == torch.__version__
    assert found["cores"] >= 1 and found["memory_bytes"] > 2**28
    assert found["isa"] in ("avx512", "avx2", "avx", "neon", "baseline")
    assert json.loads(json.dumps(found)) == found


def test_measure_is_positive_and_its_ridge_is_the_quotient():
    before = torch.get_num_threads()
    m = measure.measure("cpu", threads=1, stream_bytes=2**22, gemm_n=96)
    assert torch.get_num_threads() == before
    assert set(m.peak_flops) == set(measure.CPU_DTYPES) and all(p > 1e6 for p in m.peak_flops.values())
    assert m.read_bytes_per_s > 1e7
    assert m.ridge["float32"] == m.peak_flops["float32"] / m.read_bytes_per_s


def test_no_narrow_type_is_slower_than_float32():
    """On AVX2 torch multiplies bfloat16 and int8 element by element, 100 times slower than after widening them."""
    found = measure.at_least_float32({"float32": 100.0, "bfloat16": 1.0, "int8": 400.0})
    assert found == {"float32": 100.0, "bfloat16": 100.0, "int8": 400.0}


def test_the_stream_kernel_reads_every_element():
    values = torch.arange(4096.0 * 4)
    library = measure.stream_library()
    assert library.wager_stream_read(values.data_ptr(), len(values), 2) == values.double().sum().item()


def test_the_shortest_repetition_counts_and_the_first_does_not(monkeypatch):
    clock = iter([0, 0.5, 10, 13, 20, 22, 30, 35])  # the warm-up is fastest and must not win
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    assert measure.best_seconds(lambda: None, repetitions=3) == 2


@pytest.mark.parametrize(
    "arguments, said",
    [({"device": "tpu"}, "tpu"), ({"stream_bytes": 100}, "100"), ({"threads": -1}, "-1")],
)
def test_what_cannot_be_measured_is_refused(arguments, said):
    with pytest.raises(UsageError, match=said):
        measure.measure(**{"gemm_n": 32, "stream_bytes": 2**16} | arguments)


def test_report_names_every_dtype_and_the_command_is_mounted():
    text = measure.report([measure.Measured("cpu", 2, 2e10, {"float32": 1e11})])
    assert "float32" in text and "20.0 GB/s" in text and "5.0 operations/byte" in text
    assert cli.load(cli.COMMANDS["hardware"]).help
