"""`wager generate`, `wager chat` and `wager bench serve` as a user runs them, against a server that `wager serve` started."""

import json
import os
import subprocess
import sys

import httpx
import pytest

from tests.serve.http.process import started
from wager import cli
from wager.serve.llm import LLM
from wager.serve.params import SamplingParams

KEY = "cli-key"


def wager(*args, stdin=None, key=None):
    command = [sys.executable, "-m", "wager", *map(str, args)]
    environment = {k: v for k, v in os.environ.items() if k not in ("WAGER_API_KEY", "OPENAI_API_KEY")}
    environment |= {"WAGER_API_KEY": key} if key else {}
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=600, env=environment)


@pytest.fixture(scope="module")
def url(tiny_dir):
    with started(tiny_dir, "--api-key", KEY) as (base, _):
        yield base


def greedy_chat(url, messages, max_tokens):
    body = {"messages": messages, "temperature": 0, "max_tokens": max_tokens}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=600)
    return answer.json()["choices"][0]["message"]["content"]


def test_chat_speaks_to_a_server_and_remembers_until_reset(url):
    spoken = wager(
        "chat", "--url", f"{url}/v1", "--system", "Be brief.", "--temperature", 0, "--max-tokens", 6, key=KEY,
        stdin="One two\nThree\n/reset\nThree\n/quit\n",
    )  # fmt: skip
    assert spoken.returncode == 0, spoken.stderr
    system = {"role": "system", "content": "Be brief."}
    first = greedy_chat(url, [system, {"role": "user", "content": "One two"}], 6)
    turns = [{"role": "user", "content": "One two"}, {"role": "assistant", "content": first}]
    second = greedy_chat(url, [system, *turns, {"role": "user", "content": "Three"}], 6)
    fresh = greedy_chat(url, [system, {"role": "user", "content": "Three"}], 6)
    assert spoken.stdout == "".join(f"{text}\n" for text in (first, second, fresh))
    assert second != fresh and "tiny" in spoken.stderr


def test_chat_says_in_one_line_what_is_wrong(url):
    for args, key, message in (
        (("--url", f"{url}/v1"), "wrong", "401"),
        (("--url", f"{url}/v1", "--temperature", -1), KEY, "temperature"),
    ):
        refused = wager("chat", *args, key=key, stdin="Hi\n")
        assert refused.returncode == 1 and message in refused.stderr and "Traceback" not in refused.stderr
        assert refused.stderr.strip().splitlines()[-1].startswith("wager: error:")


def test_chat_runs_the_model_itself_when_there_is_no_url(tiny_dir, url):
    spoken = wager("chat", tiny_dir, "--temperature", 0, "--max-tokens", 6, stdin="One two\n")
    assert spoken.returncode == 0, spoken.stderr
    assert spoken.stdout == greedy_chat(url, [{"role": "user", "content": "One two"}], 6) + "\n"


def test_generate_prints_what_the_engine_says(tiny_dir):
    params = SamplingParams(temperature=0.7, max_tokens=9, seed=3)
    expected = LLM(str(tiny_dir)).generate("Once upon", params)[0].outputs[0].text
    piped = wager("generate", "-", "--model", tiny_dir, "--max-tokens", 9, "--seed", 3, stdin="Once upon")
    assert (piped.returncode, piped.stdout) == (0, expected + "\n"), piped.stderr


def test_generate_refuses_in_one_line(tiny_dir, tmp_path, capsys):
    for args, status, message in (
        (("x", "--model", tmp_path), 1, "config.json"),
        (("x", "--model", tiny_dir, "--temperature", -1), 2, "temperature"),
        (("x", "--model", tiny_dir, "--speculative-config", "{"), 2, "speculative-config"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["generate", *map(str, args)])
        said = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == status and len(said) == 1 and message in said[0]


def test_bench_serve_measures_the_server(url, tmp_path):
    out = tmp_path / "result.json"
    run = wager(
        "bench", "serve", "--base-url", url, "--num-prompts", 12, "--random-input-len", 20, "--random-output-len", 10,
        "--vocab-size", 300, "--request-rate", 100, "--result-filename", out, "--save-detailed", key=KEY,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr + run.stdout
    record = json.loads(out.read_text())
    assert record["completed"] == 12 and record["total_output_tokens"] == 120 and record["total_input_tokens"] == 240
    assert record["model_id"] == "tiny" and record["output_throughput"] > 0
    assert 0 < record["median_ttft_ms"] <= record["p99_ttft_ms"] and record["mean_e2el_ms"] >= record["mean_ttft_ms"]
    assert "Time to first token" in run.stdout
    metrics = httpx.get(f"{url}/metrics").text
    assert 'vllm:request_success_total{finished_reason="length",model_name="tiny"}' in metrics
