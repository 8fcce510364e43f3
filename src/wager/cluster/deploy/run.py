"""Starts everything a plan names, and stops it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from wager.cluster.deploy.engine import DeployedLLM, deploy_engine
from wager.cluster.deploy.plan import DeployPlan, ReplicaPlan
from wager.cluster.deploy.process import Launcher
from wager.cluster.deploy.router import RoutedLLM
from wager.errors import UsageError
from wager.serve.config import EngineConfig
from wager.serve.observe import Observer
from wager.serve.parallel.stage import skeleton


class Deployment(RoutedLLM):
    """A plan that runs. Ends its processes with it."""

    def __init__(self, replicas: Sequence[DeployedLLM], weights: Sequence[float], launcher: Launcher):
        super().__init__(replicas, weights)
        self.launcher = launcher

    async def shutdown(self, drain_s: float = 0.0) -> None:
        await super().shutdown(drain_s)
        self.launcher.close()


def start(
    plan: DeployPlan, launcher: Launcher, name: str | None = None, observers: Sequence[Observer] = ()
) -> Deployment:
    """Load every stage of every replica at once. Raises UsageError when the checkpoint has another number of layers than the plan."""
    layers = len(skeleton(plan.checkpoint)[0].attention)
    if layers != plan.layers:
        raise UsageError(
            f"the plan is for {plan.layers} layers and {plan.checkpoint} has {layers}; name its checkpoint in [deploy], or plan again"
        )
    config = EngineConfig(model=plan.checkpoint, max_loras=0, **plan.engine)

    def one(replica: ReplicaPlan) -> DeployedLLM:
        engine, running = deploy_engine(
            config, [(s.first, s.last) for s in replica.stages], launcher, replica.name,
            [s.resource for s in replica.stages], plan.micro_batches, plan.threads, observers,
        )  # fmt: skip
        running.notice_s = plan.notice_s
        return DeployedLLM(engine, running, name or plan.checkpoint)

    try:
        with ThreadPoolExecutor(len(plan.replicas)) as pool:
            replicas: list[Any] = list(pool.map(one, plan.replicas))
    except Exception:
        launcher.close()
        raise
    return Deployment(replicas, [r.weight for r in plan.replicas], launcher)
