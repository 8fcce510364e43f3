"""Runs a model whose layers do not fit in memory: they are streamed from a file through a small ring of buffers while others compute.

For a user: `offload_memory="2GB"` (or `wager serve --offload-memory 2GB`) holds as many decoder layers in memory at a time as fit that
budget (`offload_layers=2` says it as a number); embeddings, norms and the output head stay. A pass then costs
what reading the file costs, whether it verifies one token or hundreds: the case for large token trees (SpecExec, arXiv 2406.02532).

Each layer's tensors lie one after another in the file, layer i is read into ring slot i % slots, and its tensors are views of that slot for
good. A reader thread fills a slot as soon as the layer that used it has computed; at the end of a pass it goes on with the first layers of
the next one, so reading overlaps with drafting too. Exact: the same bits are computed as without offloading.

The page cache is bypassed (O_DIRECT where the file system has it, else pages are dropped after reading): what is measured is the disk.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wager.errors import UsageError, WagerError

ALIGN = 4096  # of a layer in the file and in memory, as O_DIRECT wants it
TENSOR_ALIGN = 64
READ_BYTES = 4 << 20


@dataclass
class RingStats:
    """Seconds are of busy time: reading, computing, and computing that had to wait for reading."""

    passes: int = 0
    layers_read: int = 0
    read_s: float = 0.0
    compute_s: float = 0.0
    wait_s: float = 0.0

    @property
    def overlap(self) -> float:
        """Share of the shorter of reading and computing that ran beside the other, while layers were computed."""
        shorter = min(self.read_s, self.compute_s)
        return max(0.0, min(1.0, (self.read_s - self.wait_s) / shorter)) if shorter else 0.0


@dataclass
class _Stored:
    """Where one layer lies in the file and which tensors it has: (owner, attribute, offset, shape, dtype)."""

    offset: int
    nbytes: int
    tensors: list[tuple[Any, str, int, torch.Size, torch.dtype]] = field(default_factory=list)


class LayerRing:
    """Streams `model.layers` through `slots` buffers. One thread computes (passes must not overlap), one reads.

    path: the file to write the layers to; it keeps no name, so that its space comes back however the process ends.
    bytes_per_s: read no faster than this (None: as fast as it goes).
    """

    def __init__(self, model: nn.Module, slots: int, path: Path | None = None, bytes_per_s: float | None = None):
        layers = getattr(model, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise UsageError("offload_layers: this model's layers cannot be streamed", param="offload_layers")
        if not 2 <= slots <= len(layers):
            raise UsageError(
                f"offload_layers must lie in [2, {len(layers)}] for this model, got {slots}", param="offload_layers"
            )
        if next(model.parameters()).device.type != "cpu":
            raise UsageError("offload_layers streams into CPU memory: use device='cpu'", param="offload_layers")
        model.layer_ring = self  # type: ignore[assignment]
        self.slots, self.stats, self.bytes_per_s = slots, RingStats(), bytes_per_s
        self._stored = _store(layers, path)
        self.path = self._stored.path
        self._buffers = [mmap.mmap(-1, self._stored.largest) for _ in range(slots)]
        self._fd, self._direct = _open(self.path)
        self.path.unlink()
        self._bind()
        self._changed = threading.Condition()
        self._held: list[int] = [-1] * slots  # the layer a slot holds completely
        self._free = [True] * slots
        self._error: BaseException | None = None
        self._stop = False
        self._begun_s = 0.0
        for i, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(_before, self, i))
            layer.register_forward_hook(partial(_after, self, i))
        self._thread = threading.Thread(target=_read_forever, args=(weakref.ref(self),), daemon=True, name="layer-ring")
        self._thread.start()

    @property
    def num_layers(self) -> int:
        return len(self._stored.layers)

    @property
    def resident_bytes(self) -> int:
        """Memory for streamed layers."""
        return self.slots * self._stored.largest

    @property
    def file_bytes(self) -> int:
        return sum(layer.nbytes for layer in self._stored.layers)

    def close(self) -> None:
        """Stop reading and give the file back; the model cannot run any more."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self):
        if hasattr(self, "_thread"):
            self.close()

    def _bind(self) -> None:
        """Make each layer's tensors views of its slot."""
        for i, layer in enumerate(self._stored.layers):
            buffer = torch.frombuffer(self._buffers[i % self.slots], dtype=torch.uint8)
            for owner, name, offset, shape, dtype in layer.tensors:
                nbytes = shape.numel() * dtype.itemsize
                view = buffer[offset : offset + nbytes].view(dtype).view(shape)
                if isinstance(owner, nn.Module) and name in owner._parameters:
                    owner._parameters[name] = nn.Parameter(view, requires_grad=False)
                else:
                    setattr(owner, name, view)

    # -- the computing thread ----------------------------------------------------------------------------------------------------

    def _wait(self, layer: int) -> None:
        begun = time.perf_counter()
        slot = layer % self.slots
        with self._changed:
            while self._held[slot] != layer:
                if self._error is not None:
                    raise WagerError(f"reading layer {layer} from {self.path} failed: {self._error}") from self._error
                if self._stop:
                    raise WagerError("the model's layers are no longer streamed: its engine was closed")
                self._changed.wait()
        self._begun_s = time.perf_counter()
        self.stats.wait_s += self._begun_s - begun

    def _release(self, layer: int) -> None:
        self.stats.compute_s += time.perf_counter() - self._begun_s
        self.stats.passes += layer == self.num_layers - 1
        with self._changed:
            self._held[layer % self.slots] = -1
            self._free[layer % self.slots] = True
            self._changed.notify_all()

    # -- the reading thread ------------------------------------------------------------------------------------------------------

    def _claim(self, layer: int) -> bool:
        """Take the layer's slot when it is free; False while it is not."""
        slot = layer % self.slots
        with self._changed:
            if not self._free[slot]:
                self._changed.wait(0.5)
            if self._stop or not self._free[slot]:
                return False
            self._free[slot] = False
            return True

    def _fill(self, layer: int) -> None:
        begun = time.perf_counter()
        stored = self._stored.layers[layer]
        target = memoryview(self._buffers[layer % self.slots])
        for at in range(0, stored.nbytes, READ_BYTES):
            chunk = min(READ_BYTES, stored.nbytes - at)
            got = os.preadv(self._fd, [target[at : at + chunk]], stored.offset + at)
            if got != chunk:
                raise OSError(f"{got} of {chunk} bytes")
            if not self._direct:
                os.posix_fadvise(self._fd, stored.offset + at, chunk, os.POSIX_FADV_DONTNEED)
            if self.bytes_per_s:
                time.sleep(max(0.0, (at + chunk) / self.bytes_per_s - (time.perf_counter() - begun)))
        self.stats.read_s += time.perf_counter() - begun
        self.stats.layers_read += 1
        with self._changed:
            self._held[layer % self.slots] = layer
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()


