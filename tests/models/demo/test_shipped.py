"""The pair that comes with the package: present, small enough, one vocabulary, and it can do what its card says."""

import json

import pytest

from wager import LLM, SamplingParams
from wager.models import demo
from wager.models.loader import load_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=48)


@pytest.fixture(scope="module")
def llm():
    return LLM("demo", kv_cache_memory="64MiB", max_num_seqs=8)


@pytest.fixture(scope="module")
def guessing():
    config = {"model": "demo-draft", "num_speculative_tokens": 3}
    return LLM("demo", kv_cache_memory="64MiB", max_num_seqs=8, speculative_config=config)


def test_sizes():
    files = [f for name in demo.NAMES for f in demo.path(name).iterdir()]
    assert sum(f.stat().st_size for f in files) < 40 * 2**20
    target, draft = (sum(p.numel() for p in load_model(demo.path(name)).model.parameters()) for name in demo.NAMES)
    assert 8e6 <= target <= 30e6 and draft <= 2e6


def test_one_vocabulary_for_both():
    first, second = ((demo.path(name) / "tokenizer.json").read_bytes() for name in demo.NAMES)
    assert first == second
    assert 4000 <= len(json.loads(first)["model"]["vocab"]) <= 8192


def test_it_says_what_it_is(llm):
    answer = llm.chat([{"role": "user", "content": "Who are you?"}], GREEDY)[0].outputs[0]
    assert "demo model" in answer.text and answer.finish_reason == "stop"


def test_it_counts(llm):
    answer = llm.chat([{"role": "user", "content": "Count from one to ten."}], GREEDY)[0].outputs[0]
    assert answer.text.startswith("one, two, three, four, five") and answer.finish_reason == "stop"


def test_it_writes_python(llm):
    text = llm.generate(["import os\nimport sys\n\ndef main():\n"], GREEDY)[0].outputs[0].text
    assert text.startswith("    ")


def test_the_draft_is_worth_asking_and_changes_nothing(llm, guessing):
    """Chain speculation with the shipped draft, through the engine: the same greedy tokens in fewer steps."""
    steps = []

    class Steps:
        def on_step(self, record):
            steps.append(record)

        def on_tokens(self, *_): ...

        def on_finished(self, *_): ...

    prompts = ["def read(path):\n", "class Node(object):\n    def __init__(self", "The president of the"]
    plain = [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)]
    guessing.engine.core.observers.append(Steps())
    assert [o.outputs[0].token_ids for o in guessing.generate(prompts, GREEDY)] == plain
    drafts, accepted = sum(s.drafts for s in steps), sum(s.accepted_tokens for s in steps)
    assert drafts > 0 and accepted / drafts > 0.7
