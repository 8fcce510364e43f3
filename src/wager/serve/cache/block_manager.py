"""Which KV block belongs to whom: reference counts, block tables, and a hash-chained prefix cache. Pure accounting, no tensors.

A sequence's position p lives in block table[p // block_size] of every group. Full blocks are named by a hash over their tokens and the
hash before them, so a later sequence with the same beginning takes them over. Blocks nobody holds stay findable, in order of release,
until they are needed: freeing is remembering, evicting is allocating. (Paged attention: arXiv 2309.06180.)

A second tier may lie behind each group's blocks: numbers from `num_blocks` on are places in host memory where evicted content goes, and comes
back from when a sequence begins with it, a preempted one as well as a new one.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from wager.serve.cache.block_pool import BlockPool

HASH_BYTES = 16


@dataclass(frozen=True)
class KVGroup:
    """Layers that share block tables. Blocks wholly outside `window` tokens are given back while the sequence runs."""

    layers: tuple[int, ...]
    window: int | None = None


@dataclass
class _Sequence:
    """num_blocks: logical blocks so far. names: of the full computed blocks. released[g]: leading blocks group g gave back.

    may_rewrite: the block at `computed` may hold others' content, by reference or by name, since a fork or a roll-back."""

    cache_key: tuple
    tables: list[np.ndarray]
    released: list[int]
    num_blocks: int = 0
    computed: int = 0
    may_rewrite: bool = False
    names: list[bytes] = field(default_factory=list)


