"""When a step has been running for so long that something must be wrong with it.

A bound of seconds alone would be wrong for somebody: a step of a large model on a CPU takes longer than a whole answer
of a small one on a GPU. So it is learned. An alarm costs little: streams go on elsewhere, with the same tokens, and the
replica comes back when its step ends.
"""

from __future__ import annotations

FLOOR_S = 2.0  # no step is called stalled before
SLACK = 5.0  # times what the slowest took


class StallBound:
    """Learns from steps that have ended. `rows` is how many a full step has: until one of half as many was seen, the
    slowest row of the others says how long a full one may take."""

    def __init__(self, rows: int, floor_s: float = FLOOR_S) -> None:
        self._rows = max(rows, 1)
        self._floor_s = floor_s
        self._full = False
        self.slowest_s = 0.0
        self._slowest_row_s = 0.0

    def note(self, seconds: float, rows: int) -> None:
        """A step of so many rows took so long. One that was far too long, for its process was stopped or the machine
        asleep, does not teach that such is usual: it counts for twice the bound at most."""
        if rows <= 0:
            return
        seconds = min(seconds, 2 * self.seconds)
        self._full = self._full or 2 * rows >= self._rows
        self.slowest_s = max(seconds, 0.999 * self.slowest_s)
        self._slowest_row_s = max(self._slowest_row_s, seconds / rows)

    @property
    def seconds(self) -> float:
        """A step that runs for longer is stalled."""
        guess = 0.0 if self._full else self._slowest_row_s * self._rows
        return max(self._floor_s, SLACK * self.slowest_s, guess)
