"""Interned sets of who holds a block, so that a block in an index costs a number and not a set. Pure.

A holder is a slot (a replica's number) and how it holds the block. Blocks of one conversation have one set, and so have
blocks of one system prompt: there are far fewer sets than blocks.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]


class Held(IntEnum):
    """How a replica holds a block: EXPECTED where it was given a prompt with it and has not yet told."""

    DEVICE = 0
    HOST = 1
    EXPECTED = 2


KINDS = len(Held)


class HolderSets:
    """Sets by number; 0 is the empty one. Numbers are given out until `keep` says which are still in use."""

    def __init__(self) -> None:
        self._members: list[frozenset[int]] = [frozenset()]
        self._numbers: dict[frozenset[int], int] = {frozenset(): 0}
        self._slots: list[tuple[Slots, Slots] | None] = [None]
        self._next: dict[tuple[int, int, bool], int] = {}
        self._alive = 1  # sets at the last `keep`

    def __len__(self) -> int:
        return len(self._members)

    @property
    def overgrown(self) -> bool:
        """Whether it is time for `keep`."""
        return len(self._members) > 1024 + 2 * self._alive

    def added(self, number: int, slot: int, held: Held) -> int:
        """The set that also has this holder. What is on the device is expected no more."""
        way = (number, KINDS * slot + held, True)
        known = self._next.get(way)
        if known is None:
            members, base = self._members[number], KINDS * slot
            if held is Held.EXPECTED and base + Held.DEVICE in members:
                known = number
            else:
                gone = {base + Held.EXPECTED} if held is Held.DEVICE else set()
                known = self._intern((members - gone) | {base + held})
            self._next[way] = known
        return known

    def removed(self, number: int, slot: int, held: Held) -> int:
        """The set without this holder."""
        way = (number, KINDS * slot + held, False)
        known = self._next.get(way)
        if known is None:
            known = self._next[way] = self._intern(self._members[number] - {KINDS * slot + held})
        return known

    def has(self, number: int, slot: int, held: Held) -> bool:
        return KINDS * slot + held in self._members[number]

    def slots(self, number: int) -> tuple[Slots, Slots]:
        """Who has the block on the device (or soon will), and who in host memory alone; each slot once."""
        known = self._slots[number]
        if known is None:
            members = self._members[number]
            fast = {m // KINDS for m in members if m % KINDS != Held.HOST}
            slow = {m // KINDS for m in members if m % KINDS == Held.HOST} - fast
            known = self._slots[number] = np.array(sorted(fast), np.int64), np.array(sorted(slow), np.int64)
        return known

    def without(self, slot: int) -> NDArray[np.uint32]:
        """For each set the one without anything of this slot."""
        mine = {KINDS * slot + held for held in Held}
        changed = [i for i, members in enumerate(self._members) if not mine.isdisjoint(members)]
        numbers = [self._intern(self._members[i] - mine) for i in changed]
        result = np.arange(len(self._members), dtype=np.uint32)
        result[changed] = numbers
        return result

    def keep(self, used: NDArray[np.bool_]) -> NDArray[np.uint32]:
        """Forgets the sets that are not `used`; for each set its new number."""
        used[0] = True
        kept = np.flatnonzero(used)
        numbers = np.zeros(len(self._members), np.uint32)
        numbers[kept] = np.arange(len(kept))
        self._members = [self._members[i] for i in kept]
        self._slots = [self._slots[i] for i in kept]
        self._numbers = {members: i for i, members in enumerate(self._members)}
        self._next.clear()
        self._alive = len(self._members)
        return numbers

    def _intern(self, members: frozenset[int]) -> int:
        number = self._numbers.get(members)
        if number is None:
            number = self._numbers[members] = len(self._members)
            self._members.append(members)
            self._slots.append(None)
        return number