def _before(ring: LayerRing, layer: int, _module: nn.Module, _args: Any) -> None:
    ring._wait(layer)


def _after(ring: LayerRing, layer: int, _module: nn.Module, _args: Any, _output: Any) -> None:
    ring._release(layer)


def _read_forever(reference: weakref.ref[LayerRing]) -> None:
    """Layer after layer, pass after pass; holds no reference to the ring between two layers."""
    layer = 0
    while True:
        ring = reference()
        if ring is None or ring._stop:
            return
        try:
            if ring._claim(layer):
                ring._fill(layer)
                layer = (layer + 1) % ring.num_layers
        except Exception as error:  # whatever it is, the computing thread must hear of it
            ring._fail(error)
            return
        del ring


@dataclass
class _File:
    path: Path
    layers: list[_Stored]

    @property
    def largest(self) -> int:
        return max(layer.nbytes for layer in self.layers)


def _store(layers: nn.ModuleList, path: Path | None) -> _File:
    """Write every layer's tensors to a new file, each layer aligned. Raises UsageError when there is one."""
    if path is None:
        handle, name = tempfile.mkstemp(prefix="wager-layers-", suffix=".bin")
        os.close(handle)
        path = Path(name)
    elif path.exists():
        raise UsageError(f"offload_file {path} exists; name a file that can be made new", param="offload_file")
    stored = []
    with open(path, "wb") as file:
        for layer in layers:
            entry = _Stored(file.tell(), 0)
            at = 0
            for owner, name, tensor in tensors_of(layer):
                at = -(-at // TENSOR_ALIGN) * TENSOR_ALIGN
                entry.tensors.append((owner, name, at, tensor.shape, tensor.dtype))
                file.seek(entry.offset + at)
                file.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
                at += tensor.nbytes
            entry.nbytes = -(-at // ALIGN) * ALIGN
            file.seek(entry.offset + entry.nbytes)
            stored.append(entry)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
    return _File(path, stored)


def layers_within(model: nn.Module, budget_bytes: int) -> int:
    """How many of the model's layers a ring of `budget_bytes` holds; 0 when all of them fit and nothing need be streamed.

    Raises UsageError when the budget holds fewer than two: one computes while the next is read.
    """
    layers = list(getattr(model, "layers", ()))
    sizes = [_layer_bytes(layer) for layer in layers]
    if layers and sum(sizes) <= budget_bytes:
        return 0
    slots = budget_bytes // max(sizes, default=1)
    if layers and slots < 2:
        raise UsageError(
            f"offload_memory of {budget_bytes} bytes holds {slots} of this model's layers of {max(sizes)} bytes; "
            f"give at least {2 * max(sizes)}",
            param="offload_memory",
        )
    return max(2, slots)


def _layer_bytes(layer: nn.Module) -> int:
    """What one layer takes in the file and in its slot."""
    at = 0
    for _, _, tensor in tensors_of(layer):
        at = -(-at // TENSOR_ALIGN) * TENSOR_ALIGN + tensor.nbytes
    return -(-at // ALIGN) * ALIGN


def tensors_of(layer: nn.Module) -> Iterator[tuple[Any, str, Tensor]]:
    """(owner, attribute, tensor) of every weight below a layer: parameters, and tensors that packed linears keep."""
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter
        for value in vars(module).values():
            if isinstance(value, (nn.Module, dict)) or not hasattr(value, "__dict__"):
                continue
            for name, tensor in vars(value).items():
                if isinstance(tensor, Tensor) and tensor.numel():
                    yield value, name, tensor


def _open(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether it bypasses the page cache by itself."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        probe = mmap.mmap(-1, ALIGN)
        os.preadv(fd, [probe], 0)
        return fd, True
    except (OSError, AttributeError):
        return os.open(path, os.O_RDONLY), False
