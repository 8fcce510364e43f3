"""The engine's own scheduler under a virtual clock: steps add up, tokens are conserved, memory pressure only delays."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wager.errors import WagerError
from wager.serve.cache.block_manager import BlockManager, KVGroup
from wager.serve.params import SamplingParams
from wager.serve.request import Request
from wager.serve.schedule.continuous import ContinuousScheduler, SchedulerConfig
from wager.simulate.engine import run_engine


def scheduler(blocks=64, budget=32):
    manager = BlockManager([KVGroup((0,))], blocks, 16, enable_prefix_caching=False)
    return ContinuousScheduler(SchedulerConfig(max_num_batched_tokens=budget), manager)


def request(i, arrival_s, prompt, output):
    return Request(f"r{i}", list(range(2, 2 + prompt)), SamplingParams(max_tokens=output), arrival_s, prompt + output)


def test_chunked_prefill_then_decode_steps_add_up():
    timeline = run_engine(scheduler(), [request(0, 1.0, 40, 3)], lambda tokens, context, spans: 10.0 + tokens)
    # prefill in chunks of 32 and 8, then two decode steps
    assert timeline.records[0].token_s == pytest.approx([1.060, 1.071, 1.082])


def test_every_token_comes_once_also_when_blocks_run_out():
    requests = [request(i, 0.01 * i, 30, 40) for i in range(12)]
    tight = scheduler(blocks=10)
    timeline = run_engine(tight, requests, lambda tokens, context, spans: 1.0 + 0.1 * tokens)
    assert [len(r.token_s) for r in timeline.records] == [40] * 12
    assert sum(r.metrics.num_preemptions for r in requests) > 0
    assert tight.blocks.usage == 0
    tight.blocks.check_invariants()
    roomy = run_engine(
        scheduler(blocks=200), [request(i, 0.01 * i, 30, 40) for i in range(12)], lambda t, c, s: 1.0 + 0.1 * t
    )
    assert roomy.end_s < timeline.end_s


def test_a_step_without_a_price_and_an_impossible_request_are_refused():
    with pytest.raises(WagerError, match="takes time"):
        run_engine(scheduler(), [request(0, 0.0, 4, 1)], lambda tokens, context, spans: 0.0)
    with pytest.raises(WagerError, match="r0"):
        run_engine(scheduler(blocks=2), [request(0, 0.0, 60, 1)], lambda tokens, context, spans: 1.0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 3), st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=15),
    st.integers(6, 40),
    st.integers(1, 48),
)
def test_tokens_are_conserved_and_the_engine_never_idles_while_work_waits(lives, blocks, budget):
    requests = [request(i, at, prompt, output) for i, (at, prompt, output) in enumerate(lives)]
    engine, computed = scheduler(blocks, budget), []

    def price(tokens, context, spans):
        assert 0 < tokens <= budget and 0 <= engine.blocks.usage <= 1
        computed.append(tokens)
        return 1.0 + tokens

    timeline = run_engine(engine, requests, price)
    assert [len(r.token_s) for r in timeline.records] == [output for _, _, output in lives]
    needed = sum(prompt + output - 1 for _, prompt, output in lives)
    preempted = any(r.metrics.num_preemptions for r in requests)
    assert sum(computed) == needed or (preempted and sum(computed) > needed)
    assert engine.blocks.usage == 0 and engine.num_running == engine.num_waiting == 0
    intervals = timeline.busy["engine"]
    for (_, end, _), (begin, _, _) in zip(intervals, intervals[1:], strict=False):
        open_then = [r for r in timeline.records if r.arrival_s <= end < r.token_s[-1]]
        assert begin == end or not open_then
    for record in timeline.records:
        assert record.token_s == sorted(record.token_s) and record.token_s[0] > record.arrival_s
