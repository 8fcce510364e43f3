"""The judge: every seeded cheat is caught, honest kernels pass, and nothing a candidate does hangs or fools the judging process."""

import time

import pytest

from tests.kernels.referee import cheats
from wager.kernels.referee import static_check
from wager.kernels.referee.architectures import architecture
from wager.kernels.referee.capture import capture, select
from wager.kernels.referee.judge import Options, Status, judge, judge_dynamically

QUICK = Options(iterations=4, rounds=1, warmup=1, flush_bytes=1 << 20, timing=False)
SOURCES = {"Linear": "whisper", "SiluAndMul": "llama", "RMSNorm": "llama", "ReLU": "dlrmv2"}


@pytest.fixture(scope="module")
def cases():
    found = {}
    for operator, name in SOURCES.items():
        net = architecture(name)
        found[operator] = select([c for held in (False, True) for c in capture(net, held)], operator, 2)
    return found


def verdict(tmp_path, cases, operator, source, options=QUICK, look=True):
    path = tmp_path / "candidate.py"
    path.write_text(cheats.HEAD + source)
    run = judge if look else judge_dynamically
    return run(operator, path, *cases[operator], options)


@pytest.mark.parametrize("name", cheats.HONEST)
def test_honest_kernels_pass(tmp_path, cases, name):
    found = verdict(tmp_path, cases, *cheats.HONEST[name])
    assert found.status is Status.PASSED, found.reason
    assert any(c.held_out for c in found.cases) and all(c.error <= 1 for c in found.cases)


@pytest.mark.parametrize("name", cheats.STATIC)
def test_cheats_that_the_source_shows(name):
    operator, source = cheats.STATIC[name]
    assert static_check.check(cheats.HEAD + source, operator), "no complaint"


@pytest.mark.parametrize("name", cheats.NUMERIC)
def test_wrong_results(tmp_path, cases, name):
    found = verdict(tmp_path, cases, *cheats.NUMERIC[name], look=False)
    assert found.status is Status.INCORRECT_NUMERICAL, (found.status, found.reason)


@pytest.mark.parametrize("name", cheats.CONDUCT)
def test_forbidden_conduct(tmp_path, cases, name):
    found = verdict(tmp_path, cases, *cheats.CONDUCT[name], look=False)
    assert found.status is Status.REWARD_HACK, (found.status, found.reason)


@pytest.mark.parametrize("name", cheats.SHAPES)
def test_shapes_dtypes_and_errors(tmp_path, cases, name):
    operator, source, status = cheats.SHAPES[name]
    found = verdict(tmp_path, cases, operator, source, look=False)
    assert found.status == status, (found.status, found.reason)


@pytest.mark.parametrize("name", cheats.TIMED)
def test_cheats_in_the_timed_calls(tmp_path, cases, name):
    options = Options(iterations=8, rounds=2, warmup=1, flush_bytes=1 << 20)
    found = verdict(tmp_path, {k: (v[0][:1], []) for k, v in cases.items()}, *cheats.TIMED[name], options, look=False)
    assert found.status in (Status.REWARD_HACK, Status.INCORRECT_NUMERICAL), (found.status, found.reason)


def test_the_baseline_cannot_be_imported_behind_the_checker(tmp_path, cases):
    source = "import importlib\nBase = importlib.import_module('wager.kernels.' + 'referee.operators').SiluAndMul\nclass SiluAndMul(Base):\n    pass\n"
    assert verdict(tmp_path, cases, "SiluAndMul", source).status is Status.REWARD_HACK


def test_a_hanging_candidate_ends(tmp_path, cases):
    started = time.monotonic()
    options = Options(timing=False, timeout_s=2.0, flush_bytes=1 << 20)
    found = verdict(
        tmp_path,
        cases,
        "SiluAndMul",
        "class SiluAndMul(nn.Module):\n    def forward(self, x):\n        while True:\n            time.sleep(1)\n",
        options,
    )
    assert found.status is Status.RUNTIME_ERROR and "no answer" in found.reason
    assert time.monotonic() - started < 30


def test_the_baseline_against_itself(cases):
    options = Options(iterations=5, rounds=2, warmup=1, flush_bytes=1 << 20)
    found = judge("SiluAndMul", None, *[part[:1] for part in cases["SiluAndMul"]], options)
    assert found.status is Status.PASSED, found.reason
    assert found.speedup is not None and 0.2 < found.speedup < 5, "a busy machine is noisy, but not by a factor of five"


def test_no_cases_is_skipped_not_passed():
    assert judge("SiluAndMul", None, [], []).status is Status.SKIPPED


def test_library_operators_can_be_forbidden(tmp_path, cases):
    options = Options(timing=False, library=False)
    assert verdict(tmp_path, cases, *cheats.HONEST["library norm"], options).status is Status.REWARD_HACK
