"""Whether there is room for one more request, and when to come back where there is none. Pure.

Lower classes may use less of a queue, so that what is urgent still finds room when others have filled it: low ones half
of a bound, normal ones seven eighths, urgent ones all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from router.policy import Class, Fleet, Mask
from understudy.errors import Overloaded

SHARES = {Class.LOW: 0.5, Class.NORMAL: 0.875, Class.URGENT: 1.0}
SOONEST_S, LATEST_S = 0.5, 30.0  # to come back


@dataclass(frozen=True)
class Limits:
    """How long queues may be: sequences that wait at a replica, prompt tokens not yet computed there, and those that
    wait in the whole service (sequences; None: as many as its replicas allow)."""

    max_waiting: int = 256
    max_queued_tokens: int = 1 << 20
    max_service_waiting: int | None = None


def admit(fleet: Fleet, candidates: Mask, present: Mask, limits: Limits, rank: Class, now: float) -> Mask:
    """Which of the candidates have room for a request of this class. `present` are all replicas of the service.

    Raises Overloaded with a time to come back: when the shortest queue should be half as long.
    """
    share, queue = SHARES[rank], fleet.queue
    if limits.max_service_waiting is not None:
        waiting = int(queue[present].sum())
        if waiting >= share * limits.max_service_waiting:
            why = f"{waiting} requests wait in the whole service, of {limits.max_service_waiting} that may"
            raise _overloaded(why, fleet, candidates, rank, now)
    tokens = fleet.queued + fleet.granted_tokens
    room = candidates & (queue < share * limits.max_waiting) & (tokens < share * limits.max_queued_tokens)
    if not room.any():
        why = (
            f"every replica's queue is full ({limits.max_waiting} requests or {limits.max_queued_tokens} prompt tokens)"
        )
        raise _overloaded(why, fleet, candidates, rank, now)
    return room


def _overloaded(why: str, fleet: Fleet, candidates: Mask, rank: Class, now: float) -> Overloaded:
    prompts = np.maximum(fleet.ahead[Class.LOW] - now, 0)
    places = fleet.queue * fleet.stay / fleet.places
    seconds = float(np.maximum(prompts, places)[candidates].min()) / 2
    retry_after = min(max(seconds, SOONEST_S), LATEST_S)
    lower = "" if rank is Class.URGENT else f", of which class {rank.name.lower()} may use {SHARES[rank]:.0%}"
    return Overloaded(f"{why}{lower}; come back in {retry_after:.1f} s", retry_after)
