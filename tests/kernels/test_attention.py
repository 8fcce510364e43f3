"""Native attention: the same bits for any grouping of queries, heads and threads, and every variant against its definition in float64."""

import pytest
import torch
from torch import Tensor

from tests.kernels.ragged import ragged_starts
from wager.kernels import native
from wager.kernels.registry import choice, usual_mode

pytestmark = pytest.mark.skipif(choice().form != "native", reason="native kernels cannot be built here")
SIZE = 16


def made(
    seed, contexts, lengths, heads, kv_heads, key_dim, value_dim, dtype=torch.bfloat16, latent=False, magnitude=1.0
):
    """Arguments up to the scale, over pages in random order."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-(c + n) // SIZE) for c, n in zip(contexts, lengths, strict=True)]
    order, tables = torch.randperm(sum(counts), generator=generator).int(), torch.zeros(len(counts), max(counts)).int()
    for row, (first, count) in enumerate(zip(ragged_starts(counts).tolist(), counts, strict=False)):
        tables[row, :count] = order[first : first + count]
    k = (magnitude * torch.randn(sum(counts) * SIZE, kv_heads, key_dim, generator=generator)).to(dtype)
    v = k[..., :value_dim] if latent else torch.randn(*k.shape[:2], value_dim, generator=generator).to(dtype)
    q = torch.randn(sum(lengths), heads, key_dim, generator=generator)
    positions = torch.cat([torch.arange(c, c + n) for c, n in zip(contexts, lengths, strict=True)])
    contexts_R = torch.tensor(contexts, dtype=torch.int32)
    return q, k, v, tables, ragged_starts(lengths), contexts_R, positions, SIZE, key_dim**-0.5


def exact(q, k, v, tables, starts, contexts, positions, size, scale, window=None, softcap=None, sinks_H=None) -> Tensor:
    """The definition in float64, span by span; positions are cache indices here."""
    rows = []
    for r, (a, b) in enumerate(zip(starts.tolist(), starts.tolist()[1:], strict=False)):
        index = torch.arange(int(contexts[r]) + b - a)
        slots = tables[r].long()[index // size] * size + index % size
        group = q.shape[1] // k.shape[1]
        keys, values = (t[slots].double().repeat_interleave(group, 1) for t in (k, v))
        scores = torch.einsum("thk,shk->hts", q[a:b].double(), keys) * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        at = positions[a:b, None]
        scores[:, (index > at) | (index <= at - window if window else index < 0)] = -torch.inf
        extra = (
            scores.new_zeros(*scores.shape[:2], 0)
            if sinks_H is None
            else sinks_H.double()[:, None, None].expand(-1, b - a, 1)
        )
        weights = torch.cat((scores, extra), -1).softmax(-1)[..., : len(index)]
        rows.append(torch.einsum("hts,shv->thv", weights, values))
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_dim", "value_dim", "latent"),
    [(8, 8, 64, 64, False), (32, 8, 128, 128, False), (10, 2, 24, 40, False), (7, 1, 72, 16, False), (16, 1, 576, 512, True), (71, 1, 64, 64, False)],
)  # fmt: skip
@pytest.mark.parametrize("extra", [{}, {"window": 40}, {"softcap": 50.0}, {"sinks_H": True}])
def test_every_variant_equals_its_definition_in_float64(heads, kv_heads, key_dim, value_dim, latent, extra):
    arguments = made(1, [130, 0, 31, 1100], [1, 37, 3, 2], heads, kv_heads, key_dim, value_dim, latent=latent)
    extra = {**extra, "sinks_H": torch.linspace(-2, 2, heads)} if "sinks_H" in extra else extra
    got = native.paged_attention(*arguments, **extra)
    # where bfloat16 pairs are multiplied, queries and weights are sums of two bfloat16 numbers
    pairs = arguments[1].dtype == torch.bfloat16 and usual_mode(torch.bfloat16, torch.device("cpu")) is not None
    bound = 2e-5 if pairs else 4e-6
    torch.testing.assert_close(got.double(), exact(*arguments, **extra), atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(12, 4, 64), (8, 2, 128), (5, 5, 24)])
def test_one_token_at_a_time_has_the_bits_of_a_whole_prompt(dtype, heads, kv_heads, dim):
    """Few queries read the cache where it lies, many read a widened copy, in tiles of other shapes."""
    length = 90
    q, k, v, tables, *_ = made(2, [0], [length], heads, kv_heads, dim, dim, dtype)
    run = lambda a, b: native.paged_attention(
        q[a:b],
        k,
        v,
        tables,
        ragged_starts([b - a]),
        torch.tensor([a], dtype=torch.int32),
        torch.arange(a, b),
        SIZE,
        0.1,
    )
    whole = run(0, length)
    for step in (1, 2, 3, 7, 32):
        assert torch.equal(torch.cat([run(a, min(a + step, length)) for a in range(0, length, step)]), whole), step


def test_threads_and_neighbours_leave_no_trace():
    """How many heads an item takes depends on the batch and the threads; the result does not."""
    spans = [700, 40, 2100, 5, 64, 1023, 1024, 1025]
    arguments = made(3, spans, [1] * 8, 32, 8, 64, 64)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(native.paged_attention(*arguments))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    q, k, v, tables, _, contexts, positions, size, scale = arguments
    for i in range(8):
        alone = native.paged_attention(
            q[i : i + 1],
            k,
            v,
            tables[i : i + 1],
            ragged_starts([1]),
            contexts[i : i + 1],
            positions[i : i + 1],
            size,
            scale,
        )
        assert torch.equal(alone, results[0][i : i + 1]), i


def test_keys_that_a_query_does_not_see_do_not_matter():
    """Rows past the end of a request, and rows that the window hides, may hold anything finite."""
    arguments = made(4, [500], [20], 8, 2, 64, 64)
    want = native.paged_attention(*arguments, window=100)
    _, k, v, tables = arguments[:4]
    for key in [*range(0, 400), *range(520, tables.shape[1] * SIZE)]:
        slot = int(tables[0, key // SIZE]) * SIZE + key % SIZE
        k[slot], v[slot] = 1e30, -1e30
    assert torch.equal(native.paged_attention(*arguments, window=100), want)


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 30.0])
def test_softcap_is_exact_to_rounding_at_every_magnitude(magnitude):
    arguments = made(5, [200], [4], 4, 2, 64, 64, torch.float32, magnitude=magnitude)
    got = native.paged_attention(*arguments, softcap=30.0)
    assert (got - exact(*arguments, softcap=30.0)).abs().max() < 2e-5


def test_a_request_with_nan_does_not_touch_the_next():
    """Leftovers of an earlier block lie behind a short one."""
    bad, good = (made(seed, [70], [20], 8, 2, 24, 24) for seed in (6, 7))
    short = made(8, [0], [3], 8, 2, 24, 24)
    want = [native.paged_attention(*arguments) for arguments in (good, short)]
    bad[1].fill_(torch.nan)
    for expected, arguments in zip(want, (good, short), strict=True):
        native.paged_attention(*bad)
        assert torch.equal(native.paged_attention(*arguments), expected)
