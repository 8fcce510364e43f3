"""A checkpoint that cannot be served is refused with one clear CheckpointError naming what is wrong; one that can is read exactly."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wager.errors import CheckpointError
from wager.models.attend import causal_attention
from wager.models.loader import Checkpoint, load_model, resolve


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("whole")
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture()
def copy(whole, tmp_path):
    """(directory, its config, its tensors, a function that writes both back)."""
    config, tensors = json.loads((whole / "config.json").read_text()), load_file(whole / "model.safetensors")

    def write():
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return tmp_path, config, tensors, write


def logits_of(path, **options):
    model = load_model(path, **options).model
    with torch.no_grad():
        return model.logits(model(torch.arange(9), torch.arange(9), causal_attention(model)))


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def test_missing_tensor(copy):
    _, _, tensors, write = copy
    del tensors[Q_PROJ]
    with pytest.raises(CheckpointError, match=rf"tensor '{Q_PROJ}' is missing"):
        load_model(write())


@pytest.mark.parametrize("shape", [(16, 15), (15, 16), (17, 16), (16,)])
def test_wrong_shape(copy, shape):
    _, _, tensors, write = copy
    tensors[Q_PROJ] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ}.*shape.*expected \(16, 16\)"):
        load_model(write())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int32, torch.bool])
def test_weights_that_are_no_plain_numbers_are_refused_not_cast(copy, dtype):
    """A quantised weight without its scales would load and answer nonsense."""
    _, _, tensors, write = copy
    tensors[Q_PROJ] = tensors[Q_PROJ].to(dtype)
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ}.*{str(dtype).removeprefix('torch.')}"):
        load_model(write())


def test_a_declared_quantization_is_refused(copy):
    _, config, _, write = copy
    config["quantization_config"] = {"quant_method": "fp8"}
    with pytest.raises(CheckpointError, match="fp8"):
        load_model(write())


@pytest.mark.parametrize("name", ["float64", "int8", "nonsense", "nn"])
def test_a_checkpoint_dtype_that_is_not_served(copy, name):
    _, config, _, write = copy
    config.pop("torch_dtype", None)
    config["dtype"] = name
    with pytest.raises(CheckpointError, match=f"dtype '{name}' is not supported; use float32"):
        load_model(write())


@pytest.mark.parametrize("given", [None, ["BertModel"], []])
def test_unsupported_architecture(copy, given):
    _, config, _, write = copy
    config["architectures"] = given
    with pytest.raises(
        CheckpointError, match="architecture .* is not supported; supported: DeepseekV2.*LlamaForCausalLM"
    ):
        load_model(write())


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "intermediate_size"]
)
def test_a_missing_field_is_named(copy, key):
    _, config, _, write = copy
    del config[key]
    with pytest.raises(CheckpointError, match=f"lacks '{key}', which LlamaForCausalLM needs"):
        load_model(write())


def test_unsupported_rope_and_activation(copy):
    _, config, _, write = copy
    config["rope_parameters"] = {"rope_type": "spiral"}
    with pytest.raises(CheckpointError, match="'spiral' is not supported; supported: default, dynamic, linear"):
        load_model(write())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    config["hidden_act"] = "relu"
    with pytest.raises(CheckpointError, match="activation 'relu' is not supported"):
        load_model(write())


@pytest.mark.parametrize("keep", [0, 4, 50, -1, -1000])
def test_a_truncated_file_is_named(whole, tmp_path, keep):
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    data = (whole / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or truncated"):
        load_model(tmp_path)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_never_opened(whole, tmp_path, pickle):
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    (tmp_path / pickle).write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(CheckpointError, match="pickled weights, which are never loaded: convert them to safetensors"):
        load_model(tmp_path)
    (tmp_path / pickle).unlink()
    with pytest.raises(CheckpointError, match=r"no \*.safetensors: none found"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("text", "names"),
    [("{oops", "cannot be read as JSON"), ("[1]", "holds list, not a JSON object"), (None, "config.json is missing")],
)
def test_an_unreadable_config_is_named(tmp_path, text, names):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=names):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/dir", "nowhere", "a/b/c"])
def test_a_name_that_is_neither_directory_nor_hub_id(name):
    with pytest.raises(CheckpointError, match=f"{name} is neither a directory nor a hub id"):
        resolve(name)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(CheckpointError, match="neither a directory"):
        resolve(tmp_path / "x")


def test_a_hub_id_offline_asks_for_a_directory(monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        CheckpointError, match="somebody/some-model cannot be fetched from the hub .*; pass a local directory"
    ) as caught:
        load_model("somebody/some-model")
    assert "\n" not in str(caught.value)


# -- sharded and mapped --------------------------------------------------------------------------------------------------------------


@pytest.fixture()
def sharded(whole, tmp_path):
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(whole).save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def test_shards_load_as_the_whole_does(whole, sharded):
    assert torch.equal(logits_of(whole), logits_of(sharded))


def test_a_missing_or_outside_shard_is_named(sharded):
    index = sharded / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing, though the index lists it"):
        load_model(sharded)
    listed["weight_map"][Q_PROJ] = "../secret.safetensors"
    index.write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="secret.safetensors"):
        load_model(sharded)


@pytest.mark.parametrize("weight_map", [[], {"a": 3}, "x", None])
def test_a_malformed_index_is_named(sharded, weight_map):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="index.json"):
        load_model(sharded)


def test_tensors_are_mapped_and_streamed(tmp_path):
    """Opening a file of 256 MB and reading one small tensor must not read the rest."""
    import psutil

    big = tmp_path / "model.safetensors"
    save_file({"big": torch.zeros(64 << 20), "small": torch.arange(4.0)}, big)
    process = psutil.Process()
    before = process.memory_info().rss
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensor("small").tolist() == [0, 1, 2, 3]
        assert sorted(checkpoint.names()) == ["big", "small"] and "big" in checkpoint
        assert process.memory_info().rss - before < 64 << 20


@pytest.mark.parametrize(
    ("option", "dtype"),
    [("auto", torch.bfloat16), (torch.float32, torch.float32), ("float32", torch.float32), ("float16", torch.float16)],
)
def test_dtype_is_the_checkpoints_or_the_callers(whole, copy, option, dtype):
    _, config, tensors, write = copy
    config["dtype"] = "bfloat16"
    tensors |= {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    loaded = load_model(write(), dtype=option)
    assert loaded.model.dtype == dtype
    rows = dict(loaded.model.named_parameters())["layers.1.attention.qkv.weight"][:16]
    assert torch.equal(rows.to(torch.bfloat16), tensors[Q_PROJ])


def test_half_precision_serves_what_float32_does_within_rounding(whole):
    full = logits_of(whole, dtype=torch.float32)
    for dtype, bound in ((torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        half = logits_of(whole, dtype=dtype)
        assert half.dtype == torch.float32 and ((half - full).abs().max() / full.abs().max()) < bound
