"""Requests under which a replica was lost: any one of them may be what killed it. Pure.

They go on in groups half as large as the one that they were in, at a replica or one after the other, until the killer
is alone; who gets a few tokens on is none. Others that run at such a replica meanwhile become suspects if it is lost,
too. Only a request under which replicas were lost `MAX_ALONE` times while no other suspect was there is given up.

| owns | does not own |
|---|---|
| `Suspicion`: what a gateway knows of one of its streams | where the stream runs: `dispatch` |
| `Probation`: which suspects the router has let in where | which of the replicas with room: `policy` |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_ALONE = 2
CLEARING_TOKENS = 4  # what killed a replica does so again when the same token is computed, or not at all
PROBATION_S = 120.0  # a suspect that nobody speaks of any more has been forgotten by its gateway


@dataclass(slots=True)
class Suspicion:
    """`together` is how many suspects may be at one replica, this one included; 0: it is not suspected. `alone`
    counts the replicas that were lost under it when it was the only suspect there, since it was last cleared."""

    together: int = 0
    alone: int = 0

    def fell(self, crowd: int) -> None:
        """A replica was lost under it, and under `crowd` - 1 other requests."""
        self.alone += crowd <= 1 or self.together == 1
        group = min(crowd, self.together) if self.together else crowd
        self.together = max(1, (group + 1) // 2)

    def clear(self) -> None:
        """It got on: whatever killed the replica, it was not this."""
        self.together = self.alone = 0

    @property
    def guilty(self) -> bool:
        return self.alone >= MAX_ALONE


class Probation:
    """Suspects by the slot of the replica that they are at, and by the lease that they are known by."""

    def __init__(self) -> None:
        self._there: dict[int, dict[int, int]] = {}  # slot -> lease -> how many may be together
        self._entered: dict[int, tuple[int, float]] = {}  # lease -> slot, moment

    def __len__(self) -> int:
        return len(self._entered)

    def room(self, slots: int, together: int) -> NDArray[np.bool_]:
        """Which replicas would take one more suspect of this kind. [R]"""
        mask = np.ones(slots, np.bool_)
        for slot, there in self._there.items():
            mask[slot] = len(there) < min(together, *there.values())
        return mask

    def enter(self, lease: int, slot: int, together: int, now: float) -> None:
        """A suspect goes there. `now` in seconds."""
        self._there.setdefault(slot, {})[lease] = together
        self._entered[lease] = (slot, now)

    def leave(self, lease: int) -> None:
        """It is cleared, or has ended. Unknown ones are ignored."""
        slot, _ = self._entered.pop(lease, (-1, 0.0))
        if slot >= 0:
            del self._there[slot][lease]
            if not self._there[slot]:
                del self._there[slot]

    def forget(self, slot: int) -> None:
        """The replica is gone."""
        for lease in list(self._there.get(slot, ())):
            self.leave(lease)

    def expire(self, now: float) -> None:
        """Forgets those that entered too long ago."""
        for lease, (_, entered) in list(self._entered.items()):
            if now - entered <= PROBATION_S:
                break
            self.leave(lease)
