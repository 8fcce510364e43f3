"""The judge: every seeded cheat is caught, honest kernels pass, and nothing a candidate does hangs or fools the judging process."""

import random
import time

import pytest

from tests.kernels.referee import cheats
from wager.kernels import registry
from wager.kernels.referee import judge as judge_module
from wager.kernels.referee import static_check
from wager.kernels.referee.architectures import architecture
from wager.kernels.referee.capture import capture, select
from wager.kernels.referee.judge import CaseResult, Options, Status, Verdict, judge, judge_dynamically
from wager.kernels.referee.score import amdahl, score

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


def test_a_case_has_a_roofline_floor():
    """One shape whose time underflows must not drive a mean."""
    assert judge_module.too_fast(1e-9, 8 << 20) and judge_module.too_fast(0.0, 2 << 20)
    assert not judge_module.too_fast(1e-4, 8 << 20) and not judge_module.too_fast(1e-7, 1 << 10)


@pytest.mark.parametrize(
    "reply, window_s, words",
    [
        ({"hack": "", "loop_s": 0.001, "seconds": [0.0005]}, 60.0, "clock"),
        ({"hack": "", "loop_s": 0.001, "seconds": [0.5]}, 0.001, "claims"),
        ({"hack": "3 threads appeared", "loop_s": 1.0, "seconds": [0.5]}, 1.0, "threads"),
    ],
)
def test_a_worker_that_lies_about_time(reply, window_s, words, tmp_path, cases):
    case = cases["SiluAndMul"][0][0]
    with pytest.raises(judge_module.Rejected, match=words):
        judge_module._check_timed(case, reply, window_s, [], {}, [1.0], tmp_path, random.Random(0))


def test_there_are_at_least_twenty_cheats():
    assert sum(map(len, (cheats.STATIC, cheats.NUMERIC, cheats.CONDUCT, cheats.TIMED))) >= 40


def test_scores():
    made = lambda status, *pairs: Verdict(
        "x", "y", status, "", [CaseResult("c", False, Status.PASSED, "", 0.1, a, b, 0.01, 2 * a) for a, b in pairs]
    )
    found = score([made(Status.PASSED, (4.0, 1.0)), made(Status.INCORRECT_SHAPE, (9.0, 1.0)), made(Status.SKIPPED)])
    assert (found.operators, found.skipped, found.correct) == (2, 1, 0.5), "skipped is neither passed nor failed"
    assert found.fallback_speedup == pytest.approx(2.0) and found.passed_speedup == pytest.approx(4.0)
    assert found.compiled_speedup == pytest.approx(8.0) and found.fast_p == {"0": 0.5, "1": 0.5, "2": 0.5}
    assert score([]).fallback_speedup is None
    assert amdahl([0.5, 0.25], [2.0, 1.0]) == pytest.approx(1 / 0.75)


@pytest.mark.skipif(registry.choice().form != "native", reason="torch.compile needs a compiler too")
def test_torch_compile_stands_beside_eager(cases):
    options = Options(iterations=2, rounds=1, warmup=1, flush_bytes=1 << 20, compiled=True, timeout_s=300)
    found = judge("SiluAndMul", None, cases["SiluAndMul"][0][:1], [], options)
    assert found.status is Status.PASSED, found.reason
    assert found.compiled_speedup and found.as_dict()["cases"][0]["compiled_s"] > 0
