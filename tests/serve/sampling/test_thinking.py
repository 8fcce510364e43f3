"""A bound on thinking tokens: the closing tag comes in time, once, and nothing else changes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serve.text.tokenizers_for_tests import make
from wager.errors import UsageError
from wager.serve.llm import LLM
from wager.serve.params import SamplingParams, StructuredOutputs
from wager.serve.sampling.thinking import ThinkingBudget
from wager.serve.text.reasoning import CLOSE, OPEN


@pytest.fixture(scope="module")
def llm(tiny_dir):
    return LLM(str(tiny_dir))


@pytest.fixture(scope="module")
def drafted(tiny_dir, tiny_draft_dir):
    return LLM(str(tiny_dir), speculative_config={"draft": str(tiny_draft_dir), "auto": False})


def thoughts(budget, **options):
    settings = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, **options}
    return SamplingParams(thinking_token_budget=budget, **settings)


def closing(llm):
    return llm.get_tokenizer().encode(CLOSE, add_special_tokens=False)


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_thoughts_end_at_the_budget_and_the_answer_goes_on(llm, budget):
    prompt = f"Count. {OPEN}"
    free = llm.generate(prompt, thoughts(None))[0].outputs[0]
    assert CLOSE not in free.text  # so that the tag below is the budget's doing
    bounded = llm.generate(prompt, thoughts(budget))[0].outputs[0]
    tag = closing(llm)
    assert bounded.token_ids[: budget + len(tag)] == free.token_ids[:budget] + tag
    assert len(bounded.token_ids) == 40 and bounded.text.count(CLOSE) == 1


def test_answers_without_thoughts_are_left_alone(llm):
    prompt = "The quick brown fox"
    texts = [llm.generate(prompt, thoughts(budget))[0].outputs[0].text for budget in (None, 0, 3)]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_keep_the_budget(llm, drafted, temperature):
    for budget in (0, 2, 5):
        params = thoughts(budget, temperature=temperature, seed=11)
        tokens = [engine.generate(f"one two {OPEN}", params)[0].outputs[0].token_ids for engine in (llm, drafted)]
        tag = closing(llm)
        assert all(made[budget : budget + len(tag)] == tag for made in tokens)
        if temperature == 0:
            assert tokens[0] == tokens[1]


TEXTS = st.lists(st.sampled_from(["The lazy dog. ", OPEN, CLOSE, "</th", "ought ", "你好", "\n"]), max_size=12).map(
    "".join
)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@given(before=TEXTS, text=TEXTS, budget=st.integers(0, 6), cut=st.integers(0, 60))
def test_a_guessed_path_is_judged_as_the_same_output_would_be(kind, before, text, budget, cut):
    tokenizer = make(kind)
    prompt, output = tokenizer.encode("x" + before), tokenizer.encode(text, add_special_tokens=False)
    cut = min(cut, len(output))
    guessing = ThinkingBudget(tokenizer, prompt, budget)
    guessed = guessing.forced(output[:cut], output[cut:])
    assert guessed == ThinkingBudget(tokenizer, prompt, budget).forced(output)
    assert guessing.forced(output) == guessed  # guesses leave no trace


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@given(text=st.text(st.characters(codec="utf-8"), max_size=30), budget=st.integers(0, 12))
def test_any_thoughts_are_closed(kind, text, budget):
    """Whatever a model writes after the opening tag: following what is forced closes the thoughts within the budget and two tags."""
    tokenizer = make(kind)
    wishes = iter(tokenizer.encode(text, add_special_tokens=False) * 40 + [ord("x")] * 40)
    thinking, output = ThinkingBudget(tokenizer, tokenizer.encode(f"why {OPEN}"), budget), []
    most = budget + 2 * len(tokenizer.encode(CLOSE, add_special_tokens=False))
    while len(output) < most and CLOSE not in tokenizer.decode(output, skip_special_tokens=False):
        forced = thinking.forced(output)
        output.append(next(wishes) if forced is None else forced)
    assert CLOSE in tokenizer.decode(output, skip_special_tokens=False)
    assert thinking.forced(output) is None


def test_what_cannot_be_bounded_is_refused(tiny_dir):
    with pytest.raises(UsageError, match="thinking_token_budget must lie in"):
        SamplingParams(thinking_token_budget=-1)
    with pytest.raises(UsageError, match="exclude each other"):
        SamplingParams(thinking_token_budget=3, structured_outputs=StructuredOutputs(regex="a+"))
    bare = LLM(str(tiny_dir), skip_tokenizer_init=True)
    with pytest.raises(UsageError, match="thinking_token_budget needs a tokenizer"):
        bare.generate([5, 6], SamplingParams(thinking_token_budget=3))
