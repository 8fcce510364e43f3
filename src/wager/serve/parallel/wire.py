"""Messages between the processes of a pipeline, over a torch.distributed gloo group that may lose members.

A group here is an object, not the process-wide default group: a process may be in several, and one that lost a member is dropped and made
anew. A message is a JSON head followed by raw arrays; nothing is unpickled. Short ones (most decode steps) travel in one fixed-size packet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

from wager.errors import WagerError

PACKET_BYTES = 8192
NO_LIMIT = timedelta(days=3650)  # a stage waits for work as long as nobody sends any; death closes its connections
JOIN_LIMIT = timedelta(seconds=900)
LENGTHS = 16  # two int64: bytes of the head, bytes of the whole message


class StageLost(WagerError):
    """A member of the group is gone, or cut the connection."""


def pack(head: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> np.ndarray:
    """uint8 bytes of a message."""
    described = {**head, "arrays": [[a.dtype.str, list(a.shape)] for a in arrays]}
    text = json.dumps(described).encode()
    bodies = [np.ascontiguousarray(a).view(np.uint8).reshape(-1) if a.size else np.zeros(0, np.uint8) for a in arrays]
    size = LENGTHS + len(text) + sum(len(b) for b in bodies)
    lengths = np.array([len(text), size], np.int64).view(np.uint8)
    return np.concatenate([lengths, np.frombuffer(text, np.uint8), *bodies])


def unpack(message: np.ndarray) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The head and the arrays of `pack`."""
    text_bytes = int(message[:8].view(np.int64)[0])
    at = LENGTHS + text_bytes
    head = json.loads(message[LENGTHS:at].tobytes())
    arrays = []
    for kind, shape in head.pop("arrays"):
        dtype = np.dtype(kind)
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        arrays.append(np.frombuffer(message[at : at + count].tobytes(), dtype).reshape(shape).copy())
        at += count
    return head, arrays


class Group:
    """Point-to-point messages among `size` processes. Every failure is a StageLost; the group is useless afterwards."""

    def __init__(self, host: str, port: int, name: str, rank: int, size: int, store: Any = None):
        self.rank, self.size = rank, size
        self._posted: list[tuple[Any, Tensor, int]] = []
        try:
            store = store or TCPStore(host, port, is_master=False, timeout=JOIN_LIMIT)
            self._group: Any = dist.ProcessGroupGloo(PrefixStore(name, store), rank, size, JOIN_LIMIT)
        except (RuntimeError, ValueError) as error:
            raise StageLost(f"the group {name} did not come together: {error}") from None

    def send(self, tensor: Tensor, to: int) -> None:
        self._do("send", [tensor], to)

    def post(self, tensor: Tensor, to: int) -> None:
        """Send without waiting for the peer to take it; `settle` waits."""
        self._posted.append((self._begin("send", [tensor], to), tensor, to))

    def settle(self) -> None:
        """Wait until everything posted is taken."""
        for work, _, to in self._posted:
            self._end(work, to)
        self._posted = []

    def receive(self, tensor: Tensor, source: int) -> Tensor:
        self._do("recv", [tensor], source)
        return tensor

    def post_message(self, to: int, head: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        message = pack(head, arrays)
        first = np.zeros(PACKET_BYTES, np.uint8)
        first[: min(len(message), PACKET_BYTES)] = message[:PACKET_BYTES]
        self.post(torch.from_numpy(first), to)
        if len(message) > PACKET_BYTES:
            self.post(torch.from_numpy(message[PACKET_BYTES:].copy()), to)

    def send_message(self, to: int, head: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        self.post_message(to, head, arrays)
        self.settle()

    def receive_message(self, source: int) -> tuple[dict[str, Any], list[np.ndarray]]:
        first = self.receive(torch.empty(PACKET_BYTES, dtype=torch.uint8), source).numpy()
        size = int(first[8:16].view(np.int64)[0])
        if size <= PACKET_BYTES:
            return unpack(first[:size])
        rest = self.receive(torch.empty(size - PACKET_BYTES, dtype=torch.uint8), source).numpy()
        return unpack(np.concatenate([first, rest]))

    def close(self) -> None:
        """Drop the connections: whoever waits for this process is told."""
        group, self._group = self._group, None
        if group is not None:
            getattr(group, "abort", lambda: None)()
        del group
        self._posted = []  # not before: gloo never ends a message whose memory is gone, and keeps its connection

    def _do(self, what: str, tensors: list[Tensor], peer: int) -> None:
        self._end(self._begin(what, tensors, peer), peer)

    def _begin(self, what: str, tensors: list[Tensor], peer: int) -> Any:
        if self._group is None:
            raise StageLost("the group is closed")
        try:
            return getattr(self._group, what)(tensors, peer, 0)
        except RuntimeError as error:
            raise _lost(peer, error) from None

    def _end(self, work: Any, peer: int) -> None:
        try:
            work.wait(NO_LIMIT)
        except RuntimeError as error:
            raise _lost(peer, error) from None


def _lost(peer: int, error: Exception) -> StageLost:
    return StageLost(f"rank {peer} is gone: {str(error).splitlines()[0].split('] ', 1)[-1].split('. This is')[0]}")


class Meeting:
    """Where members of a group find one another: a store in the process that leads, on a port the system picks."""

    def __init__(self, host: str = "127.0.0.1"):
        self.host = host
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=JOIN_LIMIT)
        self.port: int = self._store.port

    def join(self, name: str, rank: int, size: int) -> Group:
        return Group(self.host, self.port, name, rank, size, self._store)
