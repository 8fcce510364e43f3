"""The Triton forms against the reference: on a GPU where there is one, else in a process of their own under Triton's interpreter."""

import pytest
import torch

from tests.interpreter import DEVICE, inside, outside, run_inside


@outside
def test_under_the_interpreter():
    run_inside(__file__)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@inside
def test_norms_gates_and_rotation():
    from wager.kernels import reference, triton_forms

    for rows, width in ((0, 8), (3, 8), (5, 100)):
        x, residual, weight = randn(1, rows, width), randn(2, rows, width), randn(3, width)
        torch.testing.assert_close(
            triton_forms.rms_norm(x, weight, 1e-5, 1.0), reference.rms_norm(x, weight, 1e-5, 1.0)
        )
        got, want = (form.rms_norm_residual(x, residual, weight, 1e-5) for form in (triton_forms, reference))
        torch.testing.assert_close(got, want)
        wide = 3 * randn(4, rows, 2 * width)
        for name in ("silu_mul", "gelu_tanh_mul"):
            torch.testing.assert_close(
                getattr(triton_forms, name)(wide), getattr(reference, name)(wide), atol=1e-5, rtol=1e-5
            )
    x, angles = randn(5, 7, 10, 24)[:, 2:5], randn(6, 7, 8)
    for interleaved in (False, True):
        got, want = (form.apply_rope(x, angles.cos(), angles.sin(), interleaved) for form in (triton_forms, reference))
        torch.testing.assert_close(got, want)


