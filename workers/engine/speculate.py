"""How many tokens to draft for a sequence: fewer where its drafts were refused.

Decided by the sequence's own tokens alone, so that it drafts the same beside any batch; and whatever is decided, its
answer is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_DRAFT_TOKENS = 64
LONGEST_REST = 32  # questions


@dataclass(slots=True)
class Pace:
    """One sequence's. A draft that agrees in full doubles the next one, another is followed by one longer than what
    agreed; after drafts that were wrong from the first token on, 2, 4, 8, ... questions pass without one."""

    size: int = MAX_DRAFT_TOKENS
    _drafted: list[int] = field(default_factory=list)
    _at: int = 0  # where in the sequence the draft stands
    _misses: int = 0  # in a row
    _rest: int = 0  # questions that pass without a draft

    def allowed(self, tokens: Sequence[int], at_most: int) -> int:
        """How many tokens to draft now; `tokens` begins with those of the call before."""
        self._judge(tokens, at_most)
        if self._rest:
            self._rest -= 1
            return 0
        return min(self.size, at_most)

    def drafted(self, tokens: Sequence[int], draft: list[int]) -> None:
        """`draft` was said to follow `tokens`."""
        self._drafted, self._at = draft, len(tokens)

    def pause(self, questions: int) -> None:
        """Nothing is drafted for so many questions."""
        self._rest = max(self._rest, questions)

    def _judge(self, tokens: Sequence[int], at_most: int) -> None:
        draft, self._drafted = self._drafted, []
        followed = tokens[self._at : self._at + len(draft)]
        if not followed:
            return
        right = agreeing(draft, followed)
        if right == len(followed):
            self.size = min(2 * self.size, max(self.size, at_most))
        else:
            self.size = min(self.size, right + 1)
        self._misses = 0 if right else self._misses + 1
        if self._misses > 1:
            self.pause(min(1 << (self._misses - 1), LONGEST_REST))


def agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
