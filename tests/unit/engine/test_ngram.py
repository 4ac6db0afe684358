"""Drafts looked up in the sequence itself, beside a search that tries every place."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine import ngram
from workers.engine.ngram import Lookup


def naive(tokens: list[int], count: int) -> list[int]:
    """By trying every earlier place, the latest first."""
    here, run = len(tokens), ngram.SHORTEST
    places = [p for p in range(here - 1, run - 1, -1) if tokens[p - run : p] == tokens[here - run :]]
    best, length = 0, 0
    for place in [p for p in places if p > here - 1 - ngram.WINDOW][: ngram.CANDIDATES]:
        common = run
        while common < min(ngram.LONGEST, place) and tokens[place - common - 1] == tokens[here - common - 1]:
            common += 1
        if common > length:
            best, length = place, common
    longer = list(tokens)
    for i in range(count if length else 0):
        longer.append(longer[best + i])
    return longer[here:]


@pytest.fixture(params=[(2, 16, 16, 16384), (2, 4, 3, 8), (3, 5, 2, 12), (1, 3, 4, 6)])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in zip(("SHORTEST", "LONGEST", "CANDIDATES", "WINDOW"), request.param, strict=True):
        monkeypatch.setattr(ngram, name, value)


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 2), max_size=60),
    steps=st.lists(st.integers(1, 5), min_size=60, max_size=60),
    count=st.integers(0, 9),
)
@pytest.mark.usefixtures("sizes")
def test_drafts_equal_a_search_of_every_place(tokens: list[int], steps: list[int], count: int) -> None:
    """However many tokens come between two questions."""
    lookup, length = Lookup(), 0
    for step in steps:
        length = min(length + step, len(tokens))
        assert lookup.draft(tokens[:length], count) == naive(tokens[:length], count)


def test_a_repeated_text_goes_on() -> None:
    text = list(range(50, 90))
    assert Lookup().draft(text + text[:5], 4) == [55, 56, 57, 58]
    assert Lookup().draft([1, 2, 3] * 3, 7) == [1, 2, 3, 1, 2, 3, 1]
    assert Lookup().draft(text, 4) == []
    assert Lookup().draft([], 4) == Lookup().draft([7], 4) == Lookup().draft([7, 7], 4) == []
    assert Lookup().draft([7, 7, 7], 2) == [7, 7]


def test_the_longer_past_wins_and_then_the_later_place() -> None:
    assert Lookup().draft([1, 2, 3, 4, 9, 2, 3, 5, 0, 1, 2, 3], 1) == [4]
    assert Lookup().draft([9, 2, 3, 4, 8, 2, 3, 5, 0, 2, 3], 1) == [5]


def test_the_index_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "WINDOW", 64)
    lookup, tokens = Lookup(), list(range(5000))
    for length in range(0, 5000, 7):
        lookup.draft(tokens[:length], 4)
    assert len(lookup._latest) <= 64
    assert len(lookup._before) <= 64
