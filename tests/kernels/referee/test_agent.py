"""The agent loop: our own server with the demo model proposes rubbish, which is judged and rejected; endpoints that fail are named."""

import http.server
import json
import threading

import pytest

from tests.kernels.referee import cheats
from tests.serve.http.process import started
from wager.errors import WagerError
from wager.kernels.referee.agent import Endpoint, code_of
from wager.kernels.referee.architectures import architecture
from wager.kernels.referee.capture import capture, select
from wager.kernels.referee.judge import Options, Status
from wager.kernels.referee.search import search

OPTIONS = Options(timing=False, flush_bytes=1 << 20)


@pytest.fixture(scope="module")
def cases():
    return select([c for held in (False, True) for c in capture(architecture("llama"), held)], "SiluAndMul", 1)


class Scripted(http.server.BaseHTTPRequestHandler):
    """Answers with `answers` in turn and keeps what it was asked."""

    answers: list = []
    asked: list = []

    def do_POST(self):
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        status, body = self.answers[len(self.asked) - 1]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def scripted():
    Scripted.answers, Scripted.asked = [], []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", Scripted
    server.shutdown()
    server.server_close()


def said(text):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def test_a_model_that_learns_from_the_report(cases, scripted, tmp_path):
    url, script = scripted
    wrong, right = (
        cheats.HEAD + source for source in (cheats.NUMERIC["zeros"][1], cheats.HONEST["another formula"][1])
    )
    script.answers = [said("I cannot help."), said(f"Here:\n```python\n{wrong}```\nfast!"), said(f"```py\n{right}```")]
    found = search("SiluAndMul", Endpoint(url, "m", "SiluAndMul", 3), *cases, tmp_path, OPTIONS)
    statuses = [a.verdict.status for a in found]
    assert statuses == [Status.RUNTIME_ERROR, Status.INCORRECT_NUMERICAL, Status.PASSED]
    assert "class SiluAndMul(nn.Module)" in script.asked[0]["messages"][0]["content"]
    assert "INCORRECT_NUMERICAL" in script.asked[2]["messages"][-1]["content"], "the model reads what the judge said"
    assert len(list(tmp_path.glob("*.py"))) == 3


def test_our_own_server_proposes_rubbish_and_is_refused(cases, tmp_path):
    with started("demo", "--max-model-len", "1024") as (url, _):
        endpoint = Endpoint(f"{url}/v1", "tiny", "SiluAndMul", 2, max_tokens=16)
        found = search("SiluAndMul", endpoint, *cases, tmp_path, OPTIONS)
    assert len(found) == 2 and all(a.verdict.status is not Status.PASSED and a.verdict.reason for a in found)


def test_endpoints_that_fail(scripted):
    url, script = scripted
    script.answers = [(401, '{"error": {"message": "no key"}}'), (200, "not json"), (200, "{}")]
    for words in ("401.*no key", "OpenAI-compatible", "OpenAI-compatible"):
        with pytest.raises(WagerError, match=words):
            Endpoint(url, "m", "SiluAndMul", 1).propose([])
    with pytest.raises(WagerError, match="OpenAI-compatible"):
        Endpoint("http://127.0.0.1:1/v1", "m", "SiluAndMul", 1).propose([])


def test_code_of():
    assert code_of("a ```python\nx = 1\n``` b ```\ny = 2\n```") == "y = 2\n"
    assert code_of("x = 1") == "x = 1"
