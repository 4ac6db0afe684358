"""What a request adds to its logits before anything is drawn: bias, penalties, and tokens that may not come.

In this order, on the row's own copy [V] in float32, by the definitions of vLLM (https://docs.vllm.ai, sampling
parameters), which are those of the OpenAI API and, for the repetition penalty, of https://arxiv.org/abs/1909.05858:

1. logit_bias: l_i += b_i.
2. repetition_penalty r, for tokens of the prompt or the answer: l_i = l_i / r where l_i > 0, else l_i * r.
3. frequency_penalty f and presence_penalty p, for tokens that the answer holds c_i > 0 times: l_i -= f c_i, then
   l_i -= p.
4. bad_words: where the answer ends with all of a word's ids but the last, the last one is barred.

Each is elementwise with one rounding, so a row's bits depend on nothing beside the row. What a step costs grows with
the number of distinct tokens, not with the vocabulary, and nothing is paid for a request that asks for none of it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workers.engine.contract import Sampling

Floats = NDArray[np.float32]


def adjusts(sampling: Sampling) -> bool:
    """Whether `adjust` would do anything."""
    return bool(
        sampling.logit_bias
        or sampling.bad_words
        or sampling.repetition_penalty != 1
        or sampling.frequency_penalty
        or sampling.presence_penalty
    )


class Seen:
    """The distinct tokens of one sequence, and how often its answer holds each. Grows with the answer."""

    def __init__(self, prompt: Sequence[int], answer: Sequence[int] = ()) -> None:
        self.ids = array("i")  # of the answer, in the order of their first place
        self.counts = array("i")
        self._place: dict[int, int] = {}
        self._prompt = np.unique(np.asarray(prompt, np.int32))
        self._other = self._prompt  # tokens of the prompt that the answer lacks
        for token in answer:
            self.add(token)

    def add(self, token: int) -> None:
        """The answer goes on with `token`."""
        place = self._place.setdefault(token, len(self.ids))
        if place < len(self.ids):
            self.counts[place] += 1
            return
        self.ids.append(token)
        self.counts.append(1)
        at = int(np.searchsorted(self._other, token))
        if at < len(self._other) and self._other[at] == token:
            self._other = np.delete(self._other, at)

    def remove(self, token: int) -> None:
        """Takes back the latest `add`, which was of `token`."""
        place = self._place[token]
        self.counts[place] -= 1
        if self.counts[place]:
            return
        del self._place[token], self.ids[place], self.counts[place]  # its first place was the last one
        at = int(np.searchsorted(self._prompt, token))
        if at < len(self._prompt) and self._prompt[at] == token:
            self._other = np.insert(self._other, int(np.searchsorted(self._other, token)), np.int32(token))

    def answer(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(ids, counts) of the answer's distinct tokens."""
        return np.array(self.ids, np.int32), np.array(self.counts, np.int32)

    def prompt_only(self) -> NDArray[np.int32]:
        """The prompt's distinct tokens that the answer lacks."""
        return self._other


def adjust(logits: Floats, sampling: Sampling, seen: Seen, answer: Sequence[int]) -> None:
    """Applies the list above to one row [V], in place; `answer` are the tokens of the answer so far, `seen` counts
    them. Ids beyond the vocabulary are left out (a prompt cannot have any; a bias or a word might)."""
    size = len(logits)
    for token, bias in sampling.logit_bias:
        if token < size:
            logits[token] += np.float32(bias)
    penalty = sampling.repetition_penalty
    ids, counts = seen.answer() if penalty != 1 or sampling.frequency_penalty or sampling.presence_penalty else _NONE
    if penalty != 1:
        for which in (seen.prompt_only(), ids):
            values = logits[which]
            logits[which] = np.where(values > 0, values / np.float32(penalty), values * np.float32(penalty))
    if sampling.frequency_penalty:
        logits[ids] -= np.float32(sampling.frequency_penalty) * counts.astype(np.float32)
    if sampling.presence_penalty:
        logits[ids] -= np.float32(sampling.presence_penalty)
    for token in barred_words(sampling.bad_words, answer):
        if token < size:
            logits[token] = -np.inf


_NONE = (np.empty(0, np.int32), np.empty(0, np.int32))


def barred_words(words: Sequence[Sequence[int]], answer: Sequence[int]) -> list[int]:
    """The ids that would complete one of `words` after `answer`."""
    return [
        word[-1]
        for word in words
        if len(word) == 1
        or (len(word) - 1 <= len(answer) and list(answer[len(answer) - len(word) + 1 :]) == list(word[:-1]))
    ]
