"""A hash table of 64-bit keys in flat arrays: 13 bytes a slot, where a `dict` takes about 100 a key. Pure.

A key lies at its home or, where that is taken, in the next free slot. Keys are parts of SHA-256 digests, so their upper
bits are the hash. A key is never taken out: where both of its values are 0 it means nothing, and growing leaves it
behind.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_FULLEST = 0.7
_GROWTH = 1.5
_SPARE = 1024  # slots after the last home, for what does not fit there; more where that is not enough


class KeyTable:
    """`holders` (a set's number) and `stored` (a generation) of each key, by its place. 0 is nothing in both."""

    def __init__(self, slots: int = 1 << 12) -> None:
        self.used = 0  # keys, those that mean nothing any more among them
        self._make(slots)

    def _make(self, slots: int, spare: int = _SPARE) -> None:
        if slots >= 1 << 32:
            raise ValueError(f"{slots} slots; a table has fewer than 2^32")
        self._slots = slots
        self.keys = np.zeros(slots + spare, np.uint64)
        self.holders = np.zeros(slots + spare, np.uint32)
        self.stored = np.zeros(slots + spare, np.uint8)
        self._views()

    def _views(self) -> None:
        """One element of a memoryview is read in a third of the time that one of an array takes."""
        self._key_at = self.keys.data
        self.holders_at = self.holders.data
        self.stored_at = self.stored.data

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.holders.nbytes + self.stored.nbytes

    def find(self, key: int) -> int:
        """The key's place, or -1."""
        place, keys = (key >> 32) * self._slots >> 32, self._key_at
        while (here := keys[place]) != key:
            if not here:
                return -1
            place += 1
        return place

    def place(self, key: int) -> int:
        """The key's place, a new one where it had none. Places from before are void where `grow` was needed: it
        answers -1 then, and has done nothing."""
        place, keys = (key >> 32) * self._slots >> 32, self._key_at
        while (here := keys[place]) != key:
            if not here:
                if self.used >= _FULLEST * self._slots or place + 1 >= len(keys) - 1:
                    return -1
                keys[place] = key
                self.used += 1
                return place
            place += 1
        return place

    def alive(self) -> NDArray[np.bool_]:
        """Which places mean something."""
        alive: NDArray[np.bool_] = (self.holders != 0) | (self.stored != 0)
        return alive

    def grow(self, most: int) -> None:
        """Makes room for half as many keys again, at most `most`; those that mean nothing are left behind. Every place
        changes."""
        alive = self.alive()
        keys, holders, stored = self.keys[alive], self.holders[alive], self.stored[alive]
        order = np.argsort(keys)
        keys = keys[order]
        slots = max(int(min(len(keys) * _GROWTH, max(most, len(keys))) / _FULLEST), 1 << 12)
        spare = _SPARE
        while True:
            self._make(slots, spare)
            # Keys in the order of their homes: each lies at its home, or right after the one before.
            homes = ((keys >> np.uint64(32)) * np.uint64(slots) >> np.uint64(32)).astype(np.int64)
            steps = np.arange(len(keys))
            places = np.maximum.accumulate(homes - steps) + steps
            if not len(places) or places[-1] < len(self.keys) - 3:
                break
            spare *= 2
        self.keys[places], self.holders[places], self.stored[places] = keys, holders[order], stored[order]
        self.used = len(keys)
