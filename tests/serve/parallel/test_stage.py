"""A model cut into stages computes the bits of the whole model, in every family; stages share nothing and go on over old memory."""

import numpy as np
import pytest
import torch

from tests.models.families import build
from wager import kernels
from wager.errors import UsageError
from wager.models.loader import load_model
from wager.serve.cache.block_manager import BlockManager
from wager.serve.cache.pool import KVPool, groups_for
from wager.serve.parallel.pipeline import deal
from wager.serve.parallel.stage import DONE_STEP, WEIGHTS_READY, Stage, StageSpec, batch_arrays, batch_from
from wager.serve.parallel.wire import PACKET_BYTES, pack, unpack
from wager.serve.runner import ModelRunner, SpanInput

CASES = [
    "llama-llama3",
    "mistral-window",
    "qwen2-tied",
    "qwen3-moe",
    "gemma3",
    "gpt2",
    "gpt-neox",
    "deepseek-v3",
    "olmo2",
    "phi3",
]
BLOCKS, BLOCK = 12, 4


def spans(lengths, contexts):
    rng = np.random.default_rng(0)
    return [
        SpanInput(f"s{i}", rng.integers(0, 200, n).tolist(), c, None, 1)
        for i, (n, c) in enumerate(zip(lengths, contexts, strict=True))
    ]


@pytest.mark.parametrize("name", CASES)
def test_a_chain_of_stages_is_the_model(name, tmp_path):
    build(name, tmp_path)
    loaded = load_model(tmp_path)
    model = loaded.model.requires_grad_(False)
    layers = len(model.attention)
    groups = groups_for(model.attention)
    blocks = BlockManager(groups, BLOCKS, BLOCK)
    model.prepack(kernels.usual_mode(loaded.model.dtype, torch.device("cpu")))
    runner = ModelRunner(model, KVPool(model.attention, groups, BLOCKS, BLOCK, loaded.model.dtype), blocks)
    bounds = [(l, l + 1) for l in range(layers)]
    stages = []
    for first, last in bounds:
        spec = StageSpec(str(tmp_path), first, last, BLOCKS, BLOCK, quantization=None)
        stage = Stage(spec, torch.zeros(Stage(spec).bytes_needed, dtype=torch.uint8))
        assert stage.load() == "disk"
        stages.append(stage)
    for length, context in (([7, 3], [0, 0]), ([1, 2], [7, 3])):
        inputs = spans(length, context)
        for one in inputs:
            if not context[0]:
                blocks.start(one.seq, one.tokens + [0] * 8)
            assert blocks.reserve(one.seq, one.context + one.length)
        batch = runner.build(inputs)
        expected = runner.logits(runner.forward(batch), batch.logit_rows_L)
        for again in range(2):  # a step that was cut short is repeated as a whole
            sent = None
            for stage in stages[: None if again else -1]:
                head, arrays = unpack(pack(*batch_arrays(batch)))
                sent = stage.forward(batch_from(head, arrays), sent)
        assert torch.equal(stages[-1].logits(sent, batch.logit_rows_L), expected)
    whole = sum(p.numel() for p in load_model(tmp_path).model.parameters())
    assert all(sum(p.numel() for p in _empty(s).parameters()) < whole for s in stages)


def _empty(stage):
    return Stage(stage.spec).model


def test_a_new_stage_over_old_memory_goes_on(tiny_dir):
    spec = StageSpec(str(tiny_dir), 0, 1, BLOCKS, BLOCK)
    memory = torch.zeros(Stage(spec).bytes_needed, dtype=torch.uint8)
    first = Stage(spec, memory)
    assert first.load() == "disk" and int(first.ledger[WEIGHTS_READY]) == 1
    first.pool.k[0][5] = 3.0
    first.begin(4, [])
    first.done(4)
    again = Stage(spec, memory)
    assert again.load() == "memory" and int(again.ledger[DONE_STEP]) == 4
    assert torch.equal(again.pool.k[0], first.pool.k[0]) and torch.equal(again.weights, first.weights)


def test_copies_of_a_step_are_made_once(tiny_dir):
    """When a step is repeated the source of a copy may hold another request's keys already."""
    spec = StageSpec(str(tiny_dir), 0, 1, BLOCKS, BLOCK)
    stage = Stage(spec, torch.zeros(Stage(spec).bytes_needed, dtype=torch.uint8))
    stage.pool.k[0][:BLOCK] = 1.0
    stage.begin(1, [(0, 0, 2)])
    stage.pool.k[0][:BLOCK] = 9.0
    stage.begin(1, [(0, 0, 2)])
    assert (stage.pool.k[0][2 * BLOCK : 3 * BLOCK] == 1.0).all()
    stage.begin(2, [(0, 0, 2)])
    assert (stage.pool.k[0][2 * BLOCK : 3 * BLOCK] == 9.0).all()


def test_wrong_stages_are_refused(tiny_dir):
    with pytest.raises(UsageError, match="no range"):
        Stage(StageSpec(str(tiny_dir), 1, 99, BLOCKS))
    spec = StageSpec(str(tiny_dir), 0, 1, BLOCKS)
    with pytest.raises(UsageError, match="does not fit"):
        Stage(spec, torch.zeros(64, dtype=torch.uint8))


def test_messages_of_any_size_arrive_as_they_were():
    rng = np.random.default_rng(0)
    for count in (0, 1, 5, PACKET_BYTES // 8, PACKET_BYTES):
        arrays = [rng.integers(0, 9, count), rng.random((2, count)).astype(np.float32), np.zeros((0, 3), np.int32)]
        head, back = unpack(pack({"op": "run", "n": count}, arrays))
        assert head == {"op": "run", "n": count}
        assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(arrays, back, strict=True))


def test_dealing_keeps_order_and_balances():
    inputs = spans([50, 1, 1, 1, 40, 7, 1], [0] * 7)
    for count in (1, 2, 3, 20):
        runs = deal(inputs, count)
        assert [s for run in runs for s in run] == inputs and all(runs) and len(runs) <= count
    assert len(deal(spans([1] * 8, [5] * 8), 2)[0]) == 4
