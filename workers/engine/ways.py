"""What one request asks of every choice beyond temperature and filters, as a function of its answer so far.

Nothing here has a state of its own that the tokens do not determine: whoever goes on with an answer, elsewhere or
after preemption, chooses the same. Where rules contradict each other: a forced id comes whatever else is said; then
the format, min_tokens and bad words bar; penalties and bias shape what is left. A format whose answer is whole and
cannot go on ends it, min_tokens or not. What leaves no token at all ends the sequence with ERROR.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from understudy.errors import InvalidRequest
from workers.engine.contract import Grammar, Request
from workers.engine.formats import Bits, Formats, Matcher, mask_words
from workers.engine.penalties import Bias, Penalized, Seen, penalizes
from workers.engine.sampler import Extra
from workers.engine.sequence import begun_words, forced_id


def asks(request: Request) -> bool:
    """Whether a request needs `Ways` at all: most do not, and pay nothing."""
    s = request.sampling
    return bool(
        penalizes(s)
        or s.logit_bias
        or s.bad_words
        or request.grammar is not None
        or request.interjection is not None
        or request.probe is not None
    )


class Ways:
    """The rules of one sequence. Rows are asked for in the order of their tokens, drafts that follow among them."""

    def __init__(self, request: Request, vocab_size: int) -> None:
        s = request.sampling
        self._request = request
        self._start = len(request.prompt)
        self._seen = Seen(request.prompt) if penalizes(s) else None
        bias = {id: addend for id, addend in s.logit_bias if 0 <= id < vocab_size}
        self._bias = Bias(np.array([*bias], np.int64), np.array([*bias.values()], np.float32)) if bias else None
        self._bad_ids = sorted({word[0] for word in s.bad_words if len(word) == 1})
        self._bad_words: dict[int, list[list[int]]] = {}  # by their last id but one
        for word in s.bad_words:
            if len(word) > 1:
                self._bad_words.setdefault(word[-2], []).append(word)
        self._candidates = request.probe.candidates if request.probe is not None else None

    def extras(self, tokens: Sequence[int], drafts: Sequence[int]) -> list[Extra]:
        """For the token after `tokens` (prompt and answer), and for those after each beginning of `drafts`."""
        if self._seen is not None:
            for token in tokens[self._start + self._seen.length :]:
                self._seen.add(token)
        result = [self._extra(tokens, len(tokens))]
        if drafts:
            whole = [*tokens, *drafts]
            for end, draft in enumerate(drafts, len(tokens) + 1):
                if self._seen is not None:
                    self._seen.add(draft)
                result.append(self._extra(whole, end))
            if self._seen is not None:
                for draft in reversed(drafts):
                    self._seen.take_back(draft)
        return result

    def _extra(self, tokens: Sequence[int], end: int) -> Extra:
        """For the token after tokens[:end], which `_seen` has counted."""
        return Extra(
            forced=self._forced(tokens, end),
            barred=self._barred(tokens, end),
            penalized=None if self._seen is None else Penalized(*self._seen.snapshot()),
            bias=self._bias,
            candidates=self._candidates,
        )

    def _barred(self, tokens: Sequence[int], end: int) -> Sequence[int]:
        if not self._bad_words or end == self._start:
            return self._bad_ids
        return [*self._bad_ids, *begun_words(self._bad_words.get(tokens[end - 1], ()), tokens, self._start, end)]

    def _forced(self, tokens: Sequence[int], end: int) -> int | None:
        rule = self._request.interjection
        return None if rule is None else forced_id(rule, tokens, self._start, end)


def opened(formats: Formats, grammar: Grammar, generated: Sequence[int]) -> Matcher:
    """The matcher after the tokens that the caller already has. Raises as `Formats.open` does."""
    matcher = formats.open(grammar)
    try:
        for token in generated:
            matcher.accept(token)
    except ValueError as error:
        raise InvalidRequest(f"are not of this request: {error}", "resume.sequences") from error
    return matcher


def not_opened(error: BaseException) -> tuple[str, str]:
    """Why a format could not be opened, and the request's field to blame: empty where it is a fault of ours."""
    if isinstance(error, InvalidRequest):
        return error.message.removeprefix(f"{error.field}: "), error.field or "format"
    if isinstance(error, ValueError):
        return str(error), "format"
    return f"{type(error).__name__}: {error}", ""


def masks_of(matcher: Matcher, drafts: Sequence[int], ends: Sequence[int], vocab_size: int) -> list[tuple[Bits, bool]]:
    """What may follow the answer so far, and each beginning of `drafts`: masks, and whether it may end there.

    The matcher is afterwards as before. Stops, with fewer masks, at the first draft that the format or the end of the
    answer (`ends`: EOS and stop ids) forbids: what follows it is never looked at.
    """
    masks: list[tuple[Bits, bool]] = []
    accepted = 0
    try:
        for draft in (*drafts, None):
            bits = np.zeros(mask_words(vocab_size), np.uint32)
            masks.append((bits, matcher.mask_into(bits)))
            if draft is None or draft in ends or not bits[draft >> 5] >> np.uint32(draft & 31) & np.uint32(1):
                break
            matcher.accept(draft)
            accepted += 1
    finally:
        if accepted:
            matcher.rollback(accepted)
    return masks
