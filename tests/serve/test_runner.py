"""Token trees through the paged engine path: every node sees its ancestors only, and an accepted path becomes ordinary context."""

import numpy as np
import pytest
import torch

from wager.serve.llm import LLM
from wager.serve.runner import SpanInput, ancestor_mask
from wager.serve.speculate.verify import sample_and_match
from wager.serve.token_tree import TokenTree

TREE = TokenTree(
    tokens=np.array([11, 12, 13, 14, 15, 16], dtype=np.int64), parents=np.array([-1, -1, 0, 0, 2, 1], dtype=np.int32)
)


@pytest.fixture()
def runner(tiny_dir):
    return LLM(str(tiny_dir), block_size=4).engine.core.runner


def logits_of(runner, inputs):
    for i in inputs:
        assert runner.blocks.reserve(i.seq, i.context + i.length)
    batch = runner.build(inputs)
    return runner.logits(runner.forward(batch), batch.logit_rows_L), batch


def chain_logits(runner, tokens, name):
    runner.blocks.start(name, tokens)
    logits, _ = logits_of(runner, [SpanInput(name, tokens, 0, logit_rows=1)])
    runner.blocks.free(name)
    return logits[0]


def test_every_node_of_a_tree_sees_exactly_its_path(runner):
    prompt = [5, 9, 300, 17, 21]
    other = [7] * 9
    for name, tokens in (("a", prompt), ("b", other)):
        runner.blocks.start(name, tokens)
    inputs = [SpanInput("b", other, 0, logit_rows=1), SpanInput("a", prompt, 0, TREE, logit_rows=7)]
    logits, batch = logits_of(runner, inputs)
    assert batch.mask_TP is not None
    for node in range(-1, len(TREE)):
        path = [int(TREE.tokens[i]) for i in TREE.path(node)]
        torch.testing.assert_close(
            logits[2 + node], chain_logits(runner, prompt + path, f"n{node}"), atol=1e-4, rtol=1e-4
        )


def test_an_accepted_path_becomes_context(runner):
    prompt = [5, 9, 300, 17, 21]
    runner.blocks.start("a", prompt)
    _, batch = logits_of(runner, [SpanInput("a", prompt, 0, TREE, logit_rows=7)])
    path = TREE.path(4)
    assert path == [0, 2, 4]
    runner.keep_tree_path(batch.spans[0], path)
    accepted = [int(TREE.tokens[i]) for i in path]
    runner.blocks.commit("a", prompt + accepted, len(prompt) + 3)
    runner.blocks.truncate("a", len(prompt) + 3)
    after, _ = logits_of(runner, [SpanInput("a", [50], len(prompt) + 3, logit_rows=1)])
    torch.testing.assert_close(after[0], chain_logits(runner, [*prompt, *accepted, 50], "whole"), atol=1e-4, rtol=1e-4)


def test_wide_masks_span_several_words():
    tree = TokenTree(np.arange(100, dtype=np.int64), np.full(100, -1, dtype=np.int32))
    mask = ancestor_mask([SpanInput("a", [1, 2], 0, tree)], np.array([0, 102]))
    assert mask.shape == (102, 2)
    seen = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little").astype(bool)
    for node in range(100):
        assert set(np.flatnonzero(seen[2 + node])) == {0, 1, 2 + node}


def test_sample_and_match_follows_the_target():
    sampled = np.array([11, 13, 99, 15, 98, 77, 96])
    assert sample_and_match(TREE, sampled) == ([0, 2, 4], [11, 13, 15, 77])
    assert sample_and_match(TREE, np.array([50] * 7)) == ([], [50])
    assert sample_and_match(None, np.array([3])) == ([], [3])


def test_trees_refuse_children_before_parents():
    with pytest.raises(ValueError, match="parents before children"):
        TokenTree(np.array([1, 2]), np.array([1, -1]))


def test_nodes_see_their_paths():
    for node, seen in enumerate(TREE.visible()):
        assert set(np.flatnonzero(seen)) == set(TREE.path(node))
    assert TREE.depths().tolist() == [1, 1, 2, 2, 3, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [[0, 1, 2, 3], [1, 3], [3]])
def test_logits_of_some_rows_are_those_rows_of_all_logits(runner, wanted, dtype):
    hidden_TD = torch.randn(4, runner.model.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = torch.tensor(wanted)
    assert torch.equal(runner.logits(hidden_TD, rows), runner.model.logits(hidden_TD.float())[rows])
