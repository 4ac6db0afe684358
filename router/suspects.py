"""Requests under which a replica was lost: any one of them may be what killed it. Pure.

They go on in groups half as large as the one that they were in, at a replica or one after the other, until the killer
is alone; who gets a few tokens on is none. Others that run at such a replica meanwhile become suspects if it is lost,
too. Only a request under which replicas were lost `MAX_ALONE` times while no other suspect was there is given up.

| owns | does not own |
|---|---|
| `Suspicion`: what a gateway knows of one of its streams | where the stream runs: `dispatch` |
| `Probation`: which suspects a router has let in where | which of the replicas with room: `policy` |
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

MAX_ALONE = 2
CLEARING_TOKENS = 4  # what killed a replica does so again when the same token is computed, or not at all
PROBATION_S = 120.0  # a suspect that nobody speaks of any more has been forgotten by its gateway
Place = TypeVar("Place", bound=Hashable)


@dataclass(slots=True)
class Suspicion:
    """`together` is how many suspects may be at one replica, this one included; 0: it is not suspected. `alone`
    counts the replicas that were lost under it when it was the only suspect there, since it was last cleared.

    While the router cannot be reached, suspects of one gateway are kept apart, but not from those of others: groups
    shrink, and nobody counts as alone."""

    together: int = 0
    alone: int = 0

    def fell(self, crowd: int, *, apart: bool = True) -> None:
        """A replica was lost under it, and under `crowd` - 1 other requests of this gateway. `apart`: the router kept
        those of others away."""
        self.alone += apart and (crowd <= 1 or self.together == 1)
        group = min(crowd, self.together) if self.together else crowd
        self.together = max(1, (group + 1) // 2)

    def clear(self) -> None:
        """It got on: whatever killed the replica, it was not this."""
        self.together = self.alone = 0

    @property
    def guilty(self) -> bool:
        return self.alone >= MAX_ALONE


class Probation(Generic[Place]):
    """Suspects by the replica that they are at, its slot for instance, and by the lease that they are known by."""

    def __init__(self) -> None:
        self._there: dict[Place, dict[int, int]] = {}  # place -> lease -> how many may be together
        self._entered: dict[int, tuple[Place, float]] = {}  # lease -> place, moment

    def __len__(self) -> int:
        return len(self._entered)

    def takes(self, place: Place, together: int) -> bool:
        """Whether a replica would take one more suspect of this kind."""
        there = self._there.get(place, {})
        return not there or len(there) < min(together, *there.values())

    def room(self: Probation[int], slots: int, together: int) -> NDArray[np.bool_]:
        """Which replicas would take one more suspect of this kind. [R]"""
        mask = np.ones(slots, np.bool_)
        for slot in self._there:
            mask[slot] = self.takes(slot, together)
        return mask

    def enter(self, lease: int, place: Place, together: int, now: float) -> None:
        """A suspect goes there. `now` in seconds."""
        self._there.setdefault(place, {})[lease] = together
        self._entered[lease] = (place, now)

    def leave(self, lease: int) -> None:
        """It is cleared, or has ended. Unknown ones are ignored."""
        entered = self._entered.pop(lease, None)
        if entered is not None:
            place, _ = entered
            del self._there[place][lease]
            if not self._there[place]:
                del self._there[place]

    def forget(self, place: Place) -> None:
        """The replica is gone."""
        for lease in list(self._there.get(place, ())):
            self.leave(lease)

    @property
    def places(self) -> list[Place]:
        """Where suspects are."""
        return list(self._there)

    def expire(self, now: float) -> None:
        """Forgets those that entered too long ago."""
        for lease, (_, entered) in list(self._entered.items()):
            if now - entered <= PROBATION_S:
                break
            self.leave(lease)
