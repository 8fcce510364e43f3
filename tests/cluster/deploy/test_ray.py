"""The same on a real Ray cluster of this machine: stages and daemons are actors, each in a process of its own."""

import os
import signal

import pytest

from tests.cluster.deploy.conftest import OPTIONS, generate
from wager.cluster.deploy.engine import deploy_engine, stage_layers
from wager.errors import UsageError
from wager.serve.config import EngineConfig

pytest.importorskip("ray", reason="the deploy extra is not installed")


@pytest.fixture(scope="session")
def ray_launcher():
    from wager.cluster.deploy.ray_process import RayLauncher

    # the cluster's processes import this checkout, whatever is installed
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [os.path.abspath("src"), os.path.abspath("."), os.environ.get("PYTHONPATH", "")]
    )
    launcher = RayLauncher()
    yield launcher
    launcher.close()


def test_two_stages_on_ray_survive_a_kill(ray_launcher, undisturbed):
    engine, replica = deploy_engine(EngineConfig(model="demo", **OPTIONS), stage_layers(5, 2), ray_launcher, "ray")
    pids = {h.pid for p in replica.places for h in (p.worker, p.daemon)}
    assert len(pids) == 4 and os.getpid() not in pids
    assert generate(engine) == undisturbed
    seen = []

    def client(output):
        seen.append(output)
        if len(seen) == 20:
            os.kill(replica.places[1].worker.pid, signal.SIGKILL)

    assert generate(engine, client) == undisturbed
    assert [(e.kind, e.stage, e.weights_from) for e in replica.events] == [("kill", 1, "memory")]
    assert engine.core.tokens_computed_again == 0
    replica.close()


def test_without_ray_one_clear_error(monkeypatch):
    import builtins

    from wager.cluster.deploy.ray_process import require_ray

    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "ray":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError, match=r"pip install 'wager\[deploy\]'"):
        require_ray()
