"""GGUF files: blocks against the `gguf` package's own decoding, models against the same weights through the ordinary loader."""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

gguf = pytest.importorskip("gguf")
from gguf.quants import dequantize, quantize  # noqa: E402

from benchmarks.kernels import gguf_file  # noqa: E402
from wager.errors import CheckpointError, UsageError  # noqa: E402
from wager.kernels.registry import pack_linear  # noqa: E402
from wager.models.attend import causal_attention  # noqa: E402
from wager.models.formats import blocks, gguf_tokenizer  # noqa: E402
from wager.models.formats.gguf import GGUFCheckpoint  # noqa: E402
from wager.models.loader import load_model  # noqa: E402

KINDS = gguf.GGMLQuantizationType
RNG = np.random.default_rng(7)
TINY = dict(hidden=64, layers=2, heads=4, kv_heads=2, width=96, vocab=300)


def tiny(arch="llama", **more):
    return gguf_file.llama_config(**{**TINY, **more.pop("sizes", {})}, **{**more, "arch": arch})


def file_blocks(kind, rows, inputs):
    if kind in ("Q4_K", "Q6_K"):
        return gguf_file.random_blocks(kind, rows, inputs, RNG)
    return quantize(RNG.standard_normal((rows, inputs), dtype=np.float32), KINDS[kind])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_blocks_without_a_minimum_are_read_exactly(kind):
    data = file_blocks(kind, 5, 256)
    assert np.array_equal(blocks.decode(kind, data).dequantized().numpy(), dequantize(data, KINDS[kind]))


def test_q4_k_is_read_within_the_rounding_of_its_scales():
    data = file_blocks("Q4_K", 20, 512)
    data[:3, 4:16] = 0  # groups without scale and minimum
    data[3:6, 4:8] &= 0xC0  # groups without scale, with a minimum: constant
    got, want = blocks.decode("Q4_K", data), dequantize(data, KINDS.Q4_K)
    codes = 16 + 2 * got.zeros.abs()  # float16 rounds scales (2^-25 near zero) and zero points
    bound = (codes * (got.scales * 2**-11 + 2**-25)).repeat_interleave(32, 1).numpy()
    assert (np.abs(got.dequantized().numpy() - want) <= bound).all()
    assert np.abs(want).max() > 0 and got.mode == "q4z"


def test_q6_k_values_are_exact_and_their_int8_form_near():
    data = file_blocks("Q6_K", 6, 512)
    want = dequantize(data, KINDS.Q6_K)
    raw = torch.from_numpy(data).view(6, 2, 210)
    assert np.array_equal(blocks.q6_k_values(raw).numpy(), want)
    top = np.abs(want).reshape(6, -1, 32).max(-1).repeat(32, 1)
    assert (np.abs(blocks.decode("Q6_K", data).dequantized().numpy() - want) <= top / 254 * 1.01).all()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_packed_blocks_multiply_as_what_they_stand_for(kind):
    weight = blocks.decode(kind, file_blocks(kind, 40, 256))
    x = torch.from_numpy(RNG.standard_normal((7, 256), dtype=np.float32))
    want = x.double() @ weight.dequantized().double().T
    size = x.abs() @ weight.dequantized().abs().T
    assert ((pack_linear(weight)(x) - want).abs() <= 2e-5 * size + 1e-6).all()


def logits(path, **options):
    model = load_model(path, **options).model
    with torch.no_grad():
        tokens = torch.arange(3, 14)
        return model.logits(model(tokens, torch.arange(11), causal_attention(model)))


