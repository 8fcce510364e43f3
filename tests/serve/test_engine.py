"""The engine against transformers and against itself: tokens do not depend on how the work is scheduled."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wager.errors import UsageError
from wager.kernels import registry
from wager.serve.llm import LLM
from wager.serve.params import SamplingParams, StructuredOutputs

PROMPTS = [[5, 9, 300, 17], [44] * 40, list(range(10, 90)), [399], [7, 8, 9] * 25, list(range(100, 133))]
LENGTHS = [12, 30, 7, 40, 20, 25]


def tokens_of(outputs):
    return [choice.token_ids for output in outputs for choice in output.outputs]


def greedy(max_tokens, **options):
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **options)


@pytest.fixture(scope="session")
def oracle(tiny_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def plain(tiny_dir):
    return LLM(str(tiny_dir))


@pytest.fixture(scope="session")
def expected(plain):
    """Greedy tokens of every prompt run alone."""
    return [plain.generate(p, greedy(n))[0].outputs[0].token_ids for p, n in zip(PROMPTS, LENGTHS, strict=True)]


def test_greedy_tokens_are_those_of_transformers(expected, oracle):
    for prompt, length, ours in zip(PROMPTS, LENGTHS, expected, strict=True):
        ids = torch.tensor([prompt])
        theirs = oracle.generate(ids, max_new_tokens=length, min_new_tokens=length, do_sample=False, use_cache=True)
        assert ours == theirs[0, len(prompt) :].tolist()


@pytest.mark.skipif(registry.choice().form != "native", reason="only the native kernels add in one order")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logprobs_have_the_same_bits_in_any_batch(tiny_dir, dtype):
    """Alone and in whole prompts, or among others in small chunks: every chosen token's log-probability is the same number."""

    def logprobs(llm, prompts):
        params = greedy(12, logprobs=2)
        choices = [output.outputs[0] for output in llm.generate(prompts, params)]
        return [[{t: lp.logprob for t, lp in entry.items()} for entry in choice.logprobs] for choice in choices]

    quiet = LLM(str(tiny_dir), dtype=dtype)
    alone = [logprobs(quiet, [prompt])[0] for prompt in PROMPTS]
    crowded = LLM(str(tiny_dir), dtype=dtype, max_num_batched_tokens=29, block_size=4, enable_prefix_caching=False)
    assert logprobs(crowded, PROMPTS) == alone


def test_a_float8_cache_holds_twice_as_much_and_stays_near(tiny_dir, tiny_draft_dir):
    """Its log-probabilities are those of the wider cache within its rounding, in whatever chunks the prompt comes."""
    options = {"dtype": "bfloat16", "kv_cache_memory": 1 << 16}
    wide, narrow = LLM(str(tiny_dir), **options), LLM(str(tiny_dir), kv_cache_dtype="fp8", **options)
    assert narrow.engine.core.runner.blocks.num_blocks == 2 * wide.engine.core.runner.blocks.num_blocks
    chunked = LLM(str(tiny_dir), dtype="bfloat16", kv_cache_dtype="fp8", max_num_batched_tokens=16, block_size=4)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)

    def logprobs(llm):
        return [
            next(iter(entry.values())).logprob
            for output in llm.generate(PROMPTS, params)
            for entry in output.prompt_logprobs[1:]
        ]

    exact, rounded = np.array(logprobs(wide)), np.array(logprobs(narrow))
    assert 0 < np.abs(exact - rounded).mean() < 0.1
    assert np.allclose(logprobs(chunked), rounded, atol=0.02)
    guessing = {"draft": str(tiny_draft_dir), "auto": False}
    drafted = LLM(str(tiny_dir), dtype="bfloat16", kv_cache_dtype="fp8", speculative_config=guessing)
    assert tokens_of(drafted.generate(PROMPTS, greedy(20))) == tokens_of(chunked.generate(PROMPTS, greedy(20)))
    with pytest.raises(UsageError, match="kv_cache_dtype 'int3' is unknown"):
        LLM(str(tiny_dir), kv_cache_dtype="int3")


