"""Which replica has which blocks, and which the shared store has: hints for choosing a replica. Pure.

| owns | does not own |
|---|---|
| who holds a block, as far as it was told; what is expected from an assignment | which replica that makes the best |
| the order of what replicas tell, and what is missing of it | how it travels: `cluster.directory` |

A block is the first 8 bytes of its key: two of ten million agree in them once in 370,000 such indexes, and what is told
here need not be true at all by the time a request arrives. A wrong hint costs time, never an answer.

Each replica's `workers.cache.events.Journal` numbers its changes. They are taken in order; what comes twice is skipped,
what comes too early is left until the journal is asked again from `wanted` on. Whoever vanishes is forgotten at once.

Bounds: `max_blocks` in all, and `max_stored` that only the shared store has, the longest unused of which are dropped.
What is above them is not taken in, so that it is merely computed again. What was assigned but not told counts as
expected until the answer has ended, at most `EXPECT_S` seconds, and at most `MAX_EXPECTED` blocks of it in all.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from router.holders import Held, HolderSets, way_of
from router.table import KeyTable
from workers.cache.events import Changes, Tier

EXPECT_S = 60.0  # an assignment's blocks that were never told are forgotten after this
SETTLED_S = 2.0  # and after this, once its answer has ended
MAX_EXPECTED = 1 << 20
EXACT_BLOCKS = 128  # a longer prompt is looked at in strides
STRIDE = 8
_OLDEST = 255  # generations of the shared store's blocks are bytes
_HELD = (Held.DEVICE, Held.HOST)  # by tier

Blocks = NDArray[np.int64]


@dataclass(frozen=True)
class Match:
    """Leading blocks of a prompt that each replica need not compute, by its slot: on its device, in its host's memory,
    in the shared store. Together they are a prompt's beginning without a gap."""

    device: Blocks  # [R]
    host: Blocks  # [R]
    store: Blocks  # [R]


class IndexStats(msgspec.Struct):
    """Counts: `blocks` are keys in the table, those that nobody has any more among them until it grows; `nbytes` is the
    table's size. Those in the past tense run since the start: changes `taken` from journals, `gaps` in what they told,
    `snapshots` taken instead, and blocks `refused` for want of room."""

    blocks: int = 0
    stored: int = 0
    expected: int = 0
    sets: int = 0
    nbytes: int = 0
    taken: int = 0
    gaps: int = 0
    snapshots: int = 0
    refused: int = 0


@dataclass
class _Expected:
    """Blocks that an assignment will bring."""

    slot: int
    keys: list[int]


@dataclass
class _Source:
    """What one replica's life has told: the changes before number `wanted`. `told`: perhaps it has some blocks."""

    wanted: int = 0
    told: bool = False
    expected: dict[int, None] = field(default_factory=dict)  # numbers of its assignments
    awaited: dict[int, int] = field(default_factory=dict)  # how many of those each block is expected from


