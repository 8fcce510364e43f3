"""A planned pass computes what the ordinary pass computes, whatever the batch looks like; and models it does not know go the ordinary way."""

from typing import Any

import numpy as np
import pytest
import torch

from wager.serve.llm import LLM
from wager.serve.runner import Growth, SpanInput
from wager.serve.speculate import planned_pass
from wager.serve.speculate.draft_engine import DraftModel
from wager.serve.speculate.planned_pass import plan_pass


def drafts(target, draft, **options):
    """The same draft model twice: with and without a plan, each over a pool of its own."""
    made = []
    for _ in range(2):
        config = {"method": "sequoia", "draft": str(draft), "tree": [-1], **options}
        llm = LLM(str(target), block_size=4, speculative_config=config)
        speculator: Any = llm.engine.core.speculator
        made.append((llm, speculator.drafters["sequoia"].draft))
    (_, planned), (_, plain) = made
    assert planned.planned is not None, "the tiny draft is of the kind that is planned"
    plain.planned = None
    return made


def both(planned: DraftModel, plain: DraftModel, inputs):
    ours, theirs = planned.logits(inputs), plain.logits(inputs)
    assert (ours is None) == (theirs is None)
    if ours is not None:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"draft_vocabulary": 50}, {"draft_quantization": "int8"}])
def test_logits_are_those_of_the_ordinary_pass(options, tiny_dir, tiny_draft_dir):
    """Prompts in chunks, then trees of two requests grown level by level over what is cached."""
    (_, planned), (_, plain) = drafts(tiny_dir, tiny_draft_dir, **options)
    rng = np.random.default_rng(0)
    for model in (planned, plain):
        for seq, length in (("a", 40), ("b", 60)):
            model.runner.blocks.start(seq, [0], (seq,))
            assert model.runner.blocks.reserve(seq, length)
    a, b = rng.integers(0, 400, 19).tolist(), rng.integers(0, 400, 33).tolist()
    both(planned, plain, [SpanInput("a", a[:11], 0), SpanInput("b", b[:7], 0)])
    both(planned, plain, [SpanInput("a", a[11:], 11, logit_rows=1), SpanInput("b", b[7:], 7, logit_rows=3)])
    first = Growth(0, np.ones(2, np.int32), np.eye(2, dtype=bool))
    second = Growth(2, np.full(3, 2), np.array([[1, 0, 1, 0, 0], [1, 0, 0, 1, 0], [0, 1, 0, 0, 1]], bool))
    for growth, count in ((first, 2), (second, 3)):
        spans = [SpanInput(s, [5, 9, 77][:count], n, None, count, growth) for s, n in (("a", 19), ("b", 33))]
        both(planned, plain, spans)


def test_a_batch_too_large_for_the_buffers_goes_the_ordinary_way(tiny_dir, tiny_draft_dir):
    (_, planned), (_, plain) = drafts(tiny_dir, tiny_draft_dir)
    for model in (planned, plain):
        model.runner.blocks.start("a", [0], ("a",))
        assert model.runner.blocks.reserve("a", 100)
    inputs = [SpanInput("a", list(range(planned_pass.MAX_TOKENS + 1)), 0, logit_rows=1)]
    assert not planned.planned.fits(inputs)
    both(planned, plain, inputs)


def test_models_of_other_kinds_have_no_plan(tiny_dir):
    llm = LLM(str(tiny_dir), offload_layers=2)
    assert plan_pass(llm.engine.core.runner) is None, "streamed layers wait for their weights"
