"""Between what a request's values must lie, and the words for one that does not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from understudy.errors import InvalidRequest

MAX_LOGPROBS = 20
_SHOWN = 60  # characters of a value that an error repeats


@dataclass(frozen=True)
class Bound:
    """An interval; `open_low` leaves out its lower end."""

    low: float
    high: float
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value) and (self.low < value if self.open_low else self.low <= value) and value <= self.high
        )

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"


BOUNDS = {
    "sampling.temperature": Bound(0, 100),
    "sampling.top_k": Bound(0, 2**31 - 1),
    "sampling.top_p": Bound(0, 1, open_low=True),
    "sampling.min_p": Bound(0, 1),
    "sampling.repetition_penalty": Bound(0, 10, open_low=True),
    "sampling.presence_penalty": Bound(-2, 2),
    "sampling.frequency_penalty": Bound(-2, 2),
    "sampling.logit_bias": Bound(-100, 100),
    "sampling.n": Bound(1, 128),
    "response.logprobs": Bound(0, MAX_LOGPROBS),
    "response.prompt_logprobs": Bound(0, MAX_LOGPROBS),
    "response.trace_options.candidates": Bound(0, MAX_LOGPROBS),
    "priority": Bound(-100, 100),
}


def show(value: object) -> str:
    """A value for an error message, never longer than a header may be."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def within(field: str, value: float) -> float:
    """`value`. Raises InvalidRequest where it is out of the field's bound."""
    if value not in BOUNDS[field]:
        raise InvalidRequest(f"is {value:g}; it must be in {BOUNDS[field]}", field)
    return value


def check_token_ids(field: str, ids: Iterable[int], vocab_size: int) -> list[int]:
    """`ids` as a list. Raises InvalidRequest naming the first id that is outside the vocabulary."""
    found = list(ids)
    if found and max(found) >= vocab_size:
        index = next(i for i, id in enumerate(found) if id >= vocab_size)
        raise InvalidRequest(
            f"[{index}] is {found[index]}; ids must be below the vocabulary size of {vocab_size}", field
        )
    return found


def check_strings(field: str, texts: Sequence[str], most: int, most_bytes: int) -> tuple[str, ...]:
    """`texts` without repetitions. Raises InvalidRequest where there are more than `most`, or one is empty or has more
    than `most_bytes` bytes of UTF-8."""
    if len(texts) > most:
        raise InvalidRequest(f"has {len(texts)} strings; at most {most} are allowed", field)
    for i, text in enumerate(texts):
        size = len(text.encode())
        if not 1 <= size <= most_bytes:
            raise InvalidRequest(
                f"[{i}] has {size} bytes; each must have between 1 and {most_bytes} bytes of UTF-8", field
            )
    return tuple(dict.fromkeys(texts))
