"""What a cache tells of itself, and the journal of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.cache.events import STORE_KEPT, Changes, Journal, Tier, hints
from workers.cache.keys import block_keys, root_key
from workers.cache.manager import CacheManager
from workers.engine.contract import Request
from workers.engine.fake import FakeEngine

P = 4
Told = tuple[Tier, bool, bytes]


def key(i: int) -> bytes:
    return i.to_bytes(8, "little") + bytes(24)


class Reader:
    """Applies changes as an index does: what is there now, by tier."""

    def __init__(self) -> None:
        self.present: dict[int, set[bytes]] = {tier: set() for tier in Tier}
        self.wanted = 0

    def read(self, changes: Changes) -> None:
        if changes.reset:
            self.present[Tier.DEVICE].clear()
            self.present[Tier.HOST].clear()
        else:
            assert changes.first == self.wanted
        for i, code in enumerate(changes.codes):
            name = changes.keys[8 * i : 8 * i + 8]
            (self.present[code >> 1].add if code & 1 else self.present[code >> 1].discard)(name)
        self.wanted = changes.end


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(Tier), st.booleans(), st.integers(0, 9)), max_size=80),
    st.integers(2, 12),
    st.integers(1, 9),
    st.data(),
)
def test_who_reads_at_any_time_and_in_any_parts_knows_what_is_there(
    said: list[tuple[Tier, bool, int]], capacity: int, most: int, data: st.DataObject
) -> None:
    """Also who loses what was read, or comes anew."""
    journal, reader = Journal(capacity), Reader()
    there: dict[int, set[bytes]] = {tier: set() for tier in Tier}
    for tier, present, i in said:
        journal.record(tier, present, key(i))
        (there[tier].add if present else there[tier].discard)(key(i)[:8])
        match data.draw(st.sampled_from(["", "", "read", "lost", "anew"])):
            case "read":
                reader.read(journal.since(reader.wanted, most))
            case "lost":
                journal.since(reader.wanted, most)
            case "anew":
                reader = Reader()
    while reader.wanted != journal.end:
        reader.read(journal.since(reader.wanted, most))
    assert reader.present[Tier.DEVICE] == there[Tier.DEVICE]
    assert reader.present[Tier.HOST] == there[Tier.HOST]
    assert reader.present[Tier.STORE] >= there[Tier.STORE], "what left the store may be known a little longer"


def test_what_is_known_is_not_told_again() -> None:
    journal = Journal()
    for _ in range(2):
        journal.record(Tier.DEVICE, True, key(1))
        journal.record(Tier.HOST, False, key(1))
    assert journal.since(0) == Changes.of(0, [(Tier.DEVICE, True, key(1))], reset=True)
    assert journal.since(1) == Changes(1, False, b"", b"")


def test_a_number_that_is_gone_or_never_was_gets_everything() -> None:
    journal = Journal(4)
    for i in range(10):
        journal.record(Tier.DEVICE, True, key(i))
        if i >= 3:
            journal.record(Tier.DEVICE, False, key(i - 3))
    everything = [(Tier.DEVICE, True, key(i)) for i in (7, 8, 9)]
    gone = journal.since(0)
    assert gone == Changes.of(gone.first, everything, reset=True)
    assert gone.first > 16, "no number of before means anything any more"
    ahead = journal.since(journal.end + 1)
    assert ahead.reset
    assert ahead.first > gone.end
    journal.record(Tier.DEVICE, True, key(30))
    assert journal.since(ahead.end) == Changes.of(ahead.end, [(Tier.DEVICE, True, key(30))])


def test_a_snapshot_larger_than_the_journal_is_read_in_parts_while_it_goes_on() -> None:
    journal, reader = Journal(4), Reader()
    for i in range(100):
        journal.record(Tier.DEVICE, True, key(i))
    for i in range(100, 106):
        reader.read(journal.since(reader.wanted, 30))
        journal.record(Tier.DEVICE, True, key(i))
    reader.read(journal.since(reader.wanted, 30))
    assert reader.present[Tier.DEVICE] == {key(i)[:8] for i in range(106)}


def test_the_journal_is_bounded() -> None:
    journal = Journal(100)
    for i in range(STORE_KEPT + 1000):
        journal.record(Tier.STORE, True, key(i))
    assert len(journal.since(journal.end - 50).codes) == 50
    assert len(journal.since(0, 1 << 20).codes) == STORE_KEPT
    with pytest.raises(ValueError, match="capacity is 1"):
        Journal(1)


# What a cache manager tells.


def compute(cache: CacheManager, tokens: list[int]) -> None:
    table = cache.open()
    hit = cache.match(table, b"root", tokens)
    cache.allocate(table, len(tokens))
    cache.register(table, b"root", tokens, len(tokens))
    cache.trim(table, len(tokens))
    assert hit <= len(tokens)
    cache.close(table)


@pytest.mark.parametrize("windows", [[None], [None, 5], [5, None, 9], [5, 9]])
def test_a_block_is_told_while_every_full_attention_group_has_it(windows: list[int | None]) -> None:
    there: set[bytes] = set()
    told: list[Told] = []

    def observe(tier: Tier, present: bool, name: bytes) -> None:
        told.append((tier, present, name))
        assert (name in there) != present, "told once"
        (there.add if present else there.discard)(name)

    cache = CacheManager([6] * len(windows), windows, P, observer=observe)
    for start in (0, 100, 0, 200, 50):
        tokens = list(range(start, start + 15))
        compute(cache, tokens)
        groups = [g for g, w in enumerate(windows) if w is None] or range(len(windows))
        known = [set(cache._tree.blocks(g).values()) for g in groups]
        assert there == set.intersection(*known)
    assert {tier for tier, *_ in told} == {Tier.DEVICE}
    assert any(not present for _, present, _ in told), "the cache is small: some were evicted"


def test_a_cache_without_a_prefix_tree_has_nothing_to_tell() -> None:
    told: list[Told] = []
    cache = CacheManager([6], [None], P, prefix_cache=False, observer=lambda *said: told.append(said))
    compute(cache, list(range(15)))
    assert told == []


def test_an_engine_tells_the_blocks_of_what_it_computed() -> None:
    engine = FakeEngine(blocks=3)
    prompts = [list(range(i, i + 40)) for i in (0, 100)]
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), prompt, 1, cache_salt="s"))
        while engine.has_work():
            engine.step()
    root = root_key("fake", "float32", "fake", "s")
    one, two = (block_keys(root, p, 16) for p in prompts)
    reader = Reader()
    reader.read(engine.journal.since(0))
    names = hints([one[1], *two])
    assert reader.present[Tier.DEVICE] == {names[i : i + 8] for i in range(0, 24, 8)}
