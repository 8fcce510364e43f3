"""Ahead-of-time libraries: made of the same sources, found without a compiler, ignored when the sources have changed."""

import ctypes

import pytest

from wager import build_kernels
from wager.errors import BuildError, UsageError
from wager.native import build


@pytest.fixture()
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("WAGER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 7; }\n')
    return path


def test_every_unit_of_the_package_is_listed():
    listed = {build_kernels.ROOT / file for files in build_kernels.UNITS.values() for file in files}
    with_generated = {build_kernels.ROOT / file for file in build_kernels.WITH_GENERATED}
    assert listed | with_generated == set(build_kernels.ROOT.rglob("*.cpp")) and not listed & with_generated


def test_units_are_the_sources_that_first_use_compiles():
    from wager.detect.tod.native import SOURCES as tod
    from wager.kernels.native import SOURCES as kernels

    units = {name: [build_kernels.ROOT / f for f in files] for name, files in build_kernels.UNITS.items()}
    assert units["wager_kernels"] == list(kernels) and units["wager_detect"] == list(tod)


def test_a_library_made_ahead_serves_without_a_compiler(source, tmp_path, monkeypatch):
    made = build.prebuild("answer", [source], "baseline", tmp_path / "ahead")
    monkeypatch.setenv("WAGER_PREBUILT", str(tmp_path / "ahead"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert build.build("answer", [source]) == made and build.load("answer", [source]).answer() == 7
    assert not (tmp_path / "cache").exists()
    assert build.build("answer", [source], march="x86-64") == made
    source.write_text('extern "C" int answer() { return 8; }\n')
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        build.build("answer", [source])


def test_the_widest_level_that_runs_here_is_chosen(source, tmp_path, monkeypatch):
    made = {level: build.prebuild("answer", [source], level, tmp_path) for level in ("baseline", "avx2", "avx512")}
    monkeypatch.setenv("WAGER_PREBUILT", str(tmp_path))
    for flags, want in (
        ("sse2", "baseline"),
        ("avx2 fma bmi2 f16c", "avx2"),
        (" ".join(set().union(*build.NEEDS.values())), "avx512"),
    ):
        monkeypatch.setattr(build, "cpu_flags", lambda flags=flags: flags)
        assert build.build("answer", [source]) == made[want]


def test_the_command_compiles_all_units_and_names_a_wrong_level(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_kernels, "ROOT", tmp_path)
    monkeypatch.setattr(build_kernels, "UNITS", {"answer": ["answer.cpp"]})
    build_kernels.build_kernels(isa="baseline", out=tmp_path / "out")
    assert "answer" in capsys.readouterr().out
    library = next((tmp_path / "out").glob("answer-baseline-*.so"))
    assert ctypes.CDLL(str(library)).answer() == 7
    build_kernels.build_kernels(isa="native", out=None)
    assert list((tmp_path / "cache" / "native").glob("answer-*.so"))
    with pytest.raises(UsageError, match="sse9.*avx2"):
        build_kernels.build_kernels(isa="sse9", out=None)