@settings(max_examples=12, deadline=None)
@given(
    order=st.permutations(range(len(PROMPTS))),
    batched=st.integers(4, 64),
    block_size=st.sampled_from([1, 4, 16]),
    host=st.sampled_from([None, 512 * 16, 512 * 400]),
    spare=st.integers(0, 12),
    num_seqs=st.integers(1, 6),
    caching=st.booleans(),
    threshold=st.sampled_from([0, 3]),
)
def test_scheduling_never_changes_greedy_tokens(
    tiny_dir, expected, order, batched, block_size, host, spare, num_seqs, caching, threshold
):
    """Any arrival order, chunking, block size, batch mix and preemption under a KV pool barely larger than one request."""
    per_token = 2 * 2 * 2 * 16 * 4  # layers, K and V, kv heads, head width, bytes
    longest = max(len(p) + n for p, n in zip(PROMPTS, LENGTHS, strict=True))
    llm = LLM(
        str(tiny_dir),
        max_num_batched_tokens=batched,
        max_num_seqs=num_seqs,
        block_size=block_size,
        enable_prefix_caching=caching,
        long_prefill_threshold=threshold,
        kv_cache_memory=(longest + block_size + spare) * per_token,
        kv_offload_memory=host if caching else None,
        max_model_len=128,
    )
    outputs = llm.generate([PROMPTS[i] for i in order], [greedy(LENGTHS[i]) for i in order])
    assert tokens_of(outputs) == [expected[i] for i in order]
    assert_drained(llm)


def assert_drained(llm):
    blocks = llm.engine.core.runner.blocks
    blocks.check_invariants()
    assert blocks.usage == 0.0
    assert not llm.engine.core.requests and not llm.frontend.generations


def test_preemption_happens_and_resumes(tiny_dir, expected):
    llm = LLM(str(tiny_dir), kv_cache_memory=512 * 150, max_num_seqs=6, block_size=4)
    outputs = llm.generate(PROMPTS, [greedy(n) for n in LENGTHS])
    assert llm.engine.core.preemptions_total > 0
    assert tokens_of(outputs) == expected


def test_evicted_blocks_come_back_from_the_host(tiny_dir, expected):
    """Preempted requests and repeated prompts find in host memory what the small pool had to give up, and say the same."""
    tight = dict(kv_cache_memory=512 * 150, max_num_seqs=6, block_size=4)
    llm = LLM(str(tiny_dir), **tight, kv_offload_memory="1MiB")
    blocks = llm.engine.core.runner.blocks
    for _ in range(2):
        outputs = llm.generate(PROMPTS, [greedy(n) for n in LENGTHS])
        assert tokens_of(outputs) == expected
        assert_drained(llm)
    assert llm.engine.core.preemptions_total > 0 and blocks.host_hits > 0
    without = LLM(str(tiny_dir), **tight)
    for _ in range(2):
        without.generate(PROMPTS, [greedy(n) for n in LENGTHS])
    assert blocks.prefix_hits > without.engine.core.runner.blocks.prefix_hits


def test_random_aborts_leak_nothing_and_disturb_nobody(tiny_dir, expected):
    rng = random.Random(3)
    llm = LLM(str(tiny_dir), kv_cache_memory=512 * 200, block_size=4, max_num_batched_tokens=32)
    kept = {}
    for round_ in range(30):
        i = rng.randrange(len(PROMPTS))
        generation = llm.frontend.make(PROMPTS[i], greedy(LENGTHS[i], n=rng.choice([1, 2])), f"r{round_}")
        llm.frontend.submit(generation)
        kept[generation.request_id] = (generation, i)
        for _ in range(rng.randrange(6)):
            llm.frontend.step()
        if rng.random() < 0.5:
            victim = rng.choice(list(kept))
            llm.frontend.abort(victim)
            del kept[victim]
        llm.engine.core.runner.blocks.check_invariants()
    while llm.engine.core.has_work:
        llm.frontend.step()
    for generation, i in kept.values():
        assert all(c.token_ids == expected[i] for c in generation.continuations)
    assert_drained(llm)


