"""How many replicas a model should have: from what is asked of it to a number and the reason for it. Pure; the clock is
an argument.

| signal (`router.demand`) | replicas that it asks for |
|---|---|
| sequences that run or wait | as many as have places for them, `PLACES` of each used |
| prompts of the last seconds | as many as they keep busy, each `BUSY` of its time |
| seconds of prompts that wait | as many as compute them within the objective for the first token |
| what a new request would wait | more in proportion, where that is beyond the objective: at most twice as many |
| blocks of the cache in use | as many as hold them with `CACHE` of theirs |
| requests that found no room | half as many again |
| requests that found no replica | as many as have places for them; one, where nobody knows how many those are |

The largest counts. Up: at once. Down: to the most that was asked for during `down_s`, by thresholds that are lower by
`MARGIN`, so that what remains does not ask for more again; and at most by half each time. Where a model has to grow
soon after it shrank all the same, it waits twice as long the next time. To zero, where that is allowed: after `idle_s`
with a replica and without any request.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from router.demand import LEAST, ModelDemand

PLACES, BUSY, CACHE = 0.8, 0.7, 0.85
MARGIN = 0.75
MOST_PATIENCE = 8  # times `down_s`


class Why(StrEnum):
    """What a number of replicas follows from."""

    STEADY = "steady"  # nothing asks for another number
    UNSERVED = "unserved"  # requests found no replica
    RUNNING = "running"  # sequences that run or wait
    PROMPTS = "prompts"  # work of prompts
    QUEUE = "queue"  # prompts that wait
    FIRST_TOKEN = "first_token"  # what a new request would wait
    CACHE = "cache"
    REFUSED = "refused"  # requests found no room
    LESS = "less"  # fewer do
    IDLE = "idle"  # nobody asks
    BOUNDS = "bounds"  # the configuration's
    SILENCE = "silence"  # the router does not answer: the present number is kept


@dataclass(frozen=True)
class Goal:
    """What is wanted of one model: replicas within `least` and `most`, a first token within `first_token_s` seconds.
    Seconds: `down_s` for which fewer must have been enough, `idle_s` without requests until there is none."""

    least: int
    most: int
    first_token_s: float = 2.0
    idle_s: float = 300.0
    down_s: float = 60.0


class Decision(msgspec.Struct, frozen=True):
    """So many replicas, why, and in words that a person reads. `age_s`: since the number last changed."""

    wanted: int
    why: str
    said: str = ""
    age_s: float = 0.0


class ModelScaler:
    """Decides for one model. Ask it often; `now` is a moment of one clock."""

    def __init__(self, goal: Goal) -> None:
        self.goal = goal
        self._asked: deque[tuple[float, int]] = deque()  # moments, and how many were enough then
        self._patience = goal.down_s
        self._began = self._active = self._changed = math.nan  # when: is known since; last asked; last changed
        self._shrank = self._grew = -math.inf
        self._requests = 0
        self._places = 0  # not known until a replica was there
        self._last = Decision(0, Why.STEADY)

    def decide(self, demand: ModelDemand | None, present: int, now: float) -> Decision:
        """How many there should be, where `present` should be there now. `demand` None: nobody knows. The reason is
        that of the last change."""
        found = self._decide(demand, present, now)
        wanted = min(max(found.wanted, self.goal.least), self.goal.most)
        if wanted != present:
            self._last = found if found.wanted != present else Decision(wanted, Why.BOUNDS)
            self._changed = now
        shown = found if found.why is Why.SILENCE and wanted == present else self._last
        return msgspec.structs.replace(shown, wanted=wanted, age_s=now - self._changed)

    def _decide(self, demand: ModelDemand | None, present: int, now: float) -> Decision:
        if math.isnan(self._changed):
            self._changed = now
        if demand is None or math.isnan(self._began):
            self._began = self._active = now
        if demand is None:
            return Decision(present, Why.SILENCE)
        self._places = demand.places or self._places
        starts = present > 0 and not demand.ready  # the first one: nobody could be answered yet
        if demand.any or starts or demand.requests != self._requests:
            self._active, self._requests = now, demand.requests
        up, why, said = needed(demand, self.goal, self._places)
        self._remember(now, min(enough(demand, self.goal, self._places), present))
        if up > present:
            return self._grow(up, why, said, now)
        idle = now - self._active
        if present and not self.goal.least and idle >= self.goal.idle_s:
            return Decision(0, Why.IDLE, f"no request for {idle:.0f} s")
        return self._shrink(present, now)

    def _remember(self, now: float, number: int) -> None:
        """Keeps, of the numbers of the last while, only those that no later one exceeds: the first is the largest."""
        while self._asked and self._asked[-1][1] <= number:
            self._asked.pop()
        self._asked.append((now, number))
        while self._asked[0][0] < now - self._patience:
            self._asked.popleft()

    def _grow(self, to: int, why: Why, said: str, now: float) -> Decision:
        if self._grew < self._shrank and now - self._shrank < 4 * self._patience:  # it was too few after all
            self._patience = min(2 * self._patience, MOST_PATIENCE * self.goal.down_s)
        self._grew = now
        return Decision(to, why, said)

    def _shrink(self, present: int, now: float) -> Decision:
        least = max(self.goal.least, 1)
        to = max(self._asked[0][1], present - max(present // 2, 1), least)
        since = max(self._began, self._grew, self._shrank)
        if to >= present or now - since < self._patience:
            return Decision(present, Why.STEADY)
        if now - self._grew > 4 * MOST_PATIENCE * self.goal.down_s:
            self._patience = self.goal.down_s
        self._shrank = now
        return Decision(to, Why.LESS, f"{to} would have been enough for {self._patience:.0f} s")


def needed(demand: ModelDemand, goal: Goal, places: int) -> tuple[int, Why, str]:
    """How many replicas the demand asks for, and the signal that asks for most."""
    asked = [(goal.least, Why.STEADY, ""), *_by_size(demand, goal, places, 1.0)]
    ready = demand.ready
    if not ready and demand.unserved:
        said = f"{demand.unserved} requests wait for a replica"
        asked.append((math.ceil(demand.unserved / (PLACES * places)) if places else 1, Why.UNSERVED, said))
    if ready and demand.first_token_s > goal.first_token_s:
        factor = min(demand.first_token_s / goal.first_token_s, 2.0)
        said = f"a first token would take {demand.first_token_s:.1f} s, of {goal.first_token_s:g}"
        asked.append((math.ceil(ready * factor), Why.FIRST_TOKEN, said))
    if ready and demand.refused >= LEAST:
        asked.append((ready + (ready + 1) // 2, Why.REFUSED, f"{demand.refused:.1f} requests a second find no room"))
    return max(asked, key=lambda a: a[0])


def enough(demand: ModelDemand, goal: Goal, places: int) -> int:
    """How many would do, with something in hand."""
    if demand.refused >= LEAST or demand.first_token_s > MARGIN * goal.first_token_s:
        return max(demand.ready, 1)
    return max([1, *(number for number, _, _ in _by_size(demand, goal, places, MARGIN))])


def _by_size(demand: ModelDemand, goal: Goal, places: int, share: float) -> list[tuple[int, Why, str]]:
    """What does not depend on how many there are, with thresholds times `share`."""
    held = demand.ready * demand.cache
    return [
        (
            math.ceil(demand.sequences / (PLACES * share * max(places, 1))),
            Why.RUNNING,
            f"{demand.sequences} sequences, {places} places at each",
        ),
        (math.ceil(_kept(demand.load) / (BUSY * share)), Why.PROMPTS, f"prompts keep {demand.load:.2f} replicas busy"),
        (
            math.ceil(demand.queued_s / (goal.first_token_s * share)),
            Why.QUEUE,
            f"prompts of {demand.queued_s:.1f} s wait, a first token may take {goal.first_token_s:g} s",
        ),
        (math.ceil(held / (CACHE * share)), Why.CACHE, f"{demand.cache:.0%} of the cache is in use"),
    ]


def _kept(load: float) -> float:
    """An average that falls for ever is nothing at some time."""
    return load if load >= 0.01 else 0.0


class Autoscaler:
    """Decides for every model that has goals."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._scalers: dict[str, ModelScaler] = {}
        self.decisions: dict[str, Decision] = {}

    def decide(self, model: str, goal: Goal, demands: Mapping[str, ModelDemand] | None, present: int) -> int:
        """How many replicas of `model` there should be. `demands` None: the router does not answer."""
        scaler = self._scalers.get(model)
        if scaler is None or scaler.goal != goal:
            scaler = self._scalers[model] = ModelScaler(goal)
        demand = None if demands is None else demands.get(model, ModelDemand())
        decision = self.decisions[model] = scaler.decide(demand, present, self._clock())
        return decision.wanted
