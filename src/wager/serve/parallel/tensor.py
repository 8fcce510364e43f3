"""A target split over processes by tensor parallelism: every process holds a slice of each layer and computes every step with the others.

For a user: `tensor_parallel_size=2` (`wager serve --tensor-parallel-size 2`). Process 0 is the engine: it schedules, drafts, samples and
holds the output head. The others are started by it, hold their slices of the weights and of the KV cache, and see nothing but token ids,
positions and block tables. Query and key/value heads and the MLP's width are divided; after attention and after the MLP the partial sums
are added over all processes (Megatron-LM, arXiv 1909.08053) with gloo. Speculation saves passes, so it saves these messages too
(SpecInfer, arXiv 2305.09781): drafts run in process 0 alone.

Exact up to the order of additions: a sum over two halves rounds differently from one over the whole.

Shape legend: T tokens, D hidden size.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wager import kernels
from wager.errors import UsageError, WagerError
from wager.models.config import read_json
from wager.models.llama import Block, Llama, LlamaConfig
from wager.models.loader import LoadedModel, Packing, checkpoint_dtype, load_tensors, open_plain, resolve
from wager.models.registry import family_of
from wager.serve.batch import Batch
from wager.serve.cache.pool import KVPool, groups_for
from wager.serve.runner import ModelRunner, PagedAttend, layer_groups

TIMEOUT = timedelta(minutes=10)  # of one sum: processes that were stopped for minutes may still come
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # divided along their output
ROWS = ("o_proj", "down_proj")  # divided along their input; their outputs are summed


@dataclass(frozen=True)
class Shard:
    """Slice `rank` of `size`. `group` sums over the processes; None for a slice that never runs."""

    rank: int
    size: int
    group: Any = None

    def sum(self, y_TD: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.group is not None:
            try:
                self.group.allreduce([y_TD]).wait()
            except RuntimeError as error:
                raise WagerError(f"a tensor-parallel process is gone: {error}; restart the engine") from None
        return y_TD

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(self.size, dim)[self.rank]


class ShardedBlock(Block):
    """The second half of a block is not one kernel here: a sum over processes lies in its middle."""

    def fused(self, x_TD: Tensor) -> tuple[kernels.BlockInput | None, kernels.BlockOutput | None]:
        return super().fused(x_TD)[0], None


class ShardedLlama(Llama):
    """One process's slice of a Llama: a Llama with fewer heads and a narrower MLP, and sums behind two of its linears."""

    def __init__(self, raw: dict[str, Any], dtype: torch.dtype, shard: Shard):
        whole = LlamaConfig.from_checkpoint(raw)
        for what, count in (
            ("attention heads", whole.num_attention_heads),
            ("key/value heads", whole.num_key_value_heads),
            ("MLP columns", whole.intermediate_size),
        ):
            if count % shard.size:
                raise UsageError(
                    f"tensor_parallel_size {shard.size} does not divide the model's {count} {what}",
                    param="tensor_parallel_size",
                )
        self.shard = shard
        super().__init__(
            replace(
                whole,
                num_attention_heads=whole.num_attention_heads // shard.size,
                num_key_value_heads=whole.num_key_value_heads // shard.size,
                intermediate_size=whole.intermediate_size // shard.size,
            ),
            dtype,
        )
        if shard.rank:
            self.head = nn.Identity()  # only process 0 makes logits
        for block in self.layers:
            for name in ("attention.output", "mlp.down"):
                block.get_submodule(name).register_forward_hook(_summing(shard))

    def make_block(self, layer: int, dtype: torch.dtype | None) -> nn.Module:
        return ShardedBlock(self.config, layer, dtype)

    def checkpoint_tensor(self, name: str, checkpoint: Any) -> Tensor:
        """This process's part. A bias behind a sum is added once."""
        tensor = super().checkpoint_tensor(name, checkpoint)
        linear, kind = name.rsplit(".", 2)[-2:]
        if linear in COLUMNS:
            return self.shard.of(tensor, 0)
        if linear in ROWS:
            if kind == "weight":
                return self.shard.of(tensor, 1)
            return tensor if self.shard.rank == 0 else torch.zeros_like(tensor)
        return tensor


def _summing(shard: Shard) -> Callable[..., Tensor]:
    """A hook behind a linear whose input is divided."""

    def hook(_module: nn.Module, _inputs: Any, y_TD: Tensor) -> Tensor:
        return shard.sum(y_TD)

    return hook


def load_shard(name: str | Path, dtype: str, shard: Shard, quantization: str | None = None) -> LoadedModel:
    """Read one process's slice of a checkpoint and pack it. Raises UsageError for families that cannot be divided."""
    path = resolve(name)
    raw, checkpoint = open_plain(path, "tensor_parallel_size")
    with checkpoint:
        if family_of(raw) is not Llama:
            raise UsageError(
                f"tensor_parallel_size needs a model of the Llama layout (llama, mistral, qwen2, qwen3), not {raw.get('model_type')!r}",
                param="tensor_parallel_size",
            )
        with torch.device("meta"):
            model = ShardedLlama(raw, checkpoint_dtype(raw if dtype == "auto" else {"dtype": dtype}), shard)
        load_tensors(model, checkpoint, torch.device("cpu"), Packing(quantization))
    model.eval().requires_grad_(False)
    return LoadedModel(model, raw, read_json(path / "generation_config.json", required=False), path)