def test_speculation_keeps_every_token(tiny_dir, tiny_draft_dir, expected):
    for draft in (tiny_draft_dir, tiny_dir):  # bad guesses, perfect guesses
        llm = LLM(
            str(tiny_dir),
            block_size=4,
            max_num_batched_tokens=48,
            speculative_config={"draft": str(draft), "num_speculative_tokens": 3, "auto": False},
        )
        assert tokens_of(llm.generate(PROMPTS, [greedy(n) for n in LENGTHS])) == expected
        sampled = SamplingParams(
            temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=7, max_tokens=20, ignore_eos=True
        )
        assert tokens_of(llm.generate(PROMPTS, sampled)) == tokens_of(LLM(str(tiny_dir)).generate(PROMPTS, sampled))
        assert_drained(llm)


def test_perfect_draft_takes_fewer_steps(tiny_dir):
    records = StepRecords()
    llm = LLM(
        str(tiny_dir),
        observers=[records],
        speculative_config={"draft": str(tiny_dir), "num_speculative_tokens": 4, "auto": False},
    )
    llm.generate(PROMPTS[0], greedy(40))
    assert len(records.steps) <= 40 / 5 + 3
    assert sum(r.accepted_tokens for r in records.steps) >= 30


class StepRecords:
    def __init__(self):
        self.steps, self.finished = [], []

    def on_step(self, record):
        self.steps.append(record)

    def on_tokens(self, request, num_new_tokens, now_s):
        pass

    def on_finished(self, request):
        self.finished.append(request)


def test_seeded_samples_do_not_depend_on_the_batch(tiny_dir, plain):
    params = SamplingParams(temperature=1.0, top_k=50, seed=11, max_tokens=15, ignore_eos=True)
    alone = [plain.generate(p, params)[0].outputs[0].token_ids for p in PROMPTS]
    small = LLM(str(tiny_dir), kv_cache_memory=512 * 160, block_size=4, max_num_batched_tokens=24)
    assert tokens_of(small.generate(PROMPTS, params)) == alone


def test_n_continuations_are_independent_and_share_the_prompt(plain):
    params = SamplingParams(temperature=1.0, n=4, seed=5, max_tokens=12, ignore_eos=True)
    before = plain.engine.core.prompt_tokens_total
    prompt = list(range(200, 237))
    output = plain.generate(prompt, params)[0]
    assert plain.engine.core.prompt_tokens_total - before <= len(prompt) + 3  # one last prompt token per sibling
    assert [c.index for c in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(c.token_ids) for c in output.outputs}) == 4
    assert_drained(plain)


def test_prefix_cache_serves_a_second_turn(plain):
    prompt = [random.Random(9).randrange(3, 400) for _ in range(80)]
    first = plain.generate(prompt, greedy(8))[0]
    second = plain.generate(prompt + first.outputs[0].token_ids + [5, 6], greedy(4))[0]
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens >= 80
    assert plain.generate(prompt, greedy(8))[0].outputs[0].token_ids == first.outputs[0].token_ids


def test_logprobs_equal_teacher_forcing(plain, oracle):
    prompt = PROMPTS[2]
    output = plain.generate(prompt, greedy(6, logprobs=3, prompt_logprobs=2))[0]
    again = plain.generate(prompt, greedy(6, logprobs=3, prompt_logprobs=2))[0]
    ids = prompt + output.outputs[0].token_ids
    with torch.no_grad():
        reference = oracle(torch.tensor([ids])).logits[0].log_softmax(-1)
    for entries in (output.prompt_logprobs, again.prompt_logprobs):
        assert entries[0] is None and len(entries) == len(prompt)
        for position in range(1, len(prompt)):
            assert entries[position][prompt[position]].logprob == pytest.approx(
                reference[position - 1, prompt[position]].item(), abs=2e-4
            )
            assert len(entries[position]) in (2, 3)
    for step, entry in enumerate(output.outputs[0].logprobs):
        top = reference[len(prompt) - 1 + step].topk(3)
        assert sorted(entry[t].logprob for t in top.indices.tolist()) == pytest.approx(
            sorted(top.values.tolist()), abs=2e-4
        )


