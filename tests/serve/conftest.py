"""A tiny random Llama with a real byte-level BPE tokenizer, in Hugging Face layout, shared by the engine's tests."""

from pathlib import Path

import pytest

CORPUS = [
    "def main(argv):\n    return sum(len(word) for word in argv)\n",
    "The quick brown fox jumps over the lazy dog. Count from one to ten: one two three four five six seven eight nine ten.",
    '{"name": "Ada", "age": 36, "tags": ["math", "engine"], "ok": true, "none": null}',
    "Größe naïve café – “quotes” 你好 мир 😀👍🏽",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(directory: Path, vocab_size: int = 400) -> None:
    """Train and save a byte-level BPE with ChatML specials; id 0 is the end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def favour(model, biases: dict[int, float]) -> None:
    """Add a fixed amount to the logits of some tokens: hidden channel 0 is one positive number for every input, and only the head reads it."""
    import torch

    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 4.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        model.lm_head.weight[:, 0] = 0
        for token, bias in biases.items():
            model.lm_head.weight[token, 0] = bias


def build_llama(directory: Path, seed: int = 0, favoured: dict[str, float] | None = None, **overrides) -> Path:
    """Save a random tiny Llama (fp32) and its tokenizer. `favoured`: tokens, as text, that shall be likelier than the others."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = dict(
        vocab_size=416,  # padded beyond the tokenizer, as real checkpoints are
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=0,
    )
    config = LlamaConfig(**{**settings, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [0, 2]
    build_tokenizer(directory)
    if favoured:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        favour(model, {tokenizer.token_to_id(text): bias for text, bias in favoured.items()})
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    return build_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_draft_dir(tmp_path_factory) -> Path:
    """Another random model over the same vocabulary: guesses that are usually wrong but sometimes right."""
    return build_llama(tmp_path_factory.mktemp("draft"), seed=1, num_hidden_layers=1)


@pytest.fixture(scope="session")
def closing_dir(tmp_path_factory) -> Path:
    """A random model that likes to come to an end: what closes strings, objects, lists and answers is likely at every token.

    The plain random model, held to a JSON grammar, writes one endless string.
    """
    ends = {'"': 6.0, "}": 3.0, "]": 5.0, ",": 4.0, "<|im_end|>": 1.0}
    return build_llama(tmp_path_factory.mktemp("closing"), favoured=ends)
