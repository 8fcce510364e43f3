"""`wager deploy` as a user runs it: two replicas of two stages, the OpenAI API in front, a kill in between, SIGTERM to end."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

PLAN = """model = "demo"
layers = 5
[deploy]
max_num_seqs = 4
max_model_len = 128
kv_cache_memory = 2000000
[[node]]
name = "n0"
layers = [0, 2]
replica = "a"
weight = 2
[[node]]
name = "n1"
layers = [2, 5]
replica = "a"
[[node]]
name = "n2"
layers = [0, 5]
replica = "b"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deploy")
    (folder / "plan.toml").write_text(PLAN)
    command = [sys.executable, "-m", "wager", "deploy", str(folder / "plan.toml"), "--launcher", "local", "--port", "0"]
    path = os.pathsep.join([os.path.abspath("src"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    assert process.stdout is not None
    base, lines = "", []
    for line in process.stdout:
        lines.append(line)
        if "OpenAI API" in line:
            base = line.split("OpenAI API ")[1].split()[0]
        if line.startswith("ready:"):
            break
    assert base and lines[-1].startswith("ready:"), "".join(lines)
    yield base, process
    if process.poll() is None:
        process.kill()
    process.stdout.close()
    process.wait()


def ask(base, path, **body):
    request = urllib.request.Request(f"{base}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())


def text(base, number):
    answer = ask(base, "completions", prompt=[5, 6, 7 + number], max_tokens=20, temperature=0, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 20
    return answer["choices"][0]["text"]


def children(pid):
    """Processes below pid: (pid, number of memory segments of a context daemon that it maps)."""
    found, queue = [], [pid]
    while queue:
        parent = queue.pop()
        for entry in os.listdir("/proc"):
            if entry.isdigit() and entry not in (str(p) for p, _ in found):
                try:
                    fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
                    if int(fields[1]) == parent:
                        found.append((int(entry), Path(f"/proc/{entry}/maps").read_text().count("memfd:wager-")))
                        queue.append(int(entry))
                except OSError:
                    continue
    return found


def test_serves_through_a_kill_and_drains(server):
    base, process = server
    with ThreadPoolExecutor(6) as pool:
        before = list(pool.map(lambda i: text(base, i), range(6)))
    stages = [pid for pid, segments in children(process.pid) if segments]
    assert len(stages) == 3
    os.kill(stages[0], signal.SIGKILL)
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda i: text(base, i), range(6))) == before
    chat = ask(base, "chat/completions", messages=[{"role": "user", "content": "hi"}], max_tokens=5)
    assert chat["object"] == "chat.completion"
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    assert not [pid for pid in stages if alive(pid)]


def alive(pid):
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_text())  # empty for one that has ended and waits to be collected
    except OSError:
        return False
