"""The process a candidate (or the baseline) runs in. Takes JSON requests and answers over a pipe that the candidate's prints cannot reach.
Knows no expected output.

    load   source, operator                          -> the class is there; once, so that its caches live on
    build  constructor arguments, state file         -> a new module of the class
    run    inputs file, where outputs go             -> outputs as .npy files, what it did to its inputs
    time   inputs file, factors, where outputs go    -> seconds per call, every call with fresh values at a fresh address, cold cache
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
import types
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CLOCK, SHIFT_BYTES, LINE = time.perf_counter, 256, 64
GUARDED = [
    (time, "perf_counter"), (time, "time"), (torch, "equal"), (torch, "allclose"), (torch, "isfinite"), (torch, "empty"), (torch, "load"),
    (torch.Tensor, "clone"), (torch.Tensor, "copy_"), (torch.Tensor, "numpy"), (torch.Tensor, "__eq__"), (np, "save"), (json, "dumps"),
    (torch, "get_num_threads"), (threading, "active_count"), (statistics, "median"), (statistics, "geometric_mean"),
]  # fmt: skip
BEFORE = [getattr(owner, name) for owner, name in GUARDED]


class Judged:
    """One loaded operator and the cache to flush."""

    def __init__(self, request: dict[str, Any]):
        self.flush = torch.zeros(request["flush_bytes"] // 4)
        self.cls, self.compiled = find_class(request), bool(request.get("compiled"))

    def build(self, request: dict[str, Any]) -> dict[str, Any]:
        """A new module with other parameters: what the class kept about the last one's values and weights is wrong now."""
        torch.manual_seed(request["seed"])
        self.module = self.cls(**request["init"]).eval()
        state = torch.load(request["state"], weights_only=True)
        result = self.module.load_state_dict(state, strict=False)
        missing = set(state) - set(self.module.state_dict())
        if missing or result.missing_keys:
            raise ValueError(
                f"parameters differ from the baseline's: lacks {sorted(missing)}, has extra {sorted(result.missing_keys)}"
            )
        if self.compiled:
            self.module = torch.compile(self.module)
        return {}

    @torch.no_grad()
    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        given = torch.load(request["inputs"], weights_only=True)
        kept = [None if t is None else t.clone() for t in given]
        torch.manual_seed(request["seed"])
        outputs = plain(self.module(*given))
        report = conduct(outputs, given, kept)
        return {**report, "outputs": [] if report["hack"] else save(outputs, request["outputs"])}

    @torch.no_grad()
    def time(self, request: dict[str, Any]) -> dict[str, Any]:
        pristine = torch.load(request["inputs"], weights_only=True)
        pools = [None if t is None else Pool(t, len(request["factors"])) for t in pristine]
        for _ in range(request["warmup"]):
            self.module(*[None if p is None else p.place(0, 1.0) for p in pools])
        threads = count_threads()
        seconds, made, reports = [], [], []
        say({"event": "start"})
        begin = CLOCK()
        for i, factor in enumerate(request["factors"]):
            inputs = [None if p is None else p.place(i, factor) for p in pools]
            self.flush.add_(1.0)
            start = CLOCK()
            outputs = self.module(*inputs)
            seconds.append(CLOCK() - start)
            outputs = plain(outputs)
            made.append([y.clone() for y in outputs])
            kept = [None if p is None else p.value(factor) for p in pools]
            reports.append(conduct(outputs, inputs, kept))
        loop_s = CLOCK() - begin
        say({"event": "end"})
        grown = [a - b for a, b in zip(count_threads(), threads, strict=True)]
        hacks = sorted({r["hack"] for r in reports if r["hack"]})
        files = [] if hacks else [save(outputs, f"{request['outputs']}.{i}") for i, outputs in enumerate(made)]
        if grown[0] > 0 or grown[1] > 0:
            hacks.append(f"{max(grown)} threads appeared during the timed calls")
        return {"seconds": seconds, "loop_s": loop_s, "hack": "; ".join(hacks), "outputs": files}


