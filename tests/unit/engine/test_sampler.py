"""The sampler against its definition written out naively, its distribution, and its independence of company."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_runner import PlainSamplingOps

from workers.engine import Sampling
from workers.engine.philox import uniforms
from workers.engine.sampler import Choice, Row, Sampler, draw, inverse, largest, token_logprob, weigh


def stays(logits: np.ndarray, sampling: Sampling) -> dict[int, float]:
    """Tokens that may be drawn and their weights, by the six steps at the top of the sampler, one after the other."""
    top = max(float(x) for x in logits)
    weight = {i: float(np.exp(np.float64((float(x) - top) / sampling.temperature))) for i, x in enumerate(logits)}
    weight = {i: w for i, w in weight.items() if w >= sampling.min_p}
    if sampling.top_k:
        kept = sorted(weight, key=lambda i: (-float(logits[i]), i))[: sampling.top_k]
        weight = {i: weight[i] for i in sorted(kept)}
    if sampling.top_p < 1:
        order = sorted(weight, key=lambda i: (-weight[i], i))
        goal, reached, kept = sampling.top_p * float(np.sum([weight[i] for i in sorted(weight)])), 0.0, []
        for i in order:
            kept.append(i)
            reached += weight[i]
            if reached >= goal:
                break
        weight = {i: weight[i] for i in sorted(kept)}
    return weight


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.05, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 40, 10_000]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sampling=samplings, size=st.sampled_from([1, 2, 50, 700]), seed=st.integers(0, 10_000), coarse=st.booleans())
def test_filters_are_those_of_the_definition(sampling, size, seed, coarse):
    logits = np.random.default_rng(seed).standard_normal(size).astype(np.float32) * 4
    if coarse:
        logits = np.round(logits)  # many ties
    ids, weights = weigh(logits, sampling)
    expected = stays(logits, sampling)
    assert (list(range(size)) if ids is None else ids.tolist()) == list(expected)
    assert weights.tolist() == pytest.approx(list(expected.values()), rel=1e-12)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    size=st.sampled_from([1, 5, 1023, 1024, 1025, 5000]),
    seed=st.integers(0, 1000),
    number=st.floats(0, 1, exclude_max=True),
)
def test_the_inverse_is_where_the_running_sum_passes_the_number(size, seed, number):
    weights = np.random.default_rng(seed).random(size) ** 8
    weights[::3] = 0
    weights[-1] = max(weights[-1], 1e-9)
    place = inverse(weights, number)
    assert weights[place] > 0
    before, after, whole = weights[:place].sum(), weights[: place + 1].sum(), weights.sum()
    assert before <= number * whole * (1 + 1e-12)
    assert after >= number * whole * (1 - 1e-12)


@pytest.mark.parametrize("size", [7, 1024, 3000])
def test_the_largest_number_never_draws_a_token_without_weight(size):
    weights = np.zeros(size)
    weights[2:5] = 0.1
    assert inverse(weights, 1 - 2.0**-53) == 4
    assert inverse(weights, 0.0) == 2


def test_draws_follow_the_distribution():
    logits = np.array([0.0, 1.0, 2.0, -1.0, 0.5, 2.0, -3.0], dtype=np.float32)
    for sampling in (Sampling(), Sampling(temperature=0.5), Sampling(temperature=2.0, top_k=4), Sampling(top_p=0.8)):
        expected = stays(logits, sampling)
        n = 20_000
        numbers = uniforms([(123, 0, position) for position in range(n)])
        counts = np.bincount([draw(logits, sampling, (), float(u)) for u in numbers], minlength=len(logits))
        assert set(np.flatnonzero(counts)) <= set(expected)
        whole = sum(expected.values())
        goal = {i: n * w / whole for i, w in expected.items()}
        chi_square = sum((counts[i] - e) ** 2 / e for i, e in goal.items())
        assert chi_square < 22.5, f"{sampling}: 6 degrees of freedom: one in a thousand is above"


def test_ties_go_to_the_lowest_id():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [5.0, 5.0, 1.0, 5.0]])
    rows = [Row(Sampling(temperature=0), 0, 0), Row(Sampling(temperature=0.3, top_k=1, seed=9), 0, 0)]
    assert [c.token for c in Sampler(PlainSamplingOps()).choose(logits, rows)] == [1, 0]
    assert largest(np.array([1, 3, 2, 3, 3]), 2).tolist() == [1, 3]


def test_barred_tokens_are_not_chosen():
    logits = torch.tensor([[9.0, 1.0, 2.0]] * 2)
    rows = [Row(Sampling(temperature=t), 0, 0, barred=[0]) for t in (0.0, 0.01)]
    assert [c.token for c in Sampler(PlainSamplingOps()).choose(logits, rows)] == [2, 2]


def test_a_barred_id_outside_the_vocabulary_bars_nothing():
    row = Row(Sampling(temperature=0), 0, 0, barred=[2, 3, 1000])
    (choice,) = Sampler(PlainSamplingOps()).choose(torch.tensor([[1.0, 2.0, 3.0]]), [row])
    assert (choice.token, choice.error) == (1, "")


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999])
def test_a_nucleus_of_many_thousands_is_that_of_the_definition(top_p):
    logits = np.random.default_rng(3).standard_normal(20_000).astype(np.float32) * 0.5
    sampling = Sampling(temperature=1.0, top_p=top_p)
    ids, weights = weigh(logits, sampling)
    expected = stays(logits, sampling)
    assert ids.tolist() == list(expected)
    assert weights.tolist() == list(expected.values())


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-3])
def test_a_temperature_next_to_zero_is_greedy(temperature):
    logits = np.array([1.0, 4.0, 3.99], dtype=np.float32)
    assert draw(logits, Sampling(temperature=temperature), (), 0.999) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_end_only_their_row(value):
    logits = torch.tensor([[1.0, 2.0], [value, 0.0], [4.0, 3.0]])
    rows = [Row(Sampling(temperature=t), 0, 0, logprobs=1) for t in (0.0, 1.0, 0.0)]
    choices = Sampler(PlainSamplingOps()).choose(logits, rows)
    assert [bool(c.error) for c in choices] == [False, True, False]
    assert str(value) in choices[1].error
    assert [choices[0].token, choices[2].token] == [1, 0]


def test_logprobs_are_of_the_raw_logits():
    logits = torch.tensor([[1.0, 2.0, 2.0, -1.0]])
    row = Row(Sampling(temperature=0), 0, 0, barred=[1], logprobs=3)
    (choice,) = Sampler(PlainSamplingOps()).choose(logits, [row])
    expected = torch.log_softmax(logits[0].double(), -1)
    assert (choice.token, choice.logprob.rank) == (2, 2), "token 1 is as likely and comes first"
    assert choice.logprob.logprob == pytest.approx(float(expected[2]), abs=1e-6)
    assert [id for id, _ in choice.logprob.top] == [1, 2, 0]
    assert token_logprob(np.array([-1.0, -2.0], dtype=np.float32), 0, 0).top == []


def test_a_batch_that_is_all_greedy_computes_no_logprobs():
    class Forbidden(PlainSamplingOps):
        def logprobs(self, logits: torch.Tensor) -> torch.Tensor:
            raise AssertionError("nobody asked for logprobs")

    rows = [Row(Sampling(temperature=0), 0, 0)] * 3
    assert [c.token for c in Sampler(Forbidden()).choose(torch.eye(3), rows)] == [0, 1, 2]
    assert Sampler(Forbidden()).choose(torch.empty(0, 3), []) == []


@pytest.mark.parametrize("vocab", [50, 1500, 32_003])
def test_a_row_does_not_depend_on_its_company(vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(9, vocab, generator=generator) * 3
    rows = [
        Row(Sampling(0.0), 0, 3, logprobs=4),
        Row(Sampling(1.0, seed=5), 0, 3, logprobs=0),
        Row(Sampling(0.7, top_k=20, seed=5), 1, 3),
        Row(Sampling(1.3, top_p=0.9, seed=6), 0, 4, logprobs=20),
        Row(Sampling(1.0, min_p=0.1, seed=7), 0, 5),
        Row(Sampling(0.9, top_k=40, top_p=0.8, min_p=0.01, seed=8), 2, 6, logprobs=1),
        Row(Sampling(0.0), 0, 0, barred=[3, 4]),
        Row(Sampling(1.0, seed=5), 0, 4),
        Row(Sampling(0.01, seed=5), 0, 4, barred=[1]),
    ]
    sampler = Sampler(PlainSamplingOps())
    together = sampler.choose(logits, rows)
    alone = [sampler.choose(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert together == alone
    order = [4, 1, 8, 0, 7, 2, 6, 3, 5]
    mixed: list[Choice] = sampler.choose(logits[order], [rows[i] for i in order])
    assert mixed == [alone[i] for i in order]


def test_a_row_does_not_depend_on_where_it_lies_in_memory():
    row = np.random.default_rng(0).standard_normal(10_007).astype(np.float32)
    space = np.empty(10_007 + 16, dtype=np.float32)
    expected = [t.tobytes() for t in weigh(row, Sampling(0.8, top_p=0.95))]
    for offset in range(1, 16):
        place = space[offset : offset + len(row)]
        place[:] = row
        assert [t.tobytes() for t in weigh(place, Sampling(0.8, top_p=0.95))] == expected
