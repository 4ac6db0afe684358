"""What a cache tells of itself: which block it has, on which tier, from now on or no longer.

The tiers report to an `Observer`; `Journal.record` is one. The journal numbers the changes, keeps the latest, and gives
them to one reader, the router's index, who says up to which number it has them. Whoever fell behind gets everything
that is there, in the same form, and then goes on: nothing else is needed after a lost message, a router that restarted,
or a replica that was silent.

A block is named by the first 8 bytes of its key there. The index only gives hints: where two keys agree in them, a
request goes to a replica that has nothing for it, which costs time and never an answer.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum

import msgspec

HINT_BYTES = 8
STORE_KEPT = 1 << 16  # keys in the shared store that a snapshot tells: the latest


class Tier(IntEnum):
    """Where a block lies, fastest first: the engine's own cache, the host's memory, the shared store."""

    DEVICE = 0
    HOST = 1
    STORE = 2


Observer = Callable[[Tier, bool, bytes], None]
"""Called in the order of events, on the engine's thread, with (tier, present, block key). Quick, and never raises."""


def hints(keys: Iterable[bytes]) -> bytes:
    """The first 8 bytes of each key, one after another: how an index knows blocks."""
    return b"".join([key[:HINT_BYTES] for key in keys])


class Changes(msgspec.Struct, frozen=True, array_like=True):
    """The changes with the numbers `first` to `first + len(codes) - 1`, in order.

    A code is 2 * tier + present; `keys` has 8 bytes for each (`hints`). With `reset`, whatever was said of the device
    and the host before is void, and these begin to tell everything that is there.
    """

    first: int
    reset: bool
    codes: bytes
    keys: bytes

    @property
    def end(self) -> int:
        """The number of the change that comes next."""
        return self.first + len(self.codes)

    @classmethod
    def of(cls, first: int, said: Sequence[tuple[Tier, bool, bytes]], reset: bool = False) -> Changes:
        """From (tier, present, key)."""
        return cls(first, reset, bytes(2 * tier + present for tier, present, _ in said), hints(k for *_, k in said))


class Journal:
    """Numbered changes of one cache's life. Keeps at least the latest `capacity` of them; used from any thread.

    Memory: 9 bytes a change, and about 100 for each block that is present on a tier.
    """

    def __init__(self, capacity: int = 1 << 16) -> None:
        if capacity < 2:
            raise ValueError(f"capacity is {capacity}; a journal keeps at least 2 changes")
        self._capacity = capacity
        self._lock = threading.Lock()
        self._present: tuple[dict[int, None], ...] = tuple({} for _ in Tier)  # in the order of coming
        self._first = 0  # number of the oldest change that is kept
        self._codes = bytearray()
        self._keys = array("Q")
        self._whole = True  # what is kept tells, from its beginning, everything that is there
        self._told = 0  # of what is kept: changes that tell again what was there at the last snapshot

    @property
    def end(self) -> int:
        """The number that the next change gets."""
        return self._first + len(self._codes)

    def record(self, tier: Tier, present: bool, key: bytes) -> None:
        """An `Observer`. What is known already is not told again."""
        hint = int.from_bytes(key[:HINT_BYTES], "little")
        with self._lock:
            known = self._present[tier]
            if present == (hint in known):
                return
            if present:
                known[hint] = None
                if tier is Tier.STORE and len(known) > STORE_KEPT:
                    del known[next(iter(known))]
            else:
                del known[hint]
            self._codes.append(2 * tier + present)
            self._keys.append(hint)
            if len(self._codes) > self._capacity + self._told:
                self._drop(len(self._codes) // 2)

    def since(self, number: int, most: int = 1 << 16) -> Changes:
        """The changes from `number` on, at most `most`. Where those are gone, or there never were as many, everything
        that is there, under new numbers: `Changes.reset` says so."""
        with self._lock:
            if not self._first <= number <= self.end:
                self._tell_all()
                number = self._first
            at = number - self._first
            keys = self._keys[at : at + most].tobytes()
            return Changes(number, self._whole and at == 0, bytes(self._codes[at : at + most]), keys)

    def _drop(self, count: int) -> None:
        del self._codes[:count], self._keys[:count]
        self._first += count
        self._told = max(0, self._told - count)
        self._whole = False

    def _tell_all(self) -> None:
        """What is kept becomes what is there. No older number is one of these."""
        self._first = self.end + 1
        self._codes, self._keys = bytearray(), array("Q")
        for tier in Tier:
            self._codes += bytes([2 * tier + 1]) * len(self._present[tier])
            self._keys.extend(self._present[tier])
        self._whole, self._told = True, len(self._codes)
