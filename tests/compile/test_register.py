"""Found programs as kernels: the candidate file computes the operator, falls back, passes the referee's reading, and enters the engine."""

from __future__ import annotations

import types

import pytest
import torch

from wager.compile.cli import parse_recipe
from wager.compile.mirage.generate import Limits
from wager.compile.prism import search as symbolic
from wager.compile.register import candidate_source, register, scalars
from wager.errors import UsageError
from wager.graph.program import to_json
from wager.graph.trace import trace
from wager.kernels.referee import operators, static_check
from wager.kernels.referee.injection import load_classes

WIDTH = 32


@pytest.fixture(scope="module")
def source() -> str:
    """RMSNorm with the program that the search proves first."""
    plain = operators.RMSNorm(WIDTH)
    traced = trace(
        lambda x, w: torch.func.functional_call(plain, {"weight": w}, (x,)),
        [torch.randn(4, WIDTH), plain.weight.detach()],
    )
    families = symbolic.search(traced.program, Limits(max_block_ops=11, budget_s=3600)).families
    program = symbolic.members(families, traced.program, 1)[0]
    assert program.kernels
    entry = {"shapes": [(4, WIDTH), (WIDTH,)], "settings": scalars(plain), "program": to_json(program)}
    return candidate_source("RMSNorm", [entry], 2)


def test_a_found_program_serves_its_shape_and_the_plain_form_all_others(source, monkeypatch):
    module = types.ModuleType("candidate")
    exec(compile(source, "candidate.py", "exec"), module.__dict__)
    ours, plain = module.RMSNorm(WIDTH), operators.RMSNorm(WIDTH)
    ours.load_state_dict(plain.state_dict())
    served = []
    found = module._compiled
    monkeypatch.setattr(module, "_compiled", lambda key: served.append(key[0]) or found(key))
    with torch.no_grad():
        for rows in (4, 5):
            x = torch.randn(rows, WIDTH)
            torch.testing.assert_close(ours(x), plain(x), atol=1e-5, rtol=1e-5)
        assert served == [((4, WIDTH), (WIDTH,))]
        other = module.RMSNorm(WIDTH, eps=1e-2)
        torch.testing.assert_close(other(x), operators.RMSNorm.forward(other, x))
        assert len(served) == 1  # another eps is another function
        ours.double()(torch.randn(4, WIDTH).double())
        ours.float()
    x = torch.randn(4, WIDTH, requires_grad=True)
    ours(x).sum().backward()  # a gradient goes through the plain form
    assert x.grad is not None and len(served) == 1


def test_the_referee_and_the_engine_take_the_file(source, tmp_path):
    assert static_check.check(source, "RMSNorm", library=False) == []
    place = tmp_path / "rms.py"
    place.write_text(source)
    assert set(load_classes(place)) == {"RMSNorm"}


def test_what_cannot_be_registered_is_explained(tmp_path):
    with pytest.raises(UsageError, match="'Magic' is not judged; known: BatchNorm2d"):
        register("Magic", [[(2, 2)]], tmp_path / "m.py")
    with pytest.raises(UsageError, match="cannot be built with"):
        register("RMSNorm", [[(2, 2)]], tmp_path / "m.py", {"height": 2})
    with pytest.raises(UsageError, match="nothing to register for Softmax: .*softmax"):
        register("Softmax", [[(2, 2)]], tmp_path / "m.py", search="prism", time_budget_s=60)
    assert not list(tmp_path.iterdir())
    assert parse_recipe("width=768, eps=1e-6") == {"width": 768, "eps": 1e-6} and parse_recipe("") == {}
    with pytest.raises(UsageError, match="width=768"):
        parse_recipe("width")
