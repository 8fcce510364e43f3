"""The factory: training learns, processes average their gradients, a distilled draft agrees with its target, files load anywhere."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from wager.errors import UsageError
from wager.models.attend import causal_attention
from wager.models.demo import __main__ as factory
from wager.models.demo import train as training
from wager.models.demo.evaluate import evaluate_pair, format_table
from wager.models.demo.export import save_description, save_weights
from wager.models.demo.grow import grow
from wager.models.demo.tokenizer import train_tokenizer
from wager.models.demo.train import Recipe, schedule, train
from wager.models.llama import Llama, LlamaConfig
from wager.models.loader import load_model

VOCAB = 300


def config(hidden=32, layers=1):
    return factory.model_config(factory.Size(hidden, 48, layers, 2, 1), VOCAB, max_positions=64)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A target trained on a language with short memory, and a draft distilled from it."""
    root = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(0)
    successors = rng.integers(0, VOCAB, (VOCAB, 2))
    stream = np.zeros(6000, dtype=np.uint16)
    for i in range(1, len(stream)):
        stream[i] = successors[stream[i - 1], rng.integers(2)]
    np.save(root / "train.npy", stream[:5000])
    np.save(root / "heldout-code.npy", stream[5000:])
    tokenizer = train_tokenizer(["some text for a vocabulary"], VOCAB)
    common = {"batch_tokens": 512, "window": 64, "short_window": 32, "learning_rate": 2e-2}
    for name, size in (("demo", config()), ("demo-draft", config(16))):
        save_description(size, tokenizer, root / name)
    train(config(), root / "train.npy", root / "demo", Recipe(40_000, **common))
    train(
        config(16),
        root / "train.npy",
        root / "demo-draft",
        Recipe(25_000, seed=1, teacher=str(root / "demo"), **common),
    )
    return root


def test_training_and_distillation_learn(pair):
    report = evaluate_pair(pair / "demo", pair / "demo-draft", pair)
    row = report["heldout"]["code"]
    assert row["target_nats"] < 0.6 * math.log(VOCAB)
    assert row["draft_nats"] < 0.8 * math.log(VOCAB)
    assert row["acceptance_t1"] > 0.4 and row["acceptance_t0"] > 0.3
    assert "| code |" in format_table(report)


def test_distillation_follows_the_teacher_not_the_data(pair):
    """Its loss falls to the teacher's entropy; one gradient step on it must raise the agreement with the teacher."""
    objective = training.Objective(Recipe(1, teacher=str(pair / "demo"), teacher_weight=1.0))
    teacher = objective._teacher
    tokens = torch.from_numpy(np.load(pair / "train.npy")[:65].astype(np.int64))[None]
    loss, _ = objective(teacher, tokens)
    assert abs(loss.item()) < 1e-4
    other = Llama(LlamaConfig.from_checkpoint(config()), torch.float32, torch.Generator().manual_seed(5))
    assert objective(other, tokens)[0].item() > 0.5


def test_transformers_reads_the_export_and_agrees(pair):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(pair / "demo", dtype=torch.float32)
    ours = load_model(pair / "demo", torch.float32).model
    tokens = torch.arange(20) % VOCAB
    logits = ours.logits(ours(tokens, torch.arange(20), causal_attention(ours)))
    torch.testing.assert_close(logits, theirs(tokens[None]).logits[0], atol=1e-4, rtol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(pair / "demo")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_two_processes_take_the_same_step_as_one(pair, tmp_path, monkeypatch):
    """Also into a relative folder, which every process must find."""
    monkeypatch.chdir(tmp_path)
    common = {"batch_tokens": 128, "window": 32, "short_window": 32, "learning_rate": 1e-2, "warmup": 1e-9}
    saved = []
    for processes in (1, 2):
        out = Path(str(processes))
        out.mkdir()
        train(config(), pair.absolute() / "train.npy", out, Recipe(128 * 3, processes=processes, **common))
        saved.append(load_file(out / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].float())
    start = Llama(LlamaConfig.from_checkpoint(config()), torch.float32, torch.Generator().manual_seed(0))
    moved = saved[0] - start.layers[0].mlp.down.weight.detach()
    assert (
        saved[0] - saved[1]
    ).norm() < 0.1 * moved.norm()  # bfloat16 rounding; without averaging they part by more than half
    assert not list(tmp_path.rglob("rendezvous"))


def test_the_clock_ends_a_run(pair, tmp_path):
    train(config(), pair / "train.npy", tmp_path, Recipe(10**12, batch_tokens=64, window=64, minutes=0.01))
    assert (tmp_path / "model.safetensors").exists()


def test_schedule_warms_up_holds_and_comes_down_to_zero():
    rates = [schedule(p, 0.1, 0.5) for p in (0.0, 0.05, 0.1, 0.3, 0.5, 0.75, 1.0)]
    assert rates[0] < 0.02 and rates[2] == rates[3] == rates[4] == 1.0 and rates[5] == 0.5 and rates[6] == 0.0


def test_saving_is_atomic(pair, tmp_path):
    model = Llama(LlamaConfig.from_checkpoint(config()), torch.float32, torch.Generator().manual_seed(0))
    save_weights(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_unknown_preset_is_refused(tmp_path):
    from typer.testing import CliRunner

    app = factory.typer.Typer()
    app.command()(factory.main)
    result = CliRunner().invoke(app, ["--out", str(tmp_path), "--preset", "huge"])
    assert result.exit_code == 2 and "huge" in result.output


def test_a_grown_model_computes_what_its_source_computes_and_keeps_learning(pair, tmp_path):
    """Layers added by block expansion say nothing before training, and gradients reach them."""
    recipe = Recipe(1, batch_tokens=512, window=64, short_window=32, start=str(pair / "demo"), learning_rate=1e-3)
    before, after = tmp_path / "before", tmp_path / "after"
    for out, steps in ((before, 0), (after, 12)):
        save_description(config(layers=3), train_tokenizer(["some text for a vocabulary"], VOCAB), out)
        train(
            config(layers=3),
            pair / "train.npy",
            out,
            replace(recipe, tokens=max(1, 512 * steps), minutes=None if steps else 1e-9),
        )
    tokens = torch.from_numpy(np.load(pair / "heldout-code.npy")[:60].astype(np.int64))
    logits = {}
    for path in (pair / "demo", before, after):
        model = load_model(path, torch.float32).model
        logits[path] = model.logits(model(tokens, torch.arange(60), causal_attention(model)))
    torch.testing.assert_close(logits[before], logits[pair / "demo"], atol=1e-5, rtol=1e-5)
    assert not load_file(before / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].any()
    assert load_file(after / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].any()
    with pytest.raises(UsageError, match="only the depth may differ"):
        grow(load_model(before, torch.float32).model, Llama(LlamaConfig.from_checkpoint(config(16)), torch.float32))
    with pytest.raises(UsageError, match="3 layers cannot grow into one of 1"):
        grow(load_model(pair / "demo", torch.float32).model, load_model(before, torch.float32).model)
