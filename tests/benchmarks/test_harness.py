"""The referee must itself be right: ratios, intervals, interleaving, files."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import (
    Report,
    arguments,
    compare,
    format_table,
    load_results,
    ratio_of_medians,
    write_atomically,
)
from benchmarks.worker import Worker, WorkerError

MACHINE = {"cpu": "test", "cores": 1}


def scripted(values):
    """A contender that reports the given values one after the other."""
    it = iter(values)
    return lambda: next(it)


def test_ratio_above_one_means_better_for_times_and_for_rates():
    times = compare("w", {"a": lambda: 2.0, "b": lambda: 1.0}, repeats=3)
    rates = compare("w", {"a": lambda: 2.0, "b": lambda: 1.0}, repeats=3, unit="tok/s", higher_is_better=True)
    assert times[0].ratio == pytest.approx(2.0) and times[0].verdict == "faster"
    assert rates[0].ratio == pytest.approx(0.5) and rates[0].verdict == "slower"


def test_medians_ignore_one_bad_round_and_warm_up_is_not_measured():
    slow_first = [100.0] * 2 + [1.0, 1.0, 50.0, 1.0, 1.0]  # two warm-up runs, five rounds
    row = compare("w", {"a": lambda: 3.0, "b": scripted(slow_first)}, repeats=5, warmup=2)[0]
    assert row.ours_value == 1.0 and row.ratio == pytest.approx(3.0)


def test_rounds_interleave_every_contender_and_the_baseline_twice():
    order = []

    def contender(name):
        return lambda: order.append(name) or 1.0

    compare("w", {"a": contender("a"), "b": contender("b"), "c": contender("c")}, repeats=6, warmup=0)
    rounds = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert len(rounds) == 6
    assert all(sorted(r) == ["a", "a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1, "the order within a round is never shuffled"


def test_aa_noise_is_seen_and_forbids_a_verdict_below_it():
    noisy = compare("w", {"a": scripted(np.linspace(1.0, 2.0, 12)), "b": lambda: 1.2}, repeats=6, warmup=0)[0]
    assert noisy.aa_noise > 0.0
    same = compare("w", {"a": lambda: 1.0, "b": lambda: 1.0}, repeats=6, warmup=0)[0]
    assert same.aa_noise == 0 and same.verdict == "no difference shown"


def test_interval_covers_the_truth():
    """With true ratio 1.5 and log-normal noise, about 95 of 100 intervals must hold 1.5 (at least 85 is safe for a right bootstrap)."""
    rng, hits = np.random.default_rng(7), 0
    for _ in range(100):
        a, b = 1.5 * np.exp(0.1 * rng.standard_normal(25)), np.exp(0.1 * rng.standard_normal(25))
        ratio, low, high = ratio_of_medians(list(a), list(b), False, rng)
        assert low <= ratio <= high
        hits += low <= 1.5 <= high
    assert hits >= 85


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_measurement_must_be_positive_and_finite(value):
    with pytest.raises(ValueError, match="positive and finite"):
        compare("w", {"a": lambda: 1.0, "b": lambda: value}, repeats=2)


def test_wall_time_is_used_when_the_contender_returns_nothing():
    row = compare("w", {"a": lambda: sum(range(200_000)) and None, "b": lambda: None}, repeats=3)[0]
    assert row.ratio > 10


def test_report_round_trip(tmp_path):
    rows = compare("w", {"a": lambda: 2.0, "b": lambda: 1.0}, repeats=3)
    path = Report("serve", "demo", rows, facts={"seed": 1}, command="python -m x").save(MACHINE, root=tmp_path)
    assert path == tmp_path / "serve" / "demo.json"
    (loaded,) = load_results(tmp_path)
    assert loaded["rows"][0]["ratio"] == pytest.approx(2.0)
    assert loaded["machine"] == MACHINE and loaded["facts"] == {"seed": 1} and loaded["command"] == "python -m x"
    assert [p.name for p in path.parent.iterdir()] == ["demo.json"], "a temporary file was left behind"


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "r.json"
    write_atomically(path, "old")
    with pytest.raises(TypeError):
        write_atomically(path, object())  # type: ignore[arg-type]
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_table_columns_line_up():
    lines = format_table([["a", "long head"], ["much longer cell", "x"]]).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[1].startswith("|-")


@pytest.fixture
def worker_script(tmp_path):
    script = tmp_path / "w.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys
        from benchmarks.worker import serve
        def add(a, b):
            print("chatter on stdout must not break the protocol")
            return a + b
        def fail(): raise ValueError("no such model")
        def die(): os._exit(3)
        serve({"add": add, "fail": fail, "die": die, "pid": os.getpid})
        """)
    )
    return script


def test_worker_answers_survives_an_error_and_reports_death(worker_script, tmp_path):
    with Worker([sys.executable, str(worker_script)], env={"PYTHONPATH": "."}, log=tmp_path / "log") as worker:
        assert worker.call("add", a=2, b=3) == 5
        with pytest.raises(WorkerError, match="no such model"):
            worker.call("fail")
        assert worker.call("add", a=1, b=1) == 2
        with pytest.raises(WorkerError, match="status 3"):
            worker.call("die")
    assert "chatter" in (tmp_path / "log").read_text()


def test_idle_worker_is_stopped(worker_script):
    with Worker([sys.executable, str(worker_script)], env={"PYTHONPATH": "."}) as worker:
        pid = worker.call("pid")
        for _ in range(1000):
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            if state == "T":
                break
            time.sleep(0.005)
        assert state == "T"


def test_results_are_strict_json(tmp_path):
    rows = compare("w", {"a": lambda: 2.0, "b": lambda: 1.0}, repeats=2)
    with pytest.raises(ValueError):
        Report("serve", "x", rows, facts={"bad": float("nan")}).save(MACHINE, root=tmp_path)
    json.dumps(rows[0].samples)


@pytest.mark.parametrize(("device", "repeats"), [("", True), ("cuda", False)])
def test_options_are_offered_where_they_are_heeded(device, repeats, capsys):
    parser = arguments("x", device=device, repeats=repeats)
    names = vars(parser.parse_args(["--quick"]))
    assert names == {"quick": True, **({"device": device} if device else {}), **({"repeats": None} if repeats else {})}
    with pytest.raises(SystemExit):
        parser.parse_args(["--repeats", "2"] if device else ["--device", "cpu"])
    assert "unrecognized" in capsys.readouterr().err


def test_pictures_follow_the_records(tmp_path):
    """A trial run leaves the pictures of the documentation alone."""
    where = subprocess.run(
        [sys.executable, "-c", "from benchmarks.harness import picture_path; print(picture_path('cluster', 'x'))"],
        env={**os.environ, "WAGER_RESULTS": str(tmp_path)}, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert Path(where) == tmp_path / "cluster-x.svg"
