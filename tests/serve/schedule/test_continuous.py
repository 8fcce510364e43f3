"""The scheduler alone: a driver that "computes" whatever a plan says, on real block accounting, without a model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wager.errors import UsageError
from wager.serve.cache.block_manager import BlockManager, KVGroup
from wager.serve.params import SamplingParams
from wager.serve.request import Request, Status
from wager.serve.schedule.continuous import ContinuousScheduler, SchedulerConfig

FULL = (KVGroup((0,)),)


class Driver:
    """Runs plans and checks every one of them. Output token number i of a request is 1000 + i."""

    def __init__(self, num_blocks=64, block_size=4, groups=FULL, caching=True, **config):
        self.blocks = BlockManager(groups, num_blocks, block_size, caching)
        self.scheduler = ContinuousScheduler(SchedulerConfig(**config), self.blocks)
        self.plans, self.first_run, self.finished, self.failed = [], [], [], []
        self.now_s = 0.0
        self.count = 0

    def add(self, prompt, new_tokens=4, deadline_ms=None, **options):
        prompt = list(range(prompt)) if isinstance(prompt, int) else prompt
        params = SamplingParams(max_tokens=new_tokens, deadline_ms=deadline_ms)
        request = Request(f"r{self.count}", prompt, params, self.now_s, len(prompt) + new_tokens, **options)
        self.count += 1
        self.scheduler.add(request)
        return request

    def step(self, draft_tokens=0, accepted=0):
        scheduler, blocks, config = self.scheduler, self.blocks, self.scheduler.config
        self.now_s += 1.0
        before = [*scheduler.running, *scheduler.waiting]
        plan = scheduler.next_batch(self.now_s, draft_tokens)
        self.plans.append(plan)
        self.failed += [request for request, _ in plan.failed]
        assert plan.num_tokens <= config.max_num_batched_tokens
        assert len(plan.spans) <= config.max_num_seqs and scheduler.num_running <= config.max_num_seqs
        ids = [s.request.id for s in plan.spans]
        assert len(set(ids)) == len(ids) and not set(ids) & {r.id for r in plan.preempted}
        queued = [*scheduler.running, *scheduler.waiting]
        assert len({r.id for r in queued}) == len(queued) == len(before) - len(plan.failed), (
            "each live request is in one queue"
        )
        for span in plan.spans:
            request = span.request
            assert request in scheduler.running and request.status is Status.RUNNING and span.num_tokens >= 1
            reached = request.num_computed_tokens + span.num_tokens
            assert (
                reached <= request.num_tokens
                and len(blocks.table(request.id, 0)) * blocks.block_size >= reached + span.num_draft_tokens
            )
            assert not span.num_draft_tokens or reached == request.num_tokens > request.num_prompt_tokens
            if config.long_prefill_threshold:
                assert span.num_tokens <= config.long_prefill_threshold
            if request not in self.first_run:
                self.first_run.append(request)
        for span in plan.spans:
            self._run(span, accepted)
        blocks.take_copies()
        blocks.check_invariants()
        return plan

    def _run(self, span, accepted):
        request = span.request
        computed = request.num_computed_tokens + span.num_tokens
        if computed == request.num_tokens:
            for _ in range(1 + min(accepted, span.num_draft_tokens)):
                if request.num_tokens < request.max_total_tokens:
                    request.token_ids.append(1000 + request.num_output_tokens)
            computed = request.num_tokens - 1
        request.num_computed_tokens = computed
        self.blocks.commit(request.id, request.token_ids, computed)
        self.blocks.truncate(request.id, computed)
        if request.num_tokens == request.max_total_tokens:
            request.finish("length")
            self.scheduler.remove(request)
            self.finished.append(request)

    def drain(self, limit, **step):
        for _ in range(limit):
            if not (self.scheduler.running or self.scheduler.waiting):
                assert self.blocks.usage == 0.0
                return
            self.step(**step)
        raise AssertionError(
            f"{self.scheduler.num_running} running and {self.scheduler.num_waiting} waiting after {limit} steps"
        )


SIZES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=8)


@given(
    sizes=SIZES,
    budget=st.integers(1, 40),
    num_seqs=st.integers(1, 5),
    block_size=st.sampled_from([1, 3, 8]),
    spare=st.integers(0, 20),
    threshold=st.sampled_from([0, 1, 5]),
    policy=st.sampled_from(["fcfs", "priority", "longest-prefix", "deadline"]),
    drafts=st.integers(0, 3),
    accepted=st.integers(0, 3),
    gaps=st.lists(st.integers(0, 4), min_size=8, max_size=8),
    caching=st.booleans(),
)
def test_every_request_completes_within_limits_under_any_load(
    sizes, budget, num_seqs, block_size, spare, threshold, policy, drafts, accepted, gaps, caching
):
    """Budget, sequence limit and books are checked at every step; nobody starves; nobody fails who fits alone."""
    largest = max(p + n for p, n in sizes)
    driver = Driver(
        -(-(largest + spare) // block_size) + 1, block_size, caching=caching,
        max_num_batched_tokens=budget, max_num_seqs=num_seqs, long_prefill_threshold=threshold, policy=policy,
    )  # fmt: skip
    requests = []
    for i, (prompt, new) in enumerate(sizes):
        for _ in range(gaps[i]):
            driver.step(draft_tokens=drafts, accepted=accepted)
        requests.append(driver.add(prompt, new, priority=i % 3))
    # Alone and without a cache, a request needs at most its tokens' number of steps; preempted work may be done again.
    driver.drain(limit=3 * len(sizes) * sum(p + n for p, n in sizes) + 10, draft_tokens=drafts, accepted=accepted)
    assert set(driver.finished) == set(requests) and not driver.failed
    assert all(r.output_token_ids == [1000 + i for i in range(n)] for r, (_, n) in zip(requests, sizes, strict=True))


def test_decodes_go_on_while_a_long_prompt_is_chunked():
    driver = Driver(max_num_batched_tokens=8)
    short = driver.add(3, 20)
    driver.step()
    driver.add(60, 2)
    for _ in range(8):
        before = short.num_output_tokens
        plan = driver.step()
        assert short.num_output_tokens == before + 1
        assert [s.num_tokens for s in plan.spans] == [1, 7]


def test_a_long_prompt_leaves_room_under_a_threshold():
    driver = Driver(max_num_batched_tokens=16, long_prefill_threshold=6)
    driver.add(list(range(100, 140)))
    driver.add(list(range(200, 205)))
    assert [s.num_tokens for s in driver.step().spans] == [6, 5]


def test_first_come_first_served():
    driver = Driver(max_num_seqs=2)
    requests = [driver.add(list(range(10 * i, 10 * i + 5))) for i in range(6)]
    driver.drain(100)
    assert driver.first_run == requests and driver.finished == requests


def test_lower_priority_values_run_first_and_ties_by_arrival():
    driver = Driver(max_num_seqs=1, policy="priority")
    requests = [driver.add(5, priority=p) for p in (2, 0, 1, 0)]
    driver.drain(100)
    assert driver.first_run == [requests[1], requests[3], requests[2], requests[0]]


def test_priority_decides_who_is_preempted():
    driver = Driver(num_blocks=10, block_size=1, caching=False, policy="priority", watermark=0.0)
    low = driver.add(4, 5, priority=5)
    driver.step()
    urgent = driver.add(4, 6, priority=0)
    driver.drain(100)
    assert low.metrics.num_preemptions and not urgent.metrics.num_preemptions
    assert driver.finished == [urgent, low]


def test_the_earliest_deadline_runs_first_and_is_preempted_last():
    driver = Driver(max_num_seqs=1, policy="deadline")
    requests = [driver.add(5, deadline_ms=ms) for ms in (None, 9_000, 500, None, 2_000)]
    driver.drain(100)
    assert driver.first_run == [requests[i] for i in (2, 4, 1, 0, 3)]
    driver = Driver(num_blocks=10, block_size=1, caching=False, policy="deadline", watermark=0.0)
    relaxed = driver.add(4, 5, deadline_ms=60_000)
    driver.step()
    urgent = driver.add(4, 6, deadline_ms=1_000)  # due before the other, though it came later
    driver.drain(100)
    assert relaxed.metrics.num_preemptions and not urgent.metrics.num_preemptions
    assert driver.finished == [urgent, relaxed]


def test_the_latest_is_preempted_recomputed_and_first_in_line_again():
    driver = Driver(num_blocks=11, block_size=1, caching=False, watermark=0.0)
    first, second, third = driver.add(5, 6), driver.add(5, 4), driver.add(2, 8)
    while not any(p.preempted for p in driver.plans):
        driver.step()
    assert driver.plans[-1].preempted == [second] and second.num_computed_tokens == 0
    assert second.status is Status.WAITING and driver.scheduler.waiting[0] is second
    assert len(driver.plans[-1].spans) == 1, "nothing is admitted in a step that preempts"
    tokens = list(second.token_ids)
    driver.drain(100)
    assert second.token_ids[: len(tokens)] == tokens, "its tokens are kept, only their KV is computed again"
    assert driver.finished.index(first) < driver.finished.index(second) < driver.finished.index(third)


def test_a_preempted_request_resumes_from_what_is_still_cached():
    driver = Driver(num_blocks=8, block_size=2, watermark=0.0)
    driver.add(list(range(8)), 6)
    second = driver.add(list(range(100, 106)), 6)
    while not second.metrics.num_preemptions:
        driver.step()
    hits = driver.blocks.prefix_hits
    driver.drain(100)
    assert driver.blocks.prefix_hits > hits


def test_a_request_that_can_never_fit_fails_alone_with_the_remedy():
    driver = Driver(num_blocks=4, block_size=4)
    driver.add(30)
    fits = driver.add(5)
    plan = driver.step()
    (request, reason), *_ = plan.failed
    assert request.num_prompt_tokens == 30 and "16 tokens" in reason and "kv_cache_memory" in reason
    driver.drain(20)
    assert driver.finished == [fits]


def test_a_request_that_outgrows_the_cache_fails_and_frees_it():
    driver = Driver(num_blocks=2, block_size=4)
    driver.add(4, 20)
    for _ in range(20):
        driver.step()
    assert len(driver.failed) == 1 and driver.blocks.usage == 0.0


def test_blocked_requests_hold_nobody_up():
    driver = Driver(max_num_seqs=1)
    blocked = driver.add(5)
    blocked.status = Status.BLOCKED
    other = driver.add(5)
    for _ in range(8):
        driver.step()
    assert driver.finished == [other]
    driver.scheduler.unblock(blocked)
    driver.drain(10)
    assert driver.finished == [other, blocked]


def test_longest_prefix_first_prefers_what_is_cached_and_waits_are_bounded():
    driver = Driver(max_num_seqs=1, policy="longest-prefix", max_wait_s=3.0)
    cached = list(range(20))
    driver.add(cached, 1)
    driver.drain(5)
    cold, warm = driver.add(list(range(50, 70)), 1), driver.add([*cached, 3], 1)
    driver.step()
    assert driver.first_run[-1] is warm
    for _ in range(6):  # cached prompts keep coming, yet the cold one gets its turn
        driver.add([*cached, 4], 1)
        driver.step()
    assert cold in driver.finished


def test_low_priority_does_not_starve():
    driver = Driver(max_num_seqs=1, policy="priority", max_wait_s=5.0)
    low = driver.add(5, 1, priority=9)
    for _ in range(12):
        driver.add(5, 1, priority=0)
        driver.step()
    assert low in driver.finished


def test_a_watermark_keeps_blocks_for_those_who_run():
    driver = Driver(num_blocks=10, block_size=4, watermark=0.5)
    driver.add(list(range(16)), 8)
    driver.add(list(range(50, 58)), 8)
    assert [s.num_tokens for s in driver.step().spans] == [16]


def test_siblings_fork_the_prompt_and_compute_one_token():
    driver = Driver()
    first = driver.add(20, 6)
    second = driver.add(20, 6, shares_prompt_with=first)
    assert [s.request for s in driver.step().spans] == [first]
    plan = driver.step()
    assert [(s.request, s.num_tokens) for s in plan.spans] == [(first, 1), (second, 1)]
    shared = driver.blocks.table(first.id, 0)[:4].tolist()
    assert shared == driver.blocks.table(second.id, 0)[:4].tolist()
    driver.drain(20)


def test_a_sibling_that_comes_too_late_for_the_window_starts_afresh():
    """Window layers of the first have given back what the prompt's last token sees: its blocks must not be taken over."""
    driver = Driver(num_blocks=40, block_size=2, groups=(KVGroup((0,), window=4),), max_num_seqs=2)
    other, first = driver.add(list(range(50, 60)), 12), driver.add(20, 30)
    late = driver.add(20, 4, shares_prompt_with=first)
    while late.status is not Status.RUNNING:
        driver.step()
    assert other in driver.finished and first.num_output_tokens > 8
    assert late.num_computed_tokens != late.num_prompt_tokens - 1 or driver.plans[-1].spans[-1].num_tokens > 1
    driver.drain(60)
    assert late in driver.finished


