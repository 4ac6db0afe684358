"""When a call is tried again: pure arithmetic over a clock that is an argument."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy import Retry, errors
from understudy._attempts import Attempts

GONE = errors.Unavailable("gone")


def attempts(retry: Retry, addresses: int = 1, first: int = 0, deadline: float | None = None) -> Attempts:
    return Attempts(retry, addresses, first, deadline, random.Random(0))


@given(st.integers(1, 6), st.integers(0, 9), st.integers(1, 30))
def test_it_walks_around_the_addresses_and_ends(addresses: int, first: int, bound: int) -> None:
    a = attempts(Retry(attempts=bound), addresses, first)
    seen = [a.address]
    for _ in range(bound - 1):
        seen.append(a.failed(GONE, now=0.0).address)
    with pytest.raises(errors.Unavailable, match="gone"):
        a.failed(GONE, now=0.0)
    assert seen == [(first + k) % addresses for k in range(bound)]


def test_waits_double_up_to_the_longest_and_keep_at_least_half() -> None:
    a = attempts(Retry(resume_attempts=2000, resume_s=1e9, first_delay_s=0.1, max_delay_s=3.0))
    for k in range(2000):
        longest = min(3.0, 0.1 * 2 ** min(k, 10))
        assert longest / 2 <= a.failed(GONE, now=float(k), resuming=True).delay_s <= longest


def test_progress_counts_anew() -> None:
    a = attempts(Retry(resume_attempts=2, resume_s=10))
    for now in range(0, 1000, 20):
        a.failed(GONE, now, resuming=True)
        a.failed(GONE, now + 9.0, resuming=True)
        a.progress()
    a.failed(GONE, 2000.0, resuming=True)
    with pytest.raises(errors.Unavailable):
        a.failed(GONE, 2010.5, resuming=True)  # not the third try, but too late


def test_the_wait_never_passes_the_deadline() -> None:
    a = attempts(Retry(attempts=99, first_delay_s=1.0), deadline=10.0)
    assert a.remaining(4.0) == 6.0
    assert a.remaining(11.0) == 0.0
    a.failed(GONE, now=0.0)
    with pytest.raises(errors.DeadlineExceeded, match="gone"):
        a.failed(GONE, now=9.5)


@pytest.mark.parametrize("kind", sorted(errors.FROM_KIND))
@pytest.mark.parametrize("resuming", [False, True])
def test_which_errors_are_tried_again(kind: str, resuming: bool) -> None:
    error = errors.FROM_KIND[kind]("x")
    again = {"UNAVAILABLE"} | ({"OVERLOADED", "CANNOT_RESUME"} if resuming else set())
    a = attempts(Retry(), addresses=2)
    if kind in again:
        assert a.failed(error, 0.0, resuming).address == 1
    else:
        with pytest.raises(type(error)):
            a.failed(error, 0.0, resuming)


def test_an_overloaded_service_says_how_long_to_wait() -> None:
    a = attempts(Retry(first_delay_s=0.01))
    assert a.failed(errors.Overloaded("full", 7.0), 0.0, resuming=True).delay_s == 7.0


def test_cannot_resume_is_final_when_every_address_said_so() -> None:
    refused = errors.CannotResume("other weights")
    a = attempts(Retry(), addresses=3)
    a.failed(refused, 0.0, resuming=True)
    a.failed(GONE, 0.0, resuming=True)
    a.failed(refused, 0.0, resuming=True)
    a.failed(refused, 0.0, resuming=True)  # the first address again: the second has not yet said anything
    with pytest.raises(errors.CannotResume):
        a.failed(refused, 0.0, resuming=True)


def test_a_refusal_before_progress_is_forgotten() -> None:
    refused = errors.CannotResume("other weights")
    a = attempts(Retry(), addresses=2)
    for _ in range(9):
        before = a.address
        assert a.failed(refused, 0.0, resuming=True).address != before
        a.progress()


@pytest.mark.parametrize(
    "wrong",
    [{"attempts": 0}, {"resume_attempts": -1}, {"resume_s": -1}, {"first_delay_s": -0.1}, {"max_delay_s": -1}],
    ids=lambda w: next(iter(w)),
)
def test_a_retry_that_means_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Retry(**wrong)
