"""Where fetched values land: from slots of the host tier into blocks of the device's cache, while they are wanted."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from workers.cache.host import HostTier
from workers.cache.orders import Fetch


class Caches(Protocol):
    """What the store needs of a cache group: see `workers.kernels.ops.KvCache`."""

    @property
    def kv_heads(self) -> int: ...

    @property
    def value_bytes(self) -> int: ...

    def export_blocks(
        self, blocks: NDArray[np.int64], memory: NDArray[np.uint8], offsets: NDArray[np.int64], /
    ) -> None: ...

    def import_blocks(
        self, blocks: NDArray[np.int64], memory: NDArray[np.uint8], offsets: NDArray[np.int64], /
    ) -> None: ...


@dataclass(slots=True)
class Item:
    """One block of a load and the slots that have its values, pinned: `slots[g]` is None where group g is not wanted,
    or not there yet. `fetched` are the groups, as bits, whose slots are filled from Redis."""

    fetch: Fetch
    slots: list[int | None]
    fetched: int = 0

    @property
    def missing(self) -> list[int]:
        """Groups whose values are still to be had."""
        return [g for g, b in enumerate(self.fetch.blocks) if b >= 0 and self.slots[g] is None]


class Landing:
    """Loads that are open, and how far down each is still wanted. Once `raise_floor` has returned, no thread writes to
    a block before the floor any more."""

    def __init__(self, caches: Sequence[Caches], host: HostTier) -> None:
        self._caches, self._host = caches, host
        self._lock = threading.Lock()
        self._floors: dict[int, int] = {}
        self._left: dict[int, int] = {}  # fetches of each load that are not over

    def open(self, number: int, fetches: int) -> None:
        with self._lock:
            self._floors[number], self._left[number] = 0, fetches

    def raise_floor(self, number: int, floor: int) -> None:
        """Waits for an import under way: one batch at most."""
        with self._lock:
            if number in self._floors:
                self._floors[number] = max(self._floors[number], floor)

    def wanted(self, number: int, index: int) -> bool:
        return index >= self._floors[number]

    def land(self, number: int, items: Sequence[Item]) -> list[bool]:
        """Imports what is wanted of `items`, whose slots are filled; whether each was."""
        with self._lock:
            took = [item.fetch.index >= self._floors[number] for item in items]
            for group, cache in enumerate(self._caches):
                pairs = [
                    (item.fetch.blocks[group], slot)
                    for item, wanted in zip(items, took, strict=True)
                    if wanted and (slot := item.slots[group]) is not None
                ]
                if pairs:
                    arena = self._host.arena(group)
                    blocks = np.array([block for block, _ in pairs], np.int64)
                    cache.import_blocks(blocks, arena.memory, arena.offsets([slot for _, slot in pairs]))
        return took

    def over(self, number: int, fetches: int) -> None:
        """So many fetches of a load are over; the last closes it."""
        with self._lock:
            self._left[number] -= fetches
            if not self._left[number]:
                del self._floors[number], self._left[number]

    def numbers(self) -> list[int]:
        """Of the loads that are open."""
        with self._lock:
            return list(self._floors)

    @property
    def open_loads(self) -> int:
        return len(self._left)

    def release(self, item: Item) -> None:
        """Lets go of the slots of an item."""
        for group, slot in enumerate(item.slots):
            if slot is not None:
                self._host.release(group, slot)
