"""Structured outputs: a constraint compiled to an automaton that says, at every step, which tokens may follow.

llguidance does the automaton. It was chosen over xgrammar because it refuses the JSON-schema keywords it cannot enforce instead of
ignoring them: what it compiles, it keeps.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from wager.errors import UsageError
from wager.serve.params import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from wager.serve.text.tokenizer import Tokenizer

CACHED_GRAMMARS = 256


class Grammar:
    """The automaton of one request, at the position after its committed tokens."""

    def __init__(self, matcher: LLMatcher, vocab_size: int):
        self._matcher, self._words = matcher, -(-vocab_size // 32)

    def accept(self, token_ids: Sequence[int]) -> None:
        """Advance over committed tokens; those after the end of the text change nothing."""
        for token in token_ids:
            if self._matcher.is_stopped():
                return
            self._matcher.consume_token(int(token))

    def fill_bitmask(self, mask_words: np.ndarray, guesses: Sequence[int] = ()) -> None:
        """Write the allowed tokens after the guessed path into int32 words; everything is allowed where the path breaks the grammar
        (its row is never used then)."""
        taken = self._matcher.try_consume_tokens(list(guesses)) if guesses else 0
        if taken < len(guesses) or self._matcher.is_error():
            mask_words.fill(-1)
        else:
            words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)
            mask_words.fill(0)
            mask_words[: len(words)] = words[: len(mask_words)]
        if taken:
            self._matcher.rollback(taken)

    @property
    def is_terminated(self) -> bool:
        return self._matcher.is_stopped()


@dataclass(frozen=True)
class CompiledGrammar:
    """A checked constraint; every request gets its own matcher of it."""

    source: LLMatcher
    vocab_size: int

    def matcher(self) -> Grammar:
        return Grammar(self.source.deep_copy(), self.vocab_size)


class GrammarCompiler:
    """Compiles constraints on threads of its own and remembers them. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, threads: int = 1):
        self._tokenizer, self.vocab_size = tokenizer, vocab_size
        self._ll_tokenizer: LLTokenizer | None = None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="wager-grammar")
        self._lock = threading.Lock()
        self._futures: dict[str, Future] = {}

    def submit(self, constraint: StructuredOutputs) -> Future:
        """A future of CompiledGrammar; its exception is a UsageError that says what is wrong with the constraint."""
        key = _key(constraint)
        with self._lock:
            future = self._futures.get(key)
            if future is None or (future.done() and future.exception() is not None):
                while len(self._futures) >= CACHED_GRAMMARS:
                    self._futures.pop(next(iter(self._futures)))
                future = self._futures[key] = self._pool.submit(self.compile, constraint)
            return future

    def compile(self, constraint: StructuredOutputs) -> CompiledGrammar:
        from llguidance import LLMatcher

        with self._lock:
            if self._ll_tokenizer is None:
                self._ll_tokenizer = _ll_tokenizer(self._tokenizer, self.vocab_size)
        source = to_grammar(constraint)
        matcher = LLMatcher(self._ll_tokenizer, source, log_level=0)
        if matcher.is_error():
            raise _refused(constraint, matcher.get_error())
        return CompiledGrammar(matcher, self.vocab_size)


def to_grammar(constraint: StructuredOutputs) -> str:
    """The constraint in llguidance's own language. Raises UsageError."""
    from llguidance import LLMatcher, StructTag, gbnf_to_lark

    try:
        if constraint.json is not None:
            return LLMatcher.grammar_from_json_schema(constraint.json, defaults={"whitespace_flexible": False})
        if constraint.json_object:
            return LLMatcher.grammar_from_json_schema({"type": "object"}, defaults={"whitespace_flexible": False})
        if constraint.regex is not None:
            return LLMatcher.grammar_from_regex(constraint.regex)
        if constraint.choice is not None:
            return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in constraint.choice))
        if constraint.grammar is not None:
            lark = (
                constraint.grammar if "::=" not in constraint.grammar else gbnf_to_lark.any_to_lark(constraint.grammar)
            )
            return LLMatcher.grammar_from_lark(lark)
        if constraint.structural_tag is not None:
            return StructTag.to_grammar(_struct_tags(constraint.structural_tag))
    except (
        Exception
    ) as error:  # the libraries raise bare Exception too; whatever they dislike, the constraint is to blame
        raise _refused(constraint, str(error)) from None
    raise UsageError("json_object must be true when it is given", param="response_format")


def _struct_tags(value: str | dict) -> list:
    """OpenAI-style {structures: [{begin, schema, end}], triggers: [...]}: free text until a trigger, then its schema."""
    from llguidance import StructTag

    spec = json.loads(value) if isinstance(value, str) else value
    triggers = spec.get("triggers") or []
    tags = []
    for structure in spec["structures"]:
        begin = structure["begin"]
        trigger = next((t for t in triggers if begin.startswith(t)), begin)
        tags.append(StructTag(trigger=trigger, begin=begin, grammar=structure["schema"], end=structure["end"]))
    return tags


def _refused(constraint: StructuredOutputs, reason: str) -> UsageError:
    kind = next(name for name, value in vars(constraint).items() if value is not None)
    first_line = reason.strip().splitlines()[0] if reason.strip() else "it is malformed"
    return UsageError(f"the {kind} constraint cannot be compiled: {first_line}", param="response_format")


def _key(constraint: StructuredOutputs) -> str:
    return json.dumps(vars(constraint), sort_keys=True, default=str)


def _ll_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=sorted(tokenizer.eos_token_ids) or None)


def apply_bitmask(
    logits_LW: Tensor, rows: Sequence[int], grammars: Sequence[Grammar], guesses: Sequence[tuple[int, ...]]
) -> None:
    """Set the logits of tokens that the rows' grammars forbid to -inf, in place."""
    words = -(-logits_LW.shape[1] // 32)
    masks = np.empty((len(rows), words), np.int32)
    for mask, grammar, path in zip(masks, grammars, guesses, strict=True):
        grammar.fill_bitmask(mask, path)
    allowed = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, : logits_LW.shape[1]]
    chosen = torch.as_tensor(list(rows), device=logits_LW.device)
    forbidden = torch.from_numpy(allowed == 0).to(logits_LW.device)
    logits_LW[chosen] = logits_LW[chosen].masked_fill(forbidden, -torch.inf)
