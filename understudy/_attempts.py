"""When to try a call again, where, and after how long. Pure: time and chance are arguments."""

from __future__ import annotations

import random
from dataclasses import dataclass

from understudy.errors import CannotResume, DeadlineExceeded, Overloaded, Unavailable, UnderstudyError
from understudy.types import Retry


@dataclass(frozen=True)
class Again:
    """Wait `delay_s` seconds, then try the address of that index."""

    delay_s: float
    address: int


class Attempts:
    """Counts the failures of one call in a row.

    UNAVAILABLE is tried again. A stream that has begun also waits out OVERLOADED, because its caller cannot send
    the rest of it again as he could a whole request; and it asks every address before it takes CANNOT_RESUME for an
    answer, because other gateways may know other replicas.
    """

    def __init__(self, retry: Retry, addresses: int, first: int, deadline: float | None, chance: random.Random) -> None:
        self.address = first % addresses
        self.deadline = deadline
        self._retry = retry
        self._addresses = addresses
        self._chance = chance
        self._failures = 0
        self._since = 0.0
        self._refused: set[int] = set()

    def remaining(self, now: float) -> float | None:
        """Seconds until the deadline, not negative; None without one."""
        return None if self.deadline is None else max(0.0, self.deadline - now)

    def progress(self) -> None:
        """The call got on: failures are counted anew."""
        self._failures = 0
        self._refused.clear()

    def failed(self, error: UnderstudyError, now: float, resuming: bool = False) -> Again:
        """What to do after `error`; raises it (or DeadlineExceeded) when there is nothing left to try."""
        if not self._may_try_again(error, resuming):
            raise error
        if self._failures == 0:
            self._since = now
        self._failures += 1
        if self._spent(now, resuming):
            raise error
        delay_s = self._delay_s(error)
        if self.deadline is not None and now + delay_s >= self.deadline:
            raise DeadlineExceeded(f"the deadline comes before the next try; the last one said: {error}") from error
        self.address = (self.address + 1) % self._addresses
        return Again(delay_s, self.address)

    def _may_try_again(self, error: UnderstudyError, resuming: bool) -> bool:
        if resuming and isinstance(error, CannotResume):
            self._refused.add(self.address)
            return len(self._refused) < self._addresses
        return isinstance(error, Unavailable) or (resuming and isinstance(error, Overloaded))

    def _spent(self, now: float, resuming: bool) -> bool:
        if resuming:
            return self._failures > self._retry.resume_attempts or now - self._since > self._retry.resume_s
        return self._failures >= self._retry.attempts

    def _delay_s(self, error: UnderstudyError) -> float:
        # The exponent stops where the bound has long been reached: 2.0**1024 overflows.
        longest = min(self._retry.max_delay_s, self._retry.first_delay_s * 2.0 ** min(self._failures - 1, 64))
        told = error.retry_after_s if isinstance(error, Overloaded) else 0.0
        return max(told, longest * self._chance.uniform(0.5, 1.0))
