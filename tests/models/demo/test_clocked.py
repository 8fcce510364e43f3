"""A target and drafts within a time limit: reading packages, all stages end to end, and files that the engine and transformers load."""

import json
import time
from dataclasses import replace
from email.message import Message
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from wager import LLM, SamplingParams
from wager.errors import UsageError, WagerError
from wager.models import demo
from wager.models.attend import causal_attention
from wager.models.demo import __main__ as factory
from wager.models.demo import clocked, packages
from wager.models.demo.corpus import Document
from wager.models.demo.distil import Prompts, agreement, soft_loss
from wager.models.demo.packages import Source, permissive, sources, texts_of
from wager.models.demo.timed import Clock, Place, check_loss, fresh, load, windows
from wager.models.loader import load_model

MODULE = '''"""{0} of a package that counts. {1}"""
import math
import os


def {0}_up(low, high):
    """Count from low to high.

    >>> {0}_up(1, 3)
    [1, 2, 3]
    """
    return list(range(low, high + 1))


class Thing:
    def {0}_method(self, x):
        """Say x twice, because once is not enough for {0}."""
        return x + x
'''


def metadata(**fields) -> Any:
    message = Message()
    for name, values in fields.items():
        for value in [values] if isinstance(values, str) else values:
            message[name.replace("_", "-")] = value
    return message


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """An installed package under BSD with enough modules that some are held out, and one under the GPL."""
    root = tmp_path_factory.mktemp("site")
    for name, license in (("counting", "BSD-3-Clause"), ("closed", "GPL-3.0-only")):
        (root / name / "tests").mkdir(parents=True)
        info = root / f"{name}-1.0.dist-info"
        info.mkdir()
        text = (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nLicense-Expression: {license}\n\n" + "A manual. " * 40
        )
        (info / "METADATA").write_text(text)
        files = [f"{name}-1.0.dist-info/METADATA", f"{name}/tests/test_it.py"]
        (root / name / "tests" / "test_it.py").write_text("def test_secret():\n    assert True\n" * 20)
        for i in range(60):
            (root / name / f"{name}{i}.py").write_text(MODULE.format(f"{name}{i}", "Words. " * 60))
            files.append(f"{name}/{name}{i}.py")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    return root


@pytest.fixture(scope="module")
def made(site, tmp_path_factory):
    """The preset end to end, with short stages; the library is two modules."""
    out = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        few = [f for f in packages.library_files() if f.stem in ("heapq", "textwrap")]
        patch.setattr(packages, "library_files", lambda: few)
        patch.setattr("wager.models.demo.corpus.library_files", lambda: few)
        plan = replace(factory.plans()["gpu-tiny"], steps=40)
        clocked.run(plan, Place(out, torch.device("cpu"), compiled=False), site, None, 2.0)
    return out


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"License_Expression": "BSD-3-Clause AND MIT"}, True),
        ({"License": "Apache 2.0"}, True),
        ({"Classifier": ["Programming Language :: Python", "License :: OSI Approved :: MIT License"]}, True),
        ({"Classifier": "License :: OSI Approved :: Python Software Foundation License"}, True),
        ({"License_Expression": "BSD-3-Clause AND GPL-3.0-or-later WITH GCC-exception-3.1"}, True),
        ({"License_Expression": "MIT OR GPL-2.0-only"}, False),
        ({"License": "MPL-2.0"}, False),
        ({"License": "NVIDIA Proprietary Software"}, False),
        ({"Classifier": "Topic :: Software Development :: MIT"}, False),
        ({}, False),
    ],
)
def test_only_permissive_licences_are_read(fields, allowed):
    assert permissive(metadata(**fields)) == allowed


def test_sources_are_those_of_permissive_packages_without_tests_and_within_the_limit(site):
    names = {s.name for s in sources(site, 10**9)}
    assert "counting/counting7.py" in names and "counting-1.0.dist-info/METADATA" in names
    assert not any("closed" in n or "test" in n for n in names)
    some = sources(site, 5000)
    assert 0 < sum(s.size for s in some) <= 5000 and {s.name for s in some} < names
    with pytest.raises(UsageError, match="permissive licence"):
        sources(site / "counting", 10**9)


def test_a_file_gives_its_source_its_functions_at_the_margin_and_its_docstrings(site):
    texts = list(texts_of(Source("counting/counting1.py", str(site / "counting" / "counting1.py"), 1)))
    assert {d for d, _, _ in texts} == {"code", "function", "docs"}
    method, prompt = next((t, p) for d, t, p in texts if d == "function" and "counting1_method" in t)
    assert (
        prompt is not None and method.startswith(prompt) and "\ndef counting1_method(self, x):\n    " in "\n" + method
    )
    assert prompt.endswith('not enough for counting1."""\n') and method.endswith("    return x + x\n")


