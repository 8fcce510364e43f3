"""Quantized loading holds the packed weights and about one tensor, never the float model."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from wager.models.attend import causal_attention
from wager.models.loader import build_model, load_model, pieces_of

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 2816,
    "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4, "dtype": "float32",
}  # fmt: skip
MEASURE = """
import sys, threading, torch
from wager.models.attend import causal_attention
from wager.models.loader import build_model, load_model, pieces_of
from wager.kernels.registry import choice
choice(), torch.ones(64, 64) @ torch.ones(64, 64)
load_model(sys.argv[3], packed=True, quantization=sys.argv[2])  # what torch imports on first use is no weight
own = lambda: next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('RssAnon'))
done, peak, before = threading.Event(), 0, own()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, own())
watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(sys.argv[1], packed=True, quantization=sys.argv[2]).model
done.set(), watcher.join()
peak = max(peak, own())
print(peak - before, sum(m.packed.nbytes for m in model.modules() if getattr(m, 'packed', None) is not None), model.embed.weight.nbytes)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("large")
    width, key = CONFIG["hidden_size"], 512
    shapes = {"model.embed_tokens": (8000, width), "lm_head": (8000, width), "model.norm": (width,)}
    for i in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{i}"
        shapes |= {f"{prefix}.self_attn.{n}_proj": (key if n in "kv" else width, width) for n in "qkvo"}
        shapes |= {f"{prefix}.mlp.{n}_proj": (2816, width) for n in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj": (width, 2816)}
        shapes |= {f"{prefix}.{n}": (width,) for n in ("input_layernorm", "post_attention_layernorm")}
    generator = torch.Generator().manual_seed(0)
    for shard, names in enumerate([list(shapes)[i::8] for i in range(8)]):
        tensors = {f"{n}.weight": torch.rand(shapes[n], generator=generator) * 0.02 for n in names}
        save_file(tensors, directory / f"model-{shard}.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux")
@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_peak_memory_is_the_packed_weights_and_one_tensor(checkpoint, tmp_path, mode):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(checkpoint), mode, str(small_checkpoint(tmp_path))],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    peak, packed, embedding = map(int, done.stdout.split())
    floats = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    largest = 8000 * 1024 * 4  # the mapped file's own pages are not counted, they belong to the page cache
    assert packed + embedding < peak < packed + embedding + 3 * largest < floats


def small_checkpoint(directory):
    small = {
        **CONFIG,
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
    }
    model, tensors = build_model(small), {}
    for module in model.modules():
        for parameter, pieces in pieces_of(module):
            start = 0
            for name, rows in pieces:
                tensors.setdefault(name, parameter.data[start : start + rows].clone())
                start += rows
    tensors.pop("lm_head.weight", None)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(small))
    return directory


def test_streamed_and_later_packing_give_the_same_bits(tmp_path):
    small_checkpoint(tmp_path)
    for mode in (None, "int8", "nf4", "w4a8"):
        later = load_model(tmp_path).model
        later.prepack(mode)
        streamed = load_model(tmp_path, packed=True, quantization=mode).model
        tokens, positions = torch.arange(7), torch.arange(7)
        with torch.no_grad():
            a, b = (m.logits(m(tokens, positions, causal_attention(m))) for m in (later, streamed))
        assert torch.equal(a, b), mode
