"""Which form serves CUDA tensors, decided without one."""

import importlib
import types

import pytest
import torch

from wager import doctor
from wager.errors import UsageError
from wager.kernels import registry


@pytest.fixture
def machine(monkeypatch):
    """Sets the variable, whether torch sees a GPU, and whether Triton can be imported."""
    real = importlib.import_module

    def make(forced=None, gpu=True, triton=True):
        def load(name, *rest):
            if name != "triton":
                return real(name, *rest)
            if not triton:
                raise ImportError("no module named triton")
            return types.SimpleNamespace(__version__="9.9")

        monkeypatch.delenv("WAGER_KERNELS", raising=False)
        if forced:
            monkeypatch.setenv("WAGER_KERNELS", forced)
        monkeypatch.setattr(registry.importlib, "import_module", load)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        registry.gpu_choice.cache_clear()

    yield make
    registry.gpu_choice.cache_clear()


def test_triton_serves_gpus_by_itself(machine):
    machine()
    assert registry.gpu_choice().form == "triton"
    found = doctor.check_gpu_kernels()
    assert "triton" in found.found and "9.9" in found.found and "CUDA graphs" in found.found and not found.advice


def test_without_triton_the_reference_serves_and_says_so(machine, caplog):
    machine(triton=False)
    assert registry.gpu_choice().form == "reference" and "Triton cannot be imported" in caplog.text
    assert doctor.check_gpu_kernels().advice == "pip install triton"
    machine(triton=False, gpu=False)
    assert registry.gpu_choice().form == "reference" and "no GPU" in doctor.check_gpu_kernels().found


def test_a_form_can_be_forced(machine):
    machine("reference")
    assert registry.gpu_choice().form == "reference" and not doctor.check_gpu_kernels().advice
    machine("triton", triton=False)
    with pytest.raises(UsageError, match="Triton cannot be imported"):
        registry.gpu_choice()
    assert "Triton cannot be imported" in doctor.check_gpu_kernels().advice
    machine("triton", gpu=False)
    assert registry.gpu_choice().form == "triton"


def test_wide_rows_of_logits_go_to_torch(machine):
    machine("triton", gpu=False)
    assert registry._form("sample", torch.empty(1, registry.WIDEST_ROW + 1, device="meta")) is registry.reference.sample
