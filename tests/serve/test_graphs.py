"""Buckets of decode graphs, without a GPU: a recording that runs the real model over kept buffers stands in for the CUDA capture."""

import numpy as np
import pytest
import torch

from wager.serve.batch import Batch, KVTables, Span
from wager.serve.graphs import BUCKETS, DecodeGraphs, Recording, bucket_of, padded, qualifies, width_bucket


def decode_batch(rows, width=3):
    generator = torch.Generator().manual_seed(rows)
    tables = torch.randint(1, 9, (rows, width), generator=generator, dtype=torch.int32)
    contexts = torch.arange(rows, dtype=torch.int32)
    return Batch(
        tuple(Span(str(i), i, 1, i) for i in range(rows)), torch.arange(rows) + 5, contexts.long(),
        torch.arange(rows + 1, dtype=torch.int32), contexts, (KVTables(torch.arange(rows), tables),), torch.arange(rows),
    )  # fmt: skip


def test_buckets():
    assert [bucket_of(n) for n in (1, 3, 8, 9, 17, 256)] == [1, 4, 8, 16, 32, 256]
    assert bucket_of(257) is None and list(BUCKETS) == sorted(set(BUCKETS))
    assert [width_bucket(n) for n in (1, 2, 3, 5, 64, 65)] == [1, 2, 4, 8, 64, 128]


def test_what_qualifies():
    from dataclasses import replace

    batch = decode_batch(3)
    assert qualifies(batch)
    assert not qualifies(replace(batch, mask_TP=torch.zeros(3, 1, dtype=torch.int64)))
    assert not qualifies(replace(batch, spans=batch.spans[:2])), "a span of two tokens"
    assert not qualifies(replace(batch, adapters=object())) and not qualifies(decode_batch(300))


def test_padding_writes_nothing_and_reads_block_zero():
    whole = padded(decode_batch(3), 4)
    group = whole.groups[0]
    assert whole.num_tokens == 4 and whole.span_starts.tolist() == [0, 1, 2, 3, 4]
    assert group.slots_T.tolist() == [0, 1, 2, -1] and group.tables_RB.shape == (4, 4)
    assert (group.tables_RB[3] == 0).all() and (group.tables_RB[:3, 3] == -1).all() and whole.contexts_R[3] == 0


def test_recordings_are_made_once_a_bucket_and_replays_see_new_values():
    made, calls = [], []

    def forward(batch):
        calls.append(batch.num_tokens)
        return (batch.tokens_T * 10 + batch.contexts_R)[:, None].float()

    def record(function, batch):
        kept = torch.empty(batch.num_tokens, 1)
        made.append(batch.num_tokens)
        return Recording(batch, kept, lambda: kept.copy_(function(batch)))

    graphs = DecodeGraphs(forward, record)
    for rows in (3, 4, 3, 9, 2, 10):
        batch = decode_batch(rows)
        assert torch.equal(graphs(batch), forward(batch)), rows
    assert made == [4, 16, 2]
    graphs(decode_batch(3, width=5))
    assert made == [4, 16, 2, 4], "a wider table is another graph"
    big = decode_batch(300)
    assert graphs(big).shape == (300, 1) and made == [4, 16, 2, 4], "what does not fit runs without"


@pytest.mark.parametrize("rows", [1, 3])
def test_the_model_gives_the_same_hidden_rows(rows):
    """The engine's own attention over a real pool, padded and not."""
    from wager import kernels

    generator = torch.Generator().manual_seed(0)
    k_pool, v_pool = (torch.randn(64, 2, 16, generator=generator) for _ in range(2))
    q, k, v = (torch.randn(4, h, 16, generator=generator) for h in (4, 2, 2))
    pools = []

    def forward(batch):
        own = (k_pool.clone(), v_pool.clone())
        pools.append(own)
        n, group = batch.num_tokens, batch.groups[0]
        new = (k[:n], v[:n], group.slots_T)
        return kernels.paged_attention(
            q[:n], *own, group.tables_RB, batch.span_starts, batch.contexts_R, batch.positions_T, 4, 0.25, new=new
        )

    batch = decode_batch(rows)
    whole = padded(batch, bucket_of(rows) or 0)
    got, want = forward(whole)[:rows], forward(batch)
    assert torch.equal(got, want) and all(np.array_equal(a, b) for a, b in zip(*pools, strict=True))