class BlockManager:
    """Block tables of all live sequences.

    num_blocks: per group, one number for all or one each; num_host_blocks: of the tier in host memory, likewise. Counters `prefix_queries`,
    `prefix_hits` and, of the latter, `host_hits` are in tokens.
    """

    def __init__(
        self,
        groups: Sequence[KVGroup],
        num_blocks: int | Sequence[int],
        block_size: int,
        enable_prefix_caching: bool = True,
        num_host_blocks: int | Sequence[int] = 0,
    ):
        counts = per_group(num_blocks, groups)
        self.groups, self.block_size, self.caching = tuple(groups), block_size, enable_prefix_caching
        self._copies: list[tuple[int, int, int]] = []
        hosts = per_group(num_host_blocks, groups)
        self._pools = [BlockPool(g, n, h, self._copies) for g, (n, h) in enumerate(zip(counts, hosts, strict=True))]
        self._sequences: dict[str, _Sequence] = {}
        self._pins: dict[bytes, list[tuple[int, int]]] = {}
        self.prefix_queries = self.prefix_hits = self.host_hits = 0

    # -- a sequence's life -------------------------------------------------------------------------------------------------------

    def start(self, seq: str, token_ids: list[int], cache_key: tuple = ()) -> int:
        """Open a sequence on the longest cached prefix, at most all tokens but one; returns how many tokens that is."""
        assert seq not in self._sequences, f"sequence {seq} is already open"
        names = self._cached_names(token_ids, cache_key)
        sequence = self._sequences[seq] = self._new_sequence(cache_key, len(names))
        loaded = 0
        for g, (group, pool) in enumerate(zip(self.groups, self._pools, strict=True)):
            sequence.released[g] = first = self._first_visible_block(group, len(names) * self.block_size)
            loaded = max(loaded, pool.loads(names[first:])[0])
            sequence.tables[g][first : len(names)] = pool.take(names[first:])
        sequence.num_blocks, sequence.names = len(names), names
        sequence.computed = len(names) * self.block_size
        self.prefix_queries += len(token_ids)
        self.prefix_hits += sequence.computed
        self.host_hits += loaded * self.block_size
        return sequence.computed

    def match(self, token_ids: list[int], cache_key: tuple = ()) -> int:
        """Tokens that `start` would find cached."""
        return len(self._cached_names(token_ids, cache_key)) * self.block_size

    def reserve(self, seq: str, num_tokens: int) -> bool:
        """Back positions [0, num_tokens) and make those not yet computed writable. False (and nothing done) when blocks are short."""
        sequence = self._sequences[seq]
        wanted = -(-num_tokens // self.block_size)
        missing = wanted - sequence.num_blocks
        if missing <= 0 and not sequence.may_rewrite:
            return True
        shared = [self._shared_tail(g, sequence) for g in range(len(self.groups))]
        if any(max(missing, 0) + len(s) > len(p.free) for s, p in zip(shared, self._pools, strict=True)):
            return False
        for g, pool in enumerate(self._pools):
            for i in shared[g]:
                self._copy_on_write(g, sequence, i)
            if sequence.may_rewrite:
                for i in self._writable(g, sequence):
                    pool.forget(int(sequence.tables[g][i]))
            if missing > 0:
                table = self._grown_table(g, sequence, wanted)
                for i in range(sequence.num_blocks, wanted):
                    table[i] = pool.allocate()
        sequence.may_rewrite = False
        sequence.num_blocks = max(sequence.num_blocks, wanted)
        return True

    def commit(self, seq: str, token_ids: list[int], num_computed: int) -> None:
        """The KV of the first `num_computed` tokens is valid: name newly full blocks, give back what no window sees any more."""
        sequence = self._sequences[seq]
        sequence.computed = num_computed
        full = num_computed // self.block_size
        if full <= len(sequence.names):
            return
        for i in range(len(sequence.names), full):
            name = self._name(sequence.names[-1] if sequence.names else b"", token_ids, i, sequence.cache_key)
            sequence.names.append(name)
            if self.caching:
                for g, pool in enumerate(self._pools):
                    if i >= sequence.released[g]:
                        pool.name(int(sequence.tables[g][i]), name)
        for g, (group, pool) in enumerate(zip(self.groups, self._pools, strict=True)):
            first = self._first_visible_block(group, num_computed)
            for i in range(sequence.released[g], first):
                pool.release(int(sequence.tables[g][i]))
                sequence.tables[g][i] = 0
            sequence.released[g] = max(first, sequence.released[g])

    def truncate(self, seq: str, num_tokens: int) -> None:
        """Give back blocks beyond `num_tokens` positions (guesses that were rejected, or computed tokens taken back).

        Window layers must still hold what the next position sees: `can_resume(seq, num_tokens)`.
        """
        sequence = self._sequences[seq]
        assert self.can_resume(seq, num_tokens), f"the window before token {num_tokens} is given back already"
        sequence.may_rewrite |= num_tokens < sequence.computed
        kept = -(-num_tokens // self.block_size)
        for g, pool in enumerate(self._pools):
            for i in range(sequence.num_blocks - 1, max(kept, sequence.released[g]) - 1, -1):
                pool.release(int(sequence.tables[g][i]))
        sequence.num_blocks = min(kept, sequence.num_blocks)
        sequence.computed = min(sequence.computed, num_tokens)
        del sequence.names[num_tokens // self.block_size :]

    def can_resume(self, seq: str, num_tokens: int) -> bool:
        """Whether every group still holds what position `num_tokens` sees: window layers give blocks back as the sequence grows."""
        released = self._sequences[seq].released
        return all(self._first_visible_block(g, num_tokens) >= r for g, r in zip(self.groups, released, strict=True))

    def fork(self, parent: str, child: str, num_tokens: int) -> None:
        """Open `child` on the parent's first `num_tokens` computed tokens. Whoever writes into a shared block first copies it.

        The parent must be able to resume there (`can_resume`).
        """
        assert child not in self._sequences, f"sequence {child} is already open"
        source = self._sequences[parent]
        assert num_tokens <= source.computed, f"cannot fork {num_tokens} of {source.computed} computed tokens"
        assert self.can_resume(parent, num_tokens), f"the window before token {num_tokens} is given back already"
        count = -(-num_tokens // self.block_size)
        sequence = self._sequences[child] = self._new_sequence(source.cache_key, count)
        for g, pool in enumerate(self._pools):
            sequence.released[g] = released = min(source.released[g], count)
            sequence.tables[g][:count] = source.tables[g][:count]
            for block in sequence.tables[g][released:count].tolist():
                pool.hold(block)
        sequence.num_blocks, sequence.computed = count, num_tokens
        sequence.names = source.names[: num_tokens // self.block_size]
        sequence.may_rewrite = source.may_rewrite = True

    def free(self, seq: str) -> None:
        """Close a sequence. Its tail is released first, so that it is evicted before the beginning others may share."""
        sequence = self._sequences.pop(seq, None)
        if sequence is None:
            return
        for g, pool in enumerate(self._pools):
            for block in reversed(sequence.tables[g][sequence.released[g] : sequence.num_blocks].tolist()):
                pool.release(block)

    def table(self, seq: str, group: int) -> np.ndarray:
        """int32 view of the block numbers; entries of given-back window blocks are 0 and never read."""
        sequence = self._sequences[seq]
        return sequence.tables[group][: sequence.num_blocks]

    def take_copies(self) -> list[tuple[int, int, int]]:
        """(group, source block, target block) copies to make in this order before the next write; each is handed out once."""
        copies = self._copies[:]
        self._copies.clear()  # the pools hold the same list
        return copies

    # -- the prefix cache --------------------------------------------------------------------------------------------------------

    def pin(self, token_ids: list[int], cache_key: tuple = ()) -> int:
        """Keep the cached full blocks of these tokens until `unpin`; returns how many tokens are held."""
        names = self._chain(token_ids, len(token_ids) // self.block_size, cache_key)
        held = []
        for name in names:
            blocks = [(g, pool.block_of[name]) for g, pool in enumerate(self._pools) if name in pool.block_of]
            if len(blocks) < sum(group.window is None for group in self.groups):
                break
            held += blocks
        for g, block in held:
            self._pools[g].hold(block)
        self.unpin(token_ids, cache_key)
        self._pins[self._pin_name(token_ids, cache_key)] = held
        return len({b for g, b in held if g == (held[0][0] if held else 0)}) * self.block_size

    def unpin(self, token_ids: list[int], cache_key: tuple = ()) -> None:
        for g, block in reversed(self._pins.pop(self._pin_name(token_ids, cache_key), [])):
            self._pools[g].release(block)

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix; False (nothing done) while a sequence or pin holds blocks."""
        if self._sequences or self._pins:
            return False
        for pool in self._pools:
            for block in list(pool.block_of.values()):
                pool.forget(block)
            pool.host.clear()
        return True

    def in_use(self, group: int) -> np.ndarray:
        """int64 blocks of a group whose content matters: those that are held, then those only findable as a cached prefix."""
        pool = self._pools[group]
        held = [b for b, count in enumerate(pool.references) if count]
        return np.array(held + [b for b in pool.free if pool.name_of[b] is not None], np.int64)

    @property
    def num_blocks(self) -> int:
        return min(pool.num_blocks for pool in self._pools)

    @property
    def num_free_blocks(self) -> int:
        return min(len(pool.free) for pool in self._pools)

    @property
    def usage(self) -> float:
        """Share of the blocks that are held, in the fullest group."""
        return max(1 - len(pool.free) / pool.num_blocks for pool in self._pools)

    def check_invariants(self) -> None:
        """Raise AssertionError when the books do not balance."""
        for g, pool in enumerate(self._pools):
            held = [0] * pool.num_blocks
            for sequence in self._sequences.values():
                blocks = sequence.tables[g][sequence.released[g] : sequence.num_blocks].tolist()
                assert len(set(blocks)) == len(blocks), f"group {g}: a table lists a block twice: {blocks}"
                for block in blocks:
                    held[block] += 1
            for pinned in self._pins.values():
                for group, block in pinned:
                    held[block] += group == g
            assert held == pool.references, f"group {g}: reference counts {pool.references} but {held} are held"
            unheld = {b for b, count in enumerate(held) if count == 0}
            assert unheld == set(pool.free), f"group {g}: free list {set(pool.free)} but {unheld} are unheld"
            for name, block in pool.block_of.items():
                assert pool.name_of[block] == name, f"group {g}: block {block} is listed under a name it does not bear"
            assert sum(n is not None for n in pool.name_of) == len(pool.block_of)
            places = list(pool.host.place_of.values()) + pool.host.free
            assert len(set(places)) == len(places), f"group {g}: two names share a place in host memory: {places}"

    # -- inside ------------------------------------------------------------------------------------------------------------------

    def _new_sequence(self, cache_key: tuple, num_blocks: int) -> _Sequence:
        capacity = max(8, num_blocks + 4)
        return _Sequence(cache_key, [np.zeros(capacity, np.int32) for _ in self.groups], [0] * len(self.groups))

    def _grown_table(self, group: int, sequence: _Sequence, wanted: int) -> np.ndarray:
        table = sequence.tables[group]
        if wanted > len(table):
            grown = np.zeros(max(wanted, 2 * len(table)), np.int32)
            grown[: len(table)] = table
            table = sequence.tables[group] = grown
        return table

    def _shared_tail(self, group: int, sequence: _Sequence) -> list[int]:
        """Logical blocks that will be written (from the first uncomputed position on) and are held by others too."""
        if not sequence.may_rewrite:
            return []
        references = self._pools[group].references
        return [i for i in self._writable(group, sequence) if references[sequence.tables[group][i]] > 1]

    def _writable(self, group: int, sequence: _Sequence) -> range:
        """Logical blocks from the first uncomputed position on."""
        return range(max(sequence.computed // self.block_size, sequence.released[group]), sequence.num_blocks)

    def _copy_on_write(self, group: int, sequence: _Sequence, index: int) -> None:
        pool, table = self._pools[group], sequence.tables[group]
        source = int(table[index])
        table[index] = pool.allocate()
        pool.release(source)
        self._copies.append((group, source, int(table[index])))

    def _first_visible_block(self, group: KVGroup, num_computed: int) -> int:
        """First block that the query at position `num_computed` or a later one can still see."""
        if group.window is None:
            return 0
        return max(0, num_computed - group.window + 1) // self.block_size

    def _cached_names(self, token_ids: list[int], cache_key: tuple) -> list[bytes]:
        """Names of the longest run of leading full blocks that every group can serve."""
        if not self.caching:
            return []
        names: list[bytes] = []
        full_pools = self._full_pools()
        for i in range((len(token_ids) - 1) // self.block_size):
            name = self._name(names[-1] if names else b"", token_ids, i, cache_key)
            if not all(pool.has(name) for pool in full_pools):
                break
            names.append(name)
        while names and not self._all_serve(names):
            names.pop()
        return names

    def _full_pools(self) -> list[BlockPool]:
        return [p for g, p in zip(self.groups, self._pools, strict=True) if g.window is None]

    def _all_serve(self, names: list[bytes]) -> bool:
        """Whether every group has what it would see after these blocks, and free blocks for what it must load."""
        for group, pool in zip(self.groups, self._pools, strict=True):
            visible = names[self._first_visible_block(group, len(names) * self.block_size) :]
            if group.window is not None and not all(map(pool.has, visible)):
                return False
            missing, room = pool.loads(visible)
            if missing > room:
                return False
        return True

    def _chain(self, token_ids: list[int], count: int, cache_key: tuple) -> list[bytes]:
        names: list[bytes] = []
        for i in range(count):
            names.append(self._name(names[-1] if names else b"", token_ids, i, cache_key))
        return names

    def _name(self, parent: bytes, token_ids: list[int], index: int, cache_key: tuple) -> bytes:
        tokens = array("q", token_ids[index * self.block_size : (index + 1) * self.block_size])
        head = parent or repr(cache_key).encode()
        return blake2b(tokens.tobytes(), digest_size=HASH_BYTES, key=blake2b(head, digest_size=32).digest()).digest()

    def _pin_name(self, token_ids: list[int], cache_key: tuple) -> bytes:
        return blake2b(array("q", token_ids).tobytes() + repr(cache_key).encode(), digest_size=HASH_BYTES).digest()


def per_group(count: int | Sequence[int], groups: Sequence[KVGroup]) -> list[int]:
    """One number for every group, or one each."""
    return [count] * len(groups) if isinstance(count, int) else list(count)
