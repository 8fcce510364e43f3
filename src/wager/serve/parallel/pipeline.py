"""A pipeline of stages in separate processes that looks to the engine like one model runner.

Rank 0 is the engine: it schedules, keeps the block tables, samples. Rank i is stage i. A step's spans are dealt into micro-batches, so that
a stage computes one while the next stage computes the one before. Exact: each row's logits are what one process computes.

When a member dies the step is repeated as a whole in a new group: keys and values written twice are the same bits, block copies are made
once (the stages note it), and no token is drawn before a step's logits have arrived. So nothing is generated twice. (State that outlives
its engine process: SpotServe, arXiv 2311.15566.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wager.errors import UsageError
from wager.models.base import Adapters, Model
from wager.serve.batch import Batch
from wager.serve.cache.block_manager import BlockManager
from wager.serve.parallel.stage import Stage, batch_arrays, batch_from
from wager.serve.parallel.wire import Group, StageLost
from wager.serve.runner import ModelRunner, SpanInput

RUN, HEAD, LEAVE = "run", "head", "leave"


class KVLost(Exception):
    """The keys and values of a stage are gone: every running request must be computed again. The stage itself is back, in `group`."""

    def __init__(self, group: Group):
        super().__init__("the keys and values of a stage are lost")
        self.group = group


@dataclass(frozen=True)
class MicroBatches:
    """A step's work: the batch as the engine sees it, and the parts it is computed in, in the same order of rows."""

    whole: Batch
    parts: tuple[Batch, ...]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)


def deal(inputs: Sequence[SpanInput], count: int) -> list[list[SpanInput]]:
    """Cut spans into at most `count` consecutive runs with about equal numbers of tokens."""
    total = sum(i.length for i in inputs)
    runs: list[list[SpanInput]] = [[]]
    seen = 0
    for one in inputs:
        if runs[-1] and len(runs) < count and seen >= total * len(runs) / count:
            runs.append([])
        runs[-1].append(one)
        seen += one.length
    return runs