class Pool:
    """Places for an input: each use lies 256 bytes further, so that no result can be kept by address."""

    def __init__(self, pristine: Tensor, uses: int):
        self.pristine = pristine
        dense = pristine.permute(self.order())
        self.shape, self.size, self.step = dense.shape, dense.numel(), max(1, SHIFT_BYTES // pristine.element_size())
        self.room = torch.empty(self.size + uses * self.step, dtype=pristine.dtype)

    def order(self) -> list[int]:
        return sorted(range(self.pristine.dim()), key=lambda d: (-self.pristine.stride(d), d))

    def place(self, use: int, factor: float) -> Tensor:
        order = self.order()
        dense = self.room[use * self.step : use * self.step + self.size].view(self.shape)
        view = dense.permute([order.index(d) for d in range(len(order))])
        view.copy_(self.value(factor))
        return view

    def value(self, factor: float) -> Tensor:
        return self.pristine * factor if self.pristine.dtype.is_floating_point else self.pristine


def find_class(request: dict[str, Any]) -> type:
    if request["source"] is None:
        from wager.kernels.referee.oracle import baseline_class

        return baseline_class(request["operator"])
    for name in [m for m in sys.modules if m.startswith("wager.kernels.referee.") and m != __name__]:
        del sys.modules[name]
    for name in ("operators", "recurrent", "oracle"):
        sys.modules[f"wager.kernels.referee.{name}"] = None  # type: ignore[assignment]  # importing the baseline fails
    module = types.ModuleType("candidate")
    module.__file__ = request["source"]
    sys.modules["candidate"] = module
    exec(compile(Path(request["source"]).read_text(), request["source"], "exec"), module.__dict__)
    if not hasattr(module, request["operator"]):
        raise ValueError(f"{request['source']} defines no class {request['operator']}")
    return getattr(module, request["operator"])


def plain(output: Any) -> list[Tensor]:
    """The tensors of an output. Raises TypeError for anything but tensors and sequences of them."""
    if isinstance(output, (tuple, list)):
        return [t for part in output for t in plain(part)]
    if not isinstance(output, Tensor):
        raise TypeError(f"forward returned {type(output).__name__}, not tensors")
    return [output]


def conduct(outputs: list[Tensor], given: list[Tensor | None], kept: list[Tensor | None]) -> dict[str, str]:
    """What an honest operator never does, found in the outputs and in what became of the inputs."""
    for y in outputs:
        if type(y) is not Tensor or y.layout != torch.strided or y.device.type != "cpu":
            return {"hack": f"returned a {type(y).__name__} on {y.device} instead of a plain tensor"}
    for t, before in zip(given, kept, strict=True):
        if t is not None and before is not None and not torch.equal(t, before):
            return {"hack": "changed its inputs"}
    places = {t.untyped_storage().data_ptr() for t in given if t is not None}
    if any(y.numel() and y.untyped_storage().data_ptr() in places for y in outputs):
        return {"hack": "returned a view of its inputs"}
    changed = [
        name for (owner, name), original in zip(GUARDED, BEFORE, strict=True) if getattr(owner, name) is not original
    ]
    return {"hack": f"replaced {', '.join(changed)}" if changed else ""}


def count_threads() -> tuple[int, int]:
    """(Python threads, threads of the process)."""
    tasks = Path("/proc/self/task")
    return threading.active_count(), len(list(tasks.iterdir())) if tasks.exists() else 0


def save(outputs: list[Tensor], prefix: str) -> list[dict[str, Any]]:
    entries = []
    for i, y in enumerate(outputs):
        array = (y.view(torch.int16) if y.dtype == torch.bfloat16 else y).contiguous().numpy()
        np.save(f"{prefix}.{i}.npy", array)
        entries.append(
            {"file": f"{prefix}.{i}.npy", "dtype": str(y.dtype).removeprefix("torch."), "shape": list(y.shape)}
        )
    return entries


def say(reply: dict[str, Any]) -> None:
    CHANNEL[0].send_bytes(json.dumps(reply).encode())


def serve(channel: Connection, log: str, threads: int) -> None:
    """Answer until the other end closes. What the candidate prints goes to `log`."""
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
    for stream in (1, 2):
        os.dup2(handle, stream)
    torch.set_num_threads(threads)
    CHANNEL.append(channel)
    judged: Judged | None = None
    while True:
        try:
            request = json.loads(channel.recv_bytes())
        except EOFError:
            return
        try:
            if request["op"] == "load":
                judged = Judged(request)
                say({"ok": True})
            else:
                assert judged is not None
                say({"ok": True, **getattr(judged, request["op"])(request)})
        except BaseException as error:
            say({"ok": False, "error": f"{type(error).__name__}: {error}"})


CHANNEL: list[Connection] = []
