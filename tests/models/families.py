"""Tiny random configurations of every family, three each, as `transformers` defines them."""

import torch
import transformers as t

BASE = dict(
    vocab_size=211, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.5, 2.0, 2.5, 4.0],
    "short_factor": [1.0, 1.1, 1.2, 1.3],
}
MLA = dict(
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=12,
    num_key_value_heads=4,
    n_shared_experts=1,
    moe_intermediate_size=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    num_hidden_layers=3,
)


def _with(cls, **overrides):
    return lambda: cls(**{**BASE, **overrides})


CASES = {
    "llama-llama3": _with(t.LlamaConfig, rope_parameters=LLAMA3, head_dim=16, tie_word_embeddings=True),
    "llama-linear": _with(t.LlamaConfig, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}, attention_bias=True, mlp_bias=True),
    "llama-yarn": _with(t.LlamaConfig, rope_parameters=YARN, num_key_value_heads=1),
    "llama-dynamic": _with(t.LlamaConfig, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, num_key_value_heads=4),
    "mistral-window": _with(t.MistralConfig, sliding_window=24),
    "mistral-full": _with(t.MistralConfig, sliding_window=None, head_dim=16, num_key_value_heads=4),
    "mistral-narrow": _with(t.MistralConfig, sliding_window=3, tie_word_embeddings=True, num_key_value_heads=1),
    "qwen2-tied": _with(t.Qwen2Config, tie_word_embeddings=True),
    "qwen2-window": _with(t.Qwen2Config, use_sliding_window=True, sliding_window=16, max_window_layers=1),
    "qwen2-mha": _with(t.Qwen2Config, num_key_value_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen3": _with(t.Qwen3Config, head_dim=16),
    "qwen3-tied": _with(t.Qwen3Config, head_dim=8, tie_word_embeddings=True, num_key_value_heads=1),
    "qwen3-yarn": _with(t.Qwen3Config, head_dim=8, rope_parameters=YARN),
    "qwen3-moe": _with(t.Qwen3MoeConfig, head_dim=8, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True),
    "qwen3-moe-dense-layers": _with(t.Qwen3MoeConfig, head_dim=16, num_experts=4, num_experts_per_tok=3, moe_intermediate_size=24, mlp_only_layers=[0]),
    "qwen3-moe-tied": _with(t.Qwen3MoeConfig, head_dim=8, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=16, tie_word_embeddings=True),
    "mixtral": _with(t.MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
    "mixtral-window": _with(t.MixtralConfig, num_local_experts=3, num_experts_per_tok=1, sliding_window=16, num_key_value_heads=4),
    "mixtral-tied": _with(t.MixtralConfig, num_local_experts=5, num_experts_per_tok=3, tie_word_embeddings=True),
    "gemma2": _with(t.Gemma2Config, head_dim=8, sliding_window=16, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, query_pre_attn_scalar=8),
    "gemma2-wide-heads": _with(t.Gemma2Config, head_dim=16, sliding_window=8, query_pre_attn_scalar=32, num_key_value_heads=1),
    "gemma2-four-layers": _with(t.Gemma2Config, head_dim=8, sliding_window=5, num_hidden_layers=4, num_key_value_heads=4),
    "gemma3": _with(t.Gemma3TextConfig, head_dim=8, sliding_window=16, num_hidden_layers=4, layer_types=["sliding_attention"] * 3 + ["full_attention"]),
    "gemma3-linear": _with(t.Gemma3TextConfig, head_dim=16, sliding_window=8, layer_types=["full_attention", "sliding_attention"], rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    "gemma3-narrow": _with(t.Gemma3TextConfig, head_dim=8, sliding_window=4, num_key_value_heads=1, query_pre_attn_scalar=8),
    "phi3": _with(t.Phi3Config),
    "phi3-longrope": _with(t.Phi3Config, rope_parameters=LONG, original_max_position_embeddings=16),
    "phi3-partial": _with(t.Phi3Config, hidden_size=64, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}, sliding_window=20, tie_word_embeddings=True),
    "olmo2": _with(t.Olmo2Config),
    "olmo2-mha": _with(t.Olmo2Config, num_key_value_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "olmo2-tied": _with(t.Olmo2Config, tie_word_embeddings=True, attention_bias=True, num_key_value_heads=1),
    "deepseek-v2": _with(t.DeepseekV2Config, **MLA, q_lora_rank=None),
    "deepseek-v2-groups": _with(t.DeepseekV2Config, **MLA, q_lora_rank=16, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=2.0),
    "deepseek-v2-yarn": _with(t.DeepseekV2Config, **MLA, q_lora_rank=24, rope_parameters={**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}),
    "deepseek-v3": _with(t.DeepseekV3Config, **MLA, q_lora_rank=16, n_group=4, topk_group=2),
    "deepseek-v3-no-query-rank": _with(t.DeepseekV3Config, **MLA, q_lora_rank=None, n_group=2, topk_group=1, norm_topk_prob=False),
    "deepseek-v3-yarn": _with(t.DeepseekV3Config, **MLA, q_lora_rank=16, n_group=2, topk_group=2, tie_word_embeddings=True, rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "gpt2": lambda: t.GPT2Config(vocab_size=211, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=None, eos_token_id=None),
    "gpt2-inner": lambda: t.GPT2Config(vocab_size=97, n_embd=48, n_layer=3, n_head=3, n_positions=256, n_inner=64, bos_token_id=None, eos_token_id=None),
    "gpt2-gelu": lambda: t.GPT2Config(vocab_size=211, n_embd=32, n_layer=2, n_head=2, n_positions=256, activation_function="gelu", scale_attn_weights=False, bos_token_id=None, eos_token_id=None),
    "gpt-neox": _with(t.GPTNeoXConfig),
    "gpt-neox-sequential": _with(t.GPTNeoXConfig, use_parallel_residual=False, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}),
    "gpt-neox-tied": _with(t.GPTNeoXConfig, tie_word_embeddings=True, attention_bias=False, hidden_act="gelu_new"),
}  # fmt: skip


def build(name, directory):
    """Save a random model of the case; alternate cases are bfloat16 or sharded. Returns the float32 oracle of what was saved."""
    number = list(CASES).index(name)
    config = CASES[name]()
    with torch.random.fork_rng():
        torch.manual_seed(number)
        model = t.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.normal_(
                0, 0.3 / parameter.shape[-1] ** 0.25
            ) if parameter.dim() > 1 else parameter.data.add_(torch.randn_like(parameter) * 0.1)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.2)
    if number % 3 == 1:
        model = model.to(torch.bfloat16)
    options = {"max_shard_size": "30KB"} if number % 2 else {}
    model.save_pretrained(directory, **options)
    return t.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
