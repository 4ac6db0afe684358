"""Penalties, biases and bad words, against the plain definition token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine import Sampling
from workers.engine.penalties import Seen, adjust, adjusts, barred_words

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
    adjust(row, sampling, Seen(prompt, answer), answer)
    np.testing.assert_array_equal(row, want)


@given(prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=12), answer=TOKENS, more=TOKENS)
@settings(max_examples=100, deadline=None)
def test_what_is_added_and_taken_back_leaves_no_trace(prompt: list[int], answer: list[int], more: list[int]) -> None:
    seen = Seen(prompt, answer)
    for token in more:
        seen.add(token)
    for token in reversed(more):
        seen.remove(token)
    fresh = Seen(prompt, answer)
    for one, other in zip(seen.answer(), fresh.answer(), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(seen.prompt_only(), fresh.prompt_only())


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
    assert barred_words(words, answer) == barred


def test_ids_beyond_the_vocabulary_are_left_out() -> None:
    row = np.zeros(V, np.float32)
    adjust(row, Sampling(logit_bias=[(V, 3.0), (1, 2.0)], bad_words=[[V + 1]]), Seen([0]), [])
    assert row.tolist() == [0, 2] + [0] * (V - 2)


def test_a_plain_request_asks_for_nothing() -> None:
    assert not adjusts(Sampling(temperature=0.7, top_k=3, top_p=0.9, min_p=0.1, seed=4))
    assert adjusts(Sampling(presence_penalty=-1.0))
    assert adjusts(Sampling(bad_words=[[1]]))
