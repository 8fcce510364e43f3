"""From tokens to what the caller sees: one Generation per call, one Continuation per requested choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from wager.serve.core import Progress
from wager.serve.outputs import CompletionOutput, EmbeddingOutput, Logprob, RequestOutput, TokenLogprobs
from wager.serve.params import OutputKind, SamplingParams
from wager.serve.request import Request
from wager.serve.text.detokenize import Detokenizer
from wager.serve.text.tokenizer import Tokenizer

Finish = Callable[[Request, str, int | str | None], None]


@dataclass
class Continuation:
    """One choice: its request and what has been made of its tokens so far.

    sent_*: what a DELTA caller already has. closed: the request's last progress is folded in (two siblings may end in one step).
    """

    request: Request
    detokenizer: Detokenizer | None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    sent_text: int = 0
    sent_tokens: int = 0
    closed: bool = False

    def output(self, delta: bool) -> CompletionOutput:
        wants_logprobs = self.request.params.logprobs is not None
        first_char, first_token = (self.sent_text, self.sent_tokens) if delta else (0, 0)
        self.sent_text, self.sent_tokens = len(self.text), len(self.token_ids)
        return CompletionOutput(
            index=self.request.index,
            text=self.text[first_char:],
            token_ids=self.token_ids[first_token:],
            cumulative_logprob=self.cumulative_logprob if wants_logprobs else None,
            logprobs=self.logprobs[first_token:] if wants_logprobs else None,
            finish_reason=self.request.finish_reason,
            stop_reason=self.request.stop_reason,
        )


class Generation:
    """The n continuations of one prompt, and the outputs made of them as steps complete."""

    def __init__(self, request_id: str, prompt: str | None, requests: list[Request], tokenizer: Tokenizer | None):
        self.request_id, self.prompt, self.tokenizer = request_id, prompt, tokenizer
        self.params: SamplingParams = requests[0].params
        self.prompt_token_ids = requests[0].prompt_token_ids
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.error: str | None = None
        self.continuations = [
            Continuation(r, Detokenizer(tokenizer, r.prompt_token_ids, r.params) if tokenizer else None)
            for r in requests
        ]

    @property
    def requests(self) -> list[Request]:
        return [c.request for c in self.continuations]

    @property
    def finished(self) -> bool:
        return all(c.closed for c in self.continuations)

    def update(self, done: Progress, finish: Finish) -> RequestOutput | EmbeddingOutput | None:
        """Fold one step's progress in. Ends the request through `finish` when a stop string appears; returns what to tell the caller."""
        one = self.continuations[done.request.index]
        if done.embedding is not None:
            one.closed = True
            return EmbeddingOutput(self.request_id, self.prompt_token_ids, done.embedding)
        self.error = done.error or self.error
        if done.prompt_logprobs is not None:
            self.prompt_logprobs = [None if e is None else self._with_text(e) for e in done.prompt_logprobs]
        self._extend(one, done, finish)
        kind = self.params.output_kind
        if kind is OutputKind.FINAL_ONLY:
            return self.output(self.continuations, delta=False) if self.finished else None
        if kind is OutputKind.CUMULATIVE:
            return self.output(self.continuations, delta=False)
        if not one.closed and len(one.text) == one.sent_text and one.detokenizer is not None:
            return None  # text is held back: a character is incomplete or a stop string may be starting
        return self.output([one], delta=True)

    def _extend(self, one: Continuation, done: Progress, finish: Finish) -> None:
        kept = len(done.new_tokens)
        if one.detokenizer is not None and kept:
            delta = one.detokenizer.push(done.new_tokens)
            one.text += delta.text
            if delta.stop is not None:
                kept = delta.tokens_used
                if done.request.finished:  # the same step also met EOS or the length limit: the text decides
                    done.request.finish("stop", delta.stop)
                else:
                    finish(done.request, "stop", delta.stop)
        one.token_ids += done.new_tokens[:kept]
        for token, entry in zip(done.new_tokens[:kept], done.logprobs or (), strict=False):
            one.logprobs.append(self._with_text(entry))
            one.cumulative_logprob += entry[token].logprob
        if done.request.finished and one.detokenizer is not None and not isinstance(done.request.stop_reason, str):
            one.text += one.detokenizer.finish()
        one.closed = done.request.finished

    def abort(self, finish: Finish) -> None:
        """End what is still running."""
        for one in self.continuations:
            finish(one.request, "abort", None)
            one.closed = True

    def output(self, continuations: list[Continuation], delta: bool) -> RequestOutput:
        first = self.continuations[0].request
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[c.output(delta) for c in continuations],
            finished=self.finished,
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=first.num_cached_tokens,
            metrics=first.metrics,
            error=self.error,
        )

    def _with_text(self, entry: TokenLogprobs) -> TokenLogprobs:
        if self.tokenizer is None:
            return entry
        return {
            token: Logprob(value.logprob, value.rank, self.tokenizer.token_text(token))
            for token, value in entry.items()
        }
