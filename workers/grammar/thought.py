"""A format that begins where the thought before it ends."""

from __future__ import annotations

from enum import Enum

import numpy as np

from workers.engine.contract import Thought
from workers.engine.formats import Bits, Matcher
from workers.grammar.vocabulary import Vocabulary

MAX_BREAKS = 2  # tokens of line breaks between the thought and the format: models are used to writing them


class _Place(Enum):
    """Where the answer stands: nothing said; in the thought; right after it; within the format."""

    START = 0
    THOUGHT = 1
    BREAK = 2
    FORMAT = 3


class AfterThought:
    """Keeps the contract of `workers.engine.formats.Matcher`. In the thought any text may follow, but not the answer's
    end. `before` is a matcher of the thought, where that has a grammar."""

    def __init__(
        self, format: Matcher, thought: Thought, vocabulary: Vocabulary, before: Matcher | None = None
    ) -> None:
        self._format = format
        self._before = before
        self._thought = thought
        self._breaks = vocabulary.breaks
        self._free = vocabulary.spoken.copy()
        if before is None:
            _set(self._free, thought.close)
        begun = thought.begun or before is not None
        self._places = [_Place.THOUGHT if begun else _Place.START]  # before the first token, and after each

    @property
    def _place(self) -> _Place:
        return self._places[-1]

    def mask_into(self, row: Bits) -> bool:
        """See the port."""
        if self._place is _Place.THOUGHT:
            if self._before is not None:
                self._before.mask_into(row)
            else:
                row[:] = self._free
            return False
        may_end = self._format.mask_into(row)
        if self._place is _Place.START:
            _set(row, self._thought.open)
        elif self._takes_breaks():
            row |= self._breaks
        return may_end

    def accept(self, token: int) -> None:
        """See the port."""
        if self._place is _Place.THOUGHT:
            after = self._think(token)
        elif self._place is _Place.START and token == self._thought.open:
            after = _Place.THOUGHT
        elif self._takes_breaks() and self._breaks[token // 32] >> np.uint32(token % 32) & 1:
            after = _Place.BREAK
        else:
            self._format.accept(token)
            after = _Place.FORMAT
        self._places.append(after)

    def _think(self, token: int) -> _Place:
        if self._before is None:
            return _Place.BREAK if token == self._thought.close else _Place.THOUGHT
        self._before.accept(token)
        return _Place.FORMAT if self._before.finished else _Place.THOUGHT

    def _takes_breaks(self) -> bool:
        return self._place is _Place.BREAK and self._places[-1 - MAX_BREAKS :].count(_Place.BREAK) <= MAX_BREAKS

    def rollback(self, count: int) -> None:
        """See the port."""
        if not count:
            return
        if self._before is not None:
            thought = sum(p is _Place.THOUGHT for p in self._places[-1 - count : -1])  # read in this place
            self._before.rollback(thought)
            self._format.rollback(count - thought)
        else:
            self._format.rollback(self._places[-count:].count(_Place.FORMAT))
        del self._places[-count:]

    @property
    def finished(self) -> bool:
        """See the port."""
        return self._place is not _Place.THOUGHT and self._format.finished

    @property
    def error(self) -> str:
        """See the port."""
        return self._format.error or (self._before.error if self._before is not None else "")


def _set(row: Bits, token: int) -> None:
    row[token // 32] |= np.uint32(1 << token % 32)
