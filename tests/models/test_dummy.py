"""load_format="dummy": a model of a config.json alone, the same every time, in every family and under every packing."""

import json

import pytest
import torch

from wager import LLM, SamplingParams
from wager.errors import CheckpointError, UsageError
from wager.models.attend import causal_attention
from wager.models.loader import load_model
from wager.serve.config import EngineConfig

LLAMA = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, torch_dtype="bfloat16",
)  # fmt: skip


@pytest.fixture
def shape(tmp_path):
    def write(**changes):
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
        return tmp_path

    return write


def hidden(model):
    tokens = torch.arange(6)
    with torch.no_grad():
        return model(tokens, tokens, causal_attention(model))


def test_only_the_config_is_read_and_the_numbers_are_the_same_every_time(shape):
    first, again = (load_model(shape(), load_format="dummy") for _ in range(2))
    assert first.model.dtype == torch.bfloat16 and not any(p.is_meta for p in first.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    weight = first.model.layers[0].mlp.down.weight.float()
    assert 0.015 < weight.std() < 0.025 and (first.model.norm.weight == 1).all()
    assert torch.isfinite(hidden(first.model)).all() and hidden(first.model).std() > 0.1


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_packed_weights_are_those_of_the_plain_model(shape, mode):
    plain = load_model(shape(), "float32", load_format="dummy").model
    packed = load_model(shape(), "float32", packed=True, quantization=mode, load_format="dummy").model
    assert packed.head.packed is not None and packed.layers[0].attention.qkv.weight is None
    error = (hidden(packed) - hidden(plain)).norm() / hidden(plain).norm()
    assert error < {None: 1e-5, "int8": 0.05, "int4": 0.3}[mode]


def test_a_tied_head_stays_tied(shape):
    model = load_model(shape(tie_word_embeddings=True), load_format="dummy").model
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize(
    "changes",
    [
        dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2"),
        dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=8),
        dict(
            architectures=["Gemma2ForCausalLM"],
            model_type="gemma2",
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=16,
        ),
        dict(architectures=["MixtralForCausalLM"], model_type="mixtral", num_local_experts=4, num_experts_per_tok=2),
        dict(architectures=["Phi3ForCausalLM"], model_type="phi3"),
    ],
)
def test_other_families(shape, changes):
    model = load_model(shape(**changes), load_format="dummy", packed=True).model
    assert torch.isfinite(hidden(model)).all()


def test_the_engine_serves_it(shape):
    outputs = [
        LLM(str(shape()), load_format="dummy", skip_tokenizer_init=True)
        .generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))[0]
        .outputs[0]
        .token_ids
        for _ in range(2)
    ]
    assert outputs[0] == outputs[1] and len(outputs[0]) == 5


def test_what_is_refused(shape, tmp_path):
    with pytest.raises(UsageError, match="quantization_config"):
        load_model(shape(quantization_config={"quant_method": "gptq"}), load_format="dummy")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(tmp_path / "model.gguf", load_format="dummy")
    with pytest.raises(UsageError, match="load_format 'safe' is unknown"):
        EngineConfig(load_format="safe")
    with pytest.raises(UsageError, match="tensor_parallel_size"):
        EngineConfig(load_format="dummy", tensor_parallel_size=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(tmp_path / "empty", load_format="dummy")
