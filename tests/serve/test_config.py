"""Bad engine arguments are refused before anything is loaded, naming the value and the remedy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wager.errors import CapacityError, CheckpointError, UsageError
from wager.serve.config import EngineConfig, SpeculativeConfig, parse_bytes
from wager.serve.llm import LLM
from wager.serve.params import SamplingParams


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"dtype": "int8"}, "'int8'.*auto, float32, bfloat16, float16"),
        ({"pooling": "max"}, "'max'.*mean or last"),
        ({"scheduling_policy": "random"}, "'random' is unknown.*fcfs, priority, longest-prefix"),
        ({"max_model_len": 0}, "max_model_len must be at least 1, got 0"),
        ({"max_num_seqs": -3}, "max_num_seqs must be at least 1, got -3"),
        ({"max_num_seqs": 2.5}, "max_num_seqs must be a whole number, got 2.5"),
        ({"max_num_batched_tokens": "512"}, "max_num_batched_tokens must be a whole number, got '512'"),
        ({"block_size": 0}, "block_size"),
        ({"max_queue": True}, "max_queue must be a whole number"),
        ({"long_prefill_threshold": -1}, "long_prefill_threshold must be at least 0, got -1"),
        ({"max_loras": -1}, "max_loras"),
        ({"kv_cache_memory": "much"}, "'much' as a size in bytes; write e.g. 512MiB"),
        ({"kv_cache_memory": "-2GB"}, "kv_cache_memory must be at least 1"),
        ({"kv_cache_memory": "inf"}, "'inf'"),
        ({"kv_offload_memory": "0MB"}, "kv_offload_memory must be at least 1, got 0"),
        (
            {"kv_offload_memory": "1GB", "enable_prefix_caching": False},
            "kv_offload_memory 1000000000 .* needs enable_prefix_caching",
        ),
        ({"kv_cache_memory": 0}, "kv_cache_memory must be at least 1, got 0"),
        (
            {"speculative_config": {"draft": "x", "num_speculative_tokens": 0}},
            "num_speculative_tokens must be at least 1, got 0",
        ),
        (
            {"speculative_config": {"draft": "x", "num_speculative_tokens": "3"}},
            "num_speculative_tokens must be a whole number, got '3'",
        ),
        ({"speculative_config": {"num_speculative_tokens": 3}}, "method draft_model needs a draft model"),
        (
            {"speculative_config": {"draft": "x", "tokens": 3}},
            "speculative_config does not know tokens; it takes.*draft",
        ),
        ({"speculative_config": {"draft": "x", "method": "magic"}}, "'magic' is unknown; use one of draft_model"),
        ({"speculative_config": {"draft": "x", "disable_by_batch_size": -1}}, "disable_by_batch_size"),
    ],
)
def test_bad_options_are_refused_at_once(options, names):
    with pytest.raises(UsageError, match=names) as caught:
        EngineConfig(**options)
    assert caught.value.param in (*options, None)


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"device": "abacus"}, UsageError, "device 'abacus' is unknown; use auto, cpu"),
        ({"max_model_len": 100_000}, UsageError, "max_model_len 100000 exceeds the 256 positions"),
        (
            {"kv_offload_memory": 100},
            CapacityError,
            "kv_offload_memory of 100 holds no block of 16 tokens .*; raise it",
        ),
        ({"kv_cache_memory": 100}, CapacityError, "holds no block of 16 tokens .*; raise it"),
        ({"quantization": "int3"}, UsageError, "int3"),
        ({"lora_modules": {"x": "/no/such/adapter"}}, CheckpointError, "/no/such/adapter"),
        ({"speculative_config": {"draft": "/no/such/draft"}}, CheckpointError, "/no/such/draft"),
        ({"tokenizer": "/no/such/tokenizer"}, CheckpointError, "/no/such/tokenizer"),
    ],
)
def test_options_that_do_not_fit_the_checkpoint_or_machine(tiny_dir, options, error, names):
    with pytest.raises(error, match=names):
        LLM(str(tiny_dir), **options)


def test_a_draft_of_another_vocabulary_is_refused(tiny_dir, tmp_path):
    from tests.serve.conftest import build_llama

    draft = build_llama(tmp_path, vocab_size=420)
    with pytest.raises(UsageError, match="420 tokens, the target 416.*share the target's vocabulary"):
        LLM(str(tiny_dir), speculative_config={"draft": str(draft)})


def test_an_unknown_option_is_not_swallowed(tiny_dir):
    with pytest.raises(TypeError, match="max_num_sequences"):
        LLM(str(tiny_dir), max_num_sequences=4)


def test_speculation_takes_either_spelling():
    expected = SpeculativeConfig(draft="d", num_speculative_tokens=2)
    given = {"model": "d", "num_speculative_tokens": 2}
    assert SpeculativeConfig.parse(given) == (expected,) == SpeculativeConfig.parse(expected)
    assert SpeculativeConfig.parse([given, {"method": "suffix"}]) == (expected, SpeculativeConfig(method="suffix"))
    assert SpeculativeConfig.parse(None) == ()


@given(
    st.integers(0, 2**50),
    st.sampled_from([("", 1), ("B", 1), ("k", 1000), ("KiB", 1024), (" mib", 2**20), ("GB", 10**9), ("gi", 2**30)]),
)
def test_sizes_are_read(number, unit):
    assert parse_bytes(f"{number}{unit[0]}") == pytest.approx(number * unit[1], rel=1e-12)


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ({"temperature": -0.1}, r"temperature must lie in \[0.0, ∞\), got -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, r"top_p must lie in \(0.0, 1.0\], got 0.0"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"min_tokens": 20, "max_tokens": 10}, r"min_tokens must lie in \[0, 10\], got 20"),
        ({"logprobs": -2}, "logprobs"),
        ({"n": 0}, "n must lie"),
        ({"stop": [""]}, "stop strings must not be empty"),
        ({"allowed_token_ids": []}, "at least one token"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias of token 3"),
    ],
)
def test_bad_sampling_parameters_name_field_and_range(params, names):
    with pytest.raises(UsageError, match=names):
        SamplingParams(**params)
