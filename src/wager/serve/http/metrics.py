"""Prometheus metrics under vLLM's names, so that existing dashboards work; fed by the engine's steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

from wager.serve.observe import StepRecord
from wager.serve.request import Request, Status

if TYPE_CHECKING:
    from wager.serve.llm import AsyncLLM

LATENCY_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class ServerMetrics:
    """An engine Observer with a registry of its own. `last` is the latest step, for the live panel."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.last: StepRecord | None = None
        self.drafts = self.draft_tokens = self.accepted_tokens = self.steps = 0
        self._previous = (0, 0, 0, 0, 0, 0)
        gauge, counter, histogram = self._gauge, self._counter, self._histogram
        self.running = gauge("num_requests_running", "Requests in the running batch")
        self.waiting = gauge("num_requests_waiting", "Requests in the queue")
        self.kv_usage = gauge("kv_cache_usage_perc", "Share of KV blocks held, 0 to 1")
        self.prefix_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self.prefix_hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self.host_hits = counter("external_prefix_cache_hits", "Of those, tokens that came back from the host's memory")
        self.preemptions = counter("num_preemptions", "Requests that gave up their blocks and were queued again")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens computed")
        self.generation_tokens = counter("generation_tokens", "Tokens generated")
        self.iteration_tokens = histogram("iteration_tokens_total", "Tokens per engine step", TOKENS)
        self.success = Counter("vllm:request_success", "Finished requests", ["finished_reason"], registry=self.registry)
        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first token", LATENCY_S)
        self.itl = histogram("inter_token_latency_seconds", "Between tokens of a request", LATENCY_S)
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to end", LATENCY_S)
        self.queue = histogram("request_queue_time_seconds", "Arrival to first scheduled", LATENCY_S)
        self.prefill = histogram("request_prefill_time_seconds", "First scheduled to first token", LATENCY_S)
        self.decode = histogram("request_decode_time_seconds", "First token to last token", LATENCY_S)
        self.inference = histogram("request_inference_time_seconds", "First scheduled to last token", LATENCY_S)
        self.prompt_length = histogram("request_prompt_tokens", "Prompt tokens of a request", TOKENS)
        self.output_length = histogram("request_generation_tokens", "Generated tokens of a request", TOKENS)
        self.params_n = histogram("request_params_n", "n of a request", (1, 2, 5, 10, 20))
        self.params_max_tokens = histogram("request_params_max_tokens", "max_tokens of a request", TOKENS)
        self.spec_drafts = counter("spec_decode_num_drafts", "Proposals verified")
        self.spec_draft_tokens = counter("spec_decode_num_draft_tokens", "Tokens proposed")
        self.spec_accepted = counter("spec_decode_num_accepted_tokens", "Proposed tokens accepted")
        self.spec_per_position = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted by position", ["position"], registry=self.registry
        )
        adapters = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        self.lora = Gauge("vllm:lora_requests_info", "Adapters of live requests", adapters, registry=self.registry)
        cache = ["block_size", "num_gpu_blocks", "enable_prefix_caching"]
        self.cache_config = Gauge("vllm:cache_config_info", "KV cache configuration", cache, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, registry=self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", text, buckets=buckets, registry=self.registry)

    def describe(self, llm: AsyncLLM) -> None:
        """Record the configuration once the engine is there."""
        blocks, config = llm.engine.core.runner.blocks, llm.engine.config
        self.cache_config.labels(str(blocks.block_size), str(blocks.num_blocks), str(config.enable_prefix_caching)).set(
            1
        )

    def on_step(self, record: StepRecord) -> None:
        self.last = record
        self.steps += 1
        self.running.set(record.running)
        self.waiting.set(record.waiting)
        self.kv_usage.set(record.kv_usage)
        self.iteration_tokens.observe(record.prefill_tokens + record.decode_tokens + record.draft_tokens)
        totals = (
            record.prompt_tokens_total,
            record.generation_tokens_total,
            record.prefix_queries_total,
            record.prefix_hits_total,
            record.preemptions_total,
            record.host_hits_total,
        )
        counters = (
            self.prompt_tokens, self.generation_tokens, self.prefix_queries, self.prefix_hits, self.preemptions, self.host_hits,
        )  # fmt: skip
        for counter, now, before in zip(counters, totals, self._previous, strict=True):
            counter.inc(max(0, now - before))
        self._previous = totals
        if record.drafts:
            self.drafts += record.drafts
            self.draft_tokens += record.draft_tokens
            self.accepted_tokens += record.accepted_tokens
            self.spec_drafts.inc(record.drafts)
            self.spec_draft_tokens.inc(record.draft_tokens)
            self.spec_accepted.inc(record.accepted_tokens)
            for position, count in enumerate(record.accepted_per_position):
                self.spec_per_position.labels(str(position)).inc(count)

    def on_tokens(self, request: Request, num_new_tokens: int, now_s: float) -> None:
        times = request.metrics
        if times.first_token_s is None:
            self.ttft.observe(now_s - times.arrival_s)
        elif times.last_token_s is not None:
            for _ in range(num_new_tokens):
                self.itl.observe((now_s - times.last_token_s) / num_new_tokens)

    def on_finished(self, request: Request) -> None:
        times = request.metrics
        self.success.labels(request.finish_reason or "unknown").inc()
        self.prompt_length.observe(request.num_prompt_tokens)
        self.output_length.observe(request.num_output_tokens)
        self.params_n.observe(request.params.n)
        if request.params.max_tokens is not None:
            self.params_max_tokens.observe(request.params.max_tokens)
        if times.finished_s is not None:
            self.e2e.observe(times.finished_s - times.arrival_s)
        if times.first_scheduled_s is None:
            return
        self.queue.observe(times.first_scheduled_s - times.arrival_s)
        if times.first_token_s is not None and times.last_token_s is not None:
            self.prefill.observe(times.first_token_s - times.first_scheduled_s)
            self.decode.observe(times.last_token_s - times.first_token_s)
            self.inference.observe(times.last_token_s - times.first_scheduled_s)

    def render(self, llm: AsyncLLM | None) -> bytes:
        if llm is not None:
            stats = llm.stats()
            self.running.set(stats.running)
            self.waiting.set(stats.waiting)
            self.kv_usage.set(stats.kv_usage)
            live = list(llm.engine.core.requests.values())  # one step of the interpreter: the engine's thread may go on
            running = {r.adapter for r in live if r.adapter and r.status is Status.RUNNING}
            waiting = {r.adapter for r in live if r.adapter} - running
            self.lora.clear()
            self.lora.labels(
                str(llm.engine.config.max_loras), ",".join(sorted(running)), ",".join(sorted(waiting))
            ).set(1)
        return generate_latest(_Labelled(self.registry, {"model_name": llm.served_name if llm else ""}))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Labelled:
    """A registry whose samples all carry more labels: vLLM's dashboards filter by model_name, which is known only once a model is loaded."""

    registry: CollectorRegistry
    labels: dict[str, str]

    def collect(self) -> Iterator[Metric]:
        for metric in self.registry.collect():
            metric.samples = [sample._replace(labels={**self.labels, **sample.labels}) for sample in metric.samples]
            yield metric