def test_streams_keep_held_out_files_apart(made):
    tokenizer = tokenizers.Tokenizer.from_file(str(demo.path("demo") / "tokenizer.json"))
    decoded = {
        n: tokenizer.decode(np.load(made / "streams" / f"{n}.npy").tolist())
        for n in ("train", "heldout-code", "heldout-function")
    }
    held = [i for i in range(60) if Document("code", f"counting/counting{i}.py", "").held_out]
    assert 0 < len(held) < 12
    for i in range(60):
        text = f"def counting{i}_up("
        assert (text in decoded["train"]) == (i not in held)
        assert (text in decoded["heldout-function"]) == (i in held)
    assert "test_secret" not in decoded["train"] and "def closed0_up" not in decoded["train"]


def test_prompts_are_as_long_as_asked_and_half_are_functions(made):
    place = Place(made, torch.device("cpu"), compiled=False)
    tokenizer = tokenizers.Tokenizer.from_file(str(demo.path("demo") / "tokenizer.json"))
    rows = Prompts(place, "train")(24, 40, place.generator(0))
    assert rows.shape == (40, 24)
    assert sum(tokenizer.decode(row.tolist()).rstrip().endswith('"""') for row in rows) >= 20


def test_every_stage_leaves_its_files_and_the_draft_learned_the_target(made):
    report = json.loads((made / "evaluation.json").read_text())
    assert report["heldout_nats"]["code"] < 7.5  # 8.3 before the first step
    start = fresh(factory.plans()["gpu-tiny"].drafts["draft"], Place(made, torch.device("cpu"), False), 10)
    place, plan = Place(made, torch.device("cpu"), False), factory.plans()["gpu-tiny"]
    target = load(place, "target")
    before = agreement(plan, place, target, start, 0.6)
    assert report["agreement"]["draft"]["T=0.6"] > before + 0.2
    assert agreement(plan, place, target, target, 0.6) > 0.999
    assert agreement(plan, place, target, target, 0.0) == 1.0


def test_the_engine_and_transformers_load_what_was_made(made):
    ours = load_model(made / "target", torch.float32).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made / "target", dtype=torch.float32)
    tokens = torch.arange(5, 35)
    logits = ours.logits(ours(tokens, torch.arange(30), causal_attention(ours)))
    torch.testing.assert_close(logits, theirs(tokens[None]).logits[0], atol=1e-4, rtol=1e-4)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    config = {"draft": str(made / "draft"), "num_speculative_tokens": 3}
    plain = (
        LLM(str(made / "target"), kv_cache_memory="16MiB").generate(["def counting"], params)[0].outputs[0].token_ids
    )
    guessed = LLM(str(made / "target"), kv_cache_memory="16MiB", speculative_config=config).generate(
        ["def counting"], params
    )
    assert guessed[0].outputs[0].token_ids == plain


def test_a_stage_can_be_run_again_alone(made, tmp_path):
    before = (made / "draft" / "model.safetensors").read_bytes()
    texts = np.load(made / "streams" / "texts.npy")
    plan = replace(factory.plans()["gpu-tiny"], steps=2)
    clocked.run(plan, Place(made, torch.device("cpu"), False, seed=5), None, None, 2.0, ("drafts",))
    assert (made / "draft" / "model.safetensors").read_bytes() != before
    assert np.array_equal(np.load(made / "streams" / "texts.npy"), texts)
    (made / "draft" / "model.safetensors").write_bytes(before)
    with pytest.raises(UsageError, match="drift"):
        clocked.run(plan, Place(tmp_path, torch.device("cpu"), False), None, None, 1.0, ("drift",))


def test_the_soft_loss_is_least_where_the_draft_is_the_target():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    wanted = (logits / 0.6).softmax(-1)
    entropy = -(wanted * wanted.log()).sum(-1).mean()
    torch.testing.assert_close(soft_loss(logits, wanted, 0.6), entropy)
    assert soft_loss(logits * 0.8, wanted, 0.6) > entropy + 1e-3


def test_windows_show_everything_once_an_epoch():
    stream = torch.arange(1001, dtype=torch.int16)
    batches = windows(stream, 10, 5, torch.Generator().manual_seed(0))
    first = torch.cat([next(batches) for _ in range(18)])
    assert first.shape == (90, 11) and (first.diff(dim=1) == 1).all()
    assert len(set(first[:, 0].tolist())) == 90
    with pytest.raises(UsageError, match="fewer than a batch"):
        next(windows(stream, 10, 101, torch.Generator()))


def test_a_clock_ends_by_time_or_by_steps():
    clock = Clock(0.05, 10**9)
    assert clock.progress < 1
    time.sleep(0.06)
    assert clock.progress >= 1
    counted = Clock(1000.0, 2)
    counted.step(torch.device("cpu"))
    assert 0.5 <= counted.progress < 0.6
    assert Clock(0.0, 5).progress == 1


def test_a_lost_loss_is_an_error_that_keeps_the_last_weights():
    check_loss(1.0, "target")
    with pytest.raises(WagerError, match="lower learning rate"):
        check_loss(float("nan"), "target")


def test_options_of_other_presets_are_refused(tmp_path):
    from typer.testing import CliRunner

    app = factory.typer.Typer()
    app.command()(factory.main)
    result = CliRunner().invoke(app, ["--out", str(tmp_path), "--preset", "gpu-tiny", "--scale", "2"])
    assert result.exit_code == 2 and "--minutes" in result.output
