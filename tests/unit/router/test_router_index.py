"""Who holds which blocks: the index against a naive model, its bounds, and the table and the sets under it."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router import index as module
from router.holders import Held, HolderSets
from router.index import EXPECT_S, SETTLED_S, Match, PrefixIndex
from router.table import KeyTable
from workers.cache.events import Changes, Journal, Tier, hints

SLOTS = 5


def key(i: int) -> bytes:
    return random.Random(i).randbytes(32)


KEYS = [key(i) for i in range(14)]
# Prompts that share beginnings, as those of conversations do.
PROMPTS = [KEYS[:6], [*KEYS[:3], *KEYS[6:10]], KEYS[10:], [KEYS[0], KEYS[13]], []]


def shown(match: Match | None) -> list[tuple[int, int, int]]:
    if match is None:
        return [(0, 0, 0)] * SLOTS
    return list(zip(match.device.tolist(), match.host.tolist(), match.store.tolist(), strict=True))


class Naive:
    """Sets of keys, and the definition of a match word by word."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, Held], set[bytes]] = defaultdict(set)
        self.stored: set[bytes] = set()

    def match(self, prompt: list[bytes]) -> list[tuple[int, int, int]]:
        found = []
        for slot in range(SLOTS):
            counts = [0, 0, 0]
            for name in prompt:
                if name in self.held[slot, Held.DEVICE] | self.held[slot, Held.EXPECTED]:
                    counts[0] += 1
                elif name in self.held[slot, Held.HOST]:
                    counts[1] += 1
                elif name in self.stored:
                    counts[2] += 1
                else:
                    break
            found.append((counts[0], counts[1], counts[2]))
        return found


