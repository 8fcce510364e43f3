"""A target divided over real processes: the same tokens as in one process, with trees and without; what cannot be divided is refused."""

import os
import signal

import pytest
import torch
from safetensors.torch import save_file

from tests.serve.conftest import build_llama
from wager.errors import UsageError, WagerError
from wager.models.attend import causal_attention
from wager.models.loader import load_model
from wager.serve.llm import LLM
from wager.serve.parallel.tensor import Shard, load_shard
from wager.serve.params import SamplingParams

PROMPTS = [[5, 9, 300, 17], [44] * 40, list(range(10, 90)), [7, 8, 9] * 25]
PARAMS = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


def tokens_of(outputs):
    return [choice.token_ids for output in outputs for choice in output.outputs]


@pytest.fixture(scope="module")
def expected(tiny_dir):
    return tokens_of(LLM(str(tiny_dir)).generate(PROMPTS, PARAMS))


class _InOneProcess:
    """Runs the slices one after another on threads of one process and adds up what they hand in; the oracle of the sums."""

    def __init__(self, directory, size, dtype="float32"):
        self.models = [load_shard(directory, dtype, Shard(rank, size)).model for rank in range(size)]

    def logits(self, tokens):
        """Layer by layer: every slice's branch outputs are summed by hand."""
        positions = torch.arange(len(tokens))
        first = self.models[0]
        x, residual = first.embed(tokens), None
        attends = [causal_attention(m) for m in self.models]
        for layer in range(len(first.layers)):
            normed, residual = _norm(first.layers[layer].input_norm, x, residual)
            x = sum(
                m.layers[layer].attention(normed, m.rope(positions), a, None)
                for m, a in zip(self.models, attends, strict=True)
            )
            normed, residual = first.layers[layer].post_norm.add(x, residual)
            x = sum(m.layers[layer].mlp(normed) for m in self.models)
        return first.logits(first.norm.add(x, residual)[0])


def _norm(norm, x, residual):
    return (norm(x), x) if residual is None else norm.add(x, residual)


@pytest.mark.parametrize("overrides", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
def test_slices_add_up_to_the_model(overrides, tmp_path):
    directory = build_llama(tmp_path, **overrides)
    if overrides.get("attention_bias"):
        _fill_biases(directory)
    tokens = torch.tensor([5, 9, 300, 17, 44, 44, 2])
    whole = load_model(directory, torch.float32).model
    expected = whole.logits(whole(tokens, torch.arange(7), causal_attention(whole)))
    torch.testing.assert_close(_InOneProcess(directory, 2).logits(tokens), expected, atol=2e-4, rtol=1e-4)


def _fill_biases(directory):
    """Biases are zero in a fresh model; give them values, so that adding one twice shows."""
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in weights:
        if name.endswith(".bias"):
            weights[name] = torch.randn(weights[name].shape, generator=generator)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def test_two_processes_generate_the_same_tokens_with_and_without_trees(tiny_dir, tiny_draft_dir, expected):
    """Chunked prefill, preemption in a small pool, prefix cache, trees whose KV is moved: everything that touches the cache of the others."""
    config = [
        {"method": "sequoia", "draft": str(tiny_dir), "tree": [-1, -1, 0, 0, 1, 2], "auto": False},
        {"method": "specinfer", "draft": str(tiny_draft_dir), "expansion": [2, 2, 1], "auto": False},
        {"method": "suffix", "suffix_tree": True, "auto": False},
    ]
    per_token = 2 * 2 * 1 * 16 * 4  # layers x (keys, values) x heads of one process x width x float32
    llm = LLM(
        str(tiny_dir), tensor_parallel_size=2, block_size=4, max_num_batched_tokens=48, kv_cache_memory=130 * per_token,
        kv_offload_memory=80 * per_token,
        max_num_seqs=4, speculative_config=config,
    )  # fmt: skip
    core = llm.engine.core
    for method in ("none", "sequoia", "specinfer", "suffix", "none"):
        params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, speculative_method=method)
        assert tokens_of(llm.generate(PROMPTS, params)) == expected, method
    assert core.preemptions_total > 0 and core.runner.blocks.prefix_hits > 0
    assert core.runner.blocks.host_hits > 0
    core.runner.blocks.check_invariants()

    seeded = SamplingParams(
        temperature=0.8, top_p=0.9, seed=5, max_tokens=12, ignore_eos=True, speculative_method="none"
    )
    plain = SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=12, ignore_eos=True)
    assert tokens_of(llm.generate(PROMPTS, seeded)) == tokens_of(LLM(str(tiny_dir)).generate(PROMPTS, plain))

    team = core.runner.team
    processes = list(team._processes)
    os.kill(processes[0].pid, signal.SIGKILL)
    processes[0].wait()
    with pytest.raises(WagerError, match="tensor-parallel process"):
        llm.generate(PROMPTS[0], PARAMS)
    team.close()
    assert not team._processes


def test_processes_end_with_the_engine(tiny_dir):
    llm = LLM(str(tiny_dir), tensor_parallel_size=2)
    team = llm.engine.core.runner.team
    processes = list(team._processes)
    assert len(processes) == 1 and processes[0].poll() is None
    team.close()
    assert processes[0].poll() is not None and not team._processes


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"tensor_parallel_size": 3}, "3 does not divide the model's 4 attention heads"),
        ({"tensor_parallel_size": 4}, "4 does not divide the model's 2 key/value heads"),
        ({"tensor_parallel_size": 0}, "at least 1"),
        ({"tensor_parallel_size": 2, "offload_memory": "1MB"}, "offloaded weights"),
        ({"tensor_parallel_size": 2, "lora_modules": {"a": "x"}}, "adapters"),
    ],
)
def test_what_cannot_be_divided_is_refused(options, names, tiny_dir):
    with pytest.raises(UsageError, match=names):
        LLM(str(tiny_dir), **options)


def test_families_that_cannot_be_divided_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="gpt2"):
        load_shard(tmp_path, "auto", Shard(0, 2))