@inside
def test_writes():
    from wager.kernels import reference, triton_forms

    # values that bfloat16 holds: the interpreter truncates where a GPU rounds to nearest
    new, slots = randn(7, 6, 2, 16).bfloat16().float(), torch.tensor([3, -1, 0, 9, 5, -1], device=DEVICE)
    pools = [torch.zeros(12, 2, 16, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    for form, pool in zip((triton_forms, reference), pools, strict=True):
        form.write_kv(new, pool, slots)
    assert torch.equal(*pools)


@inside
@pytest.mark.parametrize("mode", [None, "int8", "int4", "nf4", "w8a8", "w4a8", "w16a16"])
@pytest.mark.parametrize("rows,inputs,outputs", [(1, 64, 64), (5, 96, 40), (20, 130, 70)])
def test_linears(mode, rows, inputs, outputs):
    from wager.kernels import triton_forms
    from wager.kernels.registry import ReferenceLinear

    x, weight, bias = randn(0, rows, inputs), randn(1, outputs, inputs) * 0.2, randn(2, outputs)
    got = triton_forms.TritonLinear(weight, bias, mode)(x)
    torch.testing.assert_close(got, ReferenceLinear(weight, bias, mode)(x), atol=2e-4, rtol=2e-4)


@inside
@pytest.mark.parametrize("mode", [None, "int8", "int4", "nf4", "w8a8", "w4a8", "w16a16"])
@pytest.mark.parametrize("inputs,outputs", [(64, 64), (96, 36), (130, 70), (2048, 6)])
def test_one_token_takes_norm_gate_and_residual_along(mode, inputs, outputs):
    from wager.kernels import reference, triton_forms
    from wager.kernels.fused import Norm
    from wager.kernels.registry import ReferenceLinear

    x, weight, bias, norm = randn(0, 1, inputs), randn(1, outputs, inputs) * 0.2, randn(2, outputs), randn(3, inputs)
    close = dict(atol=5e-4, rtol=2e-4)
    for b in (None, bias):
        linear, plain = triton_forms.TritonLinear(weight, b, mode), ReferenceLinear(weight, b, mode)
        normed = reference.rms_norm(x, norm, 1e-5, 1.0)
        torch.testing.assert_close(linear(x), plain(x), **close)
        torch.testing.assert_close(linear.add(x, randn(4, 1, outputs)), plain.add(x, randn(4, 1, outputs)), **close)
        torch.testing.assert_close(linear.normed(x, Norm(norm, 1e-5, 1.0)), plain(normed), **close)
        for activation in ("silu", "gelu_tanh"):
            torch.testing.assert_close(linear.gated(x, activation), plain.gated(x, activation), **close)
            got = linear.normed(x, Norm(norm, 1e-5, 1.0), activation)
            torch.testing.assert_close(got, plain.gated(normed, activation), **close)
            many = torch.cat((x, 2 * x))
            got = linear.normed(many, Norm(norm, 1e-5, 1.0), activation)
            torch.testing.assert_close(got[:1], plain.gated(normed, activation), **close)


@inside
@pytest.mark.parametrize("mode", [None, "int8", "int4"])
@pytest.mark.parametrize("tile", [(1, 64, 1), (4, 128, 3), (16, 256, 1)])
def test_every_cut_gives_the_same_product(mode, tile):
    from wager.kernels import triton_forms
    from wager.kernels.registry import ReferenceLinear
    from wager.kernels.triton_tiles import Tile

    outputs, inputs, stages = tile
    x, weight = randn(0, 5, 200), randn(1, 37, 200) * 0.2
    linear, want = triton_forms.TritonLinear(weight, None, mode), ReferenceLinear(weight, None, mode)(x)
    got = linear._one(x[:1], tile=Tile(outputs, inputs, 4, stages))
    torch.testing.assert_close(got, want[:1], atol=2e-4, rtol=2e-4)
    got = linear._many(x, Tile(max(16, outputs), inputs, 4, stages))
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


@inside
def test_a_block_of_one_token():
    """The fused block against its operators one by one, twice in a row: the stream it returns has everything added."""
    from wager.kernels import reference, triton_forms
    from wager.kernels.fused import Norm

    weights = [randn(i, *shape) * 0.2 for i, shape in enumerate(((48, 32), (32, 32), (64, 32), (32, 32)))]
    norms = [Norm(randn(9 + i, 32), 1e-5) for i in range(2)]
    qkv, output, gate_up, down = (triton_forms.TritonLinear(w, None) for w in weights)
    block = triton_forms.one_token_block(norms[0], qkv, output, norms[1], gate_up, down, "silu")
    assert triton_forms.one_token_block(norms[0], qkv, None, norms[1], gate_up, down, "silu") is None
    stream = want = randn(20, 1, 32)
    for _ in range(2):
        normed = reference.rms_norm(want, norms[0].weight_D, 1e-5)
        torch.testing.assert_close(block.inputs(stream), normed @ weights[0].T, atol=1e-4, rtol=1e-4)
        attended = (normed @ weights[0].T)[:, :32]
        stream = block.outputs(attended, stream)
        want = want + attended @ weights[1].T
        inner = reference.silu_mul(reference.rms_norm(want, norms[1].weight_D, 1e-5) @ weights[2].T)
        want = want + inner @ weights[3].T
        torch.testing.assert_close(stream, want, atol=1e-4, rtol=1e-4)


@inside
def test_llama_over_one_token_is_llama_over_several():
    """A whole model whose linears are packed for Triton: its fused block against the plain one."""
    from wager.kernels import triton_forms
    from wager.kernels.fused import Norm
    from wager.models.attend import causal_attention
    from wager.models.loader import build_model

    raw = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    model, token = build_model(raw, std=0.2).to(DEVICE), torch.tensor([7], device=DEVICE)
    attend = causal_attention(model)
    with torch.inference_mode():
        want = model(token, torch.zeros_like(token), attend)
        for block in model.layers:
            a, mlp = block.attention, block.mlp
            linears = [triton_forms.TritonLinear(m.weight, None) for m in (a.qkv, a.output, mlp.gate_up, mlp.down)]
            norms = [Norm(m.weight, m.eps, m.offset) for m in (block.input_norm, block.post_norm)]
            whole = triton_forms.one_token_block(norms[0], *linears[:2], norms[1], *linears[2:], "silu")
            block.of_one_token = lambda x_TD, whole=whole: whole
        got = model(token, torch.zeros_like(token), attend)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@inside
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("latent", [False, True])
def test_attention(window, tree, sinks, latent):
    from tests.kernels.test_native import build
    from wager.kernels import reference, triton_forms

    case = dict(
        spans=[(40, 1), (0, 5), (13, 7)], heads=6, kv_heads=2, key_dim=20, value_dim=12, block_size=4, window=window,
        softcap=5.0 if tree else None, dtype=torch.float32, latent=latent, tree=tree, seed=3,
    )  # fmt: skip
    arguments = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in build(case)]
    sink = randn(5, 6) if sinks else None
    got, want = (form.paged_attention(*arguments, sink) for form in (triton_forms, reference))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@inside
def test_long_contexts_are_cut_and_combined(monkeypatch):
    from tests.kernels.test_native import build
    from wager.kernels import reference, triton_attention

    monkeypatch.setattr(triton_attention, "PIECE", 64)
    case = dict(
        spans=[(200, 1), (60, 9), (0, 3)], heads=4, kv_heads=2, key_dim=16, value_dim=16, block_size=16, softcap=None,
        dtype=torch.float32, latent=False, tree=False, seed=3,
    )  # fmt: skip
    cuts = []
    cut = triton_attention.cut
    monkeypatch.setattr(triton_attention, "cut", lambda *a: cuts.append(cut(*a)) or cuts[-1])
    for window in (None, 70):
        arguments = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in build({**case, "window": window})]
        got, want = (form.paged_attention(*arguments, randn(1, 4)) for form in (triton_attention, reference))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert all(pieces > 1 and pieces * keys >= 208 for pieces, keys in cuts)


