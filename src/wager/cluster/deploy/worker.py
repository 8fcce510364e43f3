"""What runs in a stage's process: the stage, its place in a group, and the moving of its state to another machine."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch

from wager.serve.parallel.pipeline import serve_stage
from wager.serve.parallel.stage import DONE_STEP, Stage, StageSpec
from wager.serve.parallel.wire import Group

SENDER, RECEIVER = 0, 1


class StageWorker:
    """Called from the deployment, one method at a time; `serve` returns when its group ends."""

    def __init__(self, spec: StageSpec):
        self.spec = spec
        self.stage: Stage | None = None

    def bytes_needed(self) -> int:
        return Stage(self.spec).bytes_needed

    def load(self, path: str, size: int) -> dict[str, Any]:
        """Map a context daemon's segment and bring the weights in."""
        begun = time.perf_counter()
        memory = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        self.stage = Stage(self.spec, memory)
        source = self.stage.load()
        return {
            "weights_from": source,
            "seconds": time.perf_counter() - begun,
            "step": int(self.stage.ledger[DONE_STEP]),
        }

    def serve(self, host: str, port: int, name: str, rank: int, size: int) -> str:
        assert self.stage is not None
        return serve_stage(self.stage, Group(host, port, name, rank, size))

    def send_state(self, host: str, port: int, name: str, blocks: list[np.ndarray]) -> int:
        """Send KV blocks (first: they cannot be had elsewhere), then weights, to a worker that calls `receive_state`; bytes sent."""
        assert self.stage is not None
        group = Group(host, port, name, SENDER, 2)
        sent = 0
        for number, wanted in enumerate(blocks):
            for pool in self.stage.blocks(number):
                rows = pool[torch.from_numpy(wanted)].contiguous()
                group.send(rows, RECEIVER)
                sent += rows.numel() * rows.dtype.itemsize
        group.send(self.stage.ledger, RECEIVER)
        group.send(self.stage.weights, RECEIVER)
        group.close()
        return sent + self.stage.weight_bytes

    def receive_state(
        self, host: str, port: int, name: str, blocks: list[np.ndarray], path: str, size: int
    ) -> dict[str, Any]:
        """Take what `send_state` sends into a fresh segment, and load from it."""
        group = Group(host, port, name, RECEIVER, 2)
        stage = Stage(self.spec, torch.from_file(path, shared=True, size=size, dtype=torch.uint8))
        for number, wanted in enumerate(blocks):
            for pool in stage.blocks(number):
                rows = torch.empty((len(wanted), *pool.shape[1:]), dtype=pool.dtype)
                pool[torch.from_numpy(wanted)] = group.receive(rows, SENDER)
        ledger = group.receive(torch.empty_like(stage.ledger), SENDER)
        group.receive(stage.weights, SENDER)
        stage.ledger.copy_(ledger)
        group.close()
        return self.load(path, size)

    def pid(self) -> int:
        return os.getpid()