def test_echo_loglikelihood_needs_no_output(plain):
    output = plain.generate(PROMPTS[0], SamplingParams(max_tokens=0, prompt_logprobs=1))[0]
    assert output.outputs[0].token_ids == [] and output.outputs[0].finish_reason == "length"
    assert len(output.prompt_logprobs) == len(PROMPTS[0])


def test_embeddings_are_the_normalised_mean_of_hidden_states(tiny_dir, plain, oracle):
    chunked = LLM(str(tiny_dir), max_num_batched_tokens=7)
    for prompt in PROMPTS:
        with torch.no_grad():
            hidden = oracle.model(torch.tensor([prompt])).last_hidden_state[0].mean(0)
        reference = torch.nn.functional.normalize(hidden, dim=0).numpy()
        for llm in (plain, chunked):
            np.testing.assert_allclose(llm.embed(prompt)[0].embedding, reference, atol=1e-4)


def test_stop_strings_and_stop_tokens(plain):
    text = plain.generate("Count from one to ten", greedy(30))[0].outputs[0].text
    stop = text[8:11]
    output = plain.generate("Count from one to ten", greedy(30, stop=stop))[0].outputs[0]
    assert output.finish_reason == "stop" and output.stop_reason == stop
    assert output.text == text[: text.index(stop)]
    token = plain.generate(PROMPTS[0], greedy(10))[0].outputs[0].token_ids[4]
    stopped = plain.generate(PROMPTS[0], greedy(10, stop_token_ids=[token]))[0].outputs[0]
    assert stopped.stop_reason == token and stopped.token_ids[-1] == token and len(stopped.token_ids) <= 5


def test_structured_output_parses(plain):
    import json

    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
    }
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=150, structured_outputs=StructuredOutputs(json=schema))
    choice = plain.generate("give json", params)[0].outputs[0]
    if choice.finish_reason == "stop":
        value = json.loads(choice.text)
        assert isinstance(value["a"], int) and value["b"] in ("x", "y")
    picked = SamplingParams(temperature=1.0, max_tokens=20, structured_outputs=StructuredOutputs(choice=("yes", "no")))
    assert {o.outputs[0].text for o in plain.generate(["q"] * 12, picked)} <= {"yes", "no"}


@pytest.mark.parametrize(
    ("prompt", "params", "names"),
    [
        ([1, 99999], SamplingParams(), "99999"),
        ([], SamplingParams(), "at least one"),
        ([1] * 400, SamplingParams(), "maximum context length is 256"),
        ([1] * 10, SamplingParams(max_tokens=1000), "maximum context length is 256"),
        ([1], SamplingParams(logit_bias={5000: 1.0}), "5000"),
    ],
)
def test_bad_requests_name_the_value(plain, prompt, params, names):
    with pytest.raises(UsageError, match=names):
        plain.generate([prompt], params)


def test_a_request_larger_than_the_pool_fails_alone(tiny_dir):
    llm = LLM(str(tiny_dir), kv_cache_memory=512 * 64, block_size=4)
    llm.generate(PROMPTS[0], greedy(5))
    with pytest.raises(Exception, match="KV"):
        llm.generate([[3] * 100], greedy(5))
    assert_drained(llm)


def test_siblings_that_end_in_one_step_are_both_complete(plain):
    output = plain.generate(PROMPTS[1], SamplingParams(temperature=1.0, seed=2, n=3, max_tokens=9, ignore_eos=True))[0]
    assert [len(c.token_ids) for c in output.outputs] == [9, 9, 9]
