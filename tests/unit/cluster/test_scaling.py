"""The autoscaling inside Serve's controller, without Serve."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import SimpleNamespace

import pytest

import cluster.scaling
from cluster.autoscale import Decision, Goal, Why
from cluster.policy import ReplicaPolicy
from cluster.scaling import Scaler
from router.demand import ModelDemand


class Router:
    """Answers when it is let, and keeps what it was told."""

    def __init__(self) -> None:
        self.demand: dict[str, ModelDemand] = {}
        self.told: list[Mapping[str, Decision]] = []
        self.fails = False
        self.asked = threading.Event()

    def ask(self, decisions: Mapping[str, Decision]) -> Mapping[str, ModelDemand]:
        self.told.append(decisions)
        self.asked.set()
        if self.fails:
            raise ConnectionError("it is gone")
        return self.demand


GOAL = Goal(0, 4)


def test_decides_by_the_latest_answer_and_tells_what_it_decided() -> None:
    router, now = Router(), [0.0]
    scaler = Scaler(router.ask, clock=lambda: now[0], every_s=1000.0)
    router.asked.clear()
    assert scaler.decide("m", GOAL, 2) == 2, "nothing is known yet"
    assert router.asked.wait(30), "a thread asks by itself"
    router.demand["m"] = ModelDemand(unserved=3)
    scaler.look()
    assert scaler.decide("m", GOAL, 0) == 1
    scaler.look()
    assert router.told[-1]["m"].why is Why.UNSERVED


def test_without_an_answer_the_number_stays(caplog: pytest.LogCaptureFixture) -> None:
    router, now = Router(), [0.0]
    scaler = Scaler(router.ask, clock=lambda: now[0], every_s=1000.0)
    router.demand["m"] = ModelDemand(unserved=3)
    scaler.look()
    router.fails = True
    for _ in range(3):
        scaler.look()
    assert [r.message for r in caplog.records].count(
        "the router does not tell the demand: ConnectionError: it is gone"
    ) == 1
    assert scaler.decide("m", GOAL, 0) == 1, "a moment ago it was known"
    now[0] += 6.0
    assert scaler.decide("m", GOAL, 3) == 3
    router.fails = False
    router.demand = {}
    scaler.look()
    assert scaler.decide("m", GOAL, 3) == 3
    assert scaler.decide("other", Goal(1, 9), 5) == 5


def test_the_thread_ends_where_nobody_asks_any_more() -> None:
    router, now = Router(), [0.0]
    scaler = Scaler(router.ask, clock=lambda: now[0], every_s=0.001)
    scaler.decide("m", GOAL, 1)
    thread = scaler._thread
    assert thread is not None
    now[0] += 31.0
    thread.join(30)
    assert not thread.is_alive()
    scaler.decide("m", GOAL, 1)
    assert scaler._thread is not thread
    now[0] += 31.0


def test_serves_policy_asks_the_services_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Recorder:
        def decide(self, model: str, goal: Goal, present: int) -> int:
            asked.append((model, goal, present))
            return 7

    monkeypatch.setattr(cluster.scaling, "scaler_of", lambda namespace: {"there": Recorder()}[namespace])
    policy = ReplicaPolicy("m", "there", {"least": 0, "most": 9, "first_token_s": 1.0})
    assert policy(SimpleNamespace(target_num_replicas=3)) == (7, {})
    assert asked == [("m", Goal(0, 9, 1.0), 3)]
