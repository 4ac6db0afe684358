"""How fast the tiers are, as measured lately."""

from __future__ import annotations

import math
from collections.abc import Callable

# Until something was measured: optimistic, so that it gets measured; the first loads correct it.
HOST_BYTES_S = 2e9
STORE_BYTES_S = 5e8
FIND_S = 0.002
LATELY_S = 0.1  # of waiting for bytes
PROBE_S = 2.0
FASTER = 1.1


class Rate:
    """Units per second, over about the last `units` of them, or the last `seconds` where those saw fewer: many small
    measurements weigh as one large, and what was slow for a while is not thought slow for long."""

    def __init__(self, guess: float, units: float, seconds: float = math.inf) -> None:
        self.value = guess
        self._units, self._window_s = units, seconds
        self._count = self._seconds = 0.0

    def add(self, count: float, seconds: float) -> None:
        """`count` units took `seconds`."""
        if count <= 0 or seconds <= 0:
            return
        units = min(self._units, self.value * self._window_s)
        keep = max(0.0, min(1.0, (units - count) / self._count)) if self._count else 0.0
        self._count, self._seconds = keep * self._count + count, keep * self._seconds + seconds
        self.value = self._count / self._seconds


class Probes:
    """What was slow is tried again now and then, and at once where the last try found it faster than it was."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._next = clock()
        self._last = 0.0

    def may(self, slowness: float) -> bool:
        """Whether to try, `slowness` being how slow it was when it was last measured: seconds for whatever."""
        now = self._clock()
        if now < self._next and slowness * FASTER >= self._last:
            return False
        self._next, self._last = now + PROBE_S, slowness
        return True


class Seconds:
    """A duration, smoothed: half of what is new."""

    def __init__(self, guess: float) -> None:
        self.value = guess

    def add(self, seconds: float) -> None:
        self.value = (self.value + seconds) / 2
