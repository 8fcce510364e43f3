"""Kills, notices and lost machines on real processes: every request ends with the tokens of an undisturbed run, each token once."""

import os
import signal
from dataclasses import replace

from tests.cluster.deploy.conftest import PARAMS, PROMPTS, TOKENS, generate
from wager.cluster.deploy import replica as replica_module
from wager.cluster.deploy.engine import run_all
from wager.serve.parallel.wire import StageLost
from wager.serve.params import OutputKind


def test_stages_generate_what_one_process_does(local_pipeline, undisturbed):
    engine, replica = local_pipeline
    assert len({p.worker.pid for p in replica.places} | {os.getpid()}) == 3
    assert generate(engine) == undisturbed
    engine.core.runner.blocks.check_invariants()


def test_killed_twice_each_token_streams_once(local_pipeline, undisturbed):
    engine, replica = local_pipeline
    before, computed = len(replica.events), engine.core.generation_tokens_total
    streamed = {i: [] for i in range(len(PROMPTS))}
    kills = [(10, 0), (40, 1)]

    def client(output):
        number = int(output.request_id.removeprefix("run-"))
        streamed[number] += output.outputs[0].token_ids
        if kills and sum(map(len, streamed.values())) >= kills[0][0]:
            os.kill(replica.places[kills.pop(0)[1]].worker.pid, signal.SIGKILL)

    run_all(engine, PROMPTS, [replace(p, output_kind=OutputKind.DELTA) for p in PARAMS], client)
    assert [streamed[i] for i in range(len(PROMPTS))] == undisturbed
    assert engine.core.generation_tokens_total - computed == TOKENS * len(PROMPTS)
    assert [(e.kind, e.stage, e.weights_from) for e in replica.events[before:]] == [
        ("kill", 0, "memory"),
        ("kill", 1, "memory"),
    ]
    assert engine.core.tokens_computed_again == 0


def test_stages_whose_connection_tells_them_nothing_are_started_again(local_pipeline, undisturbed, monkeypatch):
    engine, replica = local_pipeline
    before, stuck = len(replica.events), engine.core.runner.group

    def cut(*args):
        raise StageLost("a member is gone")

    monkeypatch.setattr(replica_module, "DISMISS_S", 0.1)
    monkeypatch.setattr(stuck, "post_message", cut)
    monkeypatch.setattr(stuck, "close", lambda: None)  # its connections stay open, so the stages go on waiting
    assert generate(engine) == undisturbed
    assert [(e.kind, e.stage, e.weights_from) for e in replica.events[before:]] == [
        ("kill", 0, "memory"),
        ("kill", 1, "memory"),
    ]


def test_notice_moves_a_stage_without_computing_anything_again(local_pipeline, undisturbed):
    engine, replica = local_pipeline
    before, old, again = len(replica.events), replica.places[1], engine.core.tokens_computed_again
    replica.notice_s = 0.0  # the deadline has passed when the replacement is there: it moves at the next step
    seen = []

    def client(output):
        seen.append(output)
        if len(seen) == 12:
            os.kill(old.worker.pid, signal.SIGTERM)
            while not replica._leaving:  # the notice travels through the worker's own process
                os.sched_yield()
            replica._leaving[0].fresh.result()

    assert generate(engine, client) == undisturbed
    (event,) = replica.events[before:]
    assert event.kind == "migrate" and event.moved_bytes > old.spec.block_size and event.weights_from == "memory"
    assert replica.places[1].worker.pid != old.worker.pid and engine.core.tokens_computed_again == again


def test_a_lost_machine_is_replaced_and_its_tokens_computed_again(local_pipeline, undisturbed):
    engine, replica = local_pipeline
    before, again = len(replica.events), engine.core.tokens_computed_again
    generated = engine.core.generation_tokens_total
    seen = []

    def client(output):
        seen.append(output)
        if len(seen) == 30:
            for host in (replica.places[0].daemon, replica.places[0].worker):
                os.kill(host.pid, signal.SIGKILL)
                host.call("pid").exception()  # until it is gone

    assert generate(engine, client) == undisturbed
    (event,) = replica.events[before:]
    assert event.kind == "lost" and event.weights_from == "disk"
    assert engine.core.tokens_computed_again > again
    assert engine.core.generation_tokens_total - generated == TOKENS * len(PROMPTS)


def test_hidden_rows_and_prompt_logprobs_travel(local_pipeline):
    engine, _ = local_pipeline
    from tests.cluster.deploy.conftest import OPTIONS
    from wager.serve.llm import LLM

    params = replace(PARAMS[0], max_tokens=4, logprobs=2, prompt_logprobs=1)
    ours = run_all(engine, PROMPTS[:1], [params])[0]
    whole = LLM("demo", **OPTIONS).generate(PROMPTS[:1], params)[0]
    assert ours.prompt_logprobs == whole.prompt_logprobs and ours.outputs[0].logprobs == whole.outputs[0].logprobs
