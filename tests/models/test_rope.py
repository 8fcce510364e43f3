"""Every kind of rotary embedding against the functions of transformers, over many settings and positions."""

import pytest
import torch
import transformers as t
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from wager.errors import CheckpointError
from wager.models.config import rotary_dim
from wager.models.rope import Rope, RopeConfig

HEAD, LONGEST = 32, 512


def theirs(scaling, longest=LONGEST, head=HEAD, theta=10000.0, **config):
    return t.LlamaConfig(
        hidden_size=4 * head, num_attention_heads=4, head_dim=head, max_position_embeddings=longest,
        rope_parameters={"rope_theta": theta, **scaling}, **config,
    )  # fmt: skip


def check(scaling, longest=LONGEST, theta=10000.0, sequence=None):
    config = theirs(scaling, longest, theta=theta)
    rope = Rope(RopeConfig(HEAD, theta, scaling, longest))
    positions = torch.tensor([0, 1, 2, 7, longest // 3, (sequence or longest) - 1])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    ours = rope(positions)
    for mine, want in zip(ours, (cos, sin), strict=True):
        torch.testing.assert_close(mine, want[0, :, : HEAD // 2], atol=3e-5, rtol=1e-4)
    return rope


@given(theta=st.sampled_from([10000.0, 5e5, 1e6]))
def test_default(theta):
    check({"rope_type": "default"}, theta=theta)


@given(factor=st.floats(1.0, 16.0))
def test_linear(factor):
    check({"rope_type": "linear", "factor": factor})


@given(factor=st.floats(1.0, 8.0))
def test_dynamic_within_the_checkpoints_positions(factor):
    check({"rope_type": "dynamic", "factor": factor})


@given(
    factor=st.floats(1.5, 32.0),
    low=st.floats(0.5, 2.0),
    span=st.floats(0.5, 6.0),
    original=st.sampled_from([64, 256]),
    theta=st.sampled_from([10000.0, 5e5]),
)
def test_llama3(factor, low, span, original, theta):
    check(
        {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": low + span,
            "original_max_position_embeddings": original,
        },
        theta=theta,
    )


@given(
    factor=st.floats(1.0, 32.0), original=st.sampled_from([32, 128]), fast=st.sampled_from([None, 16, 32]), slow=st.sampled_from([None, 1, 2]),
    attention=st.sampled_from([None, 0.7, 1.3]), mscale=st.sampled_from([None, (1.0, 1.0), (0.7, 0.5)]), truncate=st.sampled_from([None, True, False]),
)  # fmt: skip
def test_yarn(factor, original, fast, slow, attention, mscale, truncate):
    given_ = {"beta_fast": fast, "beta_slow": slow, "attention_factor": attention, "truncate": truncate}
    if mscale:
        given_ |= {"mscale": mscale[0], "mscale_all_dim": mscale[1]}
    scaling = {k: v for k, v in given_.items() if v is not None}
    check({"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **scaling})


@given(
    original=st.sampled_from([64, 512]),
    factor=st.sampled_from([None, 4.0, 8.0]),
    attention=st.sampled_from([None, 1.1]),
    seed=st.integers(0, 99),
)
def test_longrope(original, factor, attention, seed):
    generator = torch.Generator().manual_seed(seed)
    tables = {
        name: (1 + 3 * torch.rand(HEAD // 2, generator=generator)).tolist() for name in ("short_factor", "long_factor")
    }
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": original, **tables}
    scaling |= {k: v for k, v in {"factor": factor, "attention_factor": attention}.items() if v is not None}
    config = theirs(scaling)
    config.original_max_position_embeddings = original
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=LONGEST)
    rope = Rope(RopeConfig(HEAD, 10000.0, scaling, LONGEST))
    positions = torch.tensor([3])
    torch.testing.assert_close(
        rope(positions)[0], (3 * frequencies[None]).cos() * attention_factor, atol=1e-5, rtol=1e-5
    )


def test_partial_rotation_turns_only_a_part():
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

    raw = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    config = t.GPTNeoXConfig(hidden_size=4 * HEAD, num_attention_heads=4, rope_parameters=raw)
    turned = rotary_dim({"rope_parameters": raw}, HEAD)
    positions = torch.tensor([0, 5, 90])
    cos, _ = GPTNeoXRotaryEmbedding(config)(torch.zeros(1), positions[None])
    ours = Rope(RopeConfig(turned, 10000.0))(positions)[0]
    assert turned == HEAD // 4 and ours.shape == (3, turned // 2)
    torch.testing.assert_close(ours, cos[0, :, : turned // 2], atol=1e-5, rtol=1e-5)


def test_the_old_name_of_the_type_and_none_are_understood():
    plain = Rope(RopeConfig(HEAD))(torch.arange(9))
    for scaling in ({"type": "linear", "factor": 1.0}, {"rope_type": None}, {}):
        torch.testing.assert_close(Rope(RopeConfig(HEAD, scaling=scaling))(torch.arange(9)), plain)


def test_angles_are_float32_accurate_far_out():
    """At position 100,000 an angle kept in half precision would be meaningless."""
    rope = Rope(RopeConfig(HEAD, 1e6, {}, 2**17)).to(torch.bfloat16)
    rope.rebuild()
    positions = torch.tensor([99_999])
    exact = positions.double()[:, None] / 1e6 ** (torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)
    assert (rope(positions)[0].double() - exact.cos()).abs().max() < 1e-2


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(
        CheckpointError, match="'spiral' is not supported; supported: default, dynamic, linear, llama3, longrope, yarn"
    ):
        Rope(RopeConfig(HEAD, scaling={"rope_type": "spiral"}))
