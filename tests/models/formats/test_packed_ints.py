"""GPTQ and AWQ checkpoints, packed here bit by bit from the formats' definitions, against the float weights that they stand for."""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from wager.errors import CheckpointError, UsageError
from wager.models.attend import causal_attention
from wager.models.formats.packed_ints import assemble
from wager.models.loader import load_model

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "dtype": "float32",
}  # fmt: skip
LINEARS = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64), "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128),
}  # fmt: skip


def put(codes, bits, order=None):
    """uint32 words along the last axis, one code at a time."""
    each = 32 // bits
    words = np.zeros((codes.shape[0], codes.shape[1] // each), dtype=np.uint32)
    for word in range(words.shape[1]):
        for place in range(each):
            column = word * each + (order[place] if order else place)
            words[:, word] |= codes[:, column].astype(np.uint32) << np.uint32(bits * place)
    return torch.from_numpy(words.view(np.int32))


def linear(rng, method, outputs, inputs, bits, group, symmetric, act_order, order_seed):
    """(tensors of the format, float32 weight [O, I])."""
    groups = inputs // group
    top = (1 << bits) - 1
    codes = rng.integers(0, top + 1, (inputs, outputs))
    zeros = np.full((groups, outputs), (top + 1) // 2) if symmetric else rng.integers(1, top + 1, (groups, outputs))
    scales = (rng.random((groups, outputs)) * 0.02 * 16 / (top + 1) + 1e-3).astype(np.float16)
    group_of = np.arange(inputs) // group
    if act_order:
        group_of = np.random.default_rng(order_seed).permutation(group_of)
    weight = scales.astype(np.float32)[group_of] * (codes - zeros[group_of])
    if method == "awq":
        nibbles = (0, 2, 4, 6, 1, 3, 5, 7)
        packed = {"qweight": put(codes, 4, nibbles), "qzeros": put(zeros, 4, nibbles)}
    else:
        packed = {"qweight": put(codes.T, bits).T.contiguous(), "qzeros": put(zeros - 1, bits)}
        packed["g_idx"] = torch.from_numpy(group_of.astype(np.int32))
    return {**packed, "scales": torch.from_numpy(scales)}, torch.from_numpy(weight.astype(np.float32).T.copy())


def build(directory, method="gptq", bits=4, group=32, symmetric=True, act_order=False, settings=None, same_order=True):
    """A quantised checkpoint and its float twin; returns both directories."""
    rng = np.random.default_rng(3)
    plain, twin = {}, {}
    for name, shape in (("embed_tokens", (96, 64)), ("norm", (64,))):
        plain[f"model.{name}.weight"] = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    plain["lm_head.weight"] = torch.from_numpy(rng.standard_normal((96, 64), dtype=np.float32))
    for i in range(2):
        for name in ("input_layernorm", "post_attention_layernorm"):
            plain[f"model.layers.{i}.{name}.weight"] = torch.ones(64)
        for j, (name, (outputs, inputs)) in enumerate(LINEARS.items()):
            stem = f"model.layers.{i}.{name}"
            seed = 1 if same_order else j
            packed, weight = linear(rng, method, outputs, inputs, bits, min(group, inputs), symmetric, act_order, seed)
            plain |= {f"{stem}.{key}": value for key, value in packed.items()}
            twin[f"{stem}.weight"] = weight
            if name.split(".")[1][0] in "qkv" and "attn" in name:
                plain[f"{stem}.bias"] = torch.from_numpy(rng.standard_normal(outputs, dtype=np.float32) * 0.1)
    base = {"quant_method": method, "bits": bits, "group_size": group, "desc_act": act_order, "sym": symmetric}
    base |= {"version": "gemm", "zero_point": True} if method == "awq" else {}
    for where, tensors, extra in (
        ("packed", plain, {"quantization_config": {**base, **(settings or {})}}),
        ("twin", {**{k: v for k, v in plain.items() if v.dtype == torch.float32}, **twin}, {}),
    ):
        (directory / where).mkdir()
        save_file(tensors, directory / where / "model.safetensors")
        (directory / where / "config.json").write_text(json.dumps({**CONFIG, **extra}))
    return directory / "packed", directory / "twin"


def logits(path, **options):
    model = load_model(path, **options).model
    with torch.no_grad():
        return model.logits(model(torch.arange(9), torch.arange(9), causal_attention(model)))


CASES = {
    "gptq-4": {},
    "gptq-4-asymmetric": {"symmetric": False},
    "gptq-4-act-order": {"act_order": True, "symmetric": False},
    "gptq-4-wide-groups": {"group": 64, "act_order": True},
    "gptq-8": {"bits": 8},
    "gptq-8-act-order": {"bits": 8, "act_order": True},
    "awq": {"method": "awq", "symmetric": False},
    "awq-wide": {"method": "awq", "group": 64},
}


@pytest.mark.parametrize("case", CASES)
def test_answers_as_the_float_weights_it_stands_for(case, tmp_path, caplog):
    packed, twin = build(tmp_path, **CASES[case])
    want = logits(twin)
    with caplog.at_level(logging.INFO, logger="wager.models.formats.packed_ints"):
        for options in ({}, {"packed": True}):
            got = logits(packed, **options)
            assert (got - want).abs().max() <= 2e-4 * want.abs().max(), options
    assert not caplog.records, "exact formats are not rounded"


@pytest.mark.parametrize(
    "case", [{"bits": 8, "symmetric": False}, {"group": 16}, {"act_order": True, "same_order": False}]
)
def test_what_must_be_rounded_anew_is_near_and_said_once(case, tmp_path, caplog):
    packed, twin = build(tmp_path, **case)
    want = logits(twin)
    with caplog.at_level(logging.INFO, logger="wager"):
        got = logits(packed, packed=True)
    assert (got - want).abs().max() <= 0.03 * want.abs().max()
    assert len([r for r in caplog.records if "anew" in r.message]) == (0 if case.get("act_order") else 1)


def test_four_bits_stay_four_bits(tmp_path):
    packed, _ = build(tmp_path)
    model = load_model(packed, packed=True).model
    modes = {
        m.packed.mode for name, m in model.named_modules() if getattr(m, "packed", None) is not None and name != "head"
    }
    assert modes == {"q4"}
    assert (logits(packed, packed=True, quantization="w4a8") - logits(packed, packed=True)).abs().max() > 0
    with pytest.raises(UsageError, match="quantized already"):
        load_model(packed, packed=True, quantization="nf4")


@pytest.mark.parametrize(
    "settings,word",
    [
        ({"bits": 3}, "bits 3"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "awq", "version": "gemv"}, "gemv"),
        ({"quant_method": "awq", "bits": 8}, "bits 8"),
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"dynamic": {"x": {}}}, "dynamic"),
        ({"group_size": 0}, "group_size 0"),
    ],
)
def test_variants_that_are_not_read_are_refused_by_name(tmp_path, settings, word):
    packed, _ = build(tmp_path, settings=settings)
    with pytest.raises(CheckpointError, match=word):
        load_model(packed)


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    packed, _ = build(tmp_path)
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.scales"
    tensors[name] = tensors[name][:1].contiguous()
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(CheckpointError, match="mlp.up_proj.*do not fit"):
        load_model(packed)


def test_inputs_that_do_not_fill_a_group_of_32():
    rng = np.random.default_rng(0)
    codes, scales = torch.from_numpy(rng.integers(0, 16, (5, 40))), torch.full((5, 1), 0.5)
    made = assemble(codes, scales, torch.full((5, 1), 7), torch.zeros(40, dtype=torch.long), 4, pytest.fail)
    assert torch.equal(made.dequantized(), 0.5 * (codes - 7).float())
