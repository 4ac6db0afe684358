"""What the router measures of demand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.admission import Limits
from router.demand import LATELY_S, UNSERVED_S, DemandMeter, ModelDemand
from router.policy import Fleet
from router.port import Query
from router.state import Router
from understudy.errors import ModelNotFound, Overloaded, Unavailable
from workers.engine import EngineStats
from workers.engine.fake import FakeEngine


class Clock:
    """Seconds that stand until they are moved."""

    def __init__(self) -> None:
        self.at = 1000.0

    def now(self) -> float:
        return self.at


INFO = FakeEngine(model="m", max_running=4, blocks=100).info


def made(clock: Clock, replicas: int = 1, **limits: int) -> Router:
    router = Router(clock, limits=Limits(**limits))
    for i in range(replicas):
        router.register(f"m-{i}", "h:1", 1, INFO)
    return router


def test_requests_that_find_nobody_count_once_each_and_for_a_while() -> None:
    clock = Clock()
    router = made(clock, 0)
    for _ in range(10):
        for request in ("a", "b"):
            with pytest.raises(ModelNotFound):
                router.assign(Query("m", 5, request=request))
    assert router.demand() == {"m": ModelDemand(unserved=2)}
    router.register("m-0", "h:1", 1, INFO)
    router.assign(Query("m", 5, request="a"))
    assert router.demand()["m"].unserved == 1
    clock.at += UNSERVED_S + 0.1
    assert router.demand()["m"].unserved == 0


def test_replicas_that_drain_serve_nobody() -> None:
    router = made(Clock())
    router.drain("m-0", 1)
    with pytest.raises(Unavailable):
        router.assign(Query("m", 5, request="a"))
    demand = router.demand()["m"]
    assert (demand.ready, demand.unserved, demand.any) == (0, 1, True)


def test_what_replicas_report_and_were_given() -> None:
    clock = Clock()
    router = made(clock, 2)
    router.assign(Query("m", 4000, sequences=3))
    stats = EngineStats(running=4, waiting=2, waiting_prefill_tokens=2000, blocks_in_use=50)
    clock.at += 0.2  # too soon to contain what was just given
    router.beat("m-0", 1, stats)
    demand = router.demand()["m"]
    assert (demand.ready, demand.running, demand.waiting, demand.granted, demand.places) == (2, 4, 2, 3, 4)
    assert demand.sequences == 9
    assert demand.cache == 0.25
    assert demand.requests == 1
    assert demand.queued_s > 1.0, "2000 tokens, and 4000 that were given"
    assert demand.first_token_s == 0.0, "the other replica is idle"
    router.unregister("m-1", 1)
    assert router.demand()["m"].first_token_s > 1.0


def test_refusals_are_a_rate() -> None:
    router = made(Clock(), max_waiting=1)
    router.beat("m-0", 1, EngineStats(running=4, waiting=3))
    for _ in range(50):
        with pytest.raises(Overloaded):
            router.assign(Query("m", 5))
    assert router.demand()["m"].refused == pytest.approx(50 / LATELY_S)


@given(st.floats(0.05, 3.0), st.floats(0.01, 0.5))
def test_load_is_the_share_of_time_that_prompts_take(busy: float, every: float) -> None:
    meter, now = DemandMeter(), 0.0
    while now < 8 * LATELY_S:
        now += every
        meter.granted("m", "", busy * every, now)
    load = meter.demand(Fleet(), [], now)["m"].load
    assert load == pytest.approx(busy, rel=0.05)


def test_who_waits_is_forgotten_though_nobody_asks_for_the_demand() -> None:
    meter = DemandMeter()
    for i in range(5000):
        meter.unserved("m", str(i), float(i))
    assert len(meter._asked["m"].unserved) <= UNSERVED_S + 1