@inside
def test_keys_are_cut_to_fill_the_device_and_no_further():
    from wager.kernels.triton_attention import KEYS, PIECE, PROGRAMS, cut

    cpu = torch.device("cpu")
    assert cut(8, 200, cpu)[0] == 1 and cut(512, 8192, cpu)[0] == 1
    for rows, most in ((8, 8192), (8, 131072), (3, 5000), (100, 3000)):
        pieces, keys = cut(rows, most, cpu)
        assert keys % KEYS == 0 and (pieces - 1) * keys < most <= pieces * keys
        assert pieces <= -(-most // PIECE) and rows * (pieces - 1) < PROGRAMS * 132


@inside
@pytest.mark.parametrize("window", [None, 4])
def test_a_grown_tree_sees_cached_rows_beyond_its_own_length(window):
    """Two new nodes below five cached tree rows: mask bits reach further than the span is long, and past its own last bit nothing is read."""
    from wager.kernels import reference, triton_forms

    k, v, q = randn(0, 32, 2, 16), randn(1, 32, 2, 16), randn(2, 2, 4, 16)
    k[12:], v[12:] = torch.nan, torch.nan
    arguments = (
        q, k, v, torch.tensor([[0, 1, 2, -1]], dtype=torch.int32, device=DEVICE), torch.tensor([0, 2], dtype=torch.int32, device=DEVICE),
        torch.tensor([5], dtype=torch.int32, device=DEVICE), torch.tensor([7, 8], device=DEVICE), 4, 0.25, window, None,
        torch.tensor([[0b0100101], [0b1100101]], device=DEVICE),
    )  # fmt: skip
    got, want = (form.paged_attention(*arguments) for form in (triton_forms, reference))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@inside
def test_layer_norm_rope_write_and_embedding():
    from wager.kernels import reference, triton_forms

    for rows, width in ((0, 8), (3, 37)):
        x, residual, weight, bias = randn(1, rows, width), randn(2, rows, width), randn(3, width), randn(4, width)
        for b in (None, bias):
            got, want = (f.layer_norm_residual(x, residual, weight, b, 1e-5) for f in (triton_forms, reference))
            torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
            got, want = (f.layer_norm(x, weight, b, 1e-5) for f in (triton_forms, reference))
            torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    q, k, v = randn(5, 5, 10 * 24).view(5, 10, 24).split((6, 2, 2), dim=1)
    angles, slots, made = randn(6, 5, 8), torch.tensor([3, -1, 0, 9, 5], device=DEVICE), []
    for form in (triton_forms, reference):
        pools = [torch.zeros(12, 2, 24, device=DEVICE) for _ in range(2)]
        made.append((form.rope_write(q, k, v, angles.cos(), angles.sin(), *pools, slots), *pools))
    for got, want in zip(*made, strict=True):
        torch.testing.assert_close(got, want)
    table, ids = randn(7, 20, 24), torch.tensor([0, 19, 3], device=DEVICE)
    torch.testing.assert_close(triton_forms.embedding(ids, table), table[ids])


@inside
def test_sort_and_reduce():
    from wager.kernels import reference, triton_forms

    generator = torch.Generator().manual_seed(0)
    for n, top in ((0, 5), (1, 5), (300, 7), (500, 100_000)):
        keys = (torch.randint(top, (n,), generator=generator) - 3).to(DEVICE)
        assert torch.equal(triton_forms.sort_by_key(keys), reference.sort_by_key(keys))
    keys, values = torch.randint(7, (100,), generator=generator).to(DEVICE), randn(1, 100, 24)
    order = reference.sort_by_key(keys)
    starts = reference.segment_starts(keys[order], 9)
    for mode in ("sum", "mean", "max"):
        got, want = (f.segment_reduce(values, starts, mode, order) for f in (triton_forms, reference))
        torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)


