"""The policy's arithmetic: what must hold for any fleet and any request."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.admission import SHARES, Limits, admit
from router.policy import CROWDING, NEAR, Class, Fleet, Outlook, Reason, Reuse, choose, outlook, reason, rows_of
from understudy.errors import Overloaded
from workers.engine.fake import FakeEngine

NOW = 100.0
INFO = FakeEngine(chunk_tokens=512, max_running=8).info


@dataclass(frozen=True)
class One:
    """A replica, as the policy sees it."""

    ahead: float = 0.0
    running: int = 0
    waiting: int = 0
    granted: int = 0
    rate: float = 1000.0
    host_rate: float = 8000.0
    store_rate: float = 3000.0
    stay: float = 1.0
    queued: int = 0
    device: int = 0
    host: int = 0
    store: int = 0


counts, seconds = st.integers(0, 30), st.floats(0, 50)
rates = st.floats(10, 1e5)
replicas = st.builds(
    One, seconds, counts, counts, counts, rates, rates, rates, seconds, st.integers(0, 5000), *[st.integers(0, 900)] * 3
)
fleets = st.lists(replicas, min_size=1, max_size=6)
classes = st.sampled_from(Class)
PROMPT = 3000


def fleet_of(ones: list[One]) -> tuple[Fleet, Reuse]:
    fleet = Fleet(len(ones))
    for slot, one in enumerate(ones):
        fleet.enter(slot, INFO)
        fleet.ahead[:, slot] = NOW + one.ahead
        for name in ("running", "waiting", "granted", "queued", "rate", "host_rate", "store_rate", "stay"):
            getattr(fleet, name)[slot] = getattr(one, name)
    return fleet, Reuse(*(np.array([getattr(one, tier) for one in ones]) for tier in ("device", "host", "store")))


def expected(one: One, rank: Class = Class.NORMAL, prompt: int = PROMPT) -> float:
    fleet, reuse = fleet_of([one])
    return float(outlook(fleet, NOW, prompt, rank, reuse).first_token[0])


def every(fleet: Fleet) -> np.ndarray:
    return np.ones(len(fleet), np.bool_)


@settings(deadline=None)
@given(replicas, classes, st.sampled_from(["ahead", "running", "waiting", "granted", "stay"]), st.integers(1, 20))
def test_whatever_is_in_the_way_makes_nothing_sooner(one: One, rank: Class, name: str, more: int) -> None:
    assert expected(replace(one, **{name: getattr(one, name) + more}), rank) >= expected(one, rank)


@settings(deadline=None)
@given(replicas, st.sampled_from(["device", "host", "store"]), st.integers(1, 300))
def test_having_more_of_a_prompt_makes_nothing_later(one: One, tier: str, more: int) -> None:
    assert expected(replace(one, **{tier: getattr(one, tier) + more})) <= expected(one) * (1 + 1e-9)


@settings(deadline=None)
@given(replicas, st.sampled_from(["rate", "host_rate", "store_rate"]), st.floats(1.01, 10))
def test_whoever_is_faster_is_not_later(one: One, name: str, factor: float) -> None:
    assert expected(replace(one, **{name: getattr(one, name) * factor})) <= expected(one) * (1 + 1e-9)


@settings(deadline=None)
@given(replicas, st.integers(1, 900))
def test_the_device_is_at_least_as_good_as_loading_and_loading_as_computing(one: One, tokens: int) -> None:
    bare = replace(one, device=0, host=0, store=0)
    device, host, store = (expected(replace(bare, **{tier: tokens})) for tier in ("device", "host", "store"))
    assert device <= min(host, store)
    assert max(host, store) <= expected(bare) * (1 + 1e-9)


def test_the_sum_is_the_one_that_is_written_down() -> None:
    one = One(ahead=2.0, running=3, rate=1000, host_rate=4000, store_rate=2000, device=400, host=400, store=200)
    slow = 1 + 3 / 256
    assert rows_of(INFO) == 256
    assert expected(one, prompt=2000) == pytest.approx(2.0 + 1000 * slow / 1000 + 0.1 + 0.1)
    full = One(ahead=0.5, running=8, waiting=2, stay=4.0)
    assert expected(full, prompt=1000) == pytest.approx(3 * 4.0 / 8 + 1 + 8 / 256), "three have to leave first"
    assert expected(full, Class.URGENT, 1000) == pytest.approx(4.0 / 8 + 1 + 8 / 256), "one has to leave"


@settings(deadline=None)
@given(fleets, classes, st.data())
def test_the_choice_is_allowed_and_as_good_as_the_best(ones: list[One], rank: Class, data: st.DataObject) -> None:
    fleet, reuse = fleet_of(ones)
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=len(ones), max_size=len(ones)).filter(any)))
    said = outlook(fleet, NOW, PROMPT, rank, reuse)
    chosen = choose(fleet, said, allowed)
    assert allowed[chosen]
    cost = said.first_token + CROWDING * said.work
    assert cost[chosen] <= cost[allowed].min() * (1 + NEAR) * (1 + 1e-9)
    assert reason(chosen, allowed, reuse) in Reason


def test_of_equals_the_least_loaded_then_the_one_that_got_least() -> None:
    fleet, _ = fleet_of([One(running=2), One(running=1), One(running=1)])
    fleet.assigned[:] = [0.0, 5.0, 4.0]
    assert choose(fleet, outlook(fleet, NOW, PROMPT, Class.NORMAL), every(fleet)) == 2
    fleet.running[2] = 2
    assert choose(fleet, outlook(fleet, NOW, PROMPT, Class.NORMAL), every(fleet)) == 1


def test_equal_replicas_take_turns() -> None:
    fleet, _ = fleet_of([One()] * 5)
    got = []
    for _ in range(15):
        said = outlook(fleet, NOW, PROMPT, Class.NORMAL)
        slot = choose(fleet, said, every(fleet))
        fleet.assigned[slot] += said.work[slot]
        got.append(slot)
    assert got == [0, 1, 2, 3, 4] * 3


def test_a_prefix_is_left_when_its_replica_has_more_ahead_than_computing_takes() -> None:
    holder = One(device=2800, ahead=0.0)
    fleet, reuse = fleet_of([holder, One()])

    def chosen(ahead: float) -> int:
        fleet.ahead[:, 0] = NOW + ahead
        return choose(fleet, outlook(fleet, NOW, PROMPT, Class.NORMAL, reuse), every(fleet))

    assert [chosen(a) for a in (0, 1, 2.5)] == [0, 0, 0]
    assert chosen(6.0) == 1


def test_why_a_replica_was_chosen() -> None:
    fleet, reuse = fleet_of([One(device=10, host=30), One(store=20), One(device=5), One()])
    said = [reason(slot, every(fleet), reuse) for slot in range(4)]
    assert said == [Reason.HOST, Reason.SPREAD, Reason.SPREAD, Reason.SPREAD]
    assert reason(0, np.array([True, False, False, False]), reuse) is Reason.ONLY
    assert reason(1, np.array([False, True, False, True]), reuse) is Reason.STORE
    assert reason(1, np.array([False, True, True, False]), reuse) is Reason.SPREAD, "the store's is everybody's"
    assert reason(2, np.array([False, False, True, True]), reuse) is Reason.DEVICE
    assert reason(0, every(fleet), None) is Reason.LEAST_WORK
    nothing = Reuse(*np.zeros((3, 4), np.int64))
    assert reason(0, every(fleet), nothing) is Reason.LEAST_WORK


def test_classes_of_priority() -> None:
    assert [Class.of(p) for p in (-100, -1, 0, 1, 100)] == [0, 0, 1, 2, 2]
    assert SHARES[Class.LOW] < SHARES[Class.NORMAL] < SHARES[Class.URGENT] == 1


@settings(deadline=None)
@given(fleets, classes, st.integers(1, 40), st.integers(1, 6000), st.none() | st.integers(1, 100))
def test_whoever_is_admitted_has_room_and_a_refusal_says_when_to_come_back(
    ones: list[One], rank: Class, waiting: int, tokens: int, service: int | None
) -> None:
    fleet, _ = fleet_of(ones)
    limits, share = Limits(waiting, tokens, service), SHARES[rank]
    room = (fleet.queue < share * waiting) & (fleet.queued < share * tokens)
    crowded = service is not None and fleet.queue.sum() >= share * service
    if room.any() and not crowded:
        assert admit(fleet, every(fleet), every(fleet), limits, rank, NOW).tolist() == room.tolist()
        return
    with pytest.raises(Overloaded) as caught:
        admit(fleet, every(fleet), every(fleet), limits, rank, NOW)
    wait = min(max(one.ahead, fleet.queue[i] * one.stay / 8) for i, one in enumerate(ones))
    assert caught.value.retry_after_s == pytest.approx(min(max(wait / 2, 0.5), 30))


@settings(deadline=None)
@given(fleets, fleets)
def test_a_larger_fleet_says_the_same_of_those_that_were_there(ones: list[One], others: list[One]) -> None:
    fleet, _ = fleet_of(ones)
    said: Outlook = outlook(fleet, NOW, PROMPT, Class.NORMAL)
    larger = fleet.larger(len(ones) + len(others))
    assert outlook(larger, NOW, PROMPT, Class.NORMAL).first_token[: len(ones)].tolist() == said.first_token.tolist()
    assert (larger.ready_until[len(ones) :] == -np.inf).all()
