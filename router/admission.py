"""Whether there is room for one more request, and when to come back where there is none. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.policy import Candidate
from understudy.errors import Overloaded


@dataclass(frozen=True)
class Limits:
    """How long a replica's queue may be: sequences that wait, and prompt tokens not yet computed."""

    max_waiting: int = 256
    max_queued_tokens: int = 1 << 20


def has_room(candidate: Candidate, limits: Limits) -> bool:
    """Whether this replica may be given another request."""
    return (
        candidate.queue < limits.max_waiting
        and candidate.queued_tokens + candidate.granted_tokens < limits.max_queued_tokens
    )


def admit(candidates: Sequence[Candidate], limits: Limits, prefill_rate: float) -> list[Candidate]:
    """Those with room. `prefill_rate` is what one replica computes, in prompt tokens per second; 0 if unknown.

    Raises Overloaded with the time after which the shortest queue should have shrunk by half.
    """
    free = [c for c in candidates if has_room(c, limits)]
    if free:
        return free
    shortest = min(c.queued_tokens + c.granted_tokens for c in candidates)
    seconds = shortest / 2 / prefill_rate if prefill_rate > 0 else 1.0
    retry_after = min(max(seconds, 0.5), 30.0)
    raise Overloaded(
        f"every replica's queue is full ({limits.max_waiting} requests or {limits.max_queued_tokens} prompt tokens); "
        f"come back in {retry_after:.1f} s",
        retry_after,
    )