@inside
@pytest.mark.parametrize("mode", [None, "int8", "int4", "nf4"])
def test_experts(mode):
    from wager.kernels import reference, triton_forms

    pairs = [
        (
            triton_forms.TritonLinear(randn(2 * e, 64, 64), None, mode),
            triton_forms.TritonLinear(randn(2 * e + 1, 64, 32), None, mode),
        )
        for e in range(4)
    ]
    x, start = randn(90, 21, 64), randn(91, 21, 64)
    weights, chosen = randn(92, 21, 4).softmax(-1).topk(2)
    want = reference.experts(x, weights, chosen, start, [lambda y, p=p: p[1](p[0].gated(y, "silu")) for p in pairs])
    got = triton_forms.pack_experts(pairs, "silu")(x, weights, chosen, start)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-4)
    assert triton_forms.pack_experts([(None, None)], "silu") is None


@inside
def test_sampling():
    from tests.kernels.test_data_operators import ROWS, columns
    from wager.kernels import reference, triton_forms

    generator = torch.Generator().manual_seed(1)
    settings = [c.to(DEVICE) for c in columns()]
    for logits in (3 * randn(0, len(ROWS), 300), (3 * randn(1, len(ROWS), 300)).round()):
        got, want = (form.likely_weights(logits, *settings) for form in (triton_forms, reference))
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
        assert torch.equal(got > 0, want > 0)
        uniforms = torch.rand(len(ROWS), generator=generator, dtype=torch.float64).to(DEVICE)
        got, want = (form.sample(logits, *settings, uniforms) for form in (triton_forms, reference))
        assert torch.equal(got, want)
        seeds, positions = (
            torch.randint(-(2**62), 2**62, (len(ROWS),), generator=generator).to(DEVICE) for _ in range(2)
        )
        got, want = (form.race(logits, *settings, seeds, positions) for form in (triton_forms, reference))
        assert torch.equal(got, want)
    counts, prompt = torch.zeros(2, 50, device=DEVICE), torch.zeros(2, 50, dtype=torch.bool, device=DEVICE)
    counts[0, 3], counts[1, 4], prompt[1, 7] = 1, 2, True
    penalties = [torch.tensor(v, device=DEVICE) for v in ([1.0, 1.3], [0.5, 0.0], [0.2, -0.3])]
    got, want = (form.penalise(logits[:2, :50], counts, prompt, *penalties) for form in (triton_forms, reference))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
