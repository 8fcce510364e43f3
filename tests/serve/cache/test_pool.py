"""The pools move rows where the tables say, in every layer of a group and no other."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wager.models.base import AttentionSpec
from wager.serve.cache.pool import KVPool, groups_for

SPECS = (
    AttentionSpec(4, 2, 8, 6, 1.0),
    AttentionSpec(4, 1, 8, 8, 1.0, window=16),
    AttentionSpec(4, 1, 12, 10, 1.0, value_from_key=True),
)
GROUPS = groups_for(SPECS)


def filled(dtype=torch.float32, num_blocks=(7, 5), block_size=4):
    pool = KVPool(SPECS, GROUPS, num_blocks, block_size, dtype)
    generator = torch.Generator().manual_seed(1)
    for group in range(len(GROUPS)):
        for tensor in pool.tensors(group):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return pool


def snapshot(pool):
    return [[t.clone() for t in pool.tensors(g)] for g in range(len(GROUPS))]


def test_layers_group_by_window_and_latent_layers_keep_no_values():
    assert [(g.layers, g.window) for g in GROUPS] == [((0, 2), None), ((1,), 16)]
    pool = filled()
    assert pool.k[0].shape == (28, 2, 8) and pool.v[0].shape == (28, 2, 6)
    assert pool.k[1].shape == (20, 1, 8) and pool.v[2] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_per_block_is_what_the_pools_take(dtype):
    pool = KVPool(SPECS, GROUPS, 3, 4, dtype)
    total = sum(t.numel() * t.element_size() for g in range(len(GROUPS)) for t in pool.tensors(g))
    assert total == 3 * KVPool.bytes_per_block(SPECS, 4, dtype)


def test_pools_start_at_zero():
    pool = KVPool(SPECS, GROUPS, 3, 4, torch.bfloat16)
    assert all(not t.any() for g in range(len(GROUPS)) for t in pool.tensors(g))


@given(data=st.data(), tokens=st.integers(1, 16), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_export_and_import_carry_a_sequence_between_pools(data, tokens, dtype):
    source, target = filled(dtype), KVPool(SPECS, GROUPS, (9, 6), 2, dtype)
    from_tables = [np.array(data.draw(st.permutations(range(n)))[:4]) for n in (7, 5)]
    to_tables = [np.array(data.draw(st.permutations(range(n)))) for n in (9, 6)]
    tokens = min(tokens, 12)  # six blocks of two
    rows = source.export(from_tables, tokens)
    assert set(rows) == {"layers.0.k", "layers.0.v", "layers.1.k", "layers.1.v", "layers.2.k"}
    target.import_(rows, to_tables, tokens)
    for g, group in enumerate(GROUPS):
        for layer in group.layers:
            for before, after in ((source.k[layer], target.k[layer]), (source.v[layer], target.v[layer])):
                if before is None:
                    continue
                for position in range(tokens):
                    old = from_tables[g][position // 4] * 4 + position % 4
                    new = to_tables[g][position // 2] * 2 + position % 2
                    assert torch.equal(before[old], after[new])
    untouched = sorted(set(range(18)) - {int(to_tables[0][p // 2] * 2 + p % 2) for p in range(tokens)})
    assert not target.k[0][untouched].any()


def test_an_export_is_a_copy_and_survives_a_file(tmp_path):
    from safetensors.torch import load_file, save_file

    pool = filled()
    tables = [np.array([2, 0, 5]), np.array([1, 4, 0])]
    rows = pool.export(tables, 9)
    save_file(rows, tmp_path / "kv.safetensors")
    before = {name: row.clone() for name, row in rows.items()}
    for g in range(2):
        for tensor in pool.tensors(g):
            tensor.zero_()
    pool.import_(load_file(tmp_path / "kv.safetensors"), tables, 9)
    after = pool.export(tables, 9)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_block_copies_are_made_in_order_and_stay_in_their_group():
    pool = filled()
    before = snapshot(pool)
    pool.copy_blocks([(0, 1, 3), (0, 3, 5), (1, 0, 2)])
    for old, new in zip(before[0], pool.tensors(0), strict=True):
        assert torch.equal(new[12:16], old[4:8]) and torch.equal(new[20:24], old[4:8])
        kept = [s for s in range(28) if s // 4 not in (3, 5)]
        assert torch.equal(new[kept], old[kept])
    for old, new in zip(before[1], pool.tensors(1), strict=True):
        assert torch.equal(new[8:12], old[0:4]) and torch.equal(new[:8], old[:8])


def test_blocks_go_behind_the_pool_and_come_back():
    specs = (AttentionSpec(2, 2, 8, 8, 1.0), AttentionSpec(2, 1, 8, 8, 1.0, window=4))
    pool = KVPool(specs, groups_for(specs), [5, 3], 4, torch.float32, num_host_blocks=[2, 1])
    for tensor in pool.tensors(0) + pool.tensors(1):
        tensor.normal_()
    before = [[t.clone() for t in pool.tensors(g)] for g in range(2)]
    pool.copy_blocks([(0, 3, 6), (1, 2, 3), (0, 0, 3), (0, 6, 1), (1, 3, 0)])
    for old, new in zip(before[0], pool.tensors(0), strict=True):
        assert torch.equal(new[4:8], old[12:16]) and torch.equal(new[12:16], old[0:4])
    for old, new in zip(before[1], pool.tensors(1), strict=True):
        assert torch.equal(new[0:4], old[8:12]) and torch.equal(new[4:], old[4:])


def test_moves_read_everything_before_they_write():
    pool = filled()
    before = snapshot(pool)
    pool.move(0, torch.tensor([4, 5, 6]), torch.tensor([3, 4, 5]))
    for old, new in zip(before[0], pool.tensors(0), strict=True):
        assert torch.equal(new[3:6], old[4:7])
        assert torch.equal(new[6:], old[6:]) and torch.equal(new[:3], old[:3])
    for old, new in zip(before[1], pool.tensors(1), strict=True):
        assert torch.equal(new, old)
