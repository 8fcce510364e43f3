"""When AMX tiles serve: the processor has them, the kernel gives leave, the library has the form; and what is said when one is missing."""

import logging
import os
from types import SimpleNamespace

import pytest

from wager import doctor
from wager.errors import UsageError
from wager.hardware import measure
from wager.kernels import native, registry
from wager.native import amx, build

FLAGS = " ".join(build.NEEDS["amx"])


@pytest.fixture()
def machine(monkeypatch):
    """Pretends a processor's flags, the kernel's answer and what the library says to wager_use_tiles."""

    def pretend(flags=FLAGS, refusal=None, library=native.TILE_ROWS, isa=None):
        monkeypatch.setattr(build, "cpu_flags", lambda: flags)
        monkeypatch.setattr(doctor, "processor", lambda: (set(flags.split()), "a processor"))
        monkeypatch.setattr(amx, "refusal", lambda: refusal)
        monkeypatch.setattr(native, "library", lambda flags=(): SimpleNamespace(wager_use_tiles=lambda wanted: library))
        monkeypatch.delenv("WAGER_ISA", raising=False)
        if isa:
            monkeypatch.setenv("WAGER_ISA", isa)
        native.no_tiles.cache_clear()

    yield pretend
    native.no_tiles.cache_clear()


@pytest.mark.skipif(
    os.uname().machine != "x86_64" or "amx_tile" in build.cpu_flags().split(),
    reason="asks the kernel of a machine without AMX",
)
def test_this_kernel_refuses():
    assert "the kernel refuses tile registers" in str(amx.refusal())
    assert not build.runs_here("amx") and "lacks amx_tile" in str(build.no_tiles())


def test_tiles_serve_where_all_agree(machine, caplog):
    machine()
    assert build.runs_here("amx") and native.no_tiles() is None
    assert registry.choice.__wrapped__().reason.endswith("avx512 with AMX tiles") and not caplog.records
    assert "from 9 rows on by AMX: tdpbsud, tdpbf16ps" in doctor.dot_products()
    assert measure.machine()["amx"] == "usable"


@pytest.mark.parametrize(
    "answer, reason",
    [
        ({"refusal": "no leave"}, "no leave"),
        ({"library": 0}, "built without them"),
        ({"library": -1}, "sums otherwise"),
    ],
)
def test_without_one_of_them_a_single_warning_says_why(machine, caplog, answer, reason):
    machine(**answer)
    with caplog.at_level(logging.WARNING):
        chosen = registry.choice.__wrapped__()
    assert chosen.form == "native" and "AMX tiles" not in chosen.reason
    assert (
        [r.levelname for r in caplog.records] == ["WARNING"]
        and reason in caplog.text
        and "AVX-512 serves" in caplog.text
    )
    assert "AMX is not used" in doctor.dot_products() and reason in doctor.dot_products()
    assert build.runs_here("amx") == ("refusal" not in answer) == (measure.machine()["amx"] == "usable")


def test_nothing_is_said_where_nobody_expects_tiles(machine, caplog):
    machine(flags="avx2 fma bmi2 f16c")
    assert (
        registry.choice.__wrapped__().form == "native"
        and "AMX" not in doctor.dot_products()
        and "amx" not in measure.machine()
    )
    machine(isa="avx512")
    assert "WAGER_ISA=avx512" in str(native.no_tiles()) and "AMX" not in registry.choice.__wrapped__().reason
    assert not caplog.records


def test_amx_by_name_must_be_had(machine):
    machine(isa="amx")
    assert native.march() == build.LEVELS["amx"] and native.no_tiles() is None
    machine(isa="amx", refusal="no leave")
    with pytest.raises(UsageError, match="WAGER_ISA=amx.*no leave"):
        native.march()
    machine(isa="amx", flags="avx2")
    with pytest.raises(UsageError, match="WAGER_ISA=amx needs.*amx_tile"):
        native.march()


def test_the_widest_library_made_ahead_is_the_one_for_amx(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("WAGER_PREBUILT", str(tmp_path))
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return 7; }\n')
    made = {level: build.prebuild("answer", [source], level, tmp_path) for level in ("avx512", "avx2")}
    machine()
    key = build._ahead_key([source], [*build.BASE_FLAGS, f"-march={build.LEVELS['amx']}"], "amx")
    tiled = tmp_path / f"answer-amx-{key}.so"
    tiled.write_bytes(made["avx2"].read_bytes())
    assert build.build("answer", [source]) == tiled
    machine(refusal="no leave")
    assert build.build("answer", [source]) == made["avx512"]
