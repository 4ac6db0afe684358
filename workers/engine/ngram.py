"""Drafts without a model: what followed the last time that a text looked like this. Integers only.

The places where the sequence's last few tokens stood before are found as LZ77 finds them: a table from every run of
`SHORTEST` tokens to its latest place, and from each place to the one before it. Of the latest `CANDIDATES` places the
one with the longest common past wins, the latest among equals; a past is compared over `LONGEST` tokens at most, and
places more than `WINDOW` tokens ago are forgotten. So a token costs the same however long the sequence is, and a
sequence's index has a bounded size.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from workers.engine.drafts import Ask
from workers.engine.speculate import Pace

SHORTEST, LONGEST = 2, 16
CANDIDATES = 16
WINDOW = 16384
_NONE = -1


class Lookup:
    """The index of one sequence, which only grows."""

    __slots__ = ("_before", "_latest", "_size")

    def __init__(self) -> None:
        self._size = 0  # tokens whose runs are in the index
        self._latest: dict[tuple[int, ...], int] = {}  # run -> end of its latest place, exclusive
        self._before = array("i")  # ring by end: the place of the same run before

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may follow `tokens`, which begin with those of the call before: as many as
        were asked for, or none where the last tokens are new."""
        self._extend(tokens)
        place = self._place(tokens)
        if place == _NONE:
            return []
        drafted: list[int] = []
        for i in range(place, place + count):  # a place may overlap what it predicts: then its period goes on
            drafted.append(tokens[i] if i < len(tokens) else drafted[i - len(tokens)])
        return drafted

    def _extend(self, tokens: Sequence[int]) -> None:
        """Indexes every run that has a token behind it."""
        for end in range(max(self._size + 1, SHORTEST), len(tokens)):
            self._forget(tokens, end - WINDOW)
            run = tuple(tokens[end - SHORTEST : end])
            before = self._latest.get(run, _NONE)
            if len(self._before) < WINDOW:
                self._before.extend([_NONE] * (end - len(self._before) + 1))
            self._before[end % WINDOW] = before
            self._latest[run] = end
        self._size = max(self._size, len(tokens) - 1)

    def _forget(self, tokens: Sequence[int], end: int) -> None:
        if end >= SHORTEST and self._latest.get(run := tuple(tokens[end - SHORTEST : end])) == end:
            del self._latest[run]

    def _place(self, tokens: Sequence[int]) -> int:
        """The end of the place that is most like the end of `tokens`."""
        here = len(tokens)
        place = self._latest.get(tuple(tokens[here - SHORTEST :]), _NONE) if here > SHORTEST else _NONE
        best, length = _NONE, 0
        for _ in range(CANDIDATES):
            if place == _NONE or place <= self._size - WINDOW:
                break
            if (common := _common_past(tokens, place)) > length:
                best, length = place, common
            place = self._before[place % WINDOW]
        return best


def _common_past(tokens: Sequence[int], place: int) -> int:
    """How many tokens before `place` are those at the end of `tokens`, LONGEST at most."""
    end, most = len(tokens), min(LONGEST, place)
    count = SHORTEST
    while count < most and tokens[place - 1 - count] == tokens[end - 1 - count]:
        count += 1
    return count


class NgramProposer:
    """`workers.engine.drafts.Proposer` over one index per sequence."""

    def __init__(self) -> None:
        self._sequences: dict[str, tuple[Lookup, Pace]] = {}

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        return [self._draft(ask) for ask in asks]

    def forget(self, id: str) -> None:
        self._sequences.pop(id, None)

    def close(self) -> None:
        self._sequences.clear()

    def _draft(self, ask: Ask) -> list[int]:
        if (known := self._sequences.get(ask.id)) is None:
            known = self._sequences[ask.id] = (Lookup(), Pace())
        lookup, pace = known
        count = pace.allowed(ask.tokens, ask.at_most)
        draft = lookup.draft(ask.tokens, count) if count else []
        pace.drafted(ask.tokens, draft)
        return draft
