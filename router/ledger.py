"""What one replica was given: grants that its reports do not contain yet, and those that still wait there. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from router.policy import Class


@dataclass(slots=True)
class Lease:
    """A grant: `work` is the seconds that its prompt was expected to take, `saved` those that computing it whole would
    take in addition."""

    slot: int
    tokens: int
    work: float
    saved: float
    rank: Class
    sequences: int
    granted_at: float


@dataclass(slots=True)
class Ledger:
    """`open` grants, by number in the order of granting, are not in the replica's report yet; `settled` are in it and
    may still wait, first come first."""

    open: dict[int, Lease] = field(default_factory=dict)
    settled: deque[Lease] = field(default_factory=deque)

    def due(self, before: float) -> list[int]:
        """Grants of that moment and earlier ones: a report of now must contain them."""
        numbers = []
        for number, lease in self.open.items():
            if lease.granted_at > before:
                break
            numbers.append(number)
        return numbers

    def settle(self, lease: Lease) -> None:
        """The report contains this one."""
        self.settled.append(lease)

    def keep(self, waiting: int) -> None:
        """So many sequences wait, by the report: the latest of those that it contains."""
        while len(self.settled) > waiting:
            self.settled.popleft()

    def ahead(self, rank: Class, waiting_tokens: int, pace: float) -> float:
        """Seconds of prompts of this class and above: those that wait, less what the cache spares them, and those that
        were just granted."""
        saved = sum([lease.saved for lease in self.settled if lease.rank >= rank])
        granted = sum([lease.work for lease in self.open.values() if lease.rank >= rank])
        return max(waiting_tokens * pace - saved, 0.0) + granted
