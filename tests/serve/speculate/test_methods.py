"""Every method in the whole engine: greedy text never changes, methods compose with everything else, nothing leaks. Laws: test_law.py."""

import itertools

import pytest
import torch

from tests.serve.speculate.grid import METHODS as NAMES
from tests.serve.speculate.grid import configs, tokens_of
from wager.errors import UsageError
from wager.serve.llm import LLM
from wager.serve.params import SamplingParams, StructuredOutputs

PROMPTS = [[5, 9, 300, 17], [44] * 40, list(range(10, 90)), [399], [7, 8, 9] * 25, list(range(100, 133))]
LENGTHS = [12, 30, 7, 40, 20, 25]


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


@pytest.mark.parametrize("name", ["sequoia", "sequoia-perfect", "specinfer", "specinfer-merged"])
def test_a_seed_repeats_a_sample_whatever_runs_beside_it(name, tiny_dir, tiny_draft_dir):
    llm = LLM(str(tiny_dir), speculative_config={**configs(tiny_dir, tiny_draft_dir)[name], "auto": False})
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=15, ignore_eos=True)
    alone = [tokens_of(llm.generate(p, params))[0] for p in PROMPTS]
    assert tokens_of(llm.generate(PROMPTS, params)) == alone


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


@pytest.mark.parametrize(
    "name", ["chain", "sequoia-perfect", "specinfer-merged", "specexec-perfect", "suffix", "hybrid"]
)
def test_adapters_and_the_base_model_share_a_batch_of_trees(name, tiny_dir, tiny_draft_dir, adapter_dir, adapted):
    """Greedy text under an adapter is that of plain decoding under it, beside requests without one, with a warm prefix cache."""
    config = {**configs(tiny_dir, tiny_draft_dir)[name], "auto": False}
    llm = LLM(str(tiny_dir), speculative_config=config, lora_modules={"a": str(adapter_dir)}, max_num_batched_tokens=48)
    for _ in range(2):
        assert tokens_of(llm.generate(PROMPTS, greedy(15), adapter="a")) == adapted["a"]
        assert tokens_of(llm.generate(PROMPTS, greedy(15))) == adapted[None]
    frontend = llm.frontend
    for i, prompt in enumerate(PROMPTS[:4]):
        frontend.submit(frontend.make(prompt, greedy(15), f"r{i}", adapter="a" if i % 2 else None))
    requests = dict(llm.engine.core.requests)
    while llm.engine.core.has_work:
        frontend.step()
    mixed = [requests[f"r{i}"].output_token_ids for i in range(4)]
    assert mixed == [adapted["a" if i % 2 else None][i] for i in range(4)]


@pytest.fixture(scope="session")
def adapter_dir(tiny_dir, tmp_path_factory):
    from tests.serve.test_lora import LINEARS, make_adapter

    directory = tmp_path_factory.mktemp("adapter")
    make_adapter(tiny_dir, directory, seed=1, r=4, lora_alpha=16, target_modules=LINEARS)
    return directory


@pytest.fixture(scope="session")
def adapted(tiny_dir, adapter_dir):
    plain = LLM(str(tiny_dir), lora_modules={"a": str(adapter_dir)})
    return {name: tokens_of(plain.generate(PROMPTS, greedy(15), adapter=name)) for name in ("a", None)}


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
        ({"method": "specexec", "draft": "x", "draft_temperature": 0}, r"draft_temperature.*0"),
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
