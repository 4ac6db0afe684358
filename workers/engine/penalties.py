"""What a request may do to the logits before a token is drawn, for all rows of a step at once.

For a logit l of a token that prompt or answer holds, c times in the answer alone:

    bias        b:  l + b                              (any token)
    repetition  r:  l / r where l > 0, else l * r      (prompt and answer count; CTRL, Keskar et al. 2019; as HF, vLLM)
    frequency   f:  l - f * c                          (the answer counts; as OpenAI and vLLM)
    presence    p:  l - p where c > 0                  (the answer counts)

in this order (vLLM's), in float32, each operation rounded by itself; what a repetition penalty would take beyond
float32 becomes its largest value. Only elements that a rule names are touched, one by one: the bits of a row do not
depend on the rows beside it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.engine.contract import Sampling

Floats = NDArray[np.float32]
_LARGEST = np.finfo(np.float32).max


class Seen:
    """Distinct tokens of one sequence in the order in which they came, and how often the answer holds each."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._place = {token: i for i, token in enumerate(dict.fromkeys(prompt))}
        self._ids = array("q", self._place)
        self._counts = array("q", [0]) * len(self._ids)
        self._prompt_ids = len(self._ids)
        self.length = 0  # tokens of the answer that are counted

    def add(self, token: int) -> None:
        """The answer goes on with `token`."""
        place = self._place.setdefault(token, len(self._ids))
        if place == len(self._ids):
            self._ids.append(token)
            self._counts.append(0)
        self._counts[place] += 1
        self.length += 1

    def take_back(self, token: int) -> None:
        """Undoes an `add` of `token`, the latest first."""
        place = self._place[token]
        self._counts[place] -= 1
        self.length -= 1
        if self._counts[place] == 0 and place >= self._prompt_ids:  # it came last, so it is the last
            del self._place[token], self._ids[place], self._counts[place]

    def snapshot(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and counts: copies."""
        return np.array(self._ids, np.int64), np.array(self._counts, np.int64)


@dataclass(slots=True)
class Penalized:
    """One row's tokens: `ids` of prompt and answer, each once, and how often the answer holds each."""

    ids: NDArray[np.int64]
    counts: NDArray[np.int64]


@dataclass(slots=True)
class Bias:
    """What is added to the logits of some tokens, each named once and within the vocabulary."""

    ids: NDArray[np.int64]
    addends: Floats


def penalizes(sampling: Sampling) -> bool:
    """Whether any of the three penalties does anything."""
    return bool(sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty)


def penalize(values: Floats, rows: Sequence[int], samplings: Sequence[Sampling], seen: Sequence[Penalized]) -> None:
    """Applies the penalties in place to `rows` of values [S, V]; samplings and seen are one for each of `rows`."""
    sizes = [len(s.ids) for s in seen]

    def spread(name: str) -> Floats:
        return np.repeat(np.array([getattr(s, name) for s in samplings], np.float32), sizes)

    at = (np.repeat(np.array(rows, np.int64), sizes), np.concatenate([s.ids for s in seen]))
    counts = np.concatenate([s.counts for s in seen])
    x = values[at]
    repetition = spread("repetition_penalty")
    with np.errstate(over="ignore"):
        x = np.where(x > 0, x / repetition, x * repetition)
    np.clip(x, -_LARGEST, _LARGEST, out=x)
    x -= spread("frequency_penalty") * counts.astype(np.float32)
    x -= spread("presence_penalty") * (counts > 0).astype(np.float32)
    values[at] = x


def add_bias(values: Floats, rows: Sequence[int], biases: Sequence[Bias]) -> None:
    """Adds in place to `rows` of values [S, V]."""
    at = (np.repeat(np.array(rows, np.int64), [len(b.ids) for b in biases]), np.concatenate([b.ids for b in biases]))
    values[at] += np.concatenate([b.addends for b in biases])
