"""A tree computed level by level over cached rows gives every node the logits of its path run as plain text."""

import numpy as np
import pytest
import torch

from wager.serve.llm import LLM
from wager.serve.runner import Growth, SpanInput
from wager.serve.token_tree import TokenTree


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_levels_see_their_ancestors_only(tiny_dir, kernels, monkeypatch):
    from wager.kernels import registry

    monkeypatch.setenv("WAGER_KERNELS", kernels)
    registry.choice.cache_clear()
    runner = LLM(str(tiny_dir), block_size=4).engine.core.runner
    rng = np.random.default_rng(0)
    prompt = rng.integers(3, 400, 13).tolist()
    n = 70  # more than one mask word
    parents = np.array([rng.integers(-1, i) if i else -1 for i in range(n)], np.int32)
    tree = TokenTree(rng.integers(3, 400, n), parents)
    depths, visible = tree.depths(), tree.visible()
    runner.blocks.start("s", prompt)
    runner.blocks.reserve("s", len(prompt) + n)
    batch = runner.build([SpanInput("s", prompt, 0, logit_rows=1)])
    runner.forward(batch)
    order = np.lexsort((np.arange(n), depths))  # by level
    rows, got = [], {}
    for level in range(1, depths.max() + 1):
        nodes = [i for i in order if depths[i] == level]
        seen = visible[np.ix_(nodes, [*rows, *nodes])]
        growth = Growth(len(rows), depths[nodes], seen)
        span = SpanInput("s", tree.tokens[nodes].tolist(), len(prompt), logit_rows=len(nodes), growth=growth)
        batch = runner.build([span])
        logits = runner.logits(runner.forward(batch), batch.logit_rows_L)
        got.update(zip(nodes, logits, strict=True))
        rows += nodes
    for node in range(0, n, 9):
        path = tree.tokens[tree.path(node)].tolist()
        name = f"path{node}"
        runner.blocks.start(name, prompt + path)
        runner.blocks.reserve(name, len(prompt) + len(path))
        batch = runner.build([SpanInput(name, prompt + path, 0, logit_rows=1)])
        plain = runner.logits(runner.forward(batch), batch.logit_rows_L)[0]
        torch.testing.assert_close(got[node], plain, atol=1e-4, rtol=1e-4)
        runner.blocks.free(name)
    registry.choice.cache_clear()
