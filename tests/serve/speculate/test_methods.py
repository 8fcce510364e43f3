"""Every method in the whole engine: greedy text never changes, sampled text has the target's law, nothing leaks."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from wager.errors import UsageError
from wager.serve.llm import LLM
from wager.serve.params import SamplingParams, StructuredOutputs

PROMPTS = [[5, 9, 300, 17], [44] * 40, list(range(10, 90)), [399], [7, 8, 9] * 25, list(range(100, 133))]
LENGTHS = [12, 30, 7, 40, 20, 25]


def configs(target, draft):
    """Every method, with bad guesses (another random model) and good ones (the target itself)."""
    target, draft = str(target), str(draft)
    return {
        "chain": {"draft": draft, "num_speculative_tokens": 3},
        "sequoia": {"method": "sequoia", "draft": draft, "tree": [-1, -1, 0, 0, 1, 2, 2]},
        "sequoia-perfect": {"method": "sequoia", "draft": target, "tree": [-1, 0, 1, -1, 0, 4]},
        "sequoia-auto": {"method": "sequoia", "draft": target, "max_tree_size": 8, "max_depth": 4},
        "specinfer": {"method": "specinfer", "draft": draft, "expansion": [2, 2, 1]},
        "specinfer-merged": {"method": "specinfer", "drafts": [draft, target], "expansion": [1, 2, 1]},
        "specinfer-naive": {"method": "specinfer", "draft": target, "expansion": [1, 3, 1], "verify": "naive"},
        "specexec": {"method": "specexec", "draft": draft, "budget": 20, "beams": 4, "max_depth": 5},
        "specexec-perfect": {"method": "specexec", "draft": target, "budget": 12, "beams": 3, "max_depth": 6},
        "suffix": {"method": "suffix", "num_speculative_tokens": 8, "suffix_max_spec_factor": 2.0},
        "suffix-tree": {"method": "suffix", "suffix_tree": True, "suffix_max_spec_offset": 2.0},
        "hybrid": {"method": "suffix", "draft": target, "suffix_hybrid_threshold": 2.0},
        "ngram": {"method": "ngram", "num_speculative_tokens": 5},
    }


NAMES = list(configs("", ""))


def tokens_of(outputs):
    return [choice.token_ids for output in outputs for choice in output.outputs]


def greedy(max_tokens, **options):
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **options)


@pytest.fixture(scope="session")
def expected(tiny_dir):
    plain = LLM(str(tiny_dir))
    return [plain.generate(p, greedy(n))[0].outputs[0].token_ids for p, n in zip(PROMPTS, LENGTHS, strict=True)]


def assert_drained(llm):
    for runner in runners(llm):
        runner.blocks.check_invariants()
        assert runner.blocks.usage == 0.0


def runners(llm):
    core = llm.engine.core
    found = [core.runner]
    for drafter in core.speculator.drafters.values():
        drafts = [getattr(drafter, "draft", None), getattr(getattr(drafter, "model", None), "draft", None)]
        drafts += getattr(drafter, "drafts", [])
        found += [d.runner for d in drafts if hasattr(d, "runner")]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_is_that_of_plain_decoding(name, tiny_dir, tiny_draft_dir, expected):
    """In a mixed batch, with chunked prefill and preemption in a pool barely larger than one request, twice (a warm cache drafts more)."""
    config = {**configs(tiny_dir, tiny_draft_dir)[name], "auto": False}
    per_token = 2 * 2 * 2 * 16 * 4
    llm = LLM(
        str(tiny_dir),
        block_size=4,
        max_num_batched_tokens=48,
        kv_cache_memory=220 * per_token,
        speculative_config=config,
    )
    for _ in range(2):
        assert tokens_of(llm.generate(PROMPTS, [greedy(n) for n in LENGTHS])) == expected
    assert llm.engine.core.preemptions_total > 0
    assert_drained(llm)


@pytest.mark.parametrize("name", ["chain", "specinfer-naive", "specexec", "suffix", "ngram", "hybrid"])
def test_matching_methods_keep_seeded_samples(name, tiny_dir, tiny_draft_dir):
    params = SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=7, max_tokens=20, ignore_eos=True)
    llm = LLM(str(tiny_dir), speculative_config={**configs(tiny_dir, tiny_draft_dir)[name], "auto": False})
    assert tokens_of(llm.generate(PROMPTS, params)) == tokens_of(LLM(str(tiny_dir)).generate(PROMPTS, params))


@pytest.mark.parametrize("name", ["sequoia", "sequoia-perfect", "specinfer", "specinfer-merged"])
def test_a_seed_repeats_a_sample_whatever_runs_beside_it(name, tiny_dir, tiny_draft_dir):
    llm = LLM(str(tiny_dir), speculative_config={**configs(tiny_dir, tiny_draft_dir)[name], "auto": False})
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=15, ignore_eos=True)
    alone = [tokens_of(llm.generate(p, params))[0] for p in PROMPTS]
    assert tokens_of(llm.generate(PROMPTS, params)) == alone


# -- the law of sampled text -----------------------------------------------------------------------------------------------------

ALLOWED = (3, 4, 5)  # the request allows three tokens, so all texts of three tokens can be counted


def law_of_texts(directory, prompt, temperature, top_p):
    """P(text) for the 27 texts, from the model's own logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    law = {}

    def following(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, -1].double()[list(ALLOWED)]
        p = (logits / temperature).softmax(-1).numpy()
        order = np.argsort(-p, kind="stable")
        kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p - 1e-9)) + 1]
        q = np.zeros(3)
        q[kept] = p[kept]
        return q / q.sum()

    first = following([])
    for i, a in enumerate(ALLOWED):
        second = following([a])
        for j, b in enumerate(ALLOWED):
            third = following([a, b])
            for k, c in enumerate(ALLOWED):
                law[a, b, c] = first[i] * second[j] * third[k]
    return law


