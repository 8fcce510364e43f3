"""The doctor tells the truth about this process and stops at what is fatal."""

import json
import platform
import sys

import pytest
import torch

from wager import doctor
from wager.errors import WagerError


def test_findings_describe_this_process():
    found = {f.subject: f.found for f in doctor.examine()}
    assert found["Python"] == f"{platform.python_version()} at {sys.executable}"
    assert torch.__version__ in found["torch"]
    assert ("none" in found["GPU"]) == (not torch.cuda.is_available())


def test_a_fatal_finding_ends_the_examination_and_the_command(monkeypatch, capsys):
    fatal = doctor.Finding("torch", "absent", "pip install torch", fatal=True)
    checks = (doctor.check_python, lambda: fatal, lambda: pytest.fail("a check ran after a fatal finding"))
    assert doctor.examine(checks)[-1] is fatal
    monkeypatch.setattr(doctor, "examine", lambda: [fatal])
    with pytest.raises(WagerError, match="pip install torch"):
        doctor.doctor(as_json=True)
    assert json.loads(capsys.readouterr().out)[0]["subject"] == "torch"


def test_missing_compiler_is_advice_not_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    finding = doctor.check_compiler()
    assert finding.found == "absent" and "g++" in finding.advice and not finding.fatal


def test_unwritable_cache_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "writable", lambda path: False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert "HF_HOME" in doctor.check_cache().advice
    monkeypatch.undo()
    assert doctor.writable(tmp_path / "not" / "there" / "yet")
