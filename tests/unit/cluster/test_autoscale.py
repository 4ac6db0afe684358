"""How many replicas there should be: single signals, and whole days on paper."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscale import Autoscaler, Decision, Goal, ModelScaler, Why
from router.demand import ModelDemand

TICK_S = 0.5
PLACES = 8


@dataclass
class Fleet:
    """Replicas on paper. Each has `PLACES`, computes one second of prompts in a second, and is ready `cold_s` after it
    was ordered. `clients` are there at once, each with one sequence, and bring `work` seconds of prompts a second."""

    goal: Goal
    cold_s: float
    present: int
    now: float = 0.0
    ready: int = 0
    backlog_s: float = 0.0
    requests: int = 0
    load: float = 0.0
    ordered: list[float] = field(default_factory=list)
    changes: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ready = self.present
        self.scaler = ModelScaler(self.goal)

    def demand(self, clients: int, work: float) -> ModelDemand:
        if not self.ready:
            return ModelDemand(unserved=clients, requests=self.requests)
        running = min(clients, self.ready * PLACES)
        self.requests += clients
        self.load += (work - self.load) * TICK_S / 10
        self.backlog_s = max(0.0, self.backlog_s + (work - self.ready) * TICK_S)
        return ModelDemand(
            ready=self.ready,
            running=running,
            waiting=clients - running,
            places=PLACES,
            queued_s=self.backlog_s,
            first_token_s=self.backlog_s / self.ready,
            load=self.load,
            requests=self.requests,
        )

    def run(self, seconds: float, clients: int, work: float = 0.0) -> Decision:
        """The last decision after so long under this load."""
        decision = Decision(self.present, Why.STEADY)
        for _ in range(int(seconds / TICK_S)):
            self.now += TICK_S
            self.ready += sum(t <= self.now for t in self.ordered)
            self.ordered = [t for t in self.ordered if t > self.now]
            decision = self.scaler.decide(self.demand(clients, work), self.present, self.now)
            self.turn_to(decision.wanted)
        return decision

    def turn_to(self, wanted: int) -> None:
        assert self.goal.least <= wanted <= self.goal.most
        if wanted == self.present:
            return
        self.changes.append((self.now, wanted))
        self.ordered += [self.now + self.cold_s] * max(0, wanted - self.present)
        drop = max(0, self.present - wanted)
        self.ordered, drop = self.ordered[: max(0, len(self.ordered) - drop)], max(0, drop - len(self.ordered))
        self.ready -= drop
        self.present = wanted


def turns(changes: list[tuple[float, int]]) -> int:
    """How often the number changed its direction."""
    steps = [b - a for (_, a), (_, b) in pairwise(changes)]
    return sum(a * b < 0 for a, b in pairwise(steps))


goals = st.builds(
    lambda least, more, objective: Goal(least, max(least + more, 1), objective, idle_s=120.0, down_s=30.0),
    st.integers(0, 3), st.integers(0, 12), st.sampled_from([0.5, 2.0, 10.0]),
)  # fmt: skip
cold = st.sampled_from([1.0, 20.0, 90.0])


@settings(max_examples=40, deadline=None)
@given(goals, cold, st.lists(st.tuples(st.integers(0, 120), st.floats(0, 8), st.integers(1, 90)), max_size=8))
def test_the_number_never_leaves_its_bounds(goal: Goal, cold_s: float, phases: list[tuple[int, float, int]]) -> None:
    fleet = Fleet(goal, cold_s, max(goal.least, 1))
    for clients, work, seconds in phases:
        fleet.run(seconds, clients, work if clients else 0.0)  # `turn_to` asserts


@settings(max_examples=30, deadline=None)
@given(goals, cold, st.integers(1, 100), st.floats(0, 8))
def test_under_a_steady_load_it_comes_to_rest_with_enough(goal: Goal, cold_s: float, clients: int, work: float) -> None:
    fleet = Fleet(goal, cold_s, max(goal.least, 1))
    fleet.run(900, clients, work)
    fleet.changes.clear()
    fleet.run(1800, clients, work)
    assert turns(fleet.changes) <= 1, fleet.changes
    assert fleet.present == goal.most or (work <= fleet.present and clients <= fleet.present * PLACES)


@settings(max_examples=20, deadline=None)
@given(goals, cold, st.integers(1, 60))
def test_without_load_it_falls_to_its_least_and_with_load_it_leaves_zero(
    goal: Goal, cold_s: float, clients: int
) -> None:
    fleet = Fleet(goal, cold_s, goal.most)
    fleet.run(goal.idle_s + 10 * goal.down_s, 0)
    assert fleet.present == goal.least
    decision = fleet.run(TICK_S, clients)
    assert decision.wanted >= 1
    if goal.least == 0:
        assert decision.why is Why.UNSERVED
        fleet.run(cold_s + 1, clients)
        assert fleet.ready >= 1


def test_up_at_once_and_down_step_by_step() -> None:
    fleet = Fleet(Goal(1, 8, down_s=30.0), 5.0, 1)
    assert fleet.run(TICK_S, 48).wanted == 8  # 48 sequences, 8 places at each, four fifths of them used
    fleet.run(60, 48)
    up = len(fleet.changes)
    fleet.run(200, 1)
    down = fleet.changes[up:]
    assert [n for _, n in down] == [4, 2, 1]
    gaps = [b - a for (a, _), (b, _) in pairwise(down)]
    assert min(gaps) >= 30.0


def test_who_had_to_grow_again_waits_longer() -> None:
    fleet = Fleet(Goal(1, 8, down_s=30.0), 1.0, 1)

    def wave() -> float:
        fleet.run(120, 20)
        before, began = len(fleet.changes), fleet.now
        fleet.run(130, 1)
        return fleet.changes[before][0] - began

    first = wave()
    assert wave() > 1.5 * first


@pytest.mark.parametrize(
    ("demand", "why", "wanted"),
    [
        (ModelDemand(ready=2, running=14, places=8), Why.RUNNING, 3),
        (ModelDemand(ready=2, running=5, waiting=20, granted=10, places=8), Why.RUNNING, 6),
        (ModelDemand(ready=2, places=8, running=1, load=2.0), Why.PROMPTS, 3),
        (ModelDemand(ready=2, places=8, running=1, queued_s=7.0), Why.QUEUE, 4),
        (ModelDemand(ready=2, places=8, running=1, first_token_s=3.0), Why.FIRST_TOKEN, 3),
        (ModelDemand(ready=2, places=8, running=1, first_token_s=60.0), Why.FIRST_TOKEN, 4),
        (ModelDemand(ready=2, places=8, running=1, cache=0.95), Why.CACHE, 3),
        (ModelDemand(ready=2, places=8, running=1, refused=3.0), Why.REFUSED, 3),
        (ModelDemand(ready=2, places=8, running=1), Why.STEADY, 2),
    ],
)
def test_each_signal_asks_for_its_number_and_says_why(demand: ModelDemand, why: Why, wanted: int) -> None:
    scaler = ModelScaler(Goal(0, 9, first_token_s=2.0))
    decision = scaler.decide(demand, 2, 10.0)
    assert (decision.why, decision.wanted) == (why, wanted)
    assert bool(decision.said) == (why is not Why.STEADY)


def test_from_zero_to_one_and_to_more_where_it_is_known_what_a_replica_takes() -> None:
    scaler = ModelScaler(Goal(0, 9))
    assert scaler.decide(ModelDemand(unserved=20), 0, 0.0).wanted == 1
    scaler.decide(ModelDemand(ready=1, running=1, places=8), 1, 1.0)
    decision = scaler.decide(ModelDemand(unserved=20), 0, 9.0)
    assert (decision.wanted, decision.why) == (4, Why.UNSERVED)


def test_the_reason_of_the_last_change_stays_and_ages() -> None:
    scaler = ModelScaler(Goal(1, 3))
    assert scaler.decide(ModelDemand(ready=1, running=50, places=8), 1, 100.0).wanted == 3, "the configuration's most"
    later = scaler.decide(ModelDemand(ready=3, running=12, places=8), 3, 107.0)
    assert (later.wanted, later.why, later.age_s) == (3, Why.RUNNING, 7.0)


def test_silence_keeps_the_number() -> None:
    now = [0.0]
    scalers = Autoscaler(lambda: now[0])
    goal = Goal(0, 4, idle_s=10.0)
    for _ in range(100):
        now[0] += 1
        assert scalers.decide("m", goal, None, 3) == 3
    assert scalers.decisions["m"].why is Why.SILENCE
    there = {"m": ModelDemand(ready=3)}
    assert scalers.decide("m", goal, there, 3) == 3
    now[0] += 10
    assert scalers.decide("m", goal, there, 3) == 0
    assert scalers.decide("m", Goal(2, 4), None, 0) == 2, "a new configuration's bounds hold in any case"
    assert scalers.decisions["m"].why is Why.BOUNDS


def test_who_is_still_starting_is_not_idle() -> None:
    scaler = ModelScaler(Goal(0, 4, idle_s=10.0))
    for now in range(100):
        assert scaler.decide(ModelDemand(), 1, float(now)).wanted == 1
    assert scaler.decide(ModelDemand(ready=1), 1, 105.0).wanted == 1
    assert scaler.decide(ModelDemand(ready=1), 1, 110.0).wanted == 0


def test_a_request_between_two_looks_is_seen() -> None:
    scaler = ModelScaler(Goal(0, 4, idle_s=10.0))

    def decide(requests: int, at: float) -> int:
        return scaler.decide(ModelDemand(ready=1, requests=requests), 1, at).wanted

    assert [decide(5, 0.0), decide(6, 9.0), decide(6, 18.0), decide(6, 19.0)] == [1, 1, 1, 0]
    assert math.isclose(scaler.decide(ModelDemand(requests=6), 0, 21.0).age_s, 2.0)
