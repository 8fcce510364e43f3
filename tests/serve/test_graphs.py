"""Buckets of decode graphs, without a GPU: a recording that runs the real model over kept buffers stands in for the CUDA capture."""

import numpy as np
import pytest
import torch

from wager.serve.batch import Batch, Span
from wager.serve.graphs import BUCKETS, NARROWEST, DecodeGraphs, Recording, bucket_of, width_bucket

CPU = torch.device("cpu")


def step(rows, width=3, seed=0, logit_rows=1):
    """(spans, tokens, contexts, tables) of a decode step."""
    generator = np.random.default_rng(rows + 1000 * seed)
    contexts = generator.integers(1, 4 * width, rows)
    tables = (generator.integers(0, 60, rows), generator.integers(1, 9, (rows, width)).astype(np.int32))
    spans = tuple(Span(str(i), i, 1, int(c), None, i, logit_rows) for i, c in enumerate(contexts))
    return spans, generator.integers(1, 90, rows), contexts, [tables]


def forward(batch: Batch):
    """Hidden rows that tell every array apart."""
    group = batch.groups[0]
    return (
        torch.stack((batch.tokens_T, batch.positions_T, batch.contexts_R.long(), group.slots_T), 1).float()
        + group.tables_RB.sum(1)[:, None]
    )


def recorder(made):
    """Runs the function over the kept batch at every replay, as a graph would."""

    def record(compute, batch):
        hidden, logits = (torch.empty_like(t) for t in compute(batch))
        made.append((batch.num_tokens, batch.groups[0].tables_RB.shape[1]))

        def replay():
            for kept, value in zip((hidden, logits), compute(batch), strict=True):
                kept.copy_(value)

        return Recording(hidden, logits, replay)

    return record


def test_buckets():
    assert [bucket_of(n) for n in (1, 3, 8, 9, 17, 256)] == [1, 4, 8, 16, 32, 256]
    assert bucket_of(257) is None and list(BUCKETS) == sorted(set(BUCKETS))
    assert [width_bucket(n) for n in (1, 5, 16, 17, 64, 65)] == [NARROWEST, NARROWEST, 16, 32, 64, 128]


def test_padding_writes_nothing_and_reads_block_zero():
    graphs = DecodeGraphs(forward, torch.neg, CPU, recorder([]))
    graphs.stage(*step(4, 9, seed=1))  # what the step before left behind must not show
    spans, tokens, contexts, tables = step(3)
    batch = graphs.stage(spans, tokens, contexts, tables)
    whole, group = batch.staged, batch.staged.groups[0]
    assert (
        whole.num_tokens == 4
        and whole.span_starts.tolist() == [0, 1, 2, 3, 4]
        and whole.spans_T.tolist() == [0, 1, 2, 3]
    )
    assert group.slots_T.tolist() == [*tables[0][0], -1] and group.tables_RB.shape == (4, NARROWEST)
    assert (group.tables_RB[3] == 0).all() and (group.tables_RB[:3, 3:] == -1).all() and whole.contexts_R[3] == 0
    assert batch.num_tokens == 3 and batch.tokens_T.tolist() == tokens.tolist()
    assert batch.positions_T.tolist() == batch.contexts_R.tolist() == contexts.tolist()
    assert batch.groups[0].tables_RB[:, :3].tolist() == tables[0][1].tolist() and batch.spans == spans


def test_recordings_are_made_once_a_bucket_and_replays_see_new_values():
    made = []
    graphs = DecodeGraphs(forward, torch.neg, CPU, recorder(made))
    for seed, (rows, width) in enumerate([(3, 3), (4, 9), (3, 16), (9, 3), (2, 3), (10, 5), (3, 17)]):
        batch = graphs.stage(*step(rows, width, seed))
        hidden = graphs(batch)
        assert torch.equal(hidden, forward(batch)), rows
        assert torch.equal(graphs.logits(hidden, batch.logit_rows_L), -hidden)
    assert made == [(4, 16), (16, 16), (2, 16), (4, 32)], "a wider table is another graph"
    assert graphs.stage(*step(300)) is None, "what does not fit runs without"


def test_logits_of_other_rows_are_not_those_of_the_replay():
    graphs = DecodeGraphs(forward, torch.neg, CPU, recorder([]))
    spans, *rest = step(3)
    batch = graphs.stage((spans[0], Span("1", 1, 1, 4), spans[2]), *rest)
    hidden = graphs(batch)
    assert batch.logit_rows_L.tolist() == [0, 2] and graphs.logits(hidden, batch.logit_rows_L) is None
    assert graphs.logits(hidden.clone(), batch.logit_rows_L) is None


def test_a_model_that_cannot_be_captured_runs_without_and_says_so(caplog):
    def refuse(compute, batch):
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = DecodeGraphs(forward, torch.neg, CPU, refuse)
    batch = graphs.stage(*step(3))
    assert torch.equal(graphs(batch), forward(batch)) and "without CUDA graphs" in caplog.text
    assert graphs.stage(*step(3)) is None and graphs.logits(batch.tokens_T, batch.logit_rows_L) is None


def test_the_engine_writes_the_same_tokens_through_recordings(monkeypatch):
    """Staged decode steps with a stand-in for the capture, under a real engine: prompts of several lengths, requests that end at different times."""
    from wager import LLM, SamplingParams

    prompts = [[5, 6, 7], list(range(20, 60)), [9], list(range(100, 117))]
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (4, 20, 11, 1)]
    llm, made = LLM("demo-draft", dtype="float32", skip_tokenizer_init=True, max_model_len=256), []
    want = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
    runner = llm.engine.core.runner
    runner.graphs = DecodeGraphs(runner._forward, runner.model.logits, CPU, recorder(made))
    runner._compute = runner.graphs
    llm.engine.core.runner.blocks.reset_prefix_cache()
    assert [o.outputs[0].token_ids for o in llm.generate(prompts, params)] == want
    assert {rows for rows, _ in made} >= {1, 2, 4}


@pytest.mark.parametrize("rows", [1, 3])
def test_the_model_gives_the_same_hidden_rows(rows):
    """The engine's own attention over a real pool, padded and not."""
    from wager import kernels

    generator = torch.Generator().manual_seed(0)
    k_pool, v_pool = (torch.randn(64, 2, 16, generator=generator) for _ in range(2))
    q, k, v = (torch.randn(4, h, 16, generator=generator) for h in (4, 2, 2))
    pools = []

    def attend(batch):
        own = (k_pool.clone(), v_pool.clone())
        pools.append(own)
        n, group = batch.num_tokens, batch.groups[0]
        new = (k[:n], v[:n], group.slots_T)
        return kernels.paged_attention(
            q[:n], *own, group.tables_RB, batch.span_starts, batch.contexts_R, batch.positions_T, 4, 0.25, new=new,
            spans_T=batch.spans_T,
        )  # fmt: skip

    batch = DecodeGraphs(attend, torch.neg, CPU, recorder([])).stage(*step(rows))
    got, want = attend(batch.staged)[:rows], attend(batch)
    assert torch.equal(got, want) and all(np.array_equal(a, b) for a, b in zip(*pools, strict=True))
