"""Whose turn it is among sequences that wait: rank decides, but nobody is overtaken for ever. Integers only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from operator import attrgetter
from typing import Protocol, TypeVar

SHARE = 8  # of so many admissions one is of whoever has waited longest, and of so many prompt tokens one is theirs
FIRST = -(1 << 32)  # before any priority

_arrival = attrgetter("arrival")


class Waiter(Protocol):
    """`rank` begins with the class, smaller is better, and ends with `arrival`, the number of the request."""

    rank: tuple[int, int]

    @property
    def arrival(self) -> int: ...

    @property
    def tokens(self) -> Sized: ...


W = TypeVar("W", bound=Waiter)


class Turns:
    """Counts who is overtaken.

    Under load that never ends, whoever has waited longest is admitted after `SHARE` - 1 others, or after as many as
    have so many times its tokens, where that is more. So the k-th of a low class waits for about k times as many, and
    the others lose at most one part in `SHARE` of the engine.
    """

    def __init__(self) -> None:
        self._count = self._tokens = 0  # of those that have overtaken the oldest one

    def order(self, waiting: Sequence[W]) -> Iterable[W]:
        """Who should be admitted, best first. `waiting` is by rank, and not empty."""
        oldest = _oldest(waiting)
        if oldest is waiting[0] or not self._due(oldest):
            return waiting
        return (oldest, *(s for s in waiting if s is not oldest))

    def admitted(self, sequence: W, waiting: Sequence[W]) -> None:
        """It runs now; `waiting` are those that still wait. Who has waited longest is not overtaken again inside the
        engine: no prompt goes before its own, and its blocks are the last to be taken."""
        if waiting and _oldest(waiting).arrival < sequence.arrival:
            self._count += 1
            self._tokens += len(sequence.tokens)
            return
        if waiting and waiting[0].rank < sequence.rank:
            sequence.rank = (FIRST, sequence.arrival)
        self._count = self._tokens = 0

    def _due(self, oldest: Waiter) -> bool:
        return self._count >= SHARE - 1 and self._tokens >= (SHARE - 1) * len(oldest.tokens)


def _oldest(waiting: Sequence[W]) -> W:
    same = waiting[0].rank[0] == waiting[-1].rank[0]
    return waiting[0] if same else min(waiting, key=_arrival)