class IndexMachine(RuleBasedStateMachine):
    """Replicas come and go, their journals tell in parts that get lost, come twice or too late, and assignments are
    expected and end."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(max_blocks=1 << 12)
        self.naive = Naive()
        self.journals: dict[int, Journal] = {}
        self.late: list[tuple[int, Journal, Changes]] = []
        self.told: dict[int, dict[Tier, set[bytes]]] = {}
        self.waits: dict[int, tuple[int, list[bytes], float]] = {}
        self.now = 0.0
        self.number = 0

    @rule(slot=st.integers(0, SLOTS - 1))
    def come(self, slot: int) -> None:
        """A new life, with or without the end of an older one."""
        self.go(slot)
        self.index.add(slot)
        self.journals[slot] = Journal(capacity=6)

    @rule(slot=st.integers(0, SLOTS - 1))
    def go(self, slot: int) -> None:
        self.index.forget(slot)
        self.journals.pop(slot, None)
        self.late = [late for late in self.late if late[0] != slot]
        self.waits = {n: w for n, w in self.waits.items() if w[0] != slot}
        for held in Held:
            self.naive.held[slot, held].clear()

    @precondition(lambda self: self.journals)
    @rule(data=st.data(), tier=st.sampled_from([Tier.DEVICE, Tier.DEVICE, Tier.HOST]), present=st.booleans())
    def change(self, data: st.DataObject, tier: Tier, present: bool) -> None:
        slot = data.draw(st.sampled_from(sorted(self.journals)))
        for name in data.draw(st.sampled_from(PROMPTS)):
            self.journals[slot].record(tier, present, name)

    @precondition(lambda self: self.journals)
    @rule(data=st.data(), most=st.integers(1, 9), way=st.sampled_from(["", "", "lost", "twice", "late"]))
    def tell(self, data: st.DataObject, most: int, way: str) -> None:
        slot = data.draw(st.sampled_from(sorted(self.journals)))
        journal = self.journals[slot]
        changes = journal.since(self.index.wanted(slot), most)
        if way == "lost":
            return
        if way == "late":
            self.late.append((slot, journal, changes))
            return
        for _ in range(1 + (way == "twice")):
            self.take(slot, changes)

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def arrive_late(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.late) - 1))
        slot, _, changes = self.late.pop(at)
        self.take(slot, changes)

    def take(self, slot: int, changes: Changes) -> None:
        wanted = self.index.wanted(slot)
        if not self.index.take(slot, changes):
            assert changes.first > wanted
            assert not changes.reset
            return
        if changes.reset and changes.first >= wanted:
            for held in (Held.DEVICE, Held.HOST):
                self.naive.held[slot, held].clear()
        for i, code in enumerate(changes.codes):
            if changes.first + i < wanted:
                continue
            name = changes.keys[8 * i : 8 * i + 8]
            held = Held(code >> 1)
            if code & 1:
                self.naive.held[slot, held].add(name)
                if held is Held.DEVICE:
                    self.naive.held[slot, Held.EXPECTED].discard(name)
            else:
                self.naive.held[slot, held].discard(name)

    @rule(i=st.integers(0, len(KEYS) - 1), present=st.booleans())
    def store(self, i: int, present: bool) -> None:
        """Told by a replica that is not looked at."""
        self.index.add(SLOTS)
        self.index.take(SLOTS, Changes.of(0, [(Tier.STORE, present, KEYS[i])]))
        (self.naive.stored.add if present else self.naive.stored.discard)(KEYS[i][:8])

    @precondition(lambda self: self.journals)
    @rule(data=st.data())
    def assign(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.journals)))
        prompt = data.draw(st.sampled_from(PROMPTS))
        self.number += 1
        self.index.expect(self.number, slot, hints(prompt), self.now)
        missing = [n for k in prompt if (n := k[:8]) not in self.naive.held[slot, Held.DEVICE]]
        self.naive.held[slot, Held.EXPECTED].update(missing)
        self.waits[self.number] = (slot, missing, self.now + EXPECT_S)

    @precondition(lambda self: self.waits)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.waits)))
        self.index.ended(number, self.now)
        slot, missing, until = self.waits[number]
        self.waits[number] = (slot, missing, min(until, self.now + SETTLED_S))

    @rule(seconds=st.sampled_from([0.5, 1.5, 3.0, EXPECT_S]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.index.expire(self.now)
        for number in [n for n, w in self.waits.items() if w[2] <= self.now]:
            slot, missing, _ = self.waits.pop(number)
            still = {name for s, names, _ in self.waits.values() if s == slot for name in names}
            self.naive.held[slot, Held.EXPECTED] -= set(missing) - still

    @rule()
    def clean_up(self) -> None:
        self.index._collect()
        self.index._table.grow(1 << 12)

    @invariant()
    def agrees(self) -> None:
        for prompt in PROMPTS:
            names = [k[:8] for k in prompt]
            assert shown(self.index.match(hints(prompt), SLOTS)) == self.naive.match(names)

    def teardown(self) -> None:
        """In the end everybody tells all that is there, and nothing else is left."""
        for slot, journal in self.journals.items():
            while self.index.wanted(slot) != journal.end:
                self.take(slot, journal.since(self.index.wanted(slot), 5))
        self.agrees()
        self.now += EXPECT_S
        self.index.expire(self.now)
        assert self.index.stats().expected == 0
        for slot in range(SLOTS + 1):
            self.index.forget(slot)
        self.index._collect()
        assert len(self.index._sets) == 1


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def filled(prompts: dict[int, list[bytes]], **sizes: int) -> PrefixIndex:
    made = PrefixIndex(**sizes)
    for slot, prompt in prompts.items():
        made.add(slot)
        made.take(slot, Changes.of(0, [(Tier.DEVICE, True, k) for k in prompt], reset=True))
    return made


# What a new replica, a gap and a replay do, told plainly.


def test_a_gap_is_left_until_what_is_missing_was_told() -> None:
    made = PrefixIndex()
    made.add(0)
    first, second = [(Tier.DEVICE, True, KEYS[0])], [(Tier.DEVICE, True, KEYS[1])]
    assert not made.take(0, Changes.of(1, second))
    assert (made.wanted(0), made.stats().gaps) == (0, 1)
    assert made.match(hints(KEYS[:2]), SLOTS) is None
    assert made.take(0, Changes.of(0, first))
    assert made.take(0, Changes.of(0, first + second)), "what came before is skipped"
    assert made.take(0, Changes.of(1, second)), "a replay changes nothing"
    assert made.wanted(0) == 2
    assert shown(made.match(hints(KEYS[:3]), SLOTS))[0] == (2, 0, 0)
    assert made.take(0, Changes.of(9, second, reset=True))
    assert made.stats().snapshots == 1
    assert made.match(hints(KEYS[:2]), SLOTS) is None


def test_a_replica_that_vanishes_takes_its_blocks_along_and_no_others() -> None:
    made = filled({0: KEYS[:6], 1: KEYS[:3]})
    made.expect(1, 0, hints(KEYS[:8]), 0.0)
    made.forget(0)
    assert shown(made.match(hints(KEYS[:8]), SLOTS)) == [(0, 0, 0), (3, 0, 0), *[(0, 0, 0)] * 3]
    assert made.stats().expected == 0
    made.expire(1e9)
    made.add(0)
    assert made.wanted(0) == 0
    assert shown(made.match(hints(KEYS[:8]), SLOTS))[0] == (0, 0, 0), "a new life has nothing of the old one"


def test_a_prefix_may_lie_on_several_tiers() -> None:
    made = filled({0: KEYS[:2], 1: []})
    made.take(1, Changes.of(0, [(Tier.HOST, True, k) for k in KEYS[:3]] + [(Tier.STORE, True, k) for k in KEYS[2:5]]))
    assert shown(made.match(hints(KEYS[:6]), 3)) == [(2, 0, 3), (0, 3, 2), (0, 0, 0)]
    made.take(1, Changes.of(6, [(Tier.STORE, True, k) for k in KEYS[:2]]))
    assert shown(made.match(hints(KEYS[:6]), 3)) == [(2, 0, 3), (0, 3, 2), (0, 0, 5)], "whoever wrote it"


@given(st.integers(1, 1200), st.integers(0, 1200), st.integers(0, 1200))
@settings(max_examples=30, deadline=None)
def test_long_prompts_are_looked_at_in_strides_and_matched_exactly(length: int, first: int, second: int) -> None:
    """As long as caches give prefixes up from their ends."""
    prompt = [random.Random(i).randbytes(8) for i in range(length)]
    made = filled({0: prompt[:first], 1: prompt[:second]})
    found = shown(made.match(b"".join(prompt), SLOTS))
    assert found[:2] == [(min(first, length), 0, 0), (min(second, length), 0, 0)]


def test_long_prompts_cost_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [random.Random(i).randbytes(8) for i in range(4096)]
    made = filled({0: prompt})
    looks, find = [], KeyTable.find
    monkeypatch.setattr(KeyTable, "find", lambda table, name: looks.append(name) or find(table, name))
    assert shown(made.match(b"".join(prompt), SLOTS))[0] == (4096, 0, 0)
    assert len(looks) < 600


# Bounds.


def test_blocks_are_bounded_and_what_is_known_stays() -> None:
    made = PrefixIndex(max_blocks=5000, max_stored=1000)
    made.add(0)
    names = [random.Random(i).randbytes(8) for i in range(20_000)]
    made.take(0, Changes.of(0, [(Tier.DEVICE, True, k) for k in names]))
    stats = made.stats()
    assert stats.blocks <= 5000
    assert stats.refused == 20_000 - stats.blocks
    assert shown(made.match(b"".join(names[:4000]), 1))[0] == (4000, 0, 0)
    made.take(0, Changes.of(20_000, [(Tier.DEVICE, False, k) for k in names]))
    assert made.match(b"".join(names[:4000]), 1) is None
    monkey = [random.Random(-i).randbytes(8) for i in range(1, 100_000)]
    made.take(0, Changes.of(40_000, [(Tier.DEVICE, i % 2 == 0, k) for k in monkey for i in range(2)]))
    assert made.stats().nbytes < 500_000, "what nobody has any more takes no room"


def test_of_the_store_the_longest_unused_is_forgotten() -> None:
    made = PrefixIndex(max_blocks=1 << 16, max_stored=1280)
    made.add(0)
    names = [random.Random(i).randbytes(8) for i in range(8000)]
    used = b"".join(names[:50])
    for start in range(0, 8000, 20):
        made.take(0, Changes.of(start, [(Tier.STORE, True, k) for k in names[start : start + 20]]))
        assert shown(made.match(used, 1))[0][2] == min(50, start + 20), "it is asked for all the time"
        assert made.stats().stored <= 1280
    assert made.match(names[60], 1) is None
    assert shown(made.match(b"".join(names[-800:]), 1))[0] == (0, 0, 800)


def test_what_is_expected_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_EXPECTED", 10)
    made = filled({0: []})
    for number in range(7):
        made.expect(number, 0, hints([key(100 + 4 * number + i) for i in range(4)]), 0.0)
    assert made.stats().expected <= 10
    assert made.match(hints([key(100)]), 1) is None
    assert shown(made.match(hints([key(124)]), 1)) == [(1, 0, 0)]


# What it is made of.


@settings(deadline=None)
@given(st.lists(st.integers(1, 60)), st.integers(1, 40))
def test_the_table_keeps_what_a_dictionary_keeps(chosen: list[int], slots: int) -> None:
    """Keys are crowded: all homes lie in a few slots."""
    table, expected = KeyTable(slots), {}
    for n, i in enumerate(chosen):
        name = (i % 3) << 62 | i
        if (place := table.place(name)) < 0:
            table.grow(1 << 20)
            place = table.place(name)
        table.holders[place] = expected[name] = n + 1
    for i in range(1, 61):
        name = (i % 3) << 62 | i
        place = table.find(name)
        assert (int(table.holders[place]) if place >= 0 else None) == expected.get(name)
    assert table.used == len(expected)


def test_keys_at_the_end_of_the_table_find_room() -> None:
    table = KeyTable(16)
    names = [2**64 - 1 - i for i in range(3000)]
    for name in names:
        if table.place(name) < 0:
            table.holders[[table.find(n) for n in names if table.find(n) >= 0]] = 1
            table.grow(1 << 20)
            assert table.place(name) >= 0
    assert all(table.find(name) >= 0 for name in names)
    assert table.find(5) == -1


def test_a_block_whose_name_is_zero_is_known_by_another() -> None:
    made = filled({0: [bytes(32)]})
    assert shown(made.match(bytes(8), 1)) == [(1, 0, 0)]


def test_sets_are_shared_and_forgotten() -> None:
    sets = HolderSets()
    one = sets.added(sets.added(0, 1, Held.DEVICE), 2, Held.HOST)
    other = sets.added(sets.added(0, 2, Held.HOST), 1, Held.DEVICE)
    assert one == other
    assert [x.tolist() for x in sets.slots(one)] == [[1], [2]]
    both = sets.added(one, 2, Held.EXPECTED)
    assert [sorted(x.tolist()) for x in sets.slots(both)] == [[1, 2], []]
    used = np.zeros(len(sets), np.bool_)
    used[both] = True
    now = sets.keep(used)[both]
    assert len(sets) == 2
    assert sets.has(int(now), 2, Held.EXPECTED)
    assert sets.removed(sets.added(int(now), 2, Held.DEVICE), 2, Held.DEVICE) not in (0, now)