def twin(path, directory, **settings):
    """The same weights, decoded by the package, as an ordinary float32 checkpoint."""
    from transformers import AutoConfig

    reader = gguf.GGUFReader(path)
    checkpoint = GGUFCheckpoint(path)
    raw = checkpoint.config()
    names = {theirs: f"{ours}" for ours, theirs in gguf_names(raw["num_hidden_layers"]).items()}
    tensors = {}
    for t in reader.tensors:
        values = torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), dtype=np.float32))
        name = names[t.name]
        if raw["model_type"] == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = raw["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            half = values.shape[0] // heads // 2
            values = values.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(values.shape)
        tensors[name] = values.contiguous()
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    raw["dtype"] = "float32"
    assert AutoConfig.for_model(raw["model_type"]).model_type == raw["model_type"]
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def gguf_names(layers):
    """Hugging Face name to GGUF name, by the package's own table."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    qwen = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, layers)
    stems = ["model.embed_tokens", "model.norm", "lm_head"]
    inner = ["input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    inner += [f"self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    stems += [f"model.layers.{i}.{name}" for i in range(layers) for name in inner]
    found = {stem: table.get_name(stem) or qwen.get_name(stem) for stem in stems}
    return {f"{ours}.{suffix}": f"{theirs}.{suffix}" for ours, theirs in found.items() for suffix in ("weight", "bias")}


CASES = {
    "llama-f32": ("llama", "F32", {}),
    "llama-f16": ("llama", "F16", {}),
    "llama-q8": ("llama", "Q8_0", {}),
    "llama-q4-tied": ("llama", "Q4_0", {"tied": True}),
    "llama-mixed": ("llama", "Q4_0", {"kinds": {"attn_v.weight": "Q8_0", "ffn_up.weight": "F16", "output.weight": "Q8_0"}}),
    "qwen2-q8": ("qwen2", "Q8_0", {"tied": True}),
    "qwen3-q4": ("qwen3", "Q4_0", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_models_answer_as_with_the_same_weights_in_float32(case, tmp_path):
    arch, kind, more = CASES[case]
    kinds = dict(more.get("kinds", {}))
    path = gguf_file.write(tmp_path / "m.gguf", tiny(arch, tied=more.get("tied", False)), kind, std=0.2, kinds=kinds)
    want = logits(twin(path, tmp_path / "twin"))
    for packed in (False, True):
        got = logits(path, dtype="float32", packed=packed)
        assert want.abs().max() > 1 and (got - want).abs().max() < 2e-3 * want.abs().max(), packed
    directory = logits(tmp_path, dtype="float32", packed=True)
    assert torch.equal(directory, got)


def test_k_quants_serve_with_one_line_about_their_rounding(tmp_path, caplog):
    config = tiny(sizes=dict(hidden=256, width=256, layers=1))
    path = gguf_file.write(tmp_path / "m.gguf", config, "Q4_K", std=0.2, kinds={"attn_v.weight": "Q6_K"})
    want = logits(twin(path, tmp_path / "twin"))
    with caplog.at_level(logging.INFO, logger="wager.models.formats.gguf"):
        got = logits(path, dtype="float32", packed=True)
    assert (got - want).abs().max() < 0.02 * want.abs().max()
    assert [("Q4_K" in r.message, "Q6_K" in r.message) for r in caplog.records] in (
        [(True, False), (False, True)],
        [(True, False), (True, True)],
    )


def test_quantised_files_stay_quantised(tmp_path):
    config = tiny(sizes=dict(vocab=900))
    sizes = {}
    for kind in ("F16", "Q8_0", "Q4_0"):
        path = gguf_file.write(tmp_path / f"{kind}.gguf", config, kind)
        model = load_model(path, packed=True).model
        sizes[kind] = sum(m.packed.weight.nbytes for m in model.modules() if getattr(m, "packed", None) is not None)
    assert sizes["Q8_0"] == pytest.approx(sizes["F16"] * 8.5 / 16) and sizes["Q4_0"] == pytest.approx(
        sizes["F16"] * 4.5 / 16
    )


def test_int8_activations_on_the_files_own_codes(tmp_path):
    path = gguf_file.write(tmp_path / "m.gguf", tiny(), "Q8_0", std=0.2)
    exact, rounded = logits(path, packed=True), logits(path, packed=True, quantization="w8a8")
    assert 0 < (exact - rounded).abs().max() < 0.1 * exact.abs().max()
    with pytest.raises(UsageError, match="quantized already.*'int4'"):
        load_model(path, packed=True, quantization="int4")


def test_bad_files_say_what_is_wrong(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF is not this")
    with pytest.raises(CheckpointError, match="a.gguf is no readable GGUF file"):
        load_model(tmp_path / "a.gguf")
    path = gguf_file.write(tmp_path / "b.gguf", tiny(), "Q5_0")
    with pytest.raises(CheckpointError, match="token_embd.weight.*Q5_0, which is not read.*Q4_K"):
        load_model(path)
    with pytest.raises(CheckpointError, match="holds 2 GGUF files"):
        load_model(tmp_path)
    other = gguf_file.write(tmp_path / "c.gguf", tiny("falcon"), "F16")
    with pytest.raises(CheckpointError, match="'falcon'.*llama"):
        load_model(other)


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    path = gguf_file.write(tmp_path / "m.gguf", tiny(), "F16")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'wager\[gguf\]'"):
        load_model(path)


def tokenizer_file(path, kind, tokens, **fields):
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TEXTS = ["hello hello world", " the  world's\n\n 12345 hellos", "héllo → 世界 🙂", ""]


def test_byte_level_tokenizer_equals_the_one_it_came_from(tmp_path):
    import tokenizers

    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(TEXTS * 5, vocab_size=300, show_progress=False)
    vocabulary = backend.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__) + ["<|end|>"]
    merges = json.loads(backend.to_str())["model"]["merges"]
    path = tokenizer_file(
        tmp_path / "t.gguf", "gpt2", tokens, tokenizer_pre="gpt-2", token_merges=[" ".join(m) for m in merges],
        token_types=[1] * (len(tokens) - 1) + [3], eos_token_id=len(tokens) - 1, chat_template="{{ messages[0].content }}",
    )  # fmt: skip
    from wager.serve.text.tokenizer import Tokenizer

    ours = Tokenizer.load(path)
    for text in TEXTS:
        assert ours.encode(text) == backend.encode(text).ids and ours.decode(ours.encode(text)) == text
    assert ours.eos_token_ids == {len(tokens) - 1} and ours.encode("a<|end|>")[-1] == len(tokens) - 1
    assert ours.render_chat([{"role": "user", "content": "hi"}]) == "hi"


def sentence_piece_oracle(text, tokens, scores):
    """The greedy rule: of all neighbouring pairs that form a token, join the one with the highest score, the leftmost first."""
    pieces = list("▁" + text.replace(" ", "▁"))
    rank = dict(zip(tokens, scores, strict=True))
    while True:
        joins = [(rank[a + b], -i) for i, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False)) if a + b in rank]
        if not joins:
            break
        i = -max(joins)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    bytes_of = lambda p: [p] if p in rank else [f"<0x{b:02X}>" for b in p.encode()]
    return [tokens.index(t) for p in pieces for t in bytes_of(p)]


def test_sentence_piece_tokenizer_joins_by_score(tmp_path):
    words = [
        "▁",
        "h",
        "e",
        "l",
        "o",
        "w",
        "r",
        "d",
        "he",
        "ll",
        "hell",
        "hello",
        "▁hello",
        "lo",
        "▁w",
        "or",
        "▁wor",
        "ld",
        "▁world",
        "llo",
    ]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], *words]
    rng = np.random.default_rng(0)
    for _ in range(6):
        scores = [0.0] * 259 + [-float(s) for s in rng.permutation(len(words))]
        path = tokenizer_file(
            tmp_path / "t.gguf", "llama", tokens, token_scores=scores, token_types=[2, 3, 3] + [6] * 256 + [1] * len(words),
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        backend, config, generation = gguf_tokenizer.read_tokenizer(path)
        usable = {t: s for t, s in zip(tokens[259:], scores[259:], strict=True)}
        for text in ("hello world", "hell hollow world", "held 世 low"):
            want = sentence_piece_oracle(
                text, tokens, [usable.get(t, -1e9) if i >= 259 else -1e9 for i, t in enumerate(tokens)]
            )
            assert backend.encode(text).ids == [1, *want], (text, backend.encode(text).tokens)
            assert backend.decode(want) == text
    assert config["bos_token"] == "<s>" and generation == {"eos_token_id": [2]}


def test_engine_generates_from_a_file(tmp_path):
    from wager import LLM, SamplingParams

    path = gguf_file.write(tmp_path / "m.gguf", tiny(), "Q4_0", std=0.2)
    llm = LLM(model=str(path), kv_cache_memory=1 << 20, max_model_len=64)
    out = llm.generate(["w1 w2 hello"], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
    assert len(out[0].outputs[0].token_ids) == 5