# -- process 0 -------------------------------------------------------------------------------------------------------------------


class Team:
    """The other processes. They end with this object, or when this process does."""

    def __init__(self, name: str | Path, dtype: str, size: int, quantization: str | None = None):
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="wager-tensor-")
        store = str(Path(self._folder.name) / "store")
        threads = max(1, (os.cpu_count() or 1) // size)
        self._pipes: list[Connection] = []
        self._processes: list[subprocess.Popen] = []
        self._stop = weakref.finalize(self, _stop, self._pipes, self._processes)
        for rank in range(1, size):
            ours, theirs = socketpair()
            start = {
                "store": store, "rank": rank, "size": size, "name": str(resolve(name)), "dtype": dtype, "threads": threads,
                "quantization": quantization,
            }  # fmt: skip
            command = [sys.executable, "-m", "wager.serve.parallel.tensor_worker", str(theirs.fileno())]
            self._processes.append(subprocess.Popen(command, pass_fds=[theirs.fileno()], env=_environment(threads)))
            theirs.close()
            self._pipes.append(Connection(ours.detach()))
            self._pipes[-1].send(start)
        torch.set_num_threads(threads)
        self.shard = Shard(0, size, join(store, 0, size))

    def send(self, message: tuple[Any, ...]) -> None:
        """To all processes, which answer nothing: what they compute comes back in the sums."""
        payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        for number, (pipe, process) in enumerate(zip(self._pipes, self._processes, strict=True), 1):
            try:
                pipe.send_bytes(payload)
            except OSError:
                raise WagerError(
                    f"tensor-parallel process {number} has ended with status {process.poll()}; restart the engine"
                ) from None

    def close(self) -> None:
        self._stop()


def _environment(threads: int) -> dict[str, str]:
    """The worker imports what we import, also from a source tree."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _stop(pipes: list[Connection], processes: list[subprocess.Popen]) -> None:
    for pipe in pipes:
        pipe.close()  # its end reads that as the end
    for process in processes:
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    pipes.clear()
    processes.clear()


def join(store: str, rank: int, size: int) -> Any:
    """A process group of our own: the caller's default group, if any, is left alone."""
    store_ = dist.FileStore(store, size)  # pyright: ignore[reportPrivateImportUsage]
    return dist.ProcessGroupGloo(store_, rank, size, TIMEOUT)


class TensorParallelRunner(ModelRunner):
    """Runs batches on all processes; every change of the KV cache is carried out by all of them."""

    def __init__(self, runner: ModelRunner, team: Team):
        super().__init__(runner.model, runner.pool, runner.blocks)
        self.team = team
        block_size = self.blocks.block_size
        num_blocks = [len(self.pool.k[group.layers[0]]) // block_size for group in self.blocks.groups]
        team.send(("pool", num_blocks, block_size, self.pool.k[0].dtype, self.pool.num_host_blocks))

    def run(self, batch: Batch, copies: Sequence[tuple[int, int, int]]) -> Tensor:
        if batch.adapters is not None:
            raise UsageError("adapters cannot be used with tensor_parallel_size", param="model")
        self.team.send(("run", replace(batch, spans=(), logit_rows_L=torch.empty(0)), list(copies)))
        return super().run(batch, copies)

    def move(self, group: int, source_slots: Tensor, target_slots: Tensor) -> None:
        self.team.send(("move", group, source_slots, target_slots))
        super().move(group, source_slots, target_slots)


# -- the other processes ---------------------------------------------------------------------------------------------------------


def work(pipe: Connection) -> None:
    """Load a slice, then do as process 0 says until it closes the pipe."""
    start = pipe.recv()
    torch.set_num_threads(start["threads"])
    shard = Shard(start["rank"], start["size"], join(start["store"], start["rank"], start["size"]))
    model = load_shard(start["name"], start["dtype"], shard, start["quantization"]).model
    pool: KVPool | None = None
    block_size = 0
    groups, group_of_layer = groups_for(model.attention), layer_groups(model)
    while True:
        try:
            kind, *rest = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        if kind == "pool":
            num_blocks, block_size, dtype, num_host_blocks = rest
            pool = KVPool(model.attention, groups, num_blocks, block_size, dtype, num_host_blocks=num_host_blocks)
        elif kind == "move":
            assert pool is not None
            pool.move(*rest)
        else:
            assert pool is not None and kind == "run"
            batch, copies = rest
            with torch.inference_mode():
                pool.copy_blocks(copies)
                model(batch.tokens_T, batch.positions_T, PagedAttend(model, pool, group_of_layer, block_size, batch))
