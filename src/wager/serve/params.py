"""What a caller may ask of one generation. Field names and meanings follow vLLM's SamplingParams."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from wager.errors import UsageError

GREEDY_BELOW_TEMPERATURE = 1e-5


class OutputKind(Enum):
    """CUMULATIVE: each output carries everything so far. DELTA: only what is new. FINAL_ONLY: one output at the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True)
class StructuredOutputs:
    """A constraint on the text: exactly one field is set.

    json: JSON schema as a dict or a string. json_object: any JSON object. regex: a full-match regular expression.
    choice: one of these strings. grammar: EBNF (GBNF flavour). structural_tag: free text with constrained islands.
    """

    json: str | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    structural_tag: str | dict[str, Any] | None = None

    def __post_init__(self):
        chosen = [k for k, v in vars(self).items() if v is not None]
        if len(chosen) != 1:
            raise UsageError(
                f"structured outputs take exactly one constraint, got {chosen or 'none'}", param="structured_outputs"
            )
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                raise UsageError(
                    f"{name} must be a string, got {type(getattr(self, name)).__name__}", param="structured_outputs"
                )
        if self.choice is not None and not (
            isinstance(self.choice, tuple) and self.choice and all(isinstance(c, str) for c in self.choice)
        ):
            raise UsageError("choice must be a list of at least one string", param="structured_outputs")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when a generation ends.

    temperature < 1e-5 is greedy. top_k of 0 or -1, top_p of 1 and min_p of 0 are off. `seed` makes a request's tokens independent of
    what else is in the batch. `logprobs` is the number of alternatives reported per generated token (0: the token itself only, -1: the
    whole vocabulary), `prompt_logprobs` the same for the prompt. `speculative_method` picks one of the engine's speculation methods for
    this request, "none" turns speculation off; None takes the engine's first. `stop` strings are searched in the text, `stop_token_ids` in the tokens.
    `thinking_token_budget` closes a <think> block after so many tokens. `deadline_ms` is when the request should be done, in milliseconds
    after its arrival: the deadline policy runs the most urgent first.

    Raises UsageError naming the field and the allowed range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    thinking_token_budget: int | None = None
    deadline_ms: float | None = None
    structured_outputs: StructuredOutputs | None = None
    speculative_method: str | None = None
    output_kind: OutputKind = OutputKind.CUMULATIVE
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)
        put("stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        put("stop_token_ids", tuple(self.stop_token_ids or ()))
        put("bad_words", (self.bad_words,) if isinstance(self.bad_words, str) else tuple(self.bad_words or ()))
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", tuple(self.allowed_token_ids))
        self._check("n", self.n, 1, None)
        self._check("temperature", self.temperature, 0.0, None)
        self._check("top_p", self.top_p, 0.0, 1.0, open_low=True)
        self._check("top_k", self.top_k, -1, None)
        self._check("min_p", self.min_p, 0.0, 1.0)
        self._check("presence_penalty", self.presence_penalty, -2.0, 2.0)
        self._check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        self._check("repetition_penalty", self.repetition_penalty, 0.0, None, open_low=True)
        self._check("max_tokens", self.max_tokens, 0, None)
        self._check("min_tokens", self.min_tokens, 0, self.max_tokens)
        self._check("logprobs", self.logprobs, -1, None)
        self._check("prompt_logprobs", self.prompt_logprobs, -1, None)
        self._check("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, None)
        self._check("thinking_token_budget", self.thinking_token_budget, 0, None)
        self._check("deadline_ms", self.deadline_ms, 0.0, None, open_low=True)
        if self.thinking_token_budget is not None and self.structured_outputs is not None:
            raise UsageError(
                "thinking_token_budget and structured outputs exclude each other: a constrained answer has no thoughts",
                param="thinking_token_budget",
            )
        if any(s == "" for s in self.stop):
            raise UsageError("stop strings must not be empty", param="stop")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise UsageError("allowed_token_ids must name at least one token", param="allowed_token_ids")
        for token, bias in (self.logit_bias or {}).items():
            if not math.isfinite(bias) or not -100 <= bias <= 100:
                raise UsageError(f"logit_bias of token {token} must lie in [-100, 100], got {bias}", param="logit_bias")

    @staticmethod
    def _check(name: str, value: float | None, low: float, high: float | None, open_low: bool = False) -> None:
        if value is None:
            return
        too_low = value <= low if open_low else value < low
        if not math.isfinite(value) or too_low or (high is not None and value > high):
            bounds = f"{'(' if open_low else '['}{low}, {'∞' if high is None else high}{')' if high is None else ']'}"
            raise UsageError(f"{name} must lie in {bounds}, got {value}", param=name)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW_TEMPERATURE


def default_params(generation_config: dict[str, Any]) -> SamplingParams:
    """SamplingParams from a checkpoint's generation_config.json; `do_sample: false` is greedy."""
    known = {
        k: generation_config[k]
        for k in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        if k in generation_config
    }
    known = {k: v for k, v in known.items() if v is not None}
    if generation_config.get("do_sample") is False:
        known = {k: v for k, v in known.items() if k == "repetition_penalty"} | {"temperature": 0.0}
    return SamplingParams(**known)
