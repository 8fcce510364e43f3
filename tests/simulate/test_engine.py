"""The engine's own scheduler under a virtual clock: steps add up, tokens are conserved, memory pressure only delays."""

import pytest

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
