"""Which module serves which `architectures` entry of config.json: one line per family, imported when asked for."""

from __future__ import annotations

from importlib import import_module

from wager.errors import CheckpointError
from wager.models.base import Model

FAMILIES: dict[str, tuple[str, str]] = {
    "LlamaForCausalLM": ("wager.models.llama", "Llama"),
    "MistralForCausalLM": ("wager.models.llama", "Llama"),
    "Qwen2ForCausalLM": ("wager.models.llama", "Llama"),
    "Qwen3ForCausalLM": ("wager.models.llama", "Llama"),
    "Phi3ForCausalLM": ("wager.models.phi3", "Phi3"),
    "Olmo2ForCausalLM": ("wager.models.olmo2", "Olmo2"),
    "MixtralForCausalLM": ("wager.models.moe", "Mixtral"),
    "Qwen3MoeForCausalLM": ("wager.models.moe", "Qwen3Moe"),
    "Gemma2ForCausalLM": ("wager.models.gemma", "Gemma"),
    "Gemma3ForCausalLM": ("wager.models.gemma", "Gemma"),
    "DeepseekV2ForCausalLM": ("wager.models.deepseek", "Deepseek"),
    "DeepseekV3ForCausalLM": ("wager.models.deepseek", "Deepseek"),
    "GPT2LMHeadModel": ("wager.models.gpt2", "GPT2"),
    "GPTNeoXForCausalLM": ("wager.models.gpt_neox", "GPTNeoX"),
}


def family_of(raw: dict) -> type[Model]:
    """The model class for a config.json. Raises CheckpointError listing what is supported."""
    names = raw.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            module, cls = FAMILIES[name]
            return getattr(import_module(module), cls)
    raise CheckpointError(
        f"architecture {names or raw.get('model_type')!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
    )
