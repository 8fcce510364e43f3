"""Workloads: exact lengths, shared prefixes, arrival processes, trace formats."""

import json

import numpy as np
import pytest

from wager.errors import UsageError
from wager.serve.bench.workload import (
    Job,
    custom_jobs,
    random_jobs,
    read_trace,
    sharegpt_jobs,
    trace_jobs,
    with_arrivals,
)

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,374,44\n2023-11-16 18:17:05.4799600,396,109\n"
)
PLAIN = "arrival_s,context_tokens,generated_tokens\n10.0,374,44\n11.5,396,109\n"
MOONCAKE = [
    {"timestamp": 500, "input_length": 1100, "output_length": 7, "hash_ids": [0, 1, 2]},
    {"timestamp": 1000, "input_length": 1500, "output_length": 9, "hash_ids": [0, 1, 3]},
]


def rng():
    return np.random.default_rng(0)


def test_random_lengths_and_shared_prefix():
    jobs = random_jobs(
        50, input_tokens=40, output_tokens=20, vocab_size=500, rng=rng(), range_ratio=0.5, prefix_tokens=8
    )
    assert len({job.prompt[:8] for job in jobs}) == 1 and len({job.prompt[8:] for job in jobs}) == 50
    lengths = [len(job.prompt) - 8 for job in jobs]
    assert min(lengths) >= 20 and max(lengths) <= 60 and len(set(lengths)) > 5
    assert all(10 <= job.max_tokens <= 30 for job in jobs)
    assert all(100 <= token < 500 for job in jobs for token in job.prompt)


@pytest.mark.parametrize("text", [AZURE, PLAIN])
def test_csv_traces_start_at_zero(tmp_path, text):
    path = tmp_path / "t.csv"
    path.write_text(text)
    trace = read_trace(path)
    assert [round(r.arrival_s, 3) for r in trace] == [0.0, 1.5]
    assert [(r.input_tokens, r.output_tokens) for r in trace] == [(374, 44), (396, 109)]


def test_mooncake_blocks_become_shared_prefixes(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in MOONCAKE))
    a, b = trace_jobs(read_trace(path), vocab_size=4000, seed=1)
    assert (len(a.prompt), len(b.prompt), a.max_tokens, b.max_tokens) == (1100, 1500, 7, 9)
    assert a.prompt[:1024] == b.prompt[:1024] and a.prompt[1024:1100] != b.prompt[1024:1100]
    assert b.arrival_s == 0.5


def test_trace_is_scaled_and_cut(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(PLAIN + "99.0,4000,800\n")
    trace = read_trace(path)
    halved = trace_jobs(trace, vocab_size=500, seed=0, speed=3, length_scale=0.5, duration_s=60)
    assert [(len(j.prompt), j.max_tokens, j.arrival_s) for j in halved] == [(187, 22, 0.0), (198, 54, 0.5)]
    cut = trace_jobs(trace, vocab_size=500, seed=0, max_total_tokens=512)
    assert [(len(j.prompt), j.max_tokens) for j in cut] == [(374, 44), (396, 109), (1, 511)]


def test_trace_prompts_do_not_repeat_between_requests(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(PLAIN)
    a, b = trace_jobs(read_trace(path), vocab_size=4000, seed=0)
    assert a.prompt[:100] != b.prompt[:100]
    again = trace_jobs(read_trace(path), vocab_size=4000, seed=0)
    assert [a, b] == again


def test_poisson_arrivals_have_the_rate_and_the_burstiness():
    jobs = [Job("x", 1)] * 20_000
    for burstiness in (0.25, 1.0, 4.0):
        gaps = np.diff([j.arrival_s for j in with_arrivals(jobs, 5.0, burstiness, rng())])
        assert gaps.mean() == pytest.approx(0.2, rel=0.06)
        assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.06)
    assert {j.arrival_s for j in with_arrivals(jobs[:5], float("inf"), 1.0, rng())} == {0.0}


def test_arrivals_of_the_data_win_over_the_rate():
    jobs = with_arrivals([Job("b", 1, 2.0), Job("a", 1, 1.0)], 100.0, 1.0, rng())
    assert [j.arrival_s for j in jobs] == [1.0, 2.0]


def test_custom_and_sharegpt_files(tmp_path):
    custom = tmp_path / "c.jsonl"
    rows = [
        {"prompt": "hi", "max_tokens": 3},
        {"prompt": [5, 6], "arrival_s": 1},
        {"messages": [{"role": "user", "content": "x"}]},
    ]
    custom.write_text("\n".join(map(json.dumps, rows)))
    a, b, c = custom_jobs(custom, output_tokens=9)
    assert a == Job("hi", 3) and b == Job((5, 6), 9, 1.0) and c.is_chat and not b.is_chat
    share = tmp_path / "s.json"
    turn = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because " * 10}]
    share.write_text(json.dumps([{"conversations": turn}, {"conversations": turn[:1]}]))
    assert sharegpt_jobs(share, output_tokens=None) == [Job("why?", 20)]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("t.csv", "a,b\n1,2\n", "needs arrival_s"),
        ("t.jsonl", "{oops", "neither JSON"),
        ("t.csv", "arrival_s\n", "empty"),
    ],
)
def test_unreadable_files_name_the_problem(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_trace(path)
    with pytest.raises(UsageError, match="cannot read"):
        read_trace(tmp_path / "absent.csv")


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match="request-rate"):
        with_arrivals([Job("x", 1)], 0.0, 1.0, rng())
    with pytest.raises(UsageError, match="vocab-size"):
        random_jobs(1, input_tokens=1, output_tokens=1, vocab_size=50, rng=rng())
    with pytest.raises(UsageError, match="range-ratio"):
        random_jobs(1, input_tokens=1, output_tokens=1, vocab_size=500, rng=rng(), range_ratio=1.0)
