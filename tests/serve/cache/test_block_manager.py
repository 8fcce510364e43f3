"""Block accounting against a plain model: a pool that remembers, slot by slot, which prefix was written there.

Every rule does to the model what the engine does to tensors (copies first, then writes); afterwards each live sequence must read back its
own prefix through its block table. Sharing a block that somebody writes, reviving an evicted one or naming one wrongly all show up there.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from wager.serve.cache.block_manager import BlockManager, KVGroup

FULL = KVGroup((0,))
TOKENS = st.integers(0, 1)
KEYS = st.sampled_from([(None, None), (None, None), ("adapter", None), (None, "salt")])


class Books(RuleBasedStateMachine):
    """`live`: name → [key, tokens, computed]. `slots[g][slot]`: the (key, prefix) whose last token's KV was written there."""

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        blocks=st.integers(4, 12),
        window=st.sampled_from([None, 1, 3, 6]),
        caching=st.booleans(),
        host=st.sampled_from([0, 0, 1, 3, 12]),
    )
    def build(self, block_size, blocks, window, caching, host):
        self.groups = (FULL,) if window is None else (FULL, KVGroup((1,), window))
        self.books = BlockManager(self.groups, blocks, block_size, caching, host)
        self.size, self.blocks = block_size, blocks
        self.slots = [[None] * ((blocks + host) * block_size) for _ in self.groups]
        self.live, self.pins, self.names = {}, {}, 0

    # -- what the engine does ------------------------------------------------------------------------------------------------

    def slot(self, name, group, position):
        return int(self.books.table(name, group)[position // self.size]) * self.size + position % self.size

    def copy(self):
        for group, source, target in self.books.take_copies():
            held = self.slots[group]
            held[target * self.size : (target + 1) * self.size] = held[source * self.size : (source + 1) * self.size]

    def write(self, name, first, contents):
        for group in range(len(self.groups)):
            for offset, content in enumerate(contents):
                self.slots[group][self.slot(name, group, first + offset)] = content

    def pick(self, data):
        """A live sequence; the first rule that needs one makes it."""
        if not self.live:
            self.start([0, 1, 1, 0, 1], (None, None))
        return data.draw(st.sampled_from(sorted(self.live)), label="sequence")

    def earliest(self, name):
        """Shortest length to which the sequence may be cut back: windows must still hold what the next position sees."""
        _, _, computed = self.live[name]
        return next(length for length in range(computed + 1) if self.books.can_resume(name, length))

    @rule(tokens=st.lists(TOKENS, min_size=1, max_size=12), key=KEYS)
    def start_fresh(self, tokens, key):
        self.start(tokens, key)

    def start(self, tokens, key):
        name, self.names = f"s{self.names}", self.names + 1
        promised = self.books.match(tokens, key)
        found = self.books.start(name, tokens, key)
        assert found == promised < len(tokens) and found % self.size == 0
        assert found == 0 or self.books.caching
        self.live[name] = [key, list(tokens), found]

    @rule(data=st.data(), more=st.lists(TOKENS, min_size=1, max_size=4))
    def start_on_another(self, data, more):
        """The next turn of a conversation: what the cache is for."""
        key, tokens, _ = self.live[self.pick(data)]
        self.start(tokens + more, key)

    @rule(data=st.data(), more=st.lists(TOKENS, max_size=6), rejected=st.integers(0, 5), accepted=st.integers(0, 5))
    def compute(self, data, more, rejected, accepted):
        """One step: committed tokens, then guesses of which `accepted` become tokens and the rest is given back."""
        name = self.pick(data)
        key, tokens, computed = self.live[name]
        tokens = tokens + more
        guesses = [data.draw(TOKENS) for _ in range(accepted)]
        reached = len(tokens) + accepted + rejected
        free_before = self.books.num_free_blocks
        tables = [self.books.table(name, g).tolist() for g in range(len(self.groups))]
        if not self.books.reserve(name, reached):
            assert self.books.num_free_blocks == free_before
            assert tables == [self.books.table(name, g).tolist() for g in range(len(self.groups))]
            assert -(-reached // self.size) - len(tables[0]) + 1 > free_before, "refused although there was room"
            return
        self.copy()
        for g, table in enumerate(tables):  # nobody else reads what is about to be written
            for other in self.live:
                if other != name:
                    first, last = computed // self.size, (reached - 1) // self.size
                    mine = set(self.books.table(name, g)[first : last + 1].tolist())
                    theirs = self.books.table(other, g)[self.books._sequences[other].released[g] :]
                    assert not mine & set(theirs.tolist()), f"group {g}: a shared block is written ({table})"
        tokens = tokens + guesses
        self.write(name, computed, [(key, tuple(tokens[: p + 1])) for p in range(computed, len(tokens))])
        self.write(name, len(tokens), [("rejected", p) for p in range(len(tokens), reached)])
        self.books.commit(name, tokens, len(tokens))
        self.books.truncate(name, len(tokens))
        self.live[name] = [key, tokens, len(tokens)]

    @rule(data=st.data())
    def roll_back(self, data):
        name = self.pick(data)
        key, tokens, computed = self.live[name]
        length = data.draw(st.integers(self.earliest(name), computed), label="length")
        self.books.truncate(name, length)
        self.live[name] = [key, tokens[: max(length, 1)], length]

    @rule(data=st.data())
    def fork(self, data):
        parent = self.pick(data)
        key, tokens, computed = self.live[parent]
        length = data.draw(st.integers(self.earliest(parent), computed), label="length")
        child, self.names = f"s{self.names}", self.names + 1
        self.books.fork(parent, child, length)
        self.live[child] = [key, tokens[: max(length, 1)], length]

    @rule(data=st.data())
    def abort(self, data):
        name = self.pick(data)
        self.books.free(name)
        del self.live[name]

    @precondition(lambda self: len(self.pins) < 2)
    @rule(data=st.data())
    def pin(self, data):
        key, tokens, _ = self.live[self.pick(data)]
        held = self.books.pin(tokens, key)
        assert held <= len(tokens) and held % self.size == 0
        self.pins[key, tuple(tokens)] = held

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data):
        key, tokens = data.draw(st.sampled_from(sorted(self.pins, key=repr)))
        self.books.unpin(list(tokens), key)
        del self.pins[key, tokens]

    # -- what must hold at all times -----------------------------------------------------------------------------------------

    @invariant()
    def balanced(self):
        if not hasattr(self, "books"):
            return
        self.books.check_invariants()
        used = round(self.books.usage * self.blocks)
        assert 0 <= self.books.num_free_blocks == self.blocks - used

    @invariant()
    def everyone_reads_what_was_computed(self):
        if hasattr(self, "books"):
            self.copy()  # a prefix found in host memory arrives before the next step
        for name, (key, tokens, computed) in getattr(self, "live", {}).items():
            for g, group in enumerate(self.groups):
                first = self.books._first_visible_block(group, computed) * self.size
                for position in range(first, computed):
                    assert self.slots[g][self.slot(name, g, position)] == (key, tuple(tokens[: position + 1])), (
                        name,
                        g,
                        position,
                    )

    @invariant()
    def pinned_prefixes_stay(self):
        for (key, tokens), held in getattr(self, "pins", {}).items():
            if len(self.groups) == 1:
                assert self.books.match([*tokens, 0], key) >= held

    def teardown(self):
        if not hasattr(self, "books"):
            return
        for name in self.live:
            self.books.free(name)
        for key, tokens in self.pins:
            self.books.unpin(list(tokens), key)
        self.books.check_invariants()
        assert self.books.usage == 0.0
        assert self.books.reset_prefix_cache()
        assert self.books.match([0, 1] * 10) == 0


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=300, stateful_step_count=25, deadline=None)


def computed_sequence(books, name, tokens, key=()):
    found = books.start(name, tokens, key)
    assert books.reserve(name, len(tokens))
    books.commit(name, tokens, len(tokens))
    return found


def finished(books, name, tokens, key=()):
    found = computed_sequence(books, name, tokens, key)
    books.free(name)
    return found


@given(
    st.lists(st.tuples(st.lists(TOKENS, min_size=1, max_size=20), KEYS), min_size=1, max_size=8),
    st.sampled_from([1, 3, 4]),
)
def test_without_pressure_the_longest_common_prefix_is_found(calls, block_size):
    books = BlockManager([FULL], 1000, block_size)
    cached: set = set()
    for i, (tokens, key) in enumerate(calls):
        chains = [(key, tuple(tokens[: n * block_size])) for n in range(1, (len(tokens) - 1) // block_size + 1)]
        expected = next((n for n, chain in enumerate(chains) if chain not in cached), len(chains)) * block_size
        assert finished(books, f"s{i}", tokens, key) == expected
        cached |= {(key, tuple(tokens[: n * block_size])) for n in range(1, len(tokens) // block_size + 1)}
    assert books.prefix_queries == sum(len(tokens) for tokens, _ in calls)


def test_names_are_chained_equal_blocks_after_different_beginnings_differ():
    books = BlockManager([FULL], 16, 2)
    finished(books, "a", [1, 2, 7, 7, 0])
    assert books.match([1, 2, 7, 7, 0]) == 4
    assert books.match([3, 4, 7, 7, 0]) == 0
    assert books.match([7, 7, 0]) == 0


def test_keys_separate_adapters_and_salts():
    books = BlockManager([FULL], 16, 2)
    finished(books, "a", [1, 2, 3, 4, 5], ("x", None))
    assert [books.match([1, 2, 3, 4, 5], key) for key in [("x", None), (None, None), (None, "x"), ("x", "s")]] == [
        4,
        0,
        0,
        0,
    ]


def test_a_block_aligned_hit_leaves_one_block_to_compute():
    books = BlockManager([FULL], 16, 4)
    finished(books, "a", list(range(8)))
    assert books.start("b", list(range(8))) == 4


def test_eviction_takes_the_least_recently_released_and_tails_before_heads():
    books = BlockManager([FULL], 6, 2)
    old, new = [1, 1, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2]
    finished(books, "old", old)
    finished(books, "new", new)
    finished(books, "pressure", [3])
    assert (books.match([*old, 0]), books.match([*new, 0])) == (4, 6)
    books.start("touch", [*old, 0])  # using it again makes it the most recent
    books.free("touch")
    finished(books, "more", [4, 4, 4])  # the unnamed block of "pressure" is free for nothing; one more must go
    assert (books.match([*old, 0]), books.match([*new, 0])) == (4, 4)


def test_host_memory_keeps_what_is_evicted_until_it_is_full_itself():
    books = BlockManager([FULL], 3, 2, num_host_blocks=2)
    old, new = [1, 1, 1, 1, 9], [2, 2, 2, 2, 9]
    finished(books, "old", old)
    finished(books, "new", new)
    assert [source < 3 <= target for _, source, target in books.take_copies()] == [True, True]
    assert (books.match(new), books.match(old)) == (4, 4)
    assert books.start("again", old) == 4 and books.host_hits == 4
    out_and_in = books.take_copies()
    assert [source < 3 for _, source, _ in out_and_in] == [False, False] or len(out_and_in) > 2
    books.free("again")
    books.check_invariants()
    assert books.reset_prefix_cache() and books.match(old) == books.match(new) == 0


def test_loading_takes_no_more_blocks_than_are_free():
    books = BlockManager([FULL], 4, 1, num_host_blocks=8)
    finished(books, "a", [1, 1, 1, 1])
    finished(books, "b", [2, 2, 2, 2])  # "a" is in host memory now
    computed_sequence(books, "c", [3, 3])
    assert books.match([1, 1, 1, 1, 1]) == books.start("again", [1, 1, 1, 1, 1]) == 2
    books.check_invariants()


def test_blocks_without_a_name_go_first():
    books = BlockManager([FULL], 4, 4)
    finished(books, "a", [1, 2, 3, 4, 5])  # one named block and one partial
    for i in range(3):
        finished(books, f"b{i}", [9])
    assert books.match([1, 2, 3, 4, 5]) == 4


def test_held_blocks_are_never_evicted():
    books = BlockManager([FULL], 4, 2)
    computed_sequence(books, "a", [1, 1, 1, 1])
    books.start("b", [2] * 6)
    assert not books.reserve("b", 6)
    assert books.reserve("b", 4)
    assert not set(books.table("a", 0).tolist()) & set(books.table("b", 0).tolist())
    books.free("a")
    assert books.reserve("b", 6)


def test_a_pin_survives_pressure_until_it_is_released():
    books = BlockManager([FULL], 4, 2)
    finished(books, "a", [1, 1, 1, 1, 1])
    assert books.pin([1, 1, 1, 1, 1]) == 4
    assert not books.reset_prefix_cache()
    for i in range(4):
        finished(books, f"p{i}", [5 + i] * 4)
    assert books.match([1, 1, 1, 1, 1]) == 4
    books.unpin([1, 1, 1, 1, 1])
    for i in range(4):
        finished(books, f"q{i}", [20 + i] * 4)
    assert books.match([1, 1, 1, 1, 1]) == 0
    assert books.pin([1, 1, 1, 1, 1]) == 0
    books.unpin([1, 1, 1, 1, 1])


def test_window_layers_give_blocks_back_while_the_sequence_runs():
    books = BlockManager([FULL, KVGroup((1,), window=4)], [16, 4], 2)
    tokens = list(range(30))
    books.start("a", tokens)
    for done in range(1, 31):
        assert books.reserve("a", done), "a window of 4 tokens never needs more than 4 blocks of 2"
        books.commit("a", tokens, done)
        books.check_invariants()
    released = books._sequences["a"].released
    assert released == [0, (30 - 3) // 2]
    books.free("a")
    assert books.usage == 0.0


def test_a_forked_tail_is_copied_once_and_only_when_written():
    books = BlockManager([FULL], 8, 4)
    computed_sequence(books, "a", [1, 2, 3, 4, 5, 6])
    books.fork("a", "b", 6)
    assert books.table("a", 0).tolist() == books.table("b", 0).tolist() and books.take_copies() == []
    shared = int(books.table("b", 0)[1])
    assert books.reserve("b", 7)
    assert books.take_copies() == [(0, shared, int(books.table("b", 0)[1]))] and books.take_copies() == []
    assert books.reserve("a", 7) and books.take_copies() == []  # the last holder writes in place
    assert books.table("a", 0)[0] == books.table("b", 0)[0]


@pytest.mark.parametrize("wrong", ["leak", "double", "name"])
def test_the_check_itself_finds_cooked_books(wrong):
    books = BlockManager([FULL], 8, 2)
    computed_sequence(books, "a", [1, 1, 1, 1])
    pool = books._pools[0]
    if wrong == "leak":
        pool.references[int(books.table("a", 0)[0])] += 1
    elif wrong == "double":
        books._sequences["a"].tables[0][1] = books._sequences["a"].tables[0][0]
    else:
        pool.name_of[int(books.table("a", 0)[0])] = b"another"
    with pytest.raises(AssertionError):
        books.check_invariants()
