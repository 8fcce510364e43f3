"""Request bodies. Unknown fields are accepted (clients are ahead of servers) and logged once each."""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

from wager.errors import UsageError
from wager.serve.params import OutputKind, SamplingParams, StructuredOutputs

log = logging.getLogger(__name__)
_seen_unknown: set[str] = set()

MAX_TOP_LOGPROBS = 20
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Body(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="after")
    def _note_unknown(self) -> Body:
        for name in self.model_extra or {}:
            if name not in _seen_unknown and len(_seen_unknown) < 1000:
                _seen_unknown.add(name)
                log.info("ignoring unknown request field %r", name[:80])
        return self


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingBody(Body):
    """What chat and completions share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Integer | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[TokenId] | None = None
    skip_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    thinking_token_budget: Annotated[int, Field(ge=0)] | None = None
    deadline_ms: Annotated[float, Field(gt=0)] | None = None
    priority: Integer | None = None
    cache_salt: str | None = None
    speculative_method: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def check_stream_options(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise UsageError("stream_options is only allowed with stream: true", param="stream_options")

    def constraint(self) -> StructuredOutputs | None:
        """From response_format, structured_outputs or vLLM's older guided_* fields."""
        found = [
            c for c in (_response_format(self.response_format), self._structured(), self._guided()) if c is not None
        ]
        if len(found) > 1:
            raise UsageError("give one of response_format, structured_outputs and guided_*", param="response_format")
        return found[0] if found else None

    def _structured(self) -> StructuredOutputs | None:
        if self.structured_outputs is None:
            return None
        given = {k: v for k, v in self.structured_outputs.items() if v is not None}
        unknown = set(given) - set(StructuredOutputs.__dataclass_fields__)
        if unknown:
            raise UsageError(f"structured_outputs does not know {sorted(unknown)}", param="structured_outputs")
        if isinstance(given.get("choice"), list):
            given["choice"] = tuple(given["choice"])
        return StructuredOutputs(**given)

    def _guided(self) -> StructuredOutputs | None:
        choice = tuple(self.guided_choice) if self.guided_choice else None
        fields = {
            "json": self.guided_json,
            "regex": self.guided_regex,
            "choice": choice,
            "grammar": self.guided_grammar,
        }
        given = {k: v for k, v in fields.items() if v is not None}
        return StructuredOutputs(**given) if given else None

    def sampling_params(
        self,
        defaults: dict[str, Any],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        constraint: StructuredOutputs | None,
        n: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """SamplingParams; a field the client left out takes the checkpoint's default."""
        names = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        chosen = {}
        for name in names:
            value = getattr(self, name)
            value = defaults.get(name) if value is None else value
            if value is not None:
                chosen[name] = value
        return SamplingParams(
            **chosen,
            n=n or self.n or 1,
            seed=self.seed,
            stop=_strings(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs if prompt_logprobs is None else prompt_logprobs,
            logit_bias=_logit_bias(self.logit_bias),
            bad_words=tuple(self.bad_words or ()),
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            skip_special_tokens=self.skip_special_tokens,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            thinking_token_budget=self.thinking_token_budget,
            deadline_ms=self.deadline_ms,
            structured_outputs=constraint,
            speculative_method=self.speculative_method,
            output_kind=OutputKind.DELTA if self.stream else OutputKind.FINAL_ONLY,
        )


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any] | str] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class FunctionSpec(Body):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: FunctionSpec


class ChatBody(SamplingBody):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    echo: bool = False

    def top(self) -> int | None:
        """How many alternatives to report; None for no log-probabilities."""
        if self.top_logprobs is not None and not self.logprobs:
            raise UsageError("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise UsageError(
                f"top_logprobs must lie in [0, {MAX_TOP_LOGPROBS}], got {self.top_logprobs}", param="top_logprobs"
            )
        return (self.top_logprobs or 0) if self.logprobs else None

    def message_dicts(self) -> list[dict[str, Any]]:
        return [m.model_dump(exclude_none=True) for m in self.messages]

    def tool_dicts(self) -> list[dict[str, Any]] | None:
        return (
            [t.model_dump(exclude_none=True) for t in self.tools] if self.tools and self.tool_choice != "none" else None
        )

    def forced_tool(self) -> str | dict[str, Any] | None:
        """ "required" or the named tool, when the answer must be a call."""
        choice = self.tool_choice
        if choice in (None, "none", "auto"):
            return None
        if not self.tools:
            raise UsageError("tool_choice needs tools", param="tool_choice")
        if isinstance(choice, dict):
            name = choice.get("function", {}).get("name") if isinstance(choice.get("function"), dict) else None
            if not isinstance(name, str):
                raise UsageError(
                    'tool_choice must look like {"type": "function", "function": {"name": …}}', param="tool_choice"
                )
        return choice


class CompletionBody(SamplingBody):
    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool = False
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        if not prompt:
            raise UsageError("prompt must not be an empty list", param="prompt")
        return list(prompt)


class EmbeddingBody(Body):
    model: str | None = None
    input: str | list[TokenId] | list[str] | list[list[TokenId]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None

    def inputs(self) -> list[str | list[int]]:
        value: Any = self.input
        if isinstance(value, str) or (value and isinstance(value[0], int)):
            return [value]
        if not value:
            raise UsageError("input must not be an empty list", param="input")
        return list(value)


class TokenizeBody(Body):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[TokenId]


class AdapterBody(Body):
    lora_name: Annotated[str, Field(min_length=1, max_length=256)]
    lora_path: str | None = None


def _strings(value: str | list[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _logit_bias(value: dict[str, float] | None) -> dict[int, float] | None:
    if not value:
        return None
    try:
        return {int(token): float(bias) for token, bias in value.items()}
    except ValueError:
        raise UsageError("logit_bias maps token ids (as strings) to numbers", param="logit_bias") from None


def _response_format(value: dict[str, Any] | None) -> StructuredOutputs | None:
    if value is None or value.get("type") == "text":
        return None
    kind = value.get("type")
    if kind == "json_object":
        return StructuredOutputs(json_object=True)
    if kind == "json_schema":
        wrapper = value.get("json_schema")
        schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
        if not isinstance(schema, dict):
            raise UsageError("response_format.json_schema.schema must be a JSON schema", param="response_format")
        return StructuredOutputs(json=schema)
    if kind == "structural_tag":
        return StructuredOutputs(structural_tag=value)
    raise UsageError(
        f"response_format type {kind!r} is unknown; use text, json_object or json_schema", param="response_format"
    )
