"""The host tier: values of blocks in a bounded piece of memory, least recently used ones leave first.

Memory is one mapped arena per cache group, cut into as many slots for each group; a slot holds one block's values of
all heads of this rank, one after the other, headers included. So what comes from Redis is received where it stays, and
what goes there is sent from where it lies.

    a slot is   free     nobody knows it
                taken    somebody fills it, or copies from it: `pins` > 0
                kept     it holds the block of a key, and goes when room is wanted
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workers.cache.values import HEADER_BYTES
from workers.kernels.memory import zeroed


class Arena:
    """One group's slots. Not locked: `HostTier` does that. Memory costs nothing until it is written."""

    def __init__(self, slots: int, heads: int, value_bytes: int) -> None:
        self.heads = heads
        self.stride = HEADER_BYTES + value_bytes  # of values; a multiple of 16
        self.slot_bytes = heads * self.stride
        self.memory: NDArray[np.uint8] = np.frombuffer(zeroed(max(1, slots) * self.slot_bytes), np.uint8)
        self._view = memoryview(self.memory)  # type: ignore[arg-type]
        self.free = list(range(slots - 1, -1, -1))
        self.kept: OrderedDict[int, None] = OrderedDict()  # without pins, least recently used first
        self.pins: dict[int, int] = {}
        self.slot_of: dict[bytes, int] = {}
        self.key_of: dict[int, bytes] = {}

    def values(self, slot: int) -> list[memoryview]:
        """Each head's value, header first."""
        at = slot * self.slot_bytes
        return [self._view[at + h * self.stride : at + (h + 1) * self.stride] for h in range(self.heads)]

    def offsets(self, slots: Sequence[int]) -> NDArray[np.int64]:
        """Where payloads begin: [len(slots), heads]."""
        first = np.asarray(slots, np.int64)[:, None] * self.slot_bytes + HEADER_BYTES
        return first + np.arange(self.heads) * self.stride


class HostTier:
    """`value_bytes[g]` is the payload of one head in group g. With `keep` off nothing is found again: the slots only
    serve those who copy. `size` bytes are cut into slots; at least `least` of each group are there. `changes` tells of
    the blocks of group `told`. Thread-safe."""

    def __init__(
        self, value_bytes: Sequence[int], heads: int, size: int, *, keep: bool = True, least: int = 1, told: int = 0
    ) -> None:
        each = sum(heads * (HEADER_BYTES + size) for size in value_bytes)
        self.slots = max(least, size // each)
        self.bytes = self.slots * each
        self._keep = keep
        self._arenas = [Arena(self.slots, heads, size) for size in value_bytes]
        self._lock = threading.Lock()
        self._told_group = told
        self._told: list[tuple[bool, bytes]] = []  # since `changes` was called

    def arena(self, group: int) -> Arena:
        return self._arenas[group]

    def has(self, key: bytes, group: int) -> bool:
        with self._lock:
            return key in self._arenas[group].slot_of

    def find(self, key: bytes, group: int) -> int | None:
        """The slot that holds the key, pinned; None where none does."""
        with self._lock:
            arena = self._arenas[group]
            slot = arena.slot_of.get(key)
            if slot is not None:
                self._pin(arena, slot)
            return slot

    def take(self, group: int) -> int | None:
        """A slot to fill, pinned: a free one, else the one used longest ago; None where all are pinned."""
        with self._lock:
            arena = self._arenas[group]
            if arena.free:
                slot = arena.free.pop()
            elif arena.kept:
                slot, _ = arena.kept.popitem(last=False)
                self._forget(arena, group, slot)
            else:
                return None
            arena.pins[slot] = 1
            return slot

    def publish(self, key: bytes, group: int, slot: int) -> None:
        """A pinned slot is filled, and may be found from now on. The first of a key stays."""
        with self._lock:
            arena = self._arenas[group]
            if self._keep and key not in arena.slot_of:
                arena.slot_of[key], arena.key_of[slot] = slot, key
                if group == self._told_group:
                    self._told.append((True, key))

    def pin(self, group: int, slot: int) -> None:
        """One more who uses a pinned slot."""
        with self._lock:
            self._arenas[group].pins[slot] += 1

    def release(self, group: int, slot: int) -> None:
        """One who uses the slot less; the last leaves it kept, or free where it holds no key."""
        with self._lock:
            arena = self._arenas[group]
            arena.pins[slot] -= 1
            if arena.pins[slot] == 0:
                del arena.pins[slot]
                if slot in arena.key_of:
                    arena.kept[slot] = None
                else:
                    arena.free.append(slot)

    def changes(self) -> list[tuple[bool, bytes]]:
        """(present, key), in order, since the last call."""
        if not self._told:
            return []
        with self._lock:
            told, self._told = self._told, []
        return told

    def check(self) -> None:
        """Raises RuntimeError unless every slot is in one state and nothing is pinned. For tests, when idle."""
        with self._lock:
            for group, arena in enumerate(self._arenas):
                if arena.pins:
                    raise RuntimeError(f"slots {sorted(arena.pins)} of group {group} are pinned though nobody copies")
                if sorted([*arena.free, *arena.kept]) != list(range(self.slots)):
                    raise RuntimeError(f"slots of group {group} are lost or there twice")
                if set(arena.kept) != set(arena.key_of) or set(arena.slot_of) != set(arena.key_of.values()):
                    raise RuntimeError(f"kept slots of group {group} and keys differ")

    def _pin(self, arena: Arena, slot: int) -> None:
        if slot in arena.pins:
            arena.pins[slot] += 1
        else:
            del arena.kept[slot]
            arena.pins[slot] = 1

    def _forget(self, arena: Arena, group: int, slot: int) -> None:
        key = arena.key_of.pop(slot)
        del arena.slot_of[key]
        if group == self._told_group:
            self._told.append((False, key))
