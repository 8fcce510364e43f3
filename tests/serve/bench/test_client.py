"""The load generator against a real HTTP server with known timing: what it reports must be what happened."""

import asyncio
import json
import socket
import threading
import time

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from wager.errors import UsageError, WagerError
from wager.serve.bench import summary
from wager.serve.bench.cli import serve as bench_serve
from wager.serve.bench.client import Result, Target, first_model, run
from wager.serve.bench.workload import Job

FIRST_S, NEXT_S = 0.08, 0.02


def speaking_server() -> FastAPI:
    """Says max_tokens words: the first after FIRST_S, the others NEXT_S apart. Prompt "fail" is refused, "break" breaks off."""
    app = FastAPI()
    app.state.in_flight = app.state.peak = 0

    @app.get("/v1/models")
    def models():
        return {"data": [{"id": "speaker"}]}

    @app.post("/v1/completions")
    async def completions(request: Request):
        body = await request.json()
        if body["prompt"] == "fail":
            return JSONResponse({"error": {"message": "no"}}, 400)

        async def stream():
            app.state.in_flight += 1
            app.state.peak = max(app.state.peak, app.state.in_flight)
            try:
                for i in range(body["max_tokens"]):
                    await asyncio.sleep(NEXT_S if i else FIRST_S)
                    yield sse({"choices": [{"text": f"w{i} "}], "usage": None})
                    if body["prompt"] == "break":
                        yield sse({"error": {"message": "engine died"}})
                        return
                yield sse({"choices": [{"text": "", "finish_reason": "length"}], "usage": None})
                usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
                yield sse({"choices": [], "usage": usage})
                yield "data: [DONE]\n\n"
            finally:
                app.state.in_flight -= 1

        return StreamingResponse(stream(), media_type="text/event-stream")

    return app


def sse(value) -> str:
    return f"data: {json.dumps(value)}\n\n"


@pytest.fixture(scope="module")
def speaker():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        app = speaking_server()
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", app.state
        server.should_exit = True
        thread.join(timeout=10)


def test_times_tokens_and_text_are_those_of_the_server(speaker):
    url, _ = speaker
    (result,), duration_s = asyncio.run(run(Target(url, "speaker"), [Job((1, 2, 3), 5, 0.0)]))
    assert result.ok and result.text == "w0 w1 w2 w3 w4 "
    assert (result.input_tokens, result.output_tokens) == (3, 5)
    assert len(result.itl_s) == 4 and min(result.itl_s) >= 0  # a busy reader sees tokens in bunches, never early
    assert result.ttft_s >= FIRST_S and result.e2e_s >= FIRST_S + 4 * NEXT_S
    assert result.e2e_s == pytest.approx(result.ttft_s + sum(result.itl_s))
    assert result.tpot_s == pytest.approx(np.mean(result.itl_s)) and duration_s >= result.e2e_s


def test_open_loop_sends_on_time_and_a_limit_holds_back(speaker):
    url, state = speaker
    jobs = [Job((1,), 2, 0.02 * i) for i in range(6)]
    results, _ = asyncio.run(run(Target(url, "speaker"), jobs))
    assert all(r.start_s >= j.arrival_s for r, j in zip(results, jobs, strict=True))
    state.peak = 0
    results, _ = asyncio.run(run(Target(url, "speaker"), jobs, max_concurrency=2))
    assert state.peak <= 2 and all(r.ok for r in results)
    assert summary.peak_concurrency(results) <= 2


def test_failures_are_results(speaker):
    url, _ = speaker
    results, _ = asyncio.run(run(Target(url, "speaker"), [Job("fail", 2), Job("break", 2), Job("fine", 2)]))
    assert [r.ok for r in results] == [False, False, True]
    assert "HTTP 400" in results[0].error and results[1].error == "engine died"
    (gone,), _ = asyncio.run(run(Target("http://127.0.0.1:1", "x"), [Job("a", 1)]))
    assert not gone.ok and "ConnectError" in gone.error


def test_model_is_found_or_the_reason_given(speaker):
    assert asyncio.run(first_model(speaker[0])) == "speaker"
    with pytest.raises(WagerError, match="is the server up"):
        asyncio.run(first_model("http://127.0.0.1:1"))


def test_summary_numbers_by_hand():
    def result(ttft_s, gaps, error=""):
        return Result(Job("x", 1), 0.0, ttft_s, ttft_s + sum(gaps), list(gaps), 10, len(gaps) + 1, "", error)

    results = [result(0.1, [0.01, 0.03]), result(0.3, [0.02, 0.02]), result(0.2, [], error="boom")]
    numbers = summary.summarize(results, 2.0, goodput_ms={"ttft": 200.0})
    assert (numbers["completed"], numbers["failed"]) == (2, 1)
    assert numbers["mean_ttft_ms"] == pytest.approx(200) and numbers["std_ttft_ms"] == pytest.approx(100)
    assert numbers["median_itl_ms"] == pytest.approx(20) and numbers["p99_itl_ms"] == pytest.approx(29.7)
    assert numbers["mean_tpot_ms"] == pytest.approx(20) and numbers["mean_e2el_ms"] == pytest.approx(240)
    assert numbers["output_throughput"] == pytest.approx(3.0) and numbers["request_goodput"] == pytest.approx(0.5)
    assert numbers["total_input_tokens"] == 20 and numbers["max_concurrent_requests"] == 2


@pytest.mark.parametrize("term", ["ttft", "ttft:-1", "itl:5", "ttft:x"])
def test_goodput_terms_are_checked(term):
    with pytest.raises(UsageError, match="goodput"):
        summary.parse_goodput([term])


def test_command_writes_the_vllm_schema_and_a_picture(speaker, tmp_path, capsys):
    out, picture = tmp_path / "r.json", tmp_path / "r.png"
    bench_serve(
        base_url=speaker[0] + "/v1/", num_prompts=4, random_output_len=3, request_rate=200.0, goodput=["ttft:5000"],
        save_detailed=True, result_filename=out, plot=picture,
    )  # fmt: skip
    record = json.loads(out.read_text())
    expected = {
        "duration",
        "completed",
        "total_input_tokens",
        "request_throughput",
        "output_throughput",
        "request_goodput",
    }
    expected |= {f"{s}_{m}_ms" for s in ("mean", "median", "std", "p99") for m in ("ttft", "tpot", "itl", "e2el")}
    assert expected | {"ttfts", "itls", "model_id", "num_prompts"} <= set(record)
    assert record["completed"] == 4 and record["total_output_tokens"] == 12 and record["request_goodput"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Time to first token" in capsys.readouterr().out


def test_command_fails_when_a_request_failed(tmp_path, speaker):
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "fail"}\n{"prompt": "fine", "max_tokens": 2}\n')
    with pytest.raises(WagerError, match="1 of 2 requests failed"):
        bench_serve(base_url=speaker[0], dataset_name="custom", dataset_path=data)  # type: ignore[arg-type]
