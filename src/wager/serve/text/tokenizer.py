"""The checkpoint's own tokenizer: tokenizer.json through `tokenizers`, with its special tokens and chat template."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from wager.errors import CheckpointError, UsageError
from wager.models.config import read_json
from wager.serve.text.chat_template import ChatTemplate, find_template


class Tokenizer:
    """Text to tokens and back.

    Attributes:
        eos_token_ids: tokens that end a generation, from generation_config.json (a list there is usual) and the tokenizer itself.
        bos_token_id: added by `encode` where the tokenizer adds one, never twice.
        byte_level: every token is a fixed string of bytes, so text can be decoded token by token.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, config: dict[str, Any], eos: frozenset[int], template: ChatTemplate | None
    ):
        self._backend, self._config = backend, config
        self.eos_token_ids = eos
        self.template = template
        self.bos_token_id = self._id_of("bos_token")
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added = {i: token.content for i, token in added.items()}
        decoder = backend.decoder
        self.byte_level = decoder is not None and "ByteLevel" in str(decoder) and "Sequence" not in str(decoder)

    @staticmethod
    def load(path: Path | str, chat_template: str | None = None) -> Tokenizer:
        """From a model directory or GGUF file. `chat_template`: a file or a template text that replaces its own."""
        path = Path(path)
        if path.suffix == ".gguf":
            from wager.models.formats.gguf_tokenizer import read_tokenizer

            return Tokenizer._of(*read_tokenizer(path), path, chat_template)
        file = path / "tokenizer.json"
        if not file.exists():
            hint = (
                " (a SentencePiece tokenizer.model alone is not read: save it as a fast tokenizer)"
                if (path / "tokenizer.model").exists()
                else ""
            )
            raise CheckpointError(
                f"{file} is missing{hint}; pass token ids with skip_tokenizer_init=True or add the file"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file} cannot be read: {error}") from None
        config = read_json(path / "tokenizer_config.json", required=False)
        generation = read_json(path / "generation_config.json", required=False)
        return Tokenizer._of(backend, config, generation, path, chat_template)

    @staticmethod
    def _of(
        backend: tokenizers.Tokenizer,
        config: dict[str, Any],
        generation: dict[str, Any],
        path: Path,
        chat_template: str | None,
    ) -> Tokenizer:
        backend.no_truncation()
        backend.no_padding()
        eos = generation.get("eos_token_id")
        ids = {eos} if isinstance(eos, int) else set(eos or ())
        own = backend.token_to_id(_content(config.get("eos_token")) or "")
        ids |= {own} if own is not None else set()
        template = find_template(path, config, chat_template)
        return Tokenizer(backend, config, frozenset(ids), template)

    def _id_of(self, name: str) -> int | None:
        content = _content(self._config.get(name))
        return None if content is None else self._backend.token_to_id(content)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def to_json(self) -> str:
        return self._backend.to_str()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; a beginning-of-text token is added once where the tokenizer asks for one, also when the text brings its own."""
        token_ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        bos = self.bos_token_id
        if bos is not None and token_ids[:2] == [bos, bos]:
            return token_ids[1:]
        return token_ids

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of the tokens; ids beyond the tokenizer's vocabulary (padding of the model's) have none."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    @cached_property
    def _bytes_of_char(self) -> dict[str, int]:
        """The printable stand-ins that byte-level BPE uses for bytes."""
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        stand_ins = {chr(b): b for b in printable}
        return stand_ins | {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; for tokenizers that are not byte-level those of its text."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.byte_level:
            mapped = [self._bytes_of_char.get(char) for char in token]
            return token.encode() if None in mapped else bytes(b for b in mapped if b is not None)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def token_text(self, token_id: int) -> str:
        """A token's text on its own, for log-probability listings; incomplete characters show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **options: Any,
    ) -> str:
        """The conversation as prompt text. Raises UsageError when there is no template or it refuses the messages."""
        if self.template is None:
            raise UsageError("this model has no chat template; pass one with --chat-template", param="messages")
        specials = {
            name: _content(self._config.get(name)) or ""
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        return self.template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **{**specials, **options},
        )


def _content(token: str | dict | None) -> str | None:
    """Special tokens are written as a string or as an object with its content."""
    return token.get("content") if isinstance(token, dict) else token
