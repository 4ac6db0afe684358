"""A circuit breaker: after a failure nobody tries again for a while, longer each time; then one does."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Breaker:
    """Closed while all goes well. A failure opens it for `first_s` seconds, twice as long after each further one, at
    most `most_s`; then one caller may try, and its success closes it. May be used from several threads."""

    def __init__(self, clock: Callable[[], float], first_s: float = 0.25, most_s: float = 5.0) -> None:
        self._clock = clock
        self._first_s, self._most_s = first_s, most_s
        self._lock = threading.Lock()
        self._pause_s = 0.0  # 0 while closed
        self._until = 0.0

    @property
    def closed(self) -> bool:
        return self._pause_s == 0.0

    @property
    def ready(self) -> bool:
        """Whether `allows` would let somebody try now."""
        return self._pause_s == 0.0 or self._clock() >= self._until

    def allows(self) -> bool:
        """Whether the caller may try; while it is open only the first who asks after the pause."""
        with self._lock:
            if self._pause_s == 0.0:
                return True
            now = self._clock()
            if now < self._until:
                return False
            self._until = now + self._pause_s  # the others wait for this one's luck
            return True

    def succeeded(self) -> None:
        with self._lock:
            self._pause_s = 0.0

    def failed(self) -> None:
        with self._lock:
            self._pause_s = min(self._most_s, 2 * self._pause_s or self._first_s)
            self._until = self._clock() + self._pause_s
