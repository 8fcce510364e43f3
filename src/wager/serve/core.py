"""The engine core: one step = schedule, guess, run the model, verify, commit. Synchronous; `llm.py` drives it.

`docs/how-a-request-becomes-tokens.md` walks one request through this file.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from wager.errors import WagerError
from wager.models.base import Adapters
from wager.serve.batch import Batch
from wager.serve.lora import AdapterBatch, LoraAdapter
from wager.serve.observe import Observer, StepRecord
from wager.serve.outputs import TokenLogprobs
from wager.serve.policies import StepPlan
from wager.serve.request import Request, Status
from wager.serve.runner import ModelRunner, SpanInput
from wager.serve.sampling.sampler import Sampler
from wager.serve.schedule.continuous import ContinuousScheduler
from wager.serve.speculate.speculator import Speculator
from wager.serve.speculate.verify import Verifying, accepted_by_depth, verify

log = logging.getLogger(__name__)

PROMPT_LOGPROB_ROWS = 128  # rows of the vocabulary matrix held at once when a whole prompt's logprobs are wanted

GRAMMAR_WAIT_S = 0.005

NO_TOKEN = (
    "allowed_token_ids, bad_words, min_tokens, logit_bias and the structured output together leave no token to choose; "
    "drop one of them"
)


@dataclass
class Progress:
    """What one step did for one request. `logprobs` has one entry per new token when they were asked for."""

    request: Request
    new_tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    embedding: np.ndarray | None = None
    error: str | None = None


class EngineCore:
    """Owns the live requests. `step()` returns what changed; the caller turns tokens into text and reports stop strings by `finish`.

    Nothing here is thread-safe: all calls come from one thread.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: ContinuousScheduler,
        sampler: Sampler,
        speculator: Speculator | None = None,
        observers: Sequence[Observer] = (),
    ):
        self.runner, self.scheduler, self.sampler, self.speculator = runner, scheduler, sampler, speculator
        self.observers = list(observers)
        self.requests: dict[str, Request] = {}
        self.adapters: dict[str, LoraAdapter] = {}
        self.prompt_tokens_total = self.generation_tokens_total = self.preemptions_total = 0
        self._waiting_for_grammar: dict[str, tuple[Request, Future, list[list[int]]]] = {}
        self._prompt_logprobs: dict[str, list[TokenLogprobs | None]] = {}
        self._pooled: dict[str, tuple[Tensor, int]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def add(self, request: Request, grammar: Future | None = None, bad_words: list[list[int]] | None = None) -> None:
        """Queue a request. `grammar` resolves to the compiled constraint; until then the request blocks nobody else."""
        if request.id in self.requests:
            raise WagerError(f"request id {request.id!r} is already running; use a fresh id")
        self.requests[request.id] = request
        if grammar is None:
            self.sampler.add(request, bad_words=bad_words or [])
        else:
            request.status = Status.BLOCKED
            self._waiting_for_grammar[request.id] = (request, grammar, bad_words or [])
        self.scheduler.add(request)

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """End a request now (stop string, abort, error) and free what it holds."""
        if request.finished:
            return
        request.finish(reason, stop_reason)
        request.metrics.finished_s = time.monotonic()
        self.scheduler.remove(request)
        self.sampler.remove(request.id)
        if self.speculator:
            self.speculator.remove(request)
        for kept in (self._waiting_for_grammar, self._prompt_logprobs, self._pooled, self.requests):
            kept.pop(request.id, None)
        for observer in self.observers:
            observer.on_finished(request)

    def step(self) -> list[Progress]:
        """Run one batch. Returns progress of every request that got tokens, ended or failed; empty when nothing can run yet."""
        begun = time.perf_counter()
        failed = self._admit_compiled_grammars()
        draft_tokens = self.speculator.room(self.scheduler.num_running) if self.speculator else 0
        plan = self.scheduler.next_batch(time.monotonic(), draft_tokens)
        self.preemptions_total += len(plan.preempted)
        failed += [self._fail(request, reason) for request, reason in plan.failed]
        if not plan.spans:
            self._wait_for_a_grammar()
            return failed
        scheduled = time.perf_counter()
        decode_tokens = sum(s.request.num_computed_tokens >= s.request.num_prompt_tokens for s in plan.spans)
        inputs = self._span_inputs(plan)
        batch = self.runner.build(inputs, self._adapter_batch(plan))
        hidden_TD = self.runner.forward(batch)
        logits_LW = self.runner.logits(hidden_TD, batch.logit_rows_L) if len(batch.logit_rows_L) else None
        forwarded = time.perf_counter()
        wanted = [
            Verifying(planned.request, span.tree, span.logit_start)
            for planned, span in zip(plan.spans, batch.spans, strict=True)
            if span.logit_rows
        ]
        verdicts = iter(verify(wanted, logits_LW, self.sampler) if logits_LW is not None else ())
        sampling_done = time.perf_counter()
        progress, accepted = [], []
        for scheduled_span, span, made in zip(plan.spans, batch.spans, inputs, strict=True):
            request = scheduled_span.request
            self._collect_prompt_rows(request, span, made, hidden_TD)
            done = Progress(request)
            if span.logit_rows:
                verdict = next(verdicts)
                if not verdict.tokens:
                    progress.append(self._fail(request, NO_TOKEN))
                    continue
                self._commit(request, scheduled_span.num_tokens, span, verdict.path, verdict.tokens, done)
                if done.logprobs is not None:
                    done.logprobs = [e for e in verdict.logprobs[: len(done.new_tokens)] if e is not None]
                if span.tree is not None:
                    accepted.append(len(verdict.path))
            else:
                self._computed(request, span.context + span.length)
                self._end_prompt_only(request, done)
            if done.new_tokens or request.finished:
                progress.append(done)
        if self.speculator:
            step_ms = 1e3 * (time.perf_counter() - begun)
            self.speculator.measured(len(plan.spans), step_ms, decode_tokens < len(plan.spans))
        self._record(plan, (begun, scheduled, forwarded, sampling_done), decode_tokens, accepted, batch)
        return failed + progress

    # -- before the forward ------------------------------------------------------------------------------------------------------

    def _admit_compiled_grammars(self) -> list[Progress]:
        failed = []
        for request, future, bad_words in [entry for entry in self._waiting_for_grammar.values() if entry[1].done()]:
            del self._waiting_for_grammar[request.id]
            error = future.exception()
            if error is not None:
                failed.append(self._fail(request, str(error)))
                continue
            self.sampler.add(request, future.result().matcher(), bad_words)
            self.scheduler.unblock(request)
        return failed

    def _wait_for_a_grammar(self) -> None:
        """When compiling constraints are all that is left, wait for one instead of spinning; briefly, for others may call meanwhile."""
        if self._waiting_for_grammar:
            wait([future for _, future, _ in self._waiting_for_grammar.values()], GRAMMAR_WAIT_S, FIRST_COMPLETED)

    def _span_inputs(self, plan: StepPlan) -> list[SpanInput]:
        trees = self.speculator.propose(plan.spans, len(plan.spans)) if self.speculator else {}
        inputs = []
        for span in plan.spans:
            request, context = span.request, span.request.num_computed_tokens
            tokens = request.token_ids[context : context + span.num_tokens]
            tree = trees.get(request.id)
            reaches_end = context + span.num_tokens == request.num_tokens
            generates = reaches_end and request.pooling is None and request.params.max_tokens != 0
            rows = 0 if not generates else 1 + (0 if tree is None else len(tree))
            inputs.append(SpanInput(request.id, tokens, context, tree, rows))
        return inputs

    def _adapter_batch(self, plan: StepPlan):
        if not any(span.request.adapter for span in plan.spans):
            return None
        chosen = [self.adapters[s.request.adapter] if s.request.adapter else None for s in plan.spans]

        def make(span_starts: Tensor) -> Adapters:
            return AdapterBatch(chosen, span_starts)

        return make

    # -- after the forward -------------------------------------------------------------------------------------------------------

    def _commit(
        self, request: Request, num_tokens: int, span, path: list[int], tokens: list[int], done: Progress
    ) -> None:
        """Append the verified tokens up to the first that ends the request, and make the cache agree."""
        now = time.monotonic()
        if span.tree is not None:
            self.runner.keep_tree_path(span, path)
        end: tuple[str, int | str | None] | None = None
        for token in tokens:
            request.token_ids.append(token)
            done.new_tokens.append(token)
            end = end_of(request, token)
            if end:
                break
        self.sampler.committed(request, done.new_tokens)
        self.generation_tokens_total += len(done.new_tokens)
        self._computed(request, min(span.context + num_tokens + len(path), request.num_tokens - 1))
        if span.tree is not None:
            self.runner.blocks.truncate(request.id, request.num_computed_tokens)
            assert self.speculator is not None
            self.speculator.committed(request, path)
        for observer in self.observers:
            observer.on_tokens(request, len(done.new_tokens), now)
        if request.metrics.first_token_s is None:
            request.metrics.first_token_s = now
        request.metrics.last_token_s = now
        if request.params.logprobs is not None:
            done.logprobs = []
        if request.num_output_tokens == len(done.new_tokens):
            done.prompt_logprobs = self._prompt_logprobs.pop(request.id, None)
        if end:
            self.finish(request, *end)

    def _computed(self, request: Request, num_computed: int) -> None:
        before = min(request.num_computed_tokens, request.num_prompt_tokens)
        self.prompt_tokens_total += max(0, min(num_computed, request.num_prompt_tokens) - before)
        request.num_computed_tokens = num_computed
        self.runner.blocks.commit(request.id, request.token_ids, num_computed)

    def _collect_prompt_rows(self, request: Request, span, made: SpanInput, hidden_TD: Tensor) -> None:
        """Prompt logprobs and pooled embeddings need every row of the prompt, in whatever chunks it comes."""
        if not request.needs_every_prompt_row or request.num_output_tokens or span.context >= request.num_prompt_tokens:
            return
        stop = min(span.context + len(made.tokens), request.num_prompt_tokens)
        rows_TD = hidden_TD[span.start : span.start + stop - span.context]
        if request.pooling is not None:
            self._pool_rows(request, rows_TD, span.context)
        if request.params.prompt_logprobs is None:
            return
        kept = self._prompt_logprobs.setdefault(request.id, [None])
        following = request.prompt_token_ids[span.context + 1 : stop + 1]
        for first in range(len(kept) - 1 - span.context, len(following), PROMPT_LOGPROB_ROWS):
            targets = following[first : first + PROMPT_LOGPROB_ROWS]
            rows = torch.arange(first, first + len(targets), device=rows_TD.device)
            logits_LV = self.runner.logits(rows_TD, rows)
            kept.extend(self.sampler.prompt_logprobs(logits_LV, targets, request.params.prompt_logprobs))

    def _pool_rows(self, request: Request, rows_TD: Tensor, context: int) -> None:
        """Sum each prompt row once, also when a preempted request computes some of them again."""
        total, seen = self._pooled.get(request.id, (torch.zeros_like(rows_TD[0], dtype=torch.float32), 0))
        fresh = rows_TD[seen - context :].float()
        if len(fresh):
            self._pooled[request.id] = (
                total + fresh.sum(0) if request.pooling == "mean" else fresh[-1],
                seen + len(fresh),
            )

    def _end_prompt_only(self, request: Request, done: Progress) -> None:
        """A request that generates nothing ends with its prompt: an embedding, or logprobs of the prompt alone."""
        if request.num_computed_tokens < request.num_prompt_tokens:
            return
        if request.pooling is not None:
            pooled, _ = self._pooled.pop(request.id)
            done.embedding = torch.nn.functional.normalize(pooled, dim=0).cpu().numpy()
            self.finish(request, "stop")
        elif request.params.max_tokens == 0:
            done.prompt_logprobs = self._prompt_logprobs.pop(request.id, None)
            self.finish(request, "length")

    def _fail(self, request: Request, reason: str) -> Progress:
        self.finish(request, "error")
        return Progress(request, error=reason)

    def _record(
        self, plan: StepPlan, times: tuple[float, float, float, float], decode: int, accepted: list[int], batch: Batch
    ) -> None:
        if not self.observers:
            return
        begun, scheduled, forwarded, sampled = times
        done = time.perf_counter()
        committed = sum(s.num_tokens for s in plan.spans)
        blocks = self.runner.blocks
        record = StepRecord(
            time_s=time.monotonic(),
            prefill_tokens=committed - decode,
            decode_tokens=decode,
            draft_tokens=batch.num_tokens - committed,
            context_tokens=sum(s.context for s in batch.spans),
            num_spans=len(plan.spans),
            running=self.scheduler.num_running,
            waiting=self.scheduler.num_waiting,
            kv_usage=blocks.usage,
            schedule_ms=1e3 * (scheduled - begun),
            forward_ms=1e3 * (forwarded - scheduled),
            sample_ms=1e3 * (sampled - forwarded),
            output_ms=1e3 * (done - sampled),
            step_ms=1e3 * (done - begun),
            prompt_tokens_total=self.prompt_tokens_total,
            generation_tokens_total=self.generation_tokens_total,
            prefix_queries_total=blocks.prefix_queries,
            prefix_hits_total=blocks.prefix_hits,
            preemptions_total=self.preemptions_total,
            host_hits_total=blocks.host_hits,
            drafts=len(accepted),
            accepted_tokens=sum(accepted),
            accepted_per_position=tuple(accepted_by_depth(self.speculator.max_depth, accepted).tolist())
            if self.speculator
            else (),
        )
        for observer in self.observers:
            observer.on_step(record)


def end_of(request: Request, token: int) -> tuple[str, int | str | None] | None:
    """Whether `token`, just appended, ends the request: (finish_reason, stop_reason) or None."""
    params = request.params
    if request.num_output_tokens >= params.min_tokens:
        if token in params.stop_token_ids:
            return "stop", token
        if token in request.eos_token_ids and not params.ignore_eos:
            return "stop", None
    if request.num_tokens >= request.max_total_tokens:
        return "length", None
    return None
