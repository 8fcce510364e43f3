"""The blocks of one group of layers, and the tier in host memory behind them. Numbers only; `pool.KVPool` holds what they number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class HostTier:
    """Places first, first + 1, ... behind a pool's own blocks; the content least recently used gives way."""

    def __init__(self, first: int, count: int):
        self.free = list(range(first + count - 1, first - 1, -1))
        self.place_of: OrderedDict[bytes, int] = OrderedDict()

    def place(self, name: bytes) -> int | None:
        """Where to copy content that is evicted; None when it is there already, or there are no places."""
        if name in self.place_of:
            self.place_of.move_to_end(name)
            return None
        if not self.free and not self.place_of:
            return None
        place = self.free.pop() if self.free else self.place_of.popitem(last=False)[1]
        self.place_of[name] = place
        return place

    def clear(self) -> None:
        self.free += self.place_of.values()
        self.place_of.clear()


class BlockPool:
    """The blocks of one group: reference counts, names, and the queue of those nobody holds. `copies` takes the moves to host memory."""

    def __init__(self, group: int, num_blocks: int, num_host_blocks: int, copies: list[tuple[int, int, int]]):
        self.group, self.num_blocks, self.copies = group, num_blocks, copies
        self.host = HostTier(num_blocks, num_host_blocks)
        self.references = [0] * num_blocks
        self.name_of: list[bytes | None] = [None] * num_blocks
        self.block_of: dict[bytes, int] = {}
        self.free: OrderedDict[int, None] = OrderedDict((b, None) for b in range(num_blocks))

    def allocate(self) -> int:
        block, _ = self.free.popitem(last=False)
        name = self.name_of[block]
        if name is not None:
            place = self.host.place(name)
            if place is not None:
                self.copies.append((self.group, block, place))
            self.forget(block)
        self.references[block] = 1
        return block

    def has(self, name: bytes) -> bool:
        """Whether the content of this name is here or in host memory."""
        return name in self.block_of or name in self.host.place_of

    def loads(self, names: Sequence[bytes]) -> tuple[int, int]:
        """(blocks that taking over these names would load from host memory, free blocks there are for them)."""
        missing = sum(name not in self.block_of for name in names)
        taken = sum(name in self.block_of and self.references[self.block_of[name]] == 0 for name in names)
        return missing, len(self.free) - taken

    def take(self, names: Sequence[bytes]) -> list[int]:
        """Hold the blocks of these names, those in host memory in fresh blocks; what is here is held first, so that no load evicts it."""
        for name in names:
            if name in self.block_of:
                self.hold(self.block_of[name])
        # out of the tier meanwhile: what is evicted to make room must not take their places
        places = {name: self.host.place_of.pop(name) for name in names if name not in self.block_of}
        for name, place in places.items():
            block = self.allocate()
            self.copies.append((self.group, place, block))
            self.name(block, name)
        self.host.place_of.update(places)
        return [self.block_of[name] for name in names]

    def hold(self, block: int) -> None:
        if self.references[block] == 0:
            del self.free[block]
        self.references[block] += 1

    def release(self, block: int) -> None:
        self.references[block] -= 1
        if self.references[block] == 0:
            self.free[block] = None
            if self.name_of[block] is None:
                self.free.move_to_end(block, last=False)

    def name(self, block: int, name: bytes) -> None:
        """Make a full block findable; the first of several equal blocks wins."""
        if name not in self.block_of:
            self.block_of[name] = block
            self.name_of[block] = name

    def forget(self, block: int) -> None:
        name = self.name_of[block]
        if name is not None:
            del self.block_of[name]
            self.name_of[block] = None
