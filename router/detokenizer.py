"""Tokens to text as they come: what may be sent of an answer, with exactly the ids that it completes."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import NamedTuple

from tokenizers import Tokenizer

from router.stops import Match, StopMatcher, StopStrings

REPLACEMENT = "\ufffd"


class ByteDecoder:
    """Joins tokens' bytes."""

    __slots__ = ("_decode", "_decoder", "_strip", "_table")

    def __init__(self, table: list[bytes], errors: str, strip: int, prompt: Sequence[int]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._decode = self._decoder.decode
        self._strip = strip
        n = len(table)
        if strip:
            self._strip = self._spaces_left(b for b in (table[i] for i in prompt if i < n) if b)
        # The decoder's state depends on the last three bytes alone.
        tail = b""
        for id in reversed(prompt):
            tail = (table[id] if id < n else b"") + tail
            if len(tail) >= 4:
                break
        self._decode(tail)

    def _spaces_left(self, pieces: Iterable[bytes]) -> int:
        """Leading spaces still to be stripped after the prompt's bytes."""
        left = self._strip
        for piece in pieces:
            spaces = len(piece) - len(piece.lstrip(b" "))
            if spaces < len(piece) or spaces >= left:
                return 0
            left -= spaces
        return left

    def push(self, id: int) -> str:
        """Text that the token completes."""
        text = self._decode(self._table[id] if id < len(self._table) else b"")
        if self._strip and text:
            spaces = min(self._strip, len(text) - len(text.lstrip(" ")))
            self._strip = self._strip - spaces if spaces == len(text) else 0
            text = text[spaces:]
        return text

    @property
    def clean(self) -> bool:
        """No half character is waiting."""
        return not self._decoder.getstate()[0]

    def flush(self) -> str:
        """What is left, U+FFFD for a character that never became whole."""
        return self._decode(b"", final=True)


class WindowDecoder:
    """Decodes a window of tokens with and without the latest; the difference is new text.

    `silent` ids have no text; they never enter the window: the first token in it reads as if it began the text, and
    must be one that was given out.
    """

    __slots__ = ("_ids", "_known", "_sent", "_silent", "_tokenizer")
    _WINDOW = 6

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], silent: AbstractSet[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._silent = silent
        spoken = (id for id in reversed(prompt) if id not in silent)
        self._ids = [*islice(spoken, self._WINDOW)][::-1]
        self._sent = len(self._ids)  # ids whose text was given out
        self._known = self._text(self._ids)

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def push(self, id: int) -> str:
        if id in self._silent:
            return ""
        self._ids.append(id)
        text = self._text(self._ids)
        if text.endswith(REPLACEMENT) and len(self._ids) - self._sent < 4:
            return ""
        new = text[len(self._known) :]
        self._ids = self._ids[-self._WINDOW :]
        self._sent = len(self._ids)
        self._known = self._text(self._ids)
        return new

    @property
    def clean(self) -> bool:
        return self._sent == len(self._ids)

    def flush(self) -> str:
        return self._text(self._ids)[len(self._known) :]


Decoder = ByteDecoder | WindowDecoder


class Piece(NamedTuple):
    """Text that may be sent, and how many ids it completes, counted from the first that was not yet sent.

    `stop` is the stop string that ended the sequence; `ids` then reaches up to the token that completed it.
    """

    text: str
    ids: int
    stop: str | None = None


class Detokenizer:
    """One sequence's answer as text, cut at its first stop string.

    A token's text is given out whole or not at all: it waits while it ends in half a character or while the text
    from it on could begin a stop string. `received` are ids that the client already has: they are replayed.
    """

    def __init__(
        self,
        decoder: Decoder,
        stops: StopStrings | None = None,
        include_stop: bool = False,
        received: Sequence[int] = (),
    ) -> None:
        self._decoder = decoder
        self._matcher = StopMatcher(stops) if stops is not None else None
        self._include_stop = include_stop
        self._buffer = ""  # text of tokens not given out
        self._base = 0  # characters before the buffer
        self._pending = 0  # tokens not given out
        self._ends: list[tuple[int, int]] = []  # (characters, tokens) of the buffer where a token ends cleanly
        self.stop: str | None = None
        self.received_text = ""
        if received:
            piece = self.push(received)
            self.received_text = piece.text + self._buffer
            self._forget(len(self._buffer), self._pending)

    def _forget(self, chars: int, tokens: int) -> None:
        self._buffer = self._buffer[chars:]
        self._base += chars
        self._pending -= tokens
        self._ends = [(c - chars, t - tokens) for c, t in self._ends if c > chars or t > tokens]

    def push(self, ids: Sequence[int]) -> Piece:
        """Text that may now be sent. After a piece with `stop` nothing may be pushed."""
        decoder = self._decoder
        for id in ids:
            new = decoder.push(id)
            self._pending += 1
            if new:
                self._buffer += new
                if self._matcher is not None and (match := self._matcher.feed(new)) is not None:
                    return self._cut(match)
            if decoder.clean:
                self._ends.append((len(self._buffer), self._pending))
        return self._give()

    def _give(self) -> Piece:
        safe = len(self._buffer) - (self._matcher.held if self._matcher is not None else 0)
        chars = tokens = 0
        for end, count in self._ends:
            if end > safe:
                break
            chars, tokens = end, count
        if not tokens:
            return Piece("", 0)
        piece = Piece(self._buffer[:chars], tokens)
        self._forget(chars, tokens)
        return piece

    def _cut(self, match: Match) -> Piece:
        self.stop = match.text
        end = (match.end if self._include_stop else match.start) - self._base
        piece = Piece(self._buffer[: max(end, 0)], self._pending, match.text)
        self._buffer, self._pending, self._ends = "", 0, []
        return piece

    def finish(self) -> Piece:
        """All that is left, with U+FFFD for a character that never became whole."""
        tail = self._decoder.flush()
        if tail:
            self._buffer += tail
            if self._matcher is not None and (match := self._matcher.feed(tail)) is not None:
                return self._cut(match)
        piece = Piece(self._buffer, self._pending)
        self._buffer, self._pending, self._ends = "", 0, []
        return piece

    def push_silent(self) -> None:
        """A token that belongs to the answer without its text: EOS, or a stop token that is not included."""
        self._pending += 1
