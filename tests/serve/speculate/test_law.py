"""The law of sampled text, for every method at every temperature and nucleus, in the whole engine; wrong rules fail the same test.

Methods that sample and match must give the tokens of plain decoding, seed for seed, so their law is that of plain decoding, which is
tested here too. Methods with a ratio rule are tested by the joint law of texts of three tokens (27 texts, likelihood-ratio test).
A sound engine fails a run of the whole grid with a probability of about 19 x 1e-5.
"""

import numpy as np
import pytest

from tests.serve.conftest import build_llama
from tests.serve.speculate.grid import ALLOWED, BY_RATIO, MATCHING, SAMPLED_GRID, TextLaw, configs, g_test, tokens_of
from wager.serve.llm import LLM
from wager.serve.params import SamplingParams
from wager.serve.speculate import ratio, sequoia, specinfer

PROMPT = [7, 8, 9]
SMALL = dict(num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=416, initializer_range=0.25)
SIGNIFICANCE = 1e-5
PROMPTS = [[5, 9, 300, 17], [44] * 40, [7, 8, 9] * 25, list(range(100, 133))]


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """(target, draft, law of the target's texts): two models with flat distributions over the same tiny vocabulary."""
    target, draft = (build_llama(tmp_path_factory.mktemp(f"flat{s}"), seed=s, **SMALL) for s in (11, 12))
    return target, draft, TextLaw(target, PROMPT)


def sampled(llm, temperature, top_p, count):
    """Texts of three tokens, `count` of them, 128 requests at a time."""
    params = SamplingParams(
        temperature=temperature, top_p=top_p, max_tokens=3, ignore_eos=True, allowed_token_ids=ALLOWED, n=128
    )
    return [tuple(t) for _ in range(count // 128) for t in tokens_of(llm.generate(PROMPT, params))]


def engine(flat, config, **options):
    config = config and {**config, "auto": False}
    return LLM(str(flat[0]), speculative_config=config, max_model_len=16, block_size=4, **options)


@pytest.mark.parametrize("name", [None, *BY_RATIO])
def test_sampled_texts_have_the_target_law(name, flat):
    """At each point of the grid, all in one engine, so a draft cache that went wrong shows too."""
    target, draft, law = flat
    llm = engine(flat, configs(target, draft)[name] if name else None)
    for temperature, top_p in SAMPLED_GRID:
        assert g_test(sampled(llm, temperature, top_p, 512), law.at(temperature, top_p)) > SIGNIFICANCE, (
            temperature,
            top_p,
        )


def test_a_mixed_batch_keeps_every_law(flat):
    """Requests of different settings and different methods in one batch, each with its own law."""
    target, draft, law = flat
    known = configs(target, draft)
    llm = LLM(
        str(target), max_model_len=16,
        speculative_config=[{**known[n], "auto": False} for n in ("sequoia", "specinfer", "specexec", "chain", "suffix")],
    )  # fmt: skip
    points = [
        (1.0, 1.0, "sequoia"),
        (0.6, 0.9, "specinfer"),
        (1.0, 0.9, "specexec"),
        (0.6, 1.0, "draft_model"),
        (1.0, 1.0, "none"),
    ]
    params = [
        SamplingParams(
            temperature=t, top_p=p, max_tokens=3, ignore_eos=True, allowed_token_ids=ALLOWED, n=32, speculative_method=m
        )
        for t, p, m in points
    ]  # fmt: skip
    texts = [[] for _ in points]
    for _ in range(12):
        for found, output in zip(texts, llm.generate([PROMPT] * len(points), params), strict=True):
            found += [tuple(choice.token_ids) for choice in output.outputs]
    for (temperature, top_p, method), found in zip(points, texts, strict=True):
        assert g_test(found, law.at(temperature, top_p)) > SIGNIFICANCE, method


@pytest.mark.parametrize("name", MATCHING)
def test_matching_methods_keep_seeded_samples_on_the_whole_grid(name, tiny_dir, tiny_draft_dir, plain_samples):
    """One batch holds the whole grid, greedy requests and penalties included."""
    llm = LLM(str(tiny_dir), speculative_config={**configs(tiny_dir, tiny_draft_dir)[name], "auto": False})
    prompts, params, expected = plain_samples
    assert tokens_of(llm.generate(prompts, params)) == expected


@pytest.fixture(scope="module")
def plain_samples(tiny_dir):
    grid = [*SAMPLED_GRID, (0.0, 0.9), (0.0, 1.0)]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(2 * len(grid))]
    params = [
        SamplingParams(
            temperature=t, top_p=p, repetition_penalty=penalty, seed=seed, max_tokens=14, ignore_eos=True
        )
        for seed, (penalty, (t, p)) in enumerate((penalty, point) for penalty in (1.0, 1.2) for point in grid)
    ]  # fmt: skip
    return prompts, params, tokens_of(LLM(str(tiny_dir)).generate(prompts, params))


# -- the same test finds the known wrong rules -------------------------------------------------------------------------------------


def most_likely(probs_W, count, uniforms):
    return np.argsort(-probs_W)[:count].tolist()


def sorted_draws(probs_W, count, uniforms):
    drawn = ratio.draw_without_replacement(probs_W, count, uniforms)
    return sorted(drawn, key=lambda token: -probs_W[token])


def accepts_always(target_W, drafts_W, tokens, uniforms):
    return (0, tokens[0]) if tokens else ratio.independent(target_W, drafts_W, tokens, uniforms)


def equal_draws_once(target_W, drafts_W, tokens, uniforms):
    first = [i for i, token in enumerate(tokens) if token not in tokens[:i]]
    index, token = ratio.independent(target_W, [drafts_W[i] for i in first], [tokens[i] for i in first], uniforms)
    return None if index is None else first[index], token


PEAKED = 43  # seed of a draft that mostly draws one token, which the target likes less: equal draws are the rule


@pytest.mark.parametrize(
    ("module", "function", "wrong", "config"),
    [
        (sequoia, "draw_without_replacement", most_likely, {"method": "sequoia", "tree": [-1, -1, 0, 0, 1, 1]}),
        (sequoia, "draw_without_replacement", sorted_draws, {"method": "sequoia", "tree": [-1, -1, 0, 0, 1, 1]}),
        (specinfer, "independent", accepts_always, {"method": "specinfer", "expansion": [2, 1]}),
        (specinfer, "independent", equal_draws_once, {"method": "specinfer", "expansion": [5]}),
    ],
)
def test_wrong_rules_in_the_engine_are_found_out(module, function, wrong, config, flat, monkeypatch, tmp_path):
    """Equal draws that are tried once bias most pairs too little for this test; a peaked draft and five draws show them."""
    target, draft, law = flat
    if wrong is equal_draws_once:
        draft = build_llama(tmp_path, seed=PEAKED, **SMALL)
    room = 4096  # tokens of a step, so that every request gets its whole tree
    llm = engine(flat, {**config, "draft": str(draft)}, max_num_batched_tokens=room)
    assert g_test(sampled(llm, 1.0, 1.0, 1280), law.at(1.0, 1.0)) > SIGNIFICANCE, "right as it is"
    monkeypatch.setattr(module, function, wrong)
    assert g_test(sampled(llm, 1.0, 1.0, 2560), law.at(1.0, 1.0)) <= SIGNIFICANCE