@pytest.fixture(scope="session")
def flat_dirs(tmp_path_factory):
    """Two models with flat distributions over the same tiny vocabulary."""
    from tests.serve.conftest import build_llama

    small = dict(num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=416, initializer_range=0.25)
    return [build_llama(tmp_path_factory.mktemp(f"flat{seed}"), seed=seed, **small) for seed in (11, 12)]


def g_test(counts, law):
    """p-value of the likelihood-ratio test; texts of probability 0 must not occur."""
    n = sum(counts.values())
    assert all(law[text] > 0 for text in counts)
    possible = [t for t, p in law.items() if p * n >= 5]
    rest = n - sum(counts.get(t, 0) for t in possible)
    rest_p = 1 - sum(law[t] for t in possible)
    g = 2 * sum(counts[t] * np.log(counts[t] / (n * law[t])) for t in possible if counts.get(t))
    g += 2 * rest * np.log(rest / (n * rest_p)) if rest and rest_p > 1e-9 else 0
    return chi2.sf(g, max(len(possible) - (rest_p <= 1e-9), 1))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.9)])
@pytest.mark.parametrize("name", ["sequoia", "specinfer", "specinfer-merged", "specexec", "chain"])
def test_sampled_texts_have_the_target_law(name, temperature, top_p, flat_dirs):
    target, draft = flat_dirs
    prompt = [7, 8, 9]
    law = law_of_texts(target, prompt, temperature, top_p)
    llm = LLM(str(target), speculative_config={**configs(target, draft)[name], "auto": False}, max_model_len=16)
    params = SamplingParams(
        temperature=temperature, top_p=top_p, max_tokens=3, ignore_eos=True, allowed_token_ids=ALLOWED, n=128
    )
    texts = [tuple(t) for _ in range(6) for t in tokens_of(llm.generate(prompt, params))]
    counts = {text: texts.count(text) for text in set(texts)}
    assert g_test(counts, law) > 1e-4


