"""How fast the tiers are, as measured lately."""

from __future__ import annotations

# Until something was measured: optimistic, so that it gets measured; the first loads correct it.
HOST_BYTES_S = 2e9
STORE_BYTES_S = 5e8
FIND_S = 0.002


class Rate:
    """Units per second, over about the last `units` of them: many small measurements weigh as one large."""

    def __init__(self, guess: float, units: float) -> None:
        self.value = guess
        self._units = units
        self._count = self._seconds = 0.0

    def add(self, count: float, seconds: float) -> None:
        """`count` units took `seconds`."""
        if count <= 0 or seconds <= 0:
            return
        keep = max(0.0, min(1.0, (self._units - count) / self._count)) if self._count else 0.0
        self._count, self._seconds = keep * self._count + count, keep * self._seconds + seconds
        self.value = self._count / self._seconds


class Seconds:
    """A duration, smoothed: half of what is new."""

    def __init__(self, guess: float) -> None:
        self.value = guess

    def add(self, seconds: float) -> None:
        self.value = (self.value + seconds) / 2
