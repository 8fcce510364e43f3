"""Parts of the serving benchmarks that must be right before a long run starts."""

from benchmarks.serve import llama_100m, soak, trace_replay
from wager.serve.bench import workload


def test_made_up_tokenizer_has_the_size_and_decodes_what_it_encodes(tmp_path):
    from tokenizers import Tokenizer

    llama_100m.write_tokenizer(tmp_path, 700)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 700
    text = "Plain words, naïve café, 你好 😀."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_shipped_trace_slice_is_readable_and_covers_two_minutes():
    trace = workload.read_trace(trace_replay.TRACE)
    assert len(trace) == 456 and 110 < trace[-1].arrival_s < 120
    jobs = workload.trace_jobs(trace, vocab_size=4000, seed=0, duration_s=60, length_scale=0.1, max_total_tokens=480)
    assert len(jobs) == 191 and max(len(j.prompt) + j.max_tokens for j in jobs) <= 480


def good_facts() -> dict:
    phase = {"finished": 3, "left": 0, "wrong": [], "errors": []}
    after = {"running_after": 0.0, "waiting_after": 0.0, "kv_usage_after": 0.0, "rss_growth_second_half": 0.001}
    return {name: dict(phase) for name in ("streams", "disconnects", "soak", "afterwards")} | after


def test_soak_verdict_fails_for_each_promise_that_is_broken():
    assert soak.verdict(good_facts()) == []
    for change in (
        {"streams": {"wrong": ["x"], "errors": []}},
        {"soak": {"wrong": [], "errors": ["HTTP 500"]}},
        {"kv_usage_after": 0.1},
        {"running_after": None},
        {"rss_growth_second_half": 0.2},
    ):
        assert len(soak.verdict(good_facts() | change)) == 1, change


def test_soak_questions_are_distinct_and_some_share_a_prefix():
    import numpy as np

    questions = soak.make_questions(np.random.default_rng(0), 30, 4000)
    assert len({q.prompt for q in questions}) == 30
    heads = [q.prompt[:20] for q in questions]
    assert max(heads.count(h) for h in heads) == 10
