"""The step log keeps what happened, and the cost model recovers known costs from it, with an honest held-out error."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from typer.testing import CliRunner

from wager.errors import UsageError, WagerError
from wager.serve.bench.cli import app
from wager.serve.llm import LLM
from wager.serve.observe import StepRecord
from wager.serve.params import SamplingParams
from wager.serve.step_cost import StepCost, StepLog, features, fit, read_step_log

BLANK = StepRecord(0.0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, 0, 0, 0)
TRUE = np.array([2.0, 0.05, 0.0, 0.1, 0.3, 0.001, 0.02])  # constant, tokens, three hinges, context, spans


def synthetic(count, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(count):
        prefill, decode, drafts = (
            int(rng.integers(0, 2) * rng.integers(1, 400)),
            int(rng.integers(1, 60)),
            int(rng.integers(0, 30)),
        )
        context, spans = int(rng.integers(0, 20_000)), int(rng.integers(1, 64))
        ms = float(np.dot(features(prefill + decode + drafts, context, spans), TRUE)) * float(
            np.exp(rng.normal(0, noise))
        )
        records.append(
            replace(
                BLANK,
                prefill_tokens=prefill,
                decode_tokens=decode,
                draft_tokens=drafts,
                context_tokens=context,
                num_spans=spans,
                step_ms=ms,
            )
        )
    return records


def test_known_costs_are_recovered():
    cost = fit(synthetic(300))
    assert cost.median_error < 1e-6 and cost.p90_error < 1e-6
    np.testing.assert_allclose(cost.coefficients, TRUE, rtol=1e-4, atol=1e-6)
    assert cost.predict(200, 5000, 9) == pytest.approx(np.dot(features(200, 5000, 9), TRUE))


def test_errors_are_those_of_unseen_steps():
    noisy = fit(synthetic(600, noise=0.1))
    fresh = synthetic(600, noise=0.1, seed=1)
    errors = [
        abs(
            noisy.predict(r.prefill_tokens + r.decode_tokens + r.draft_tokens, r.context_tokens, r.num_spans)
            - r.step_ms
        )
        / r.step_ms
        for r in fresh
    ]
    assert noisy.median_error == pytest.approx(np.median(errors), rel=0.3) and 0.04 < noisy.median_error < 0.1
    half = synthetic(100)
    changed = half[:80] + [replace(r, step_ms=2 * r.step_ms) for r in half[80:]]
    assert fit(changed).median_error == pytest.approx(0.5, abs=1e-6), "a machine that became slower shows in the error"


def test_a_step_never_gets_cheaper_with_more_work():
    cost = fit(synthetic(100, noise=0.3))
    assert all(c >= 0 for c in cost.coefficients)
    prices = [cost.predict(tokens, 100, 4) for tokens in range(0, 300, 7)]
    assert prices == sorted(prices)


def test_too_short_a_log_is_refused():
    with pytest.raises(WagerError, match="19 steps are too few .* at least 20"):
        fit(synthetic(19))


def test_the_engine_logs_its_steps_and_they_can_be_fitted(tiny_dir, tmp_path):
    log = StepLog(tmp_path / "steps.jsonl")
    llm = LLM(str(tiny_dir), observers=[log], max_num_batched_tokens=16, enable_prefix_caching=False)
    llm.generate([[5] * 40, [6] * 3], SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True))
    records = read_step_log(tmp_path / "steps.jsonl")
    assert [(r.prefill_tokens, r.decode_tokens, r.context_tokens, r.num_spans) for r in records[:5]] == [
        (16, 0, 0, 1), (16, 0, 16, 1), (11, 0, 32, 2), (0, 2, 43, 2), (0, 2, 45, 2)
    ]  # fmt: skip
    assert sum(r.prefill_tokens for r in records) == 43 and records[-1].generation_tokens_total == 60
    assert all(r.step_ms >= r.schedule_ms + r.forward_ms >= 0 for r in records)
    cost = fit(records)
    assert cost.predict(16, 0, 1) > 0
    cost.save(tmp_path / "cost.json")
    assert StepCost.load(tmp_path / "cost.json") == cost


def test_a_torn_line_is_left_out_and_a_foreign_one_refused(tmp_path):
    path = tmp_path / "steps.jsonl"
    log = StepLog(path)
    for record in synthetic(3):
        log.on_step(record)
    assert read_step_log(path) == synthetic(3)
    path.write_text(path.read_text() + '{"time_s": 1.0, "pre')
    assert read_step_log(path) == synthetic(3)
    for foreign in (json.dumps({"time_s": 1.0}), "7", json.dumps({**asdict(BLANK), "extra": 1})):
        path.write_text(foreign + "\n")
        with pytest.raises(WagerError, match="line 1 of .* no step record"):
            read_step_log(path)


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UsageError, match="cannot write the step log .*nowhere"):
        StepLog(tmp_path / "nowhere" / "steps.jsonl")


def test_the_command_prints_the_held_out_error_and_writes_the_cost(tmp_path):
    path = tmp_path / "steps.jsonl"
    log = StepLog(path)
    for record in synthetic(300, noise=0.05):
        log.on_step(record)
    result = CliRunner().invoke(app, ["steps", str(path), "-o", str(tmp_path / "cost.json")])
    cost = fit(synthetic(300, noise=0.05))
    assert result.exit_code == 0, result.output
    assert f"error on the last 20% of 300 steps: {cost.median_error:.1%} median" in result.output
    assert StepCost.load(tmp_path / "cost.json") == cost
    with pytest.raises(UsageError, match="cannot be read"):
        read_step_log(tmp_path / "nowhere.jsonl")
