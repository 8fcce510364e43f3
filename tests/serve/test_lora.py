"""LoRA per request: logits of peft's merged model, several adapters in one batch, loaded and unloaded while the engine runs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from wager.errors import CheckpointError, UsageError
from wager.serve.llm import LLM
from wager.serve.lora import load_adapter
from wager.serve.params import SamplingParams

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = {
    "all": dict(r=4, lora_alpha=16, target_modules=LINEARS),
    "rank-stabilised": dict(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=True),
    "patterns": dict(
        r=4, lora_alpha=8, target_modules=LINEARS, rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 6},
        alpha_pattern={"v_proj": 40, "model.layers.1.self_attn.o_proj": 24, "layers.0.mlp.*_proj": 2},
    ),
    "one-layer": dict(r=3, lora_alpha=9, target_modules=["down_proj"], layers_to_transform=[1]),
}  # fmt: skip
PROMPTS = [[5, 9, 300, 17], [44] * 20, list(range(10, 50))]


def make_adapter(base, directory, seed=0, **settings):
    """Save a random adapter; returns the merged model that transformers would serve."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model.save_pretrained(directory)
    return model.merge_and_unload().eval()


@pytest.fixture(scope="module")
def adapters(tiny_dir, tmp_path_factory):
    """name → (directory, merged model)"""
    made = {}
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        directory = tmp_path_factory.mktemp(name)
        made[name] = (directory, make_adapter(tiny_dir, directory, seed, **settings))
    return made


@pytest.fixture(scope="module")
def llm(tiny_dir, adapters):
    return LLM(
        str(tiny_dir), lora_modules={name: str(path) for name, (path, _) in adapters.items()}, max_num_batched_tokens=16
    )


def merged_logprobs(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("name", SETTINGS)
def test_logprobs_equal_pefts_merged_model(llm, adapters, name):
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params, adapter=name), strict=True):
        choice = output.outputs[0]
        ids = prompt + choice.token_ids
        want = merged_logprobs(adapters[name][1], ids)
        for position in range(1, len(ids)):
            entries = (
                output.prompt_logprobs[position] if position < len(prompt) else choice.logprobs[position - len(prompt)]
            )
            assert entries[ids[position]].logprob == pytest.approx(want[position - 1, ids[position]].item(), abs=3e-4)


def test_adapters_differ_enough_for_that_to_mean_something(llm, adapters):
    want = [merged_logprobs(model, PROMPTS[0]) for _, model in adapters.values()]
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(want) for b in want[:i])


def test_different_adapters_and_none_share_a_batch(llm):
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    alone = {name: llm.generate(PROMPTS[2], params, adapter=name)[0].outputs[0].token_ids for name in (None, *SETTINGS)}
    assert len({tuple(tokens) for tokens in alone.values()}) > 2
    generations = {}
    for name in (None, *SETTINGS, None):
        generation = llm.frontend.make(PROMPTS[2], params, f"mixed-{name}-{len(generations)}", adapter=name)
        llm.frontend.submit(generation)
        generations[generation.request_id] = (generation, name)
    while llm.engine.core.has_work:
        llm.frontend.step()
    for generation, name in generations.values():
        assert generation.continuations[0].token_ids == alone[name]


def test_a_name_may_come_back_as_another_adapter(tiny_dir, adapters):
    """Cached KV of the first must not serve the second, though name and tokens agree."""
    llm = LLM(str(tiny_dir), block_size=4)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    answers = []
    for name in ("all", "rank-stabilised"):
        llm.load_adapter("x", str(adapters[name][0]))
        answers.append(llm.generate(PROMPTS[2], params, adapter="x")[0])
        llm.unload_adapter("x")
        fresh = LLM(str(tiny_dir), lora_modules={"x": str(adapters[name][0])})
        assert (
            answers[-1].outputs[0].token_ids == fresh.generate(PROMPTS[2], params, adapter="x")[0].outputs[0].token_ids
        )
    assert answers[1].num_cached_tokens == 0
    base = llm.generate(PROMPTS[2], params)[0]
    assert (
        base.num_cached_tokens == 0
        and base.outputs[0].token_ids == LLM(str(tiny_dir)).generate(PROMPTS[2], params)[0].outputs[0].token_ids
    )


def test_loading_and_unloading_while_requests_run(tiny_dir, adapters):
    llm = LLM(str(tiny_dir), max_loras=1)
    path = str(adapters["all"][0])
    with pytest.raises(UsageError, match="'x' is not loaded"):
        llm.generate(PROMPTS[0], adapter="x")
    llm.load_adapter("x", path)
    with pytest.raises(UsageError, match="already loaded"):
        llm.load_adapter("x", path)
    with pytest.raises(UsageError, match="max_loras"):
        llm.load_adapter("y", path)
    made = llm.frontend.make(PROMPTS[0], SamplingParams(max_tokens=4), "late", adapter="x")
    running = llm.frontend.make(PROMPTS[0], SamplingParams(max_tokens=4, ignore_eos=True), "running", adapter="x")
    llm.frontend.submit(running)
    llm.frontend.step()
    with pytest.raises(UsageError, match="serves 1 running"):
        llm.unload_adapter("x")
    while llm.engine.core.has_work:
        llm.frontend.step()
    llm.unload_adapter("x")
    with pytest.raises(UsageError, match="'x' is not loaded"):
        llm.frontend.submit(made)
    with pytest.raises(UsageError, match="not loaded"):
        llm.unload_adapter("x")
    assert not llm.engine.core.requests and not llm.frontend.generations


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda c, t: c.update(peft_type="IA3"), "IA3"),
        (lambda c, t: c.update(use_dora=True), "DoRA"),
        (lambda c, t: c.update(bias="all"), "trains biases"),
        (lambda c, t: c.update(modules_to_save=["lm_head"]), "fully trained modules"),
        (lambda c, t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 416)}), "lora_embedding_A"),
        (lambda c, t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64), "base_model.model.lm_head.lora_B.weight": torch.zeros(416, 4)}), "lm_head"),
        (lambda c, t: t.update({"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(4, 64)}), "layers.7.mlp.up_proj"),
        (lambda c, t: t.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"), "layers.0.mlp.up_proj"),
        (lambda c, t: t.pop("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"), "layers.0.mlp.up_proj"),
        (lambda c, t: t.update({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(4, 63)}), "layers.0.mlp.up_proj.*shapes"),
        (lambda c, t: t.clear(), "no LoRA weights"),
    ],
)  # fmt: skip
def test_what_would_be_ignored_or_does_not_fit_is_refused(llm, adapters, tmp_path, change, names):
    source = adapters["all"][0]
    config, tensors = (
        json.loads((source / "adapter_config.json").read_text()),
        load_file(source / "adapter_model.safetensors"),
    )
    change(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=names):
        load_adapter(tmp_path, llm.engine.core.runner.model)


def test_unreadable_adapters_are_named(llm, adapters, tmp_path):
    model = llm.engine.core.runner.model
    with pytest.raises(CheckpointError, match="adapter_config.json is missing"):
        load_adapter(tmp_path, model)
    shutil.copy(adapters["all"][0] / "adapter_config.json", tmp_path)
    with pytest.raises(CheckpointError, match="adapter_model.safetensors cannot be read"):
        load_adapter(tmp_path, model)
