"""Whether a step's rows go to experts elsewhere in two halves that take turns: one's attention is computed here while
the other's experts are computed there. No bit of an answer depends on it."""

from __future__ import annotations

from collections import deque
from statistics import median

LEAST_ROWS = 64  # of a step that is worth dividing: every half reads all weights anew
_KNOWN = 3  # steps each way before a choice
_KEPT = 5
_TRIAL = 64  # steps until the other way is tried again
_GAIN = 0.97  # what two halves have to take of the time of the whole


class Overlap:
    """Tries both ways and keeps to the faster one: it depends on whether hosts have cores and memory of their own, on
    the network and on how much of a step is attention. Steps of similar size, up to a factor of two, are alike."""

    def __init__(self) -> None:
        self.forced: bool | None = None  # for measurements
        self._seen: dict[int, dict[bool, deque[float]]] = {}
        self._steps: dict[int, int] = {}

    def halves(self, rows: int) -> bool:
        """How to compute a step."""
        if rows < LEAST_ROWS or self.forced is not None:
            return bool(self.forced) and rows >= 2
        size = rows.bit_length()
        seen = self._seen.setdefault(size, {False: deque(maxlen=_KEPT), True: deque(maxlen=_KEPT)})
        self._steps[size] = step = self._steps.get(size, 0) + 1
        for way in (False, True):
            if len(seen[way]) < _KNOWN:
                return way
        better = median(seen[True]) < _GAIN * median(seen[False])
        return better != (step % _TRIAL == 0)

    def took(self, rows: int, halves: bool, seconds: float) -> None:
        """How long it took."""
        if rows >= LEAST_ROWS:
            seen = self._seen.get(rows.bit_length())
            if seen is not None:
                seen[halves].append(seconds / rows)