class PrefixIndex:
    """Replicas are slots, small numbers that the caller gives out; times are seconds of the caller's clock."""

    def __init__(self, max_blocks: int = 1 << 24, max_stored: int = 1 << 23) -> None:
        self._max_blocks = max_blocks
        self._max_stored = max_stored
        self._table = KeyTable()
        self._sets = HolderSets()
        self._sources: dict[int, _Source] = {}
        self._generation = 1
        self._stored_lately = 0  # that came or were used in this generation
        self._stored = 0
        self._refusing = 0  # new blocks to refuse before room is looked for again
        self._expected: dict[int, _Expected] = {}
        self._expected_blocks = 0
        self._due: list[tuple[float, int]] = []
        self.counts = IndexStats()

    # What replicas tell.

    def add(self, slot: int) -> None:
        """A replica's life begins: nothing is known of it."""
        self.forget(slot)
        self._sources[slot] = _Source()

    def forget(self, slot: int) -> None:
        """A replica is gone, with all that it had."""
        source = self._sources.pop(slot, None)
        if source is not None:
            if source.told or source.expected:
                self._renumber(self._sets.without(slot))
            for number in source.expected:
                self._expected_blocks -= len(self._expected.pop(number).keys)

    def wanted(self, slot: int) -> int:
        """The number of the change that is to come next."""
        return self._sources[slot].wanted

    def take(self, slot: int, changes: Changes) -> bool:
        """What a replica's journal says. False, and nothing changes, where something before it is missing."""
        source = self._sources[slot]
        skip = source.wanted - changes.first
        if changes.reset and skip <= 0:
            if changes.first:
                self.counts.snapshots += 1
            if source.told:
                self._renumber(self._sets.without(slot, _HELD))
            skip = 0
        if skip < 0:
            self.counts.gaps += 1
            return False
        if changes.end > source.wanted:
            source.wanted, source.told = changes.end, True
            self._apply(slot, changes.codes[skip:], _numbers(changes.keys)[skip:])
        return True

    # What is asked.

    def match(self, keys: bytes, slots: int) -> Match | None:
        """What each of so many slots has of a prompt's leading blocks; None where nobody has any.

        Of a long prompt some blocks are looked at, and what lies between two of equal holders is taken to be like them:
        caches give a prefix up from one of its ends.
        """
        runs = self._runs(keys)
        if not runs:
            return None
        device, host, store = np.zeros((3, slots), np.int64)
        following = np.ones(slots, np.bool_)
        for length, holders, stored in runs:
            fast, slow = self._sets.slots(holders)
            if not stored:
                having = np.zeros(slots, np.bool_)
                having[fast] = having[slow] = True
                following &= having
                if not following.any():
                    break
                device[fast] += length * following[fast]
                host[slow] += length * following[slow]
            else:
                here, near = fast[following[fast]], slow[following[slow]]
                store[following] += length
                store[here] -= length
                store[near] -= length
                device[here] += length
                host[near] += length
        return Match(device, host, store)

    def known(self, keys: bytes) -> int:
        """Leading blocks of a prompt that somebody has, wherever."""
        return sum(length for length, *_ in self._runs(keys))

    def expect(self, number: int, slot: int, keys: bytes, now: float) -> None:
        """Assignment `number`: the slot will soon have these blocks."""
        source, sets = self._sources[slot], self._sets
        missing, way = [], way_of(0, slot, Held.EXPECTED, True)
        for key in _numbers(keys):
            place = self._place(key)
            if place < 0:
                break
            before = self._table.holders_at[place]
            after = sets.known.get(way | before)
            if after is None:
                after = sets.added(before, slot, Held.EXPECTED)
            if after != before or sets.has(before, slot, Held.EXPECTED):
                self._table.holders_at[place] = after
                source.awaited[key] = source.awaited.get(key, 0) + 1
                missing.append(key)
        if missing:
            self._expected[number] = _Expected(slot, missing)
            source.expected[number] = None
            self._expected_blocks += len(missing)
            heapq.heappush(self._due, (now + EXPECT_S, number))
        while self._expected_blocks > MAX_EXPECTED:
            self._settle(next(iter(self._expected)))

    def ended(self, number: int, now: float) -> None:
        """The answer of an assignment has ended: what it brought is told soon. Unknown ones are ignored."""
        if number in self._expected:
            heapq.heappush(self._due, (now + SETTLED_S, number))

    def expire(self, now: float) -> None:
        """Forgets what was expected for too long."""
        while self._due and self._due[0][0] <= now:
            self._settle(heapq.heappop(self._due)[1])

    def stats(self) -> IndexStats:
        """Counts now; the same object every time."""
        table, counts = self._table, self.counts
        counts.blocks, counts.nbytes, counts.stored = table.used, table.nbytes, self._stored
        counts.expected, counts.sets = self._expected_blocks, len(self._sets)
        return counts

    # How.

    def _runs(self, keys: bytes) -> list[tuple[int, int, bool]]:
        """A prompt's leading blocks that somebody has, in runs of equal holders: (blocks, set, in the store)."""
        numbers, table = _numbers(keys), self._table
        find, holders_at, stored_at = table.find, table.holders_at, table.stored_at
        recent, stale = self._generation - 1, False

        def look(i: int) -> tuple[int, bool] | None:
            nonlocal stale
            place = find(numbers[i])
            if place < 0:
                return None
            holders, stored = holders_at[place], stored_at[place]
            stale = stale or 0 < stored < recent
            return (holders, stored != 0) if holders or stored else None

        runs: list[tuple[int, int, bool]] = []
        count, stride = len(numbers), 1 if len(numbers) <= EXACT_BLOCKS else STRIDE
        start, here = 0, look(0) if numbers else None
        while here is not None:
            last, then = start, None  # the run is [start, last] so far
            while last + 1 < count:
                probe = min(last + stride, count - 1)
                then = look(probe)
                if then == here:
                    last, then = probe, None
                    continue
                while last + 1 < probe and (between := look(last + 1)) != then:
                    if between != here:
                        then = between
                        break
                    last += 1
                break
            runs.append((last + 1 - start, *here))
            start, here = last + 1, then
        if stale:
            self._refresh(numbers[:start])
        return runs

    def _refresh(self, keys: Sequence[int]) -> None:
        """These blocks of the shared store are of use."""
        for key in keys:
            place = self._table.find(key)
            if place >= 0 and self._table.stored_at[place]:
                self._store(place, True)

    def _apply(self, slot: int, codes: bytes, keys: Sequence[int]) -> None:
        """Changes in order."""
        table, sets = self._table, self._sets
        ways = {2 * held + added: way_of(0, slot, held, bool(added)) for held in _HELD for added in (0, 1)}
        last, place = 0, -1
        for code, key in zip(codes, keys, strict=True):
            if key != last:  # what goes from one tier to another is told twice in a row
                last, place = key, self._place(key) if code & 1 else table.find(key)
            elif place < 0 and code & 1:
                place = self._place(key)
            if place < 0:
                continue
            if code >> 1 == Tier.STORE:
                self._store(place, bool(code & 1))
                continue
            before = table.holders_at[place]
            after = sets.known.get(ways[code] | before)  # most often this step was taken before
            if after is None:
                step = sets.added if code & 1 else sets.removed
                after = step(before, slot, _HELD[code >> 1])
            table.holders_at[place] = after
        self.counts.taken += len(codes)
        if sets.overgrown:
            self._collect()

    def _place(self, key: int) -> int:
        """The key's place, a new one where it had none; -1 where there is no more room."""
        table = self._table
        place = table.place(key)
        if place >= 0:
            return place
        if self._refusing:
            self._refusing -= 1
        else:
            most = self._max_blocks * 15 // 16
            alive = int(table.alive().sum())
            if alive > most:
                self._age(max(0, self._stored - self._max_blocks // 4))
                alive = int(table.alive().sum())
            if alive <= most:
                table.grow(self._max_blocks)
                return table.place(key)
            self._refusing = 1 << 16
        self.counts.refused += 1
        return -1

    def _store(self, place: int, present: bool) -> None:
        """The shared store has the block, or has it no more."""
        stored_at, now = self._table.stored_at, self._generation
        was = stored_at[place]
        if not present:
            stored_at[place] = 0
            self._stored -= was != 0
        elif was != now:
            stored_at[place] = now
            self._stored += was == 0
            self._stored_lately += 1
            if self._stored_lately > self._max_stored // 128:
                self._next_generation()
            if self._stored > self._max_stored:
                self._age(self._max_stored * 7 // 8)

    def _next_generation(self) -> None:
        self._stored_lately = 0
        self._generation += 1
        if self._generation == _OLDEST:  # two become one
            stored = self._table.stored
            stored[:] = stored // 2 + stored % 2
            self._generation = _OLDEST // 2 + 2

    def _age(self, target: int) -> None:
        """Forgets what only the store has, longest unused first, until at most `target` blocks are known of it."""
        stored = self._table.stored
        sizes = np.bincount(stored, minlength=_OLDEST + 1)[1:]
        newer = np.cumsum(sizes[::-1])[::-1]  # newer[i]: blocks of generation i + 1 and later
        first = int(np.argmax(newer <= target)) + 1 if newer[-1] <= target else _OLDEST + 1
        stored[stored < first] = 0
        self._stored = int(np.count_nonzero(stored))

    def _settle(self, number: int) -> None:
        """An assignment is not waited for any more: what it was to bring and was not told is not there."""
        record = self._expected.pop(number, None)
        if record is None:
            return
        slot, source = record.slot, self._sources[record.slot]
        del source.expected[number]
        self._expected_blocks -= len(record.keys)
        table, sets, awaited = self._table, self._sets, source.awaited
        for key in record.keys:
            if others := awaited[key] - 1:
                awaited[key] = others
                continue
            del awaited[key]
            place = table.find(key)
            if place >= 0:
                table.holders_at[place] = sets.removed(table.holders_at[place], slot, Held.EXPECTED)

    def _collect(self) -> None:
        used = np.bincount(self._table.holders, minlength=len(self._sets)) > 0
        self._renumber(self._sets.keep(used))

    def _renumber(self, numbers: NDArray[np.uint32]) -> None:
        self._table.holders[:] = numbers[self._table.holders]


def _numbers(keys: bytes) -> list[int]:
    """From `workers.cache.events.hints`. 0 marks a free slot of the table: whoever is called so is called 1."""
    numbers = np.frombuffer(keys, "<u8")
    result: list[int] = (numbers if numbers.all() else np.where(numbers == 0, np.uint64(1), numbers)).tolist()
    return result