def test_most_likely_children_in_the_engine_are_found_out(flat_dirs, monkeypatch):
    """The statistical test sees a wrong drawing side."""
    from wager.serve.speculate import sequoia

    target, draft = flat_dirs
    monkeypatch.setattr(sequoia, "draw_without_replacement", lambda p, n, u: np.argsort(-p)[:n].tolist())
    config = {"method": "sequoia", "draft": str(draft), "tree": [-1, -1, 0, 0, 1, 1], "auto": False}
    llm = LLM(str(target), speculative_config=config, max_model_len=16)
    params = SamplingParams(temperature=1.0, max_tokens=3, ignore_eos=True, allowed_token_ids=ALLOWED, n=128)
    texts = [tuple(t) for _ in range(6) for t in tokens_of(llm.generate([7, 8, 9], params))]
    law = law_of_texts(target, [7, 8, 9], 1.0, 1.0)
    assert g_test({text: texts.count(text) for text in set(texts)}, law) < 1e-4


# -- composition -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sequoia-perfect", "specinfer", "specexec-perfect", "suffix"])
def test_structured_output_logprobs_and_penalties_compose(name, tiny_dir, tiny_draft_dir):
    config = {**configs(tiny_dir, tiny_draft_dir)[name], "auto": False}
    llm, plain = LLM(str(tiny_dir), speculative_config=config), LLM(str(tiny_dir))
    picked = SamplingParams(temperature=1.0, max_tokens=20, structured_outputs=StructuredOutputs(choice=("yes", "no")))
    assert {o.outputs[0].text for o in llm.generate(["q"] * 6, picked)} <= {"yes", "no"}
    params = greedy(15, logprobs=2, repetition_penalty=1.3, presence_penalty=0.4, min_tokens=3)
    for ours, theirs in zip(llm.generate(PROMPTS, params), plain.generate(PROMPTS, params), strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        for a, b in zip(ours.outputs[0].logprobs, theirs.outputs[0].logprobs, strict=True):
            assert a.keys() == b.keys()
            assert all(a[t].logprob == pytest.approx(b[t].logprob, abs=1e-4) for t in a)


def test_sampled_logprobs_belong_to_the_chosen_tokens(tiny_dir):
    llm = LLM(
        str(tiny_dir),
        speculative_config={"method": "sequoia", "draft": str(tiny_dir), "tree": [-1, 0, 1], "auto": False},
    )
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=12, logprobs=0, ignore_eos=True)
    out = llm.generate(PROMPTS[0], params)[0].outputs[0]
    assert [next(iter(e)) for e in out.logprobs] == out.token_ids


def test_requests_choose_their_method(tiny_dir, tiny_draft_dir, expected):
    known = configs(tiny_dir, tiny_draft_dir)
    llm = LLM(
        str(tiny_dir), speculative_config=[known["sequoia"], known["suffix"], {**known["specexec"], "auto": False}]
    )
    methods = ["sequoia", "suffix", "specexec", "none", None, "suffix"]
    params = [greedy(n, speculative_method=m) for n, m in zip(LENGTHS, methods, strict=True)]
    assert tokens_of(llm.generate(PROMPTS, params)) == expected
    with pytest.raises(UsageError, match="ngram"):
        llm.generate(PROMPTS[0], greedy(3, speculative_method="ngram"))
    with pytest.raises(UsageError, match="suffix"):
        LLM(str(tiny_dir)).generate(PROMPTS[0], greedy(3, speculative_method="suffix"))


@pytest.mark.parametrize("name", NAMES)
def test_switching_by_measurement_never_changes_greedy_text(name, tiny_dir, tiny_draft_dir, expected):
    llm = LLM(str(tiny_dir), speculative_config=configs(tiny_dir, tiny_draft_dir)[name])
    for _ in range(4):
        assert tokens_of(llm.generate(PROMPTS, [greedy(n) for n in LENGTHS])) == expected
    gate = next(iter(llm.engine.core.speculator.gates.values()))
    assert any(arm.plain_ms.count or arm.drafted_ms.count for arm in gate.arms.values())
    assert_drained(llm)


def test_drafts_stop_at_the_length_limit(tiny_dir):
    for config in configs(tiny_dir, tiny_dir).values():
        llm = LLM(str(tiny_dir), max_model_len=32, speculative_config={**config, "auto": False})
        out = llm.generate([[7, 8, 9] * 8], greedy(8))[0].outputs[0]
        assert len(out.token_ids) == 8 and out.finish_reason == "length"


