"""The context daemon: keeps a stage's weights and KV in shared memory while engine processes over them come and go.

It is a process of its own that only owns memory, so there is little in it to fail. A stage's process maps a segment and computes in place:
at every token boundary everything that is needed to go on is already there, and nothing is copied out. When that process is killed, the next
one maps the same segment. The memory goes with the daemon, however that ends: it has no name in any file system. (SpotServe, section 3:
arXiv 2311.15566.)
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from wager.errors import CapacityError


@dataclass(frozen=True)
class Segment:
    """`size` bytes of memory that processes of this machine and user can map by `path`; fresh: nobody has written to it yet."""

    path: str
    size: int
    fresh: bool


class ContextDaemon:
    """Segments by name."""

    def __init__(self):
        self._segments: dict[str, tuple[int, int]] = {}  # name -> descriptor, size

    def open(self, name: str, size: int) -> Segment:
        """The segment of that name, made when there is none of that size. Raises CapacityError when memory is short."""
        known = self._segments.get(name)
        if known is not None and known[1] == size:
            return Segment(_path(known[0]), size, fresh=False)
        self.drop(name)
        available = _available_bytes()
        if size > available:
            raise CapacityError(
                f"a stage's weights and KV need {size} bytes of memory and {available} are free; lower kv_cache_memory or use more stages"
            )
        descriptor = os.memfd_create(f"wager-{name}")
        os.ftruncate(descriptor, size)
        self._segments[name] = descriptor, size
        return Segment(_path(descriptor), size, fresh=True)

    def drop(self, name: str) -> None:
        known = self._segments.pop(name, None)
        if known is not None:
            os.close(known[0])

    def holds(self) -> dict[str, int]:
        """Bytes by segment."""
        return {name: size for name, (_, size) in self._segments.items()}

    def close(self) -> None:
        for name in list(self._segments):
            self.drop(name)


def _path(descriptor: int) -> str:
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _available_bytes() -> int:
    with open("/proc/meminfo") as info:
        fields = dict(line.split(":", 1) for line in info)
    return int(fields["MemAvailable"].split()[0]) * 1024
