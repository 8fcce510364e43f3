"""Distilling a draft: it foretells its target more often than before, and any draft leaves the text as it is."""

import json

import numpy as np
import pytest
import torch

from tests.serve.conftest import build_llama
from wager.errors import UsageError
from wager.models.attend import causal_attention
from wager.models.demo.grow import thin
from wager.models.llama import Llama
from wager.models.loader import load_model
from wager.serve.llm import LLM
from wager.serve.params import SamplingParams
from wager.serve.speculate.distil import DistilRecipe, Lesson, batches, distil, lesson_loss, lessons_of, texts_of


@pytest.fixture(scope="module")
def small_dir(tmp_path_factory):
    small = dict(
        num_hidden_layers=2, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1
    )
    return build_llama(tmp_path_factory.mktemp("small"), seed=3, **small, initializer_range=0.1)


@pytest.fixture(scope="module")
def lessons(tiny_dir):
    llm = LLM(str(tiny_dir))
    prompts = np.random.default_rng(0).integers(0, 300, (60, 6)).tolist()
    return lessons_of(llm, texts_of(llm, prompts, 20, (0.0, 0.6)), DistilRecipe())


def test_texts_are_what_the_target_says(tiny_dir):
    llm = LLM(str(tiny_dir))
    prompts = [[5, 9, 300, 17], [44] * 6, [7, 8]]
    texts = texts_of(llm, prompts, 9, (0.0, 0.8), seed=4)
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        params = SamplingParams(temperature=(0.0, 0.8)[i % 2], max_tokens=9, ignore_eos=True, seed=4 + i)
        assert text == [*prompt, *llm.generate([prompt], params)[0].outputs[0].token_ids]


def test_a_lesson_holds_the_targets_view_of_every_position(tiny_dir):
    recipe = DistilRecipe(temperature=0.7, kept=5)
    (lesson,) = lessons_of(LLM(str(tiny_dir), dtype="float32"), [[5, 9, 300, 17, 4]], recipe)
    model = load_model(tiny_dir, torch.float32).model
    with torch.no_grad():
        hidden = model(torch.tensor([5, 9, 300, 17, 4]), torch.arange(5), causal_attention(model))
        wanted = torch.log_softmax(model.logits(hidden) / 0.7, -1).topk(5, -1)
    assert lesson.likely.tolist() == wanted.indices.tolist()
    np.testing.assert_allclose(lesson.logprobs, wanted.values, atol=5e-3)


def counting(count):
    """Lessons of a target that counts in sevens and is nearly sure of it."""
    made = []
    for start in np.random.default_rng(0).integers(0, 60, count).tolist():
        tokens = (start + 7 * np.arange(11)) % 60
        likely = np.stack([tokens[1:], tokens[:-1]], 1).astype(np.int32)
        made.append(Lesson(tokens[:-1], likely, np.log(np.tile([0.9, 0.1], (10, 1))).astype(np.float16)))
    return made


def test_distilling_makes_guesses_right_more_often(small_dir, tmp_path):
    recipe = DistilRecipe(rounds=15, learning_rate=1e-2)
    made = distil(counting(100), str(small_dir), tmp_path / "draft", recipe)
    assert made.hits[1] > made.hits[0] + 0.1 and made.overlap[1] > made.overlap[0] + 0.1
    assert made.texts == 95


def test_the_loss_of_a_batch_is_the_mean_of_its_texts(small_dir, lessons):
    model = load_model(small_dir, torch.float32).model
    few = lessons[:3]
    (group,) = batches(few)
    whole = lesson_loss(model, group, 0.6)
    alone = torch.stack([lesson_loss(model, [lesson], 0.6) for lesson in few]).mean()
    torch.testing.assert_close(whole, alone, atol=2e-3, rtol=2e-3)


def test_a_thinned_start_is_a_model_of_fewer_layers(small_dir, lessons, tmp_path):
    source = load_model(small_dir, torch.float32).model
    assert isinstance(source, Llama)
    thinned = thin(source, [1])
    torch.testing.assert_close(thinned.layers[0].mlp.down.weight, source.layers[1].mlp.down.weight)
    distil(lessons, str(small_dir), tmp_path / "thin", DistilRecipe(rounds=1), layers=[1])
    assert json.loads((tmp_path / "thin" / "config.json").read_text())["num_hidden_layers"] == 1
    again = load_model(tmp_path / "thin", torch.float32).model
    assert isinstance(again, Llama) and len(again.layers) == 1


@pytest.mark.parametrize("layers", [[], [0, 0], [2], [-1]])
def test_layers_that_are_not_there_are_refused(small_dir, layers):
    source = load_model(small_dir, torch.float32).model
    assert isinstance(source, Llama)
    with pytest.raises(UsageError, match="different numbers below 2"):
        thin(source, layers)


def test_too_little_to_learn_from_is_refused(small_dir, lessons, tmp_path):
    with pytest.raises(UsageError, match="3 texts are too few"):
        distil(lessons[:3], str(small_dir), tmp_path, DistilRecipe())
    with pytest.raises(UsageError, match="temperature above 0"):
        DistilRecipe(temperature=0.0)


def test_a_distilled_draft_leaves_the_text_as_it_is(tiny_dir, lessons, small_dir, tmp_path):
    distil(lessons, str(small_dir), tmp_path / "draft", DistilRecipe(rounds=1))
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    config = {"method": "sequoia", "draft": str(tmp_path / "draft"), "tree": [-1, -1, 0], "auto": False}
    ours = LLM(str(tiny_dir), speculative_config=config).generate([[7, 8, 9]], params)[0].outputs[0].token_ids
    assert ours == LLM(str(tiny_dir)).generate([[7, 8, 9]], params)[0].outputs[0].token_ids
