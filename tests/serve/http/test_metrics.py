"""/metrics under vLLM's names: what dashboards query is there, and it moves as it should."""

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.http.conftest import serving, wait_idle
from wager.serve.http.settings import ServerSettings

GAUGES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "lora_requests_info",
    "cache_config_info",
]
COUNTERS = [
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos",
]
HISTOGRAMS = [
    "iteration_tokens_total",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
]
PROMPT = list(range(5, 38))  # 33 tokens: two full blocks of 16 and one token


def families(url):
    return {f.name.removeprefix("vllm:"): f for f in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)}


def samples(url):
    """Every sample's value by name; samples that share a name are added up."""
    found = {}
    for family in families(url).values():
        for sample in family.samples:
            name = sample.name.removeprefix("vllm:")
            found[name] = found.get(name, 0.0) + sample.value
    return found


def ask(url, **body):
    answer = httpx.post(
        f"{url}/v1/completions", json={"prompt": PROMPT, "temperature": 0, "ignore_eos": True, "max_tokens": 7, **body}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def own(tiny_dir):
    """A server nobody else asks: its counters start at zero."""
    with serving(tiny_dir, ServerSettings(drain_s=5), max_num_seqs=8, block_size=16) as running:
        yield running


@pytest.fixture()
def moved(own):
    """A function that runs something and returns by how much every sample moved."""
    url, app = own

    def during(action):
        before = samples(url)
        action()
        wait_idle(app.state.context.llm)
        after = samples(url)
        return {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}

    return during


def test_every_name_that_dashboards_query_is_there_with_its_type_and_model(own):
    found = families(own[0])
    for kind, names in (("gauge", GAUGES), ("counter", COUNTERS), ("histogram", HISTOGRAMS)):
        for name in names:
            assert found[name].type == kind and found[name].documentation, name
    ask(own[0])
    for family in families(own[0]).values():
        assert family.name.startswith("vllm:"), family.name
        assert all(sample.labels["model_name"] == "tiny" for sample in family.samples), family.name
    config = families(own[0])["cache_config_info"].samples[0].labels
    assert (
        config["block_size"] == "16" and int(config["num_gpu_blocks"]) > 0 and config["enable_prefix_caching"] == "True"
    )


def test_tokens_requests_and_times(own, moved):
    url = own[0]
    httpx.post(f"{url}/reset_prefix_cache")
    change = moved(lambda: ask(url))
    assert change["prompt_tokens_total"] == 33 and change["generation_tokens_total"] == 7
    assert change["request_success_total"] == 1
    assert (change["request_prompt_tokens_sum"], change["request_generation_tokens_sum"]) == (33, 7)
    assert (change["request_params_n_sum"], change["request_params_max_tokens_sum"]) == (1, 7)
    assert change["time_to_first_token_seconds_count"] == change["e2e_request_latency_seconds_count"] == 1
    assert change["inter_token_latency_seconds_count"] == 6
    # Every step reports its tokens: the prompt's, and one for each generated token but the first.
    assert change["iteration_tokens_total_sum"] == 33 + 6
    times = {n: change[f"request_{n}_time_seconds_sum"] for n in ("queue", "prefill", "decode", "inference")}
    assert all(value >= 0 for value in times.values())
    assert times["inference"] == pytest.approx(times["prefill"] + times["decode"])
    assert times["queue"] + times["inference"] <= change["e2e_request_latency_seconds_sum"] + 1e-6
    assert change["time_to_first_token_seconds_sum"] == pytest.approx(times["queue"] + times["prefill"])
    assert change["inter_token_latency_seconds_sum"] == pytest.approx(times["decode"])
    assert "num_requests_running" not in change and "kv_cache_usage_perc" not in change


def test_prefix_cache_counts_tokens(own, moved):
    url = own[0]
    httpx.post(f"{url}/reset_prefix_cache")
    cold, warm = moved(lambda: ask(url)), moved(lambda: ask(url))
    assert cold["prefix_cache_queries_total"] == warm["prefix_cache_queries_total"] == 33
    assert "prefix_cache_hits_total" not in cold and warm["prefix_cache_hits_total"] == 32
    assert warm["prompt_tokens_total"] == 33 or warm["prompt_tokens_total"] == 1
    assert ask(url)["usage"]["prompt_tokens_details"]["cached_tokens"] == 32


def reasons(url):
    return {
        s.labels["finished_reason"]: s.value
        for s in families(url)["request_success"].samples
        if s.name.endswith("_total")
    }


def test_finish_reasons_are_told_apart(own, moved):
    url = own[0]
    ask(url)
    before = reasons(url)
    first = ask(url, max_tokens=1, logprobs=0)["choices"][0]
    ids = httpx.post(f"{url}/tokenize", json={"prompt": first["text"], "add_special_tokens": False}).json()["tokens"]

    def leave():
        with httpx.stream(
            "POST",
            f"{url}/v1/completions",
            json={"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True},
        ) as s:
            next(s.iter_lines())

    moved(lambda: [ask(url), ask(url, stop_token_ids=ids), leave()])
    after = reasons(url)
    assert after["length"] - before.get("length", 0) == 2  # the one-token question above and the first here
    assert after["stop"] - before.get("stop", 0) == 1
    assert after["abort"] - before.get("abort", 0) == 1


def test_gauges_show_what_runs_and_what_waits(tiny_dir):
    with serving(tiny_dir, ServerSettings(drain_s=5), max_num_seqs=1, max_queue=4) as (url, app):
        body = {"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json={**body, "n": 3}) as stream:
            lines = stream.iter_lines()  # kept: httpx closes the connection when the iterator goes
            next(lines)
            now = samples(url)
            stats = httpx.get(f"{url}/stats").json()
        assert now["num_requests_running"] == 1 and 1 <= now["num_requests_waiting"] <= 2
        assert 0 < now["kv_cache_usage_perc"] <= 1
        assert stats["running"] == 1 and stats["max_num_seqs"] == 1 and stats["total_blocks"] > stats["free_blocks"]
        wait_idle(app.state.context.llm)
        now = samples(url)
        assert now["num_requests_running"] == now["num_requests_waiting"] == now["kv_cache_usage_perc"] == 0


def test_speculation_counts(tiny_dir, tiny_draft_dir):
    speculation = {"draft": str(tiny_draft_dir), "num_speculative_tokens": 3, "auto": False}
    with serving(tiny_dir, ServerSettings(drain_s=5), speculative_config=speculation) as (url, _):
        ask(url, max_tokens=40)
        now = samples(url)
        drafts, proposed, accepted = (
            now[f"spec_decode_num_{n}_total"] for n in ("drafts", "draft_tokens", "accepted_tokens")
        )
        assert drafts > 0 and 2 * drafts <= proposed <= 3 * drafts
        assert 0 <= accepted <= proposed and now["generation_tokens_total"] == 40
        # A step yields what was accepted and one token of its own; the last may be cut at the limit.
        assert 40 - 3 <= accepted + drafts <= 40 + 3
        positions = {
            s.labels["position"]: s.value
            for s in families(url)["spec_decode_num_accepted_tokens_per_pos"].samples
            if s.name.endswith("_total")
        }
        assert sum(positions.values()) == accepted
        ordered = [positions[p] for p in sorted(positions, key=int)]
        assert ordered == sorted(ordered, reverse=True), "a later guess counts only when the earlier ones held"
        # The identical model as its own draft is always right.
    speculation["draft"] = str(tiny_dir)
    with serving(tiny_dir, ServerSettings(drain_s=5), speculative_config=speculation) as (url, _):
        ask(url, max_tokens=40)
        now = samples(url)
        assert now["spec_decode_num_accepted_tokens_total"] >= now["spec_decode_num_draft_tokens_total"] - 3


def test_preemptions_count(tiny_dir):
    options = dict(max_num_seqs=8, block_size=4, kv_cache_memory=140_000)
    with serving(tiny_dir, ServerSettings(drain_s=5), **options) as (url, app):
        ask(url, n=6, max_tokens=100, temperature=1, seed=1)
        assert samples(url)["num_preemptions_total"] == app.state.context.llm.stats().preemptions > 0


def test_adapters_of_live_requests_are_listed(own, tiny_dir, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    url, app = own
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_dir), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    loaded = httpx.post(f"{url}/v1/load_lora_adapter", json={"lora_name": "mine", "lora_path": str(tmp_path)})
    assert loaded.status_code == 200, loaded.text
    assert [m["id"] for m in httpx.get(f"{url}/v1/models").json()["data"]] == ["tiny", "mine"]
    info = lambda: families(url)["lora_requests_info"].samples[0].labels
    assert info()["max_lora"] == "8" and info()["running_lora_adapters"] == info()["waiting_lora_adapters"] == ""
    body = {"model": "mine", "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert info()["running_lora_adapters"] == "mine"
        busy = httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "mine"})
        assert busy.status_code == 400 and "running" in busy.json()["error"]["message"]
    wait_idle(app.state.context.llm)
    assert httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 200
    unknown = httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "mine"})
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"


def test_metrics_answer_while_loading(tiny_dir):
    from tests.serve.http.conftest import listening
    from wager.serve.http.app import create_app

    def load(metrics):
        raise ValueError("no model here")

    with listening(create_app(load, ServerSettings())) as (url, _):
        answer = httpx.get(f"{url}/metrics")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert "vllm:num_requests_running" in answer.text
