"""Interned sets of who holds a block, so that a block in an index costs a number and not a set. Pure.

A holder is a slot (a replica's number) and how it holds the block. Blocks of one conversation have one set, and so have
blocks of one system prompt: there are far fewer sets than blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
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


def way_of(number: int, slot: int, held: Held, added: bool) -> int:
    """Names a step from one set to another."""
    return (KINDS * slot + held) << 33 | added << 32 | number


class HolderSets:
    """Sets by number; 0 is the empty one. Numbers are given out until `keep` says which are still in use."""

    def __init__(self) -> None:
        self._members: list[frozenset[int]] = [frozenset()]
        self._numbers: dict[frozenset[int], int] = {frozenset(): 0}
        self._slots: list[tuple[Slots, Slots] | None] = [None]
        self.known: dict[int, int] = {}  # by `way`: what `added` and `removed` have answered
        self._alive = 1  # sets at the last `keep`

    def __len__(self) -> int:
        return len(self._members)

    @property
    def overgrown(self) -> bool:
        """Whether it is time for `keep`."""
        return len(self._members) > 1024 + 2 * self._alive

    def added(self, number: int, slot: int, held: Held) -> int:
        """The set that also has this holder. What is on the device is expected no more."""
        known = self.known.get(way := way_of(number, slot, held, True))
        if known is None:
            members, base = self._members[number], KINDS * slot
            if held is Held.EXPECTED and base + Held.DEVICE in members:
                known = number
            else:
                gone = {base + Held.EXPECTED} if held is Held.DEVICE else set()
                known = self._intern((members - gone) | {base + held})
            self.known[way] = known
        return known

    def removed(self, number: int, slot: int, held: Held) -> int:
        """The set without this holder."""
        known = self.known.get(way := way_of(number, slot, held, False))
        if known is None:
            known = self.known[way] = self._intern(self._members[number] - {KINDS * slot + held})
        return known

    def has(self, number: int, slot: int, held: Held) -> bool:
        return KINDS * slot + held in self._members[number]

    def slots(self, number: int) -> tuple[Slots, Slots]:
        """Who has the block on the device (or soon will), and who in host memory alone; each slot once."""
        known = self._slots[number]
        if known is None:
            members = np.fromiter(self._members[number], np.int64, len(self._members[number]))
            slots = members // KINDS
            host = members - KINDS * slots == Held.HOST
            fast, slow = slots[~host], slots[host]  # nobody has a block on the device and expects it, too
            if len(slow):
                quicker = np.zeros(int(slots.max()) + 1, np.bool_)
                quicker[fast] = True
                slow = slow[~quicker[slow]]
            known = self._slots[number] = fast, slow
        return known

    def without(self, slot: int, kinds: Iterable[Held] = Held) -> NDArray[np.uint32]:
        """For each set the one in which this slot holds nothing in any of these ways."""
        mine = {KINDS * slot + held for held in kinds}
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
        self.known.clear()
        self._alive = len(self._members)
        return numbers

    def _intern(self, members: frozenset[int]) -> int:
        number = self._numbers.get(members)
        if number is None:
            number = self._numbers[members] = len(self._members)
            self._members.append(members)
            self._slots.append(None)
        return number