class PipelineRunner(ModelRunner):
    """The engine's runner over a group of stages.

    model: the whole network on the meta device. recover: called with the failure when a member is lost; returns the new group, or raises
    KVLost once the pipeline works again but without what it had computed. before_step: called between steps, may change `group`.
    wants_hidden: whether a batch's hidden rows are needed here, not just its logits.
    """

    def __init__(
        self,
        model: Model,
        blocks: BlockManager,
        group: Group,
        recover: Callable[[StageLost], Group],
        micro_batches: int = 1,
        before_step: Callable[[], None] = lambda: None,
        wants_hidden: Callable[[Batch], bool] = lambda batch: False,
    ):
        self.model, self.blocks, self.group = model, blocks, group
        self.recover, self.before_step, self.wants_hidden = recover, before_step, wants_hidden
        self.micro_batches = micro_batches
        self.device = torch.device("cpu")
        self.group_of_layer = [0] * len(model.attention)
        for number, kv_group in enumerate(blocks.groups):
            for layer in kv_group.layers:
                self.group_of_layer[layer] = number
        self.step = 0
        self.step_s = 0.0  # a running mean
        self._logits: tuple[Tensor, Tensor] | None = None

    def build(self, inputs: Sequence[SpanInput], adapters: Callable[[Tensor], Adapters | None] | None = None) -> Any:
        if adapters is not None:
            raise UsageError("adapters are not served by a pipeline of processes", param="model")
        runs = deal(inputs, self.micro_batches)
        whole = super().build(inputs)
        return MicroBatches(
            whole, (whole,) if len(runs) == 1 else tuple(super(PipelineRunner, self).build(r) for r in runs)
        )

    def forward(self, batch: Any) -> Tensor:
        """Hidden rows [T, D] if they are wanted, else [T, 0]; the logits of the batch's rows are kept for `logits`."""
        self.before_step()
        copies = self.blocks.take_copies()
        hidden = self.wants_hidden(batch.whole)
        self.step += 1
        begun = time.perf_counter()

        def work() -> tuple[Tensor, Tensor]:
            return self._run(batch, copies, hidden)

        hidden_TD, logits_LW = self._until_done(work)
        elapsed = time.perf_counter() - begun
        self.step_s = elapsed if not self.step_s else 0.9 * self.step_s + 0.1 * elapsed
        self._logits = batch.whole.logit_rows_L, logits_LW
        return hidden_TD

    def logits(self, hidden_TD: Tensor, rows: Tensor) -> Tensor:
        if self._logits is not None and rows is self._logits[0]:
            return self._logits[1]
        if not len(rows):
            return torch.empty(0, self.model.vocab_size)

        def work() -> Tensor:
            last = self.group.size - 1
            for rank in range(1, self.group.size):
                self.group.send_message(rank, {"op": HEAD}, [hidden_TD[rows].numpy()] if rank == last else [])
            return self.group.receive(torch.empty(len(rows), self.model.vocab_size), last)

        return self._until_done(work)

    def leave(self) -> None:
        """Send the stages out of the group, which ends it."""
        try:
            for rank in range(1, self.group.size):
                self.group.send_message(rank, {"op": LEAVE})
        except StageLost:
            pass  # the others notice by themselves
        self.group.close()

    def _until_done(self, work: Callable[[], Any]) -> Any:
        while True:
            try:
                return work()
            except StageLost as lost:
                try:
                    self.group = self.recover(lost)
                except KVLost as missing:
                    self.group = missing.group
                    raise

    def _run(self, batch: MicroBatches, copies: list[tuple[int, int, int]], hidden: bool) -> tuple[Tensor, Tensor]:
        group, last = self.group, self.group.size - 1
        hiddens, logits = [], []
        for i, part in enumerate(batch.parts):
            described, arrays = batch_arrays(part)
            head = {
                "op": RUN, "step": self.step, "final": i == len(batch.parts) - 1, "hidden": hidden,
                "copies": [list(c) for c in copies] if i == 0 else [], **described,
            }  # fmt: skip
            for rank in range(1, group.size):
                group.post_message(rank, head, arrays)
        for part in batch.parts:
            count = len(part.logit_rows_L)
            if hidden:
                hiddens.append(group.receive(torch.empty(part.num_tokens, self.model.hidden_size), last))
            if count:
                logits.append(group.receive(torch.empty(count, self.model.vocab_size), last))
        group.receive(
            torch.empty(1, dtype=torch.int64), last
        )  # the step is done everywhere: every stage has its keys and values
        group.settle()
        none = torch.empty(batch.whole.num_tokens, 0)
        return torch.cat(hiddens) if hidden else none, torch.cat(logits) if logits else torch.empty(0, 0)


def serve_stage(stage: Stage, group: Group) -> str:
    """Compute for the group until it ends: "left" when told to, or the reason when a member was lost."""
    try:
        while True:
            head, arrays = group.receive_message(0)
            if head["op"] == LEAVE:
                return "left"
            if head["op"] == HEAD:
                if arrays:
                    group.send(stage.logits(torch.from_numpy(arrays[0]), torch.arange(len(arrays[0]))), 0)
                continue
            _run_stage(stage, group, head, batch_from(head, arrays))
    except StageLost as lost:
        return str(lost)
    finally:
        group.close()


def _run_stage(stage: Stage, group: Group, head: dict[str, Any], batch: Batch) -> None:
    """Receive from the stage before, compute, send to the one after. A step's end travels the same way, so the last stage tells the engine."""
    rank, last = group.rank, group.size - 1
    stage.begin(head["step"], head["copies"])
    received = None
    if rank > 1:
        received = group.receive(torch.empty(stage.entry_shape(batch.num_tokens)), rank - 1)
    computed = stage.forward(batch, received).contiguous()
    group.settle()
    if rank < last:
        group.post(computed, rank + 1)  # the next part may be computed while this one waits to be taken
    else:
        if head["hidden"]:
            group.send(computed.float(), 0)
        if len(batch.logit_rows_L):
            group.send(stage.logits(computed, batch.logit_rows_L).contiguous(), 0)
    if head["final"]:
        group.settle()
        stage.done(head["step"])
        if rank == last:
            group.send(torch.tensor([head["step"]]), 0)


def live_blocks(blocks: BlockManager) -> list[np.ndarray]:
    """Per group, the blocks whose content matters: held by a sequence, or findable as a prefix."""
    return [blocks.in_use(group) for group in range(len(blocks.groups))]
