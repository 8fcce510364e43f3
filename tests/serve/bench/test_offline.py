"""The in-process benchmarks count what the engine really did."""

import pytest

from wager.serve.bench.cli import latency, random_batch
from wager.serve.bench.offline import measure_latency, measure_throughput
from wager.serve.llm import LLM


@pytest.fixture(scope="module")
def llm(tiny_dir):
    return LLM(str(tiny_dir), dtype="float32", skip_tokenizer_init=True)


def test_throughput_counts_every_token(llm):
    jobs = random_batch(3, 10, 6, 300, seed=0)
    found = measure_throughput(llm, jobs)
    assert found["num_requests"] == 3 and found["total_num_tokens"] == 3 * (10 + 6)
    assert found["output_tokens_per_second"] == pytest.approx(18 / found["elapsed_time"])


def test_latency_measures_the_asked_iterations_after_warm_up(llm):
    seen = []
    found = measure_latency(llm, random_batch(2, 5, 4, 300, seed=0), iterations=3, warmup=1, on_iteration=seen.append)
    assert found["latencies"] == seen and len(seen) == 3
    assert found["percentiles"]["50"] == sorted(seen)[1]


def test_latency_command(tiny_dir, capsys, tmp_path):
    out = tmp_path / "l.json"
    latency(
        model=str(tiny_dir),
        batch_size=2,
        input_len=4,
        output_len=3,
        num_iters=2,
        num_iters_warmup=0,
        vocab_size=300,
        output_json=out,
    )
    assert "Avg latency" in capsys.readouterr().out and out.read_text().startswith("{")
