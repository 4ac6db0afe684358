"""Block pool, keys, prefix tree and manager."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.cache.blocks import BlockPool
from workers.cache.keys import LAYOUT_VERSION, block_keys, child_key, root_key
from workers.cache.manager import BlockTable, CacheManager
from workers.cache.prefix_tree import ABSENT, PrefixTree

P = 4  # positions of a block in these tests
ROOT = b"root"


# Keys.


def test_a_key_is_the_hash_that_its_file_describes():
    root = root_key("model", "bfloat16", "numerics", "salt")
    parts = ("model", "bfloat16", str(LAYOUT_VERSION), "salt", "numerics")
    text = b"understudy kv block\0" + b"".join(struct.pack("<Q", len(p)) + p.encode() for p in parts)
    assert root == hashlib.sha256(text).digest()
    assert child_key(root, [1, 70_000]) == hashlib.sha256(root + struct.pack("<II", 1, 70_000)).digest()


def test_everything_that_decides_the_bytes_is_in_the_root():
    base = ("model", "bfloat16", "numerics", "salt", 1)
    roots = {root_key(*base)}
    for i in range(4):
        roots.add(root_key(*(v + "x" if j == i else v for j, v in enumerate(base))))
    roots.add(root_key("model", "bfloat16", "numerics", "salt", 2))
    roots.add(root_key("mode", "lbfloat16", "numerics", "salt", 1))
    assert len(roots) == 7


def test_keys_are_of_full_blocks_and_of_their_whole_past():
    tokens = list(range(11))
    keys = block_keys(ROOT, tokens, P)
    assert len(keys) == 2
    assert keys[1] == child_key(keys[0], tokens[4:8])
    assert block_keys(ROOT, [9, *tokens[1:]], P)[1] != keys[1]


def test_keys_are_equal_in_every_process():
    code = "from workers.cache.keys import *; print(block_keys(root_key('m','d','n','s'), range(40), 16)[-1].hex())"
    runs = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": s}, capture_output=True, check=True).stdout
        for s in ("1", "2")
    }
    assert runs == {(block_keys(root_key("m", "d", "n", "s"), range(40), 16)[-1].hex() + "\n").encode()}


# Pool.


def test_a_pool_gives_what_it_has_and_no_more():
    pool = BlockPool(3)
    assert sorted(pool.take()[0] for _ in range(3)) == [0, 1, 2]
    with pytest.raises(IndexError, match="none of 3 blocks"):
        pool.take()
    pool.release(1, keep=False)
    assert pool.take() == (1, False)


def test_kept_blocks_are_taken_last_and_oldest_first():
    pool = BlockPool(3)
    blocks = [pool.take()[0] for _ in range(3)]
    pool.release(blocks[1], keep=True)
    pool.release(blocks[0], keep=True)
    pool.release(blocks[2], keep=False)
    assert [pool.take() for _ in range(3)] == [(blocks[2], False), (blocks[1], True), (blocks[0], True)]


def test_misuse_is_an_error():
    pool = BlockPool(2)
    block, _ = pool.take()
    pool.release(block, keep=False)
    with pytest.raises(ValueError, match="released more often"):
        pool.release(block, keep=False)
    with pytest.raises(KeyError):
        pool.hold(block)
    with pytest.raises(ValueError, match="at least 1"):
        BlockPool(0)


# Tree.


def test_a_match_needs_the_whole_chain_of_a_full_group():
    tree, keys = PrefixTree(1), block_keys(ROOT, range(16), P)
    for i in (0, 1, 3):
        tree.insert(keys[i], keys[i - 1] if i else ROOT, 0, i)
    assert tree.match(keys, [None]) == 2
    assert tree.match([], [None]) == 0


def test_a_match_needs_only_the_window_of_a_windowed_group():
    tree, keys = PrefixTree(2), block_keys(ROOT, range(24), P)
    for i in range(6):
        tree.insert(keys[i], keys[i - 1] if i else ROOT, 0, i)
    for i in (2, 3, 5):
        tree.insert(keys[i], keys[i - 1], 1, i)
    assert tree.match(keys, [None, 2]) == 4
    assert tree.match(keys, [None, 1]) == 6
    assert tree.match(keys, [None, 3]) == 0
    assert tree.match(keys, [None, 0]) == 6
    tree.forget(0, 0)
    assert tree.match(keys, [None, 1]) == 0
    assert tree.find(keys[0], 0) == ABSENT
    assert len(tree) == 5


# Manager.


def computed(manager: CacheManager, tokens: list[int]) -> BlockTable:
    """A table with all of `tokens` computed and published."""
    table = manager.open()
    start = manager.match(table, ROOT, tokens)
    assert start <= len(tokens) - 1
    assert manager.can_allocate(table, len(tokens))
    manager.allocate(table, len(tokens))
    manager.register(table, ROOT, tokens, len(tokens))
    return table


def test_only_computed_full_blocks_are_published():
    manager = CacheManager([8], [None], P)
    tokens = list(range(12))
    table = manager.open()
    manager.allocate(table, 12)
    manager.register(table, ROOT, tokens, 7)
    other = manager.open()
    assert manager.match(other, ROOT, tokens) == 4
    manager.check([table, other])
    manager.close(table)
    manager.close(other)
    assert manager.blocks_kept == 1
    manager.check_idle()


def test_equal_blocks_become_one():
    manager, tokens = CacheManager([8], [None], P), list(range(9))
    first, second = manager.open(), manager.open()
    for table in (first, second):
        manager.allocate(table, 9)
    assert manager.blocks_in_use == 6
    for table in (first, second):
        manager.register(table, ROOT, tokens, 8)
    assert manager.blocks_in_use == 4
    assert first.groups[0][:2] == second.groups[0][:2]
    manager.check([first, second])
    manager.close(first)
    manager.close(second)
    manager.check_idle()


def test_eviction_takes_leaves_before_their_ancestors():
    manager = CacheManager([4], [None], P)
    manager.close(computed(manager, list(range(12))))
    table = manager.open()
    manager.allocate(table, 8)  # one free block and one kept
    manager.close(table)
    again = manager.open()
    assert manager.match(again, ROOT, [*range(12), 0]) == 8
    manager.close(again)


def test_the_window_gives_blocks_back_while_running():
    manager, tokens = CacheManager([8, 8], [None, 6], P), list(range(24))
    table = computed(manager, tokens)
    manager.trim(table, 24)
    assert [b == ABSENT for b in table.groups[1]] == [True] * 4 + [False] * 2
    assert ABSENT not in table.groups[0]
    manager.check([table])
    other = manager.open()
    assert manager.match(other, ROOT, [*tokens, 0]) == 24
    assert other.groups[1][:4].tolist() == [ABSENT] * 4
    assert other.groups[1][4:] == table.groups[1][4:]
    for t in (table, other):
        manager.close(t)
    manager.check_idle()


def test_a_windowed_hit_has_every_block_that_its_next_row_sees():
    manager, tokens = CacheManager([8], [6], P), list(range(12))
    table = computed(manager, tokens)
    manager.trim(table, 12)  # the row at 12 sees 7 .. 12: blocks 1 and 2 stay
    manager.close(table)
    filler = manager.open()
    manager.allocate(filler, 6 * P)  # takes the free blocks and block 0, the first to be released
    other = manager.open()
    assert manager.match(other, ROOT, [*tokens, 0]) == 12
    manager.close(other)
    manager.allocate(filler, 7 * P)  # takes block 2, released next: block 1 alone is not enough for anybody
    another = manager.open()
    assert manager.match(another, ROOT, [*tokens, 0]) == 0
    manager.close(another)
    manager.close(filler)
    manager.check_idle()


def test_salts_do_not_share():
    manager = CacheManager([8], [None], P)
    manager.close(computed(manager, list(range(12))))
    table = manager.open()
    assert manager.match(table, b"another root", list(range(12))) == 0
    manager.close(table)


def test_an_open_table_is_not_idle():
    manager = CacheManager([8], [None], P)
    table = manager.open()
    with pytest.raises(RuntimeError, match="1 block tables are open"):
        manager.check_idle()
    manager.close(table)
    manager.check_idle()


class Cache(RuleBasedStateMachine):
    """Sequences come, grow, are published, trimmed and leave in any order; a model of the memory says what each block
    must hold."""

    @initialize(
        blocks=st.integers(3, 12), windows=st.sampled_from([[None], [6], [None, 6], [None, 10, 1]]), on=st.booleans()
    )
    def start(self, blocks: int, windows: list[int | None], on: bool) -> None:
        self.manager = CacheManager([blocks] * len(windows), windows, P, on)
        self.memory: list[dict[int, tuple[int, ...]]] = [{} for _ in windows]  # block -> all tokens up to its end
        self.tables: list[tuple[BlockTable, list[int], list[int]]] = []  # table, tokens, [computed]

    @rule(family=st.integers(0, 2), length=st.integers(1, 30))
    def arrive(self, family: int, length: int) -> None:
        tokens = [family if i > 6 else 0 for i in range(length)]
        table = self.manager.open()
        hit = self.manager.match(table, ROOT, tokens)
        assert hit < length
        self.tables.append((table, tokens, [hit]))

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 50), rows=st.integers(1, 12))
    def compute(self, which: int, rows: int) -> None:
        table, tokens, done = self.tables[which % len(self.tables)]
        end = min(len(tokens), done[0] + rows)
        if not self.manager.can_allocate(table, end):
            return
        self.manager.allocate(table, end)
        for memory, entries in zip(self.memory, table.groups, strict=True):
            for position in range(done[0], end):
                memory[entries[position // P]] = tuple(tokens[: position + 1])
        done[0] = end
        self.manager.register(table, ROOT, tokens, end)
        self.manager.trim(table, end)

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 50))
    def leave(self, which: int) -> None:
        self.manager.close(self.tables.pop(which % len(self.tables))[0])

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 50))
    def preempt(self, which: int) -> None:
        table, tokens, done = self.tables[which % len(self.tables)]
        self.manager.free(table)
        done[0] = self.manager.match(table, ROOT, tokens)

    @invariant()
    def blocks_hold_what_their_sequences_computed(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check([t for t, _, _ in self.tables])
        for table, tokens, (done,) in self.tables:
            for group, (memory, entries) in enumerate(zip(self.memory, table.groups, strict=True)):
                window = self.manager.windows[group]
                first = 0 if window is None else max(0, done - window + 1)
                for position in range(first, done):
                    end = min(done, position // P * P + P)
                    assert memory[entries[position // P]][:end] == tuple(tokens[:end])

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            for table, _, _ in self.tables:
                self.manager.close(table)
            self.manager.check_idle()


Cache.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
TestCache = Cache.TestCase
