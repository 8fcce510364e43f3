"""The planned pass of the engine's model has the bits of the ordinary one, whatever the batch; where it does not apply, the ordinary one runs."""

import numpy as np
import pytest
import torch

from wager.serve.llm import LLM
from wager.serve.runner import Growth, ModelRunner, SpanInput
from wager.serve.token_tree import TokenTree


def runner_of(directory, **options) -> ModelRunner:
    return LLM(str(directory), block_size=4, **options).engine.core.runner


def random_spans(rng: np.random.Generator, contexts: dict[str, int]) -> list[SpanInput]:
    """Chunks, decode tokens, trees below a token and grown levels, one span for each of some sequences; only chunks move the context on."""
    spans = []
    for seq in rng.permutation(list(contexts))[: rng.integers(1, len(contexts) + 1)]:
        context, kind = contexts[seq], rng.integers(4)
        tokens = rng.integers(0, 400, rng.integers(1, 12)).tolist()
        if kind == 0 or not context:
            spans.append(SpanInput(seq, tokens, context, logit_rows=1))
            contexts[seq] += len(tokens)
        elif kind == 1:
            spans.append(SpanInput(seq, tokens[:1], context, logit_rows=1))
        elif kind == 2:
            parents = np.array([rng.integers(-1, i) for i in range(len(tokens))], np.int32)
            tree = TokenTree(np.array(tokens), parents)
            spans.append(SpanInput(seq, tokens[:1], context, tree, len(tree) + 1))
        else:
            visible = np.tri(len(tokens), dtype=bool) & (rng.random((len(tokens), len(tokens))) < 0.5)
            np.fill_diagonal(visible, True)
            growth = Growth(0, visible.sum(1), visible)
            spans.append(SpanInput(seq, tokens, context, None, len(tokens), growth))
    return spans


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "bfloat16"}, {"quantization": "int8"}, {"kv_cache_dtype": "fp8"}], ids=str
)
def test_hidden_states_have_the_bits_of_the_ordinary_pass(options, tiny_dir):
    planned, plain = (runner_of(tiny_dir, **options) for _ in range(2))
    assert planned.planned() is not None, "the tiny model is of the kind that is planned"
    plain._plans = False
    rng, contexts = np.random.default_rng(0), dict.fromkeys("abcde", 0)
    for runner in (planned, plain):
        for seq in contexts:
            runner.blocks.start(seq, [0], (seq,))
            assert runner.blocks.reserve(seq, 120)
    for _ in range(12):
        spans = random_spans(rng, contexts)
        ours, theirs = (runner.forward(runner.build(spans)) for runner in (planned, plain))
        assert torch.equal(ours, theirs)
    assert plain.planned() is None


def test_what_a_pass_returns_survives_the_next(tiny_dir):
    runner = runner_of(tiny_dir)
    runner.blocks.start("a", [0], ("a",))
    assert runner.blocks.reserve("a", 40)
    first = runner.forward(runner.build([SpanInput("a", [5, 6, 7], 0, logit_rows=1)]))
    kept = first.clone()
    runner.forward(runner.build([SpanInput("a", [8, 9], 3, logit_rows=1)]))
    assert torch.equal(first, kept)


def test_a_hook_that_comes_later_is_called(tiny_dir):
    runner, seen = runner_of(tiny_dir), []
    runner.blocks.start("a", [0], ("a",))
    assert runner.blocks.reserve("a", 40) and runner.planned() is not None
    block = runner.model.layers[1]
    handle = block.register_forward_hook(lambda *_: seen.append(1))
    runner.forward(runner.build([SpanInput("a", [5, 6, 7], 0, logit_rows=1)]))
    assert seen and runner.planned() is None
    handle.remove()


def test_one_list_of_calls_serves_every_shape_and_is_made_anew_for_other_buffers_and_threads(tiny_dir):
    planned = runner_of(tiny_dir).planned()
    assert planned is not None
    body, threads = planned.body, torch.get_num_threads()
    body.room(4, 1, 4, 8)
    for tokens, width in ((1, 1), (3, 4), (1, 8)):
        body.starts_R[1] = tokens
        first = body.run(tokens, 1, 0, width).copy()
        arguments = body._layers[0]
        assert [a.tokens for _, a, _ in body._layers] == [tokens] * len(body._layers)
        assert np.array_equal(body.run(tokens, 1, 0, width), first) and body._layers[0] is arguments
    try:
        torch.set_num_threads(threads + 1)
        body.run(1, 1, 0, 8)
        assert body._layers[0] is not arguments and body._layers[0][1].threads == threads + 1
    finally:
        torch.set_num_threads(threads)
    arguments = body._layers[0]
    body.room(64, 1, 4, 8)
    body.starts_R[1] = 1
    body.run(1, 1, 0, 8)
    assert body._layers[0] is not arguments
