"""Penalties, biases and bad words, against the plain definition token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine import Interjection, Request, Sampling
from workers.engine.penalties import Seen
from workers.engine.sampler import Row, shape
from workers.engine.ways import Ways, asks

V = 12
TOKENS = st.lists(st.integers(0, V - 1), max_size=12)
NUMBERS = st.floats(-8, 8, width=32)


def by_definition(logits: np.ndarray, sampling: Sampling, prompt: list[int], answer: list[int]) -> np.ndarray:
    out = logits.copy()
    f = np.float32
    for token in range(len(out)):
        value = out[token]
        for biased, bias in sampling.logit_bias:
            if biased == token:
                value = f(value + f(bias))
        if token in prompt or token in answer:
            r = f(sampling.repetition_penalty)
            value = f(value / r) if value > 0 else f(value * r)
        if token in answer:
            value = f(value - f(f(sampling.frequency_penalty) * f(answer.count(token))))
            value = f(value - f(sampling.presence_penalty))
        out[token] = value
    for word in sampling.bad_words:
        if [*answer, word[-1]][-len(word) :] == word:
            out[word[-1]] = -np.inf
    return out


def ways(sampling: Sampling, prompt: list[int], interjection: Interjection | None = None) -> Ways:
    return Ways(Request("a", prompt, 99, sampling, interjection=interjection), V)


def shaped(
    row: np.ndarray, sampling: Sampling, prompt: list[int], answer: list[int], mate: Sampling | None = None
) -> np.ndarray:
    """The row after step 1 of the sampler's definition, alone or between two mates."""
    (extra,) = ways(sampling, prompt).extras([*prompt, *answer], [])
    rows = [Row(sampling, 0, len(answer), extra=extra)]
    if mate is not None:
        (other,) = ways(mate, [1, 2]).extras([1, 2, 3], [])
        rows = [Row(mate, 0, 1, extra=other), *rows, Row(Sampling(), 0, 0, barred=[3])]
    values = np.stack([row] * len(rows))
    shape(values, rows)
    return values[len(rows) // 2]


@given(
    logits=st.lists(NUMBERS, min_size=V, max_size=V),
    prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=12),
    answer=TOKENS,
    penalties=st.tuples(
        st.sampled_from([1.0, 0.5, 1.7]), st.sampled_from([0.0, 0.3, -2.0]), st.sampled_from([0.0, 1.1])
    ),
    bias=st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100), max_size=3),
    words=st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=3), max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_a_row_is_what_the_definition_says(
    logits: list[float],
    prompt: list[int],
    answer: list[int],
    penalties: tuple[float, float, float],
    bias: dict[int, float],
    words: list[list[int]],
) -> None:
    repetition, presence, frequency = penalties
    sampling = Sampling(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=list(bias.items()),
        bad_words=words,
    )
    row = np.array(logits, np.float32)
    want = by_definition(row, sampling, prompt, answer)
    got = shaped(row, sampling, prompt, answer)
    np.testing.assert_array_equal(got, want)
    mate = Sampling(repetition_penalty=3.0, logit_bias=[(1, 5.0)])
    np.testing.assert_array_equal(shaped(row, sampling, prompt, answer, mate), want)


@given(prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=12), answer=TOKENS, more=TOKENS)
@settings(max_examples=100, deadline=None)
def test_what_is_added_and_taken_back_leaves_no_trace(prompt: list[int], answer: list[int], more: list[int]) -> None:
    seen = Seen(prompt)
    for token in [*answer, *more]:
        seen.add(token)
    for token in reversed(more):
        seen.take_back(token)
    fresh = Seen(prompt)
    for token in answer:
        fresh.add(token)
    for one, other in zip(seen.snapshot(), fresh.snapshot(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert seen.length == len(answer)


@pytest.mark.parametrize(
    ("words", "answer", "barred"),
    [
        ([[3]], [], [3]),
        ([[1, 2]], [1], [2]),
        ([[1, 2]], [2, 1], [2]),
        ([[1, 2]], [1, 0], []),
        ([[1, 2, 3], [2, 4]], [1, 2], [3, 4]),
        ([[1, 2, 3]], [2], []),
    ],
)
def test_only_the_last_id_of_a_begun_word_is_barred(
    words: list[list[int]], answer: list[int], barred: list[int]
) -> None:
    (extra,) = ways(Sampling(bad_words=words), [1, 2]).extras([1, 2, *answer], [])
    assert list(extra.barred) == barred


def test_ids_beyond_the_vocabulary_are_left_out() -> None:
    sampling = Sampling(logit_bias=[(V, 3.0), (1, 2.0)], bad_words=[[V + 1]])
    assert shaped(np.zeros(V, np.float32), sampling, [0], []).tolist() == [0, 2] + [0] * (V - 2)


def test_a_repetition_penalty_stays_within_float32() -> None:
    row = np.full(V, 3e38, np.float32)
    assert shaped(row, Sampling(repetition_penalty=0.01), [0], [])[0] == np.finfo(np.float32).max


def test_a_plain_request_asks_for_nothing() -> None:
    assert not asks(Request("a", [1], 5, Sampling(temperature=0.7, top_k=3, top_p=0.9, min_p=0.1, seed=4)))
    assert asks(Request("a", [1], 5, Sampling(presence_penalty=-1.0)))
    assert asks(Request("a", [1], 5, Sampling(bad_words=[[1]])))


@pytest.mark.parametrize(
    ("answer", "forced"),
    [
        ([5, 6], None),  # not yet
        ([5, 6, 7], 8),
        ([5, 6, 7, 8], 9),
        ([5, 6, 7, 8, 9], None),  # said
        ([8, 9, 7], None),  # it came by itself
        ([5, 8, 9], None),
        ([5, 6, 8], 8),  # only begun: it is said whole
    ],
)
def test_an_interjection_follows_unless_it_was_said(answer: list[int], forced: int | None) -> None:
    rule = Interjection(3, [8, 9])
    (extra,) = ways(Sampling(), [8, 9], rule).extras([8, 9, *answer], [])
    assert extra.forced == forced


@given(prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=8), answer=TOKENS, drafts=TOKENS)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_rows_after_drafts_are_those_of_longer_answers(prompt: list[int], answer: list[int], drafts: list[int]) -> None:
    sampling = Sampling(repetition_penalty=1.3, frequency_penalty=0.7, bad_words=[[1, 2], [3], [1, 1, 4]])
    rule = Interjection(2, [5, 6])
    together = ways(sampling, prompt, rule)
    for _ in range(2):  # drafts leave no trace
        rows = together.extras([*prompt, *answer], drafts)
        for j, row in enumerate(rows):
            (alone,) = ways(sampling, prompt, rule).extras([*prompt, *answer, *drafts[:j]], [])
            assert (row.forced, list(row.barred)) == (alone.forced, list(alone.barred))
            assert row.penalized is not None
            assert alone.penalized is not None
            mine = dict(zip(row.penalized.ids.tolist(), row.penalized.counts.tolist(), strict=True))
            assert mine == dict(zip(alone.penalized.ids.tolist(), alone.penalized.counts.tolist(), strict=True))