def test_drafts_get_what_is_left_of_the_budget():
    driver = Driver(max_num_batched_tokens=6)
    driver.add(2, 20)
    driver.add(2, 20)
    driver.step(draft_tokens=3)
    plan = driver.step(draft_tokens=3)
    assert [(s.num_tokens, s.num_draft_tokens) for s in plan.spans] == [(1, 2), (1, 2)]  # in equal parts


def test_no_blocks_for_drafts_means_no_drafts_rather_than_preemption():
    driver = Driver(num_blocks=6, block_size=1, caching=False, watermark=0.0)
    driver.add(2, 3)
    driver.add(2, 1)
    driver.step()
    plan = driver.step(draft_tokens=8)
    assert [s.num_draft_tokens for s in plan.spans] and not plan.preempted


def test_removal_is_idempotent_and_frees():
    driver = Driver()
    request, waiting = driver.add(9), driver.add(9)
    driver.scheduler.remove(waiting)
    driver.step()
    driver.scheduler.remove(request)
    driver.scheduler.remove(request)
    assert driver.blocks.usage == 0.0 and not driver.scheduler.running and not driver.scheduler.waiting


def test_an_unknown_policy_names_the_known_ones():
    with pytest.raises(UsageError, match="'random' is unknown.*fcfs, priority, longest-prefix"):
        SchedulerConfig(policy="random")
