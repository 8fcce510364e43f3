"""A real server on a free loopback port, over the tiny model, for the whole session."""

import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

from wager.serve.http.app import create_app
from wager.serve.http.server import server_config
from wager.serve.http.settings import ServerSettings
from wager.serve.llm import AsyncLLM

KEY = "test-key"


@contextmanager
def serving(model_dir, settings=None, **options):
    """(base URL, app) of a running server that has loaded its model."""

    def load(metrics):
        return AsyncLLM(str(model_dir), served_model_name="tiny", observers=[metrics], **options)

    with listening(create_app(load, settings)) as (url, app):
        deadline = time.monotonic() + 300
        while httpx.get(f"{url}/health").status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        yield url, app


@contextmanager
def listening(app):
    """(base URL, app) as soon as the server answers at all."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(server_config(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    deadline = time.monotonic() + 300
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield url, app
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def server(tiny_dir):
    settings = ServerSettings(api_keys=(KEY,), drain_s=5)
    with serving(tiny_dir, settings, max_num_seqs=16, enable_prefix_caching=True) as running:
        yield running


@pytest.fixture(scope="session")
def closing(closing_dir):
    """(base URL, app) of a server whose model ends what it begins: for tool calls and structured outputs."""
    settings = ServerSettings(api_keys=(KEY,), drain_s=5)
    with serving(closing_dir, settings, max_num_seqs=16) as running:
        yield running


@pytest.fixture(scope="session")
def url(server):
    return server[0]


@pytest.fixture(scope="session")
def engine(server):
    return server[1].state.context.llm


@pytest.fixture(scope="session")
def http(url):
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=600) as client:
        yield client


def wait_idle(engine, seconds=120.0):
    """Until the engine holds no request and no block; fails when it does not get there."""
    deadline = time.monotonic() + seconds
    blocks = engine.engine.core.runner.blocks
    while time.monotonic() < deadline:
        if not engine.engine.core.requests and blocks.usage == 0.0:
            blocks.check_invariants()
            return
        time.sleep(0.02)
    raise AssertionError(f"still held: {list(engine.engine.core.requests)}, usage {blocks.usage}")
