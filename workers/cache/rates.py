"""How fast the tiers are, as measured lately."""

from __future__ import annotations

# Until something was measured: optimistic, so that it gets measured; the first loads correct it.
HOST_BYTES_S = 2e9
STORE_BYTES_S = 5e8
FIND_S = 0.002


class Rate:
    """Units per second, smoothed over about `units` of them, so that many small measurements weigh as one large."""

    def __init__(self, guess: float, units: float) -> None:
        self.value = guess
        self._units = units
        self._measured = False

    def add(self, count: float, seconds: float) -> None:
        """`count` units took `seconds`."""
        if count <= 0 or seconds <= 0:
            return
        weight = min(1.0, count / self._units) if self._measured else 1.0
        # Times add up, not rates: a slow tenth of the bytes costs most of the time.
        self.value = 1.0 / ((1 - weight) / self.value + weight * seconds / count)
        self._measured = True


class Seconds:
    """A duration, smoothed: half of what is new."""

    def __init__(self, guess: float) -> None:
        self.value = guess

    def add(self, seconds: float) -> None:
        self.value = (self.value + seconds) / 2
