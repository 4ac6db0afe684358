"""What one rank remembers of the shared store's content: a help against asking and writing twice, never the truth."""

from __future__ import annotations

import threading
from collections import OrderedDict

MOST = 1 << 16


class Known:
    """Keys that were seen in the store or written there lately, and keys with a value that did not verify: those are
    to be written over. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._present: OrderedDict[bytes, None] = OrderedDict()
        self._suspects: set[bytes] = set()
        self._told: list[tuple[bool, bytes]] = []  # since `changes` was called

    def __contains__(self, key: bytes) -> bool:
        return key in self._present and key not in self._suspects

    def present(self, key: bytes) -> None:
        """It is there, as a server has just said."""
        with self._lock:
            if key not in self._present:
                self._told.append((True, key))
            self._present[key] = None
            self._present.move_to_end(key)
            if len(self._present) > MOST:
                self._present.popitem(last=False)

    def absent(self, key: bytes) -> None:
        """It is not, or not whole."""
        with self._lock:
            if key in self._present:
                del self._present[key]
                self._told.append((False, key))

    def suspect(self, key: bytes) -> None:
        """One of its values is not what it should be."""
        with self._lock:
            self._suspects.add(key)
            if len(self._suspects) > MOST:
                self._suspects.pop()

    def suspects(self, key: bytes) -> bool:
        return key in self._suspects

    def written(self, key: bytes) -> None:
        """All of this rank's values were written just now."""
        with self._lock:
            self._suspects.discard(key)
        self.present(key)

    def forget(self) -> None:
        """The store may have lost everything."""
        with self._lock:
            self._present.clear()

    def changes(self) -> list[tuple[bool, bytes]]:
        """(present, key), in order, since the last call."""
        if not self._told:
            return []
        with self._lock:
            told, self._told = self._told, []
        return told
