"""Ablations find what the symbolic search finds; families are tuned again at other sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wager.compile.mirage.generate import Limits
from wager.compile.prism import search as symbolic
from wager.compile.prism.ablation import KINDS, search_with_concrete
from wager.compile.prism.retune import retune
from wager.errors import UsageError
from wager.graph import published
from wager.graph.interpret import random_inputs
from wager.graph.program import Builder
from wager.graph.verify.floating import compare

LIMITS = Limits(max_block_ops=8, budget_s=3600)


def test_a_concrete_map_finds_the_same_families_with_more_work():
    program = published.rmsnorm_matmul(4, 16, 8)
    plain = symbolic.search(program, LIMITS)
    wanted = {str(f) for f in plain.families}
    assert wanted
    states = {}
    for which in KINDS:
        found = search_with_concrete(which, program, LIMITS)
        assert {str(f) for f in found.families} == wanted, which
        states[which] = found.progress.states
    assert states["imap"] > states["omap"] > plain.progress.states and states["fmap"] > plain.progress.states


def test_an_unknown_map_is_refused():
    with pytest.raises(UsageError, match="use one of imap, fmap, omap"):
        search_with_concrete("kmap", published.rmsnorm_matmul(4, 16, 8), LIMITS)


def test_families_are_tuned_again_at_other_sizes(rng):
    families = symbolic.search(published.rmsnorm_matmul(4, 16, 8), LIMITS).families
    for tokens, hidden, out in ((2, 16, 8), (6, 32, 48), (16, 64, 32)):
        program = published.rmsnorm_matmul(tokens, hidden, out)
        inputs = [x.astype(np.float32) for x in random_inputs(program, rng)]
        best = retune(families, program, [torch.from_numpy(x) for x in inputs], samples=3)
        got = best.run(*[torch.from_numpy(x) for x in inputs])[0].numpy()
        assert compare(program, inputs, [got]) and best.program.kernels


def test_families_of_another_program_are_refused():
    families = symbolic.search(published.rmsnorm_matmul(4, 16, 8), LIMITS).families
    b = Builder()
    x, w = b.input((4, 16)), b.input((16, 8))
    with pytest.raises(UsageError, match="none of .* families fits"):
        retune(families, b.build(b.matmul(x, w)), [torch.ones(4, 16), torch.ones(16, 8)])
