"""Where draft tokens come from: guesses of what follows, checked by the model many at a time.

A draft changes when tokens come, never which: the engine accepts a guess only where the target's own keyed draw
agrees with it. Whoever proposes may therefore be as wrong as he likes, but should be the same for the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from workers.engine.contract import Sampling

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Ask:
    """One sequence that decodes: `tokens` is prompt and answer so far (a view: neither kept nor changed), all of
    them decided. At most `at_most` >= 1 tokens of draft are of use. `salt` as in `Request.cache_salt`; `sampling`,
    `index` and `made` (tokens of the answer so far) are how the next one is drawn."""

    id: str
    tokens: Sequence[int]
    at_most: int
    salt: str = ""
    sampling: Sampling = GREEDY
    index: int = 0
    made: int = 0


class Proposer(Protocol):
    """Guesses what follows. Called by the engine's thread, between steps."""

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """For each of `asks`, in order, at most `at_most` token ids that may follow; empty for none. Called again
        with longer `tokens` of the same id: those of before are their beginning, however many drafts were accepted."""

    def forget(self, id: str) -> None:
        """The sequence has left; the id may come again, for another. Unknown ids are ignored."""

    def close(self) -> None:
        """Gives back memory. Idempotent."""
