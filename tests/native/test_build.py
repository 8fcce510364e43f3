"""The build service: once per content, safe under concurrency, clear when it cannot."""

import ctypes
import multiprocessing
from pathlib import Path

import pytest

from wager.errors import BuildError
from wager.native import build

SOURCE = 'extern "C" int answer() { return VALUE; }\n'


@pytest.fixture()
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("WAGER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def test_builds_once_and_again_when_content_or_flags_change(source):
    first = build.build("answer", [source], ["-DVALUE=7"])
    stamp = first.stat().st_mtime_ns
    assert build.build("answer", [source], ["-DVALUE=7"]) == first and first.stat().st_mtime_ns == stamp
    assert build.load("answer", [source], ["-DVALUE=7"]).answer() == 7
    assert build.load("answer", [source], ["-DVALUE=8"]).answer() == 8
    (source.parent / "extra.h").write_text("// a header beside the source counts")
    assert build.build("answer", [source], ["-DVALUE=7"]) != first


def _build(path):
    return str(build.build("answer", [Path(path)], ["-DVALUE=9"]))


def test_processes_share_one_build(source):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        libraries = set(pool.map(_build, [str(source)] * 3))
    assert len(libraries) == 1
    assert ctypes.CDLL(libraries.pop()).answer() == 9
    assert {path.suffix for path in build.cache_dir().iterdir()} == {".so", ".lock"}  # nothing half done is left


def test_several_sources_are_one_library(source):
    caller = source.parent / "caller.cpp"
    caller.write_text('extern "C" int answer();\nextern "C" int twice() { return 2 * answer(); }\n')
    assert build.load("both", [source, caller], ["-DVALUE=21"]).twice() == 42
    caller.write_text("int broken( {}")
    with pytest.raises(BuildError, match="caller.cpp.*error"):
        build.build("both", [source, caller], ["-DVALUE=21"])
    assert {path.suffix for path in build.cache_dir().iterdir()} == {".so", ".lock"}


def test_a_compile_error_is_quoted(source):
    with pytest.raises(BuildError, match="VALUE"):
        build.build("answer", [source])


def test_a_missing_compiler_is_said(source, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match="no C"):
        build.build("answer", [source])


def test_a_damaged_library_is_reported(source):
    library = build.build("answer", [source], ["-DVALUE=1"])
    library.write_bytes(b"not a library")
    with pytest.raises(BuildError, match="cannot be loaded"):
        build.load("answer", [source], ["-DVALUE=1"])
