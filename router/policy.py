"""Which replica takes a request: pure functions of what is known. A simulation runs the same code.

The expected wait of a request at a replica, in prompt tokens to be computed first, is

    queued + granted + own prompt - reusable + RUNNING_TOKENS * (running + waiting + granted sequences)

where `granted` are requests assigned since the replica last reported, and `reusable` is what its cache already holds
of this prompt (nothing is known about that yet: 0).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

# A decoding sequence slows each step for everybody about as much as this many prompt tokens.
RUNNING_TOKENS = 16


@dataclass(frozen=True)
class Candidate:
    """A replica that could take the request, with the counts that the choice needs.

    `slots` is how many sequences it runs at once, `reusable` how many prompt tokens it need not compute.
    """

    replica: str
    running: int
    waiting: int
    queued_tokens: int
    granted: int = 0
    granted_tokens: int = 0
    reusable: int = 0
    slots: int = 0

    @property
    def queue(self) -> int:
        """Sequences that wait, or will once what was granted has arrived."""
        return max(self.waiting + self.granted - max(self.slots - self.running, 0), 0)


def expected_wait(candidate: Candidate, prompt_tokens: int) -> int:
    """Prompt tokens' worth of work before this request's first token."""
    sequences = candidate.running + candidate.waiting + candidate.granted
    work = candidate.queued_tokens + candidate.granted_tokens + prompt_tokens - candidate.reusable
    return max(work, 0) + RUNNING_TOKENS * sequences


def choose(candidates: Sequence[Candidate], prompt_tokens: int) -> Candidate:
    """The least expected wait; ties go to the first, so the caller's order decides. Needs at least one candidate."""
    return min(candidates, key=lambda c: expected_wait(c, prompt_tokens))


def choose_of_two(candidates: Sequence[Candidate], prompt_tokens: int, rng: random.Random) -> Candidate:
    """The better of two drawn at random: what keeps several choosers with stale counts from all going one way."""
    drawn = list(candidates) if len(candidates) <= 2 else rng.sample(list(candidates), 2)
    return choose(drawn, prompt_tokens)
