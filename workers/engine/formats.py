"""What the engine asks of whoever holds answers to a format: one matcher per sequence, one bit per token.

`workers.grammar` implements it. Where the masks enter the choice: `workers.engine.sampler`.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from workers.engine.contract import Grammar

Bits = NDArray[np.uint32]


def mask_words(vocab_size: int) -> int:
    """Words of a mask: token i is bit i % 32 of word i // 32."""
    return -(-vocab_size // 32)


class Matcher(Protocol):
    """How far one answer has come in its format. Used by one thread at a time, not always the same.

    The tokens that it is told are those of the answer, in order, from the first on; EOS and stop ids never reach it.
    """

    def mask_into(self, row: Bits) -> bool:
        """Writes which tokens may follow, all words of `row` [mask_words(V)], bits at V and beyond 0.

        EOS and other special tokens are 0, unless the format names them. True where the answer may also end here:
        the engine then lets the request's EOS ids in. A row without a bit that may not end is a dead end.
        """

    def accept(self, token: int) -> None:
        """The answer goes on with `token`. Raises ValueError where the format does not allow it: the matcher is then
        as before."""

    def rollback(self, count: int) -> None:
        """Takes back the last `count` accepted tokens. For drafts that were not accepted."""

    @property
    def finished(self) -> bool:
        """The answer is whole and nothing can follow but its end."""

    @property
    def error(self) -> str:
        """Why the format was given up on its way, which is a dead end; empty while all is well."""


class Formats(Protocol):
    """Opens matchers. Thread-safe: grammars are compiled on threads beside the engine's."""

    def open(self, grammar: Grammar) -> Matcher:
        """A matcher before the first token. May take long; is called off the engine's thread.

        Raises ValueError, with a text for the client, where the grammar cannot be held: InvalidRequest is one.
        """