@pytest.mark.parametrize("name", ["sequoia-perfect", "specexec-perfect", "specinfer-merged"])
def test_a_perfect_draft_commits_whole_paths(name, tiny_dir, tiny_draft_dir):
    steps = []

    class Count:
        def on_step(self, record):
            steps.append(record)

        def on_tokens(self, request, num_new_tokens, now_s):
            pass

        def on_finished(self, request):
            pass

    config = {**configs(tiny_dir, tiny_draft_dir)[name], "auto": False}
    LLM(str(tiny_dir), observers=[Count()], speculative_config=config).generate(PROMPTS[0], greedy(41))
    depth = {"sequoia-perfect": 3, "specexec-perfect": 6, "specinfer-merged": 3}[name]
    tokens_per_step = (
        2.5 if name == "specexec-perfect" else depth + 1
    )  # flat distributions: its budget goes into breadth
    assert len(steps) <= 41 / tokens_per_step + 3
    assert max(len(r.accepted_per_position) for r in steps) == depth


def test_the_draft_cache_agrees_with_a_fresh_prefill(tiny_dir, tiny_draft_dir):
    """After many trees the draft's logits for the text are those of a draft that never saw a tree."""
    for config in (configs(tiny_dir, tiny_dir)[n] for n in ("sequoia-perfect", "specexec-perfect", "specinfer")):
        llm = LLM(str(tiny_dir), block_size=4, speculative_config={**config, "auto": False})
        core = llm.engine.core
        generation = llm.frontend.make(PROMPTS[0], greedy(40), "r")
        llm.frontend.submit(generation)
        for _ in range(6):
            llm.frontend.step()
        drafter = next(iter(core.speculator.drafters.values()))
        draft = getattr(drafter, "draft", None) or drafter.drafts[0]
        request = core.requests["r"]
        computed = draft.states["r"].computed
        assert computed > len(PROMPTS[0]) + 5
        kept = draft.runner.pool.export([draft.runner.blocks.table("r", 0)], computed)
        fresh = LLM(str(tiny_dir), block_size=4).engine.core.runner
        from wager.serve.runner import SpanInput

        fresh.blocks.start("f", request.token_ids)
        fresh.blocks.reserve("f", computed)
        fresh.forward(fresh.build([SpanInput("f", request.token_ids[:computed], 0)]))
        reference = fresh.pool.export([fresh.blocks.table("f", 0)], computed)
        for key, rows in kept.items():
            torch.testing.assert_close(rows, reference[key], atol=2e-4, rtol=1e-3)
        while core.has_work:
            llm.frontend.step()


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"method": "medusa"}, "medusa"),
        ({"method": "sequoia"}, "draft model"),
        ({"method": "suffix", "depth": 3}, "depth"),
        ({"method": "specinfer", "draft": "x", "expansion": []}, "expansion"),
        ({"method": "specexec", "draft": "x", "decay": 1.5}, r"1\.5"),
        ({"method": "ngram", "ngram_min": 5}, "ngram_max"),
        ([{"method": "ngram"}, {"method": "ngram"}], "twice"),
        ({"method": "sequoia", "draft": "x", "max_tree_size": 1}, "max_tree_size"),
    ],
)
def test_bad_configurations_name_the_value(config, names, tiny_dir):
    with pytest.raises(UsageError, match=names):
        LLM(str(tiny_dir), speculative_config=config)


def test_vllm_names_are_understood(tiny_dir):
    from wager.serve.config import SpeculativeConfig

    config = SpeculativeConfig.parse(
        {
            "method": "suffix",
            "num_speculative_tokens": 32,
            "suffix_decoding_max_tree_depth": 40,
            "suffix_decoding_min_token_prob": 0.2,
        }
    )[0]
    assert (config.suffix_max_depth, config.suffix_min_token_prob, config.chain_tokens) == (40, 0.2, 32)
    assert SpeculativeConfig.parse({"model": "demo-draft", "num_speculative_tokens": 4})[0].draft == "demo-draft"
    assert list(itertools.chain(SpeculativeConfig.parse(None))) == []
