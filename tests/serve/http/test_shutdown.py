"""`wager serve` as a process: where it listens, and how it stops."""

import json
import queue
import signal
import subprocess
import sys
import threading
import time

import httpx
import psutil
import pytest

from tests.serve.conftest import build_llama
from tests.serve.http.process import started

TOKENS = 3000


@pytest.fixture(scope="module")
def long_dir(tmp_path_factory):
    """A model with room for answers that take a while."""
    return build_llama(tmp_path_factory.mktemp("long"), max_position_embeddings=8192)


class Reader(threading.Thread):
    """Streams one long answer; `begun` is set at its first text, `text`, `reason` and `done` tell how it ended."""

    def __init__(self, url, prompt, max_tokens):
        super().__init__(daemon=True)
        self.url, self.begun, self.done, self.reason, self.usage, self.failure = (
            url,
            threading.Event(),
            False,
            None,
            None,
            None,
        )
        self.body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "stream": True,
            "ignore_eos": True,
            "temperature": 0,
        }
        self.body["stream_options"] = {"include_usage": True}
        self.start()

    def run(self):
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=self.body, timeout=600) as response:
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        self.done = True
                    elif line.startswith("data: "):
                        chunk = json.loads(line[6:])
                        self.usage = chunk.get("usage") or self.usage
                        for choice in chunk["choices"]:
                            self.reason = choice["finish_reason"] or self.reason
                            self.begun.set()
        except Exception as error:
            self.failure = error


def answer_while_draining(url):
    """The first refusal of a new request after the signal."""
    for _ in range(100):
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 1})
        if answer.status_code != 200:
            return answer
        time.sleep(0.02)
    raise AssertionError("the server went on taking requests after SIGTERM")


def test_sigterm_lets_running_streams_finish_and_refuses_new_ones(long_dir):
    with started(long_dir, "--drain", "60") as (url, process):
        assert listening_on(process) == {"127.0.0.1"}, "the default must be this machine only"
        readers = [Reader(url, [5 + i], TOKENS) for i in range(3)]
        assert all(reader.begun.wait(20) for reader in readers)
        process.send_signal(signal.SIGTERM)
        refused = answer_while_draining(url)
        error = refused.json()["error"]
        assert (
            refused.status_code == 503
            and "shutting down" in error["message"]
            and int(refused.headers["retry-after"]) >= 1
        )
        assert httpx.get(f"{url}/health").status_code == 503
        assert not any(reader.done for reader in readers), "the answers were too short to show anything"
        for reader in readers:
            reader.join(60)
            assert reader.failure is None and reader.done and reader.reason == "length"
            assert reader.usage["completion_tokens"] == TOKENS
        assert process.wait(20) == 0


def listening_on(process):
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    found = [c for pid in family for c in psutil.Process(pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    return {c.laddr.ip for c in found}


def test_a_drain_comes_to_an_end(long_dir):
    """What is not done in time is ended, told so, and the process still leaves with status 0. Ctrl-C does the same."""
    with started(long_dir, "--drain", "0.5") as (url, process):
        reader = Reader(url, [7], 8000)
        assert reader.begun.wait(20)
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        assert process.wait(20) == 0 and time.monotonic() - begun < 8
        reader.join(10)
        assert reader.failure is None and reader.done and reader.reason == "abort"


def test_a_key_is_advised_beyond_loopback_and_errors_are_one_line(long_dir, tmp_path):
    lines = queue.Queue()
    command = [sys.executable, "-m", "wager", "serve", str(long_dir), "--host", "0.0.0.0", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    threading.Thread(target=lambda: [lines.put(line) for line in process.stdout], daemon=True).start()
    bad = subprocess.run(
        [*command[:-1], "0", "--tool-call-parser", "nope"], capture_output=True, text=True, timeout=600
    )
    assert (
        bad.returncode == 2
        and bad.stderr.startswith("wager: error:")
        and "nope" in bad.stderr
        and "Traceback" not in bad.stderr
    )
    try:
        assert "http://0.0.0.0:" in lines.get(timeout=600) and "warning" in lines.get(timeout=600)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        process.communicate()


def test_a_model_that_cannot_be_loaded_ends_the_server_with_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "wager", "serve", str(tmp_path), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("wager: error: ") and str(tmp_path) in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("option, value", [("--quantization", "int3"), ("--port", "99999")])
def test_a_wrong_option_ends_it_before_it_listens(option, value):
    done = subprocess.run(
        [sys.executable, "-m", "wager", "serve", "demo", option, value], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and value in done.stderr
