"""Replicas on paper: what a trace of requests would see of a thousand of them, under the real index and policy. Pure.

A simulated replica computes prompts one after another at `Machine.prefill_rate`, slowed down by those that decode; its
device, its host's memory and the shared store keep blocks, longest unused given up first, and loading takes the time
that their rates say. A replica's prompts are computed in the order of assignment, so everything about a request is
known when it is assigned: no queue of events is needed, and a request costs some microseconds.

What replicas tell, and when, is as in a cluster: a report every half a second, with the counts that an engine has and
the changes of its cache until then. Whoever decides knows nothing else.
"""

from __future__ import annotations

import heapq
import itertools
import random
from array import array
from bisect import bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from router.admission import Limits
from router.policy import Floats
from router.port import Query
from router.state import Router
from router.traces import Arrival
from workers.cache.events import Changes
from workers.engine import EngineInfo, EngineStats

BEAT_S = 0.5
MODEL = "simulated"


@dataclass(frozen=True)
class Machine:
    """One replica, and its share of the store. Rates in tokens per second, sizes in blocks; None: no bound. `rows` of
    prompts are in a step beside those of decoders, `token_s` is between tokens of an answer, `places` run at once."""

    prefill_rate: float = 10_000.0
    rows: int = 256
    token_s: float = 0.02
    places: int = 64
    block_tokens: int = 512
    device_blocks: int | None = 400
    host_blocks: int | None = 1600
    host_rate: float = 100_000.0
    store_rate: float = 40_000.0
    store_blocks: int | None = 4000


@dataclass
class Outcome:
    """What a run was like. Seconds and tokens, by request or by replica."""

    first_token: Floats  # [requests]
    busy: Floats  # [replicas]
    requests: Floats  # [replicas]
    tokens: int
    hits: dict[str, int]
    decisions: dict[str, int] = field(default_factory=dict)

    @property
    def hit_rate(self) -> float:
        return sum(self.hits.values()) / self.tokens

    @property
    def imbalance(self) -> float:
        """The busiest replica's seconds over the mean."""
        return float(self.busy.max() / self.busy.mean())


class Kept:
    """Blocks of one tier, longest unused first."""

    def __init__(self, blocks: int | None) -> None:
        self._blocks = blocks
        self.keys: OrderedDict[int, float] = OrderedDict()  # and since when

    def put(self, key: int, since: float) -> int | None:
        """Keeps a block, or uses it again; the one that was given up for it."""
        if key in self.keys:
            self.keys.move_to_end(key)
            return None
        self.keys[key] = since
        if self._blocks is not None and len(self.keys) > self._blocks:
            return self.keys.popitem(last=False)[0]
        return None


class SimulatedReplica:
    """One replica's queue and caches. `take` requests in the order of time."""

    def __init__(self, machine: Machine, store: Kept, tells: bool = True) -> None:
        self._machine = machine
        self._tells = tells
        self._device, self._host, self._store = Kept(machine.device_blocks), Kept(machine.host_blocks), store
        self._ends: list[float] = []  # of answers, in order
        self._prompts: deque[tuple[float, float, int, int]] = deque()  # start, finish, tokens, of them computed
        self.free_at = 0.0
        self._news: deque[tuple[float, int, int]] = deque()  # moment, code, key
        self._told = 0
        self._stats = EngineStats()
        self.busy = 0.0
        self.requests = 0

    def take(self, request: Arrival, hits: dict[str, int]) -> float:
        """The moment of the request's first token."""
        machine, now = self._machine, request.at
        start = max(now, self.free_at)
        del self._ends[: bisect_right(self._ends, now - BEAT_S)]
        if len(self._ends) >= machine.places:
            start = max(start, self._ends[-machine.places])
        decoding = len(self._ends) - bisect_right(self._ends, start)
        pace = (1 + decoding / machine.rows) / machine.prefill_rate
        device, host, store = self._reuse(request, start)
        loading = host * min(1 / machine.host_rate, pace) + store * min(1 / machine.store_rate, pace)
        computed = max(request.prompt_tokens - device - host - store, 1)
        finish = start + loading + computed * pace
        for name, tokens in (("device", device), ("host", host), ("store", store)):
            hits[name] += tokens
        self._stats.host_hit_tokens += host
        self._stats.host_load_seconds += host / machine.host_rate
        self._stats.store_hit_tokens += store
        self._stats.store_load_seconds += store / machine.store_rate
        self._keep(request.keys, finish)
        self._prompts.append((start, finish, request.prompt_tokens, computed))
        insort(self._ends, finish + request.answer_tokens * machine.token_s)
        self.free_at = finish
        self.busy += finish - start
        self.requests += 1
        return finish

    def has(self, key: int) -> bool:
        """Whether it need not go to the store for a block."""
        return key in self._device.keys or key in self._host.keys

    def report(self, now: float) -> tuple[EngineStats, Changes | None]:
        """What it would say now."""
        stats, machine = self._stats, self._machine
        while self._prompts and self._prompts[0][1] <= now:
            start, finish, _, computed = self._prompts.popleft()
            stats.prefill_rows += computed
            stats.prefill_seconds += computed / machine.prefill_rate
        stats.running = len(self._ends) - bisect_right(self._ends, now) - len(self._prompts)
        left = waiting = 0
        for start, finish, tokens, computed in self._prompts:
            if start <= now:
                left += round(computed * (finish - now) / (finish - start))
                stats.running += 1
            else:
                left += tokens
                waiting += 1
        stats.waiting = waiting
        stats.waiting_prefill_tokens = stats.waiting_prefill_normal = left
        return msgspec.structs.replace(stats), self._changes(now)

    def _reuse(self, request: Arrival, start: float) -> tuple[int, int, int]:
        """Tokens of the prompt's beginning on each tier."""
        size = self._machine.block_tokens
        device, host, store = self._device.keys, self._host.keys, self._store.keys
        counts = [0, 0, 0]
        for key in request.keys:
            if key in device:
                counts[0] += 1
            elif key in host:
                counts[1] += 1
            elif store.get(key, np.inf) <= start:
                counts[2] += 1
            else:
                break
        over = max(sum(counts) * size - request.prompt_tokens, 0)  # of a last block that is partly full
        tokens = [count * size for count in counts]
        last = max(i for i in range(3) if counts[i] or i == 0)
        tokens[last] = max(tokens[last] - over, 0)
        return tokens[0], tokens[1], tokens[2]

    def _keep(self, keys: Sequence[int], moment: float) -> None:
        """The prompt's blocks are on the device from now on; leaves are given up first."""
        device, host, store, news = self._device, self._host, self._store, self._news
        for key in reversed(keys):
            if self._tells and key not in device.keys:
                news.append((moment, 1, key))
                if key not in store.keys and self._machine.store_blocks != 0:
                    news.append((moment, 5, key))
            given_up = device.put(key, moment)
            store.put(key, moment)
            if given_up is not None:
                known = given_up in host.keys
                forgotten = host.put(given_up, moment)
                if self._tells:
                    news.append((moment, 0, given_up))
                    if not known:
                        news.append((moment, 3, given_up))
                    if forgotten is not None:
                        news.append((moment, 2, forgotten))

    def _changes(self, now: float) -> Changes | None:
        codes, keys = bytearray(), array("Q")
        while self._news and self._news[0][0] <= now:
            _, code, key = self._news.popleft()
            codes.append(code)
            keys.append(key)
        if not codes:
            return None
        changes = Changes(self._told, self._told == 0, bytes(codes), keys.tobytes())
        self._told += len(codes)
        return changes


# Who chooses. All but the last know, without delay, when each replica will be free and what it has.

Pick = Callable[[Arrival], int]
Fleet = Sequence["SimulatedReplica"]


def _random(fleet: Fleet, rng: random.Random) -> Pick:
    return lambda _request: rng.randrange(len(fleet))


def _in_turn(fleet: Fleet, _rng: random.Random) -> Pick:
    turns = itertools.count()
    return lambda _request: next(turns) % len(fleet)


def _of_two(fleet: Fleet, rng: random.Random) -> Pick:
    """The one of two drawn at random that will be free sooner."""

    def pick(_request: Arrival) -> int:
        one, other = rng.randrange(len(fleet)), rng.randrange(len(fleet))
        return one if fleet[one].free_at <= fleet[other].free_at else other

    return pick


def _by_prefix(fleet: Fleet, rng: random.Random) -> Pick:
    """Whoever got most of the prompt last, and has it still, where that is more than half of it; else the one of two
    that will be free sooner. (Without the half, one replica gets everything where all prompts begin alike.)"""
    last: dict[int, int] = {}
    otherwise = _of_two(fleet, rng)

    def pick(request: Arrival) -> int:
        keys, slot = request.keys, -1
        for i in range(len(keys) - 1, len(keys) // 2 - 1, -1):
            slot = last.get(keys[i], -1)
            if slot >= 0 and fleet[slot].has(keys[i]):
                break
            slot = -1
        if slot < 0:
            slot = otherwise(request)
        for key in keys:
            last[key] = slot
        return slot

    return pick


BASELINES: dict[str, Callable[[Fleet, random.Random], Pick]] = {
    "random": _random,
    "round robin": _in_turn,
    "least of two": _of_two,
    "prefix affinity": _by_prefix,
}
ROUTER = "expected time"
STRATEGIES = (*BASELINES, ROUTER)


def simulate(trace: Sequence[Arrival], replicas: int, strategy: str, machine: Machine, seed: int = 0) -> Outcome:
    """The whole trace, in its order of time; `strategy` is one of `STRATEGIES`."""
    store = Kept(None if machine.store_blocks is None else machine.store_blocks * replicas)
    fleet = [SimulatedReplica(machine, store, strategy == ROUTER) for _ in range(replicas)]
    hits = {"device": 0, "host": 0, "store": 0}
    first_token = np.empty(len(trace))
    decisions: dict[str, int] = {}
    if strategy != ROUTER:
        pick = BASELINES[strategy](fleet, random.Random(seed))
        for i, request in enumerate(trace):
            first_token[i] = fleet[pick(request)].take(request, hits) - request.at
    else:
        stage = _Stage(fleet, machine)
        for i, request in enumerate(trace):
            finish = fleet[stage.assign(request)].take(request, hits)
            stage.follow(finish + request.answer_tokens * machine.token_s)
            first_token[i] = finish - request.at
        decisions = stage.router.figures().decisions
    tokens = sum(request.prompt_tokens for request in trace)
    busy = np.array([replica.busy for replica in fleet])
    requests = np.array([replica.requests for replica in fleet], np.float64)
    return Outcome(first_token, busy, requests, tokens, hits, decisions)


class _Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time


class _Stage:
    """A router among simulated replicas: it gets their reports in time, and hears of ends."""

    def __init__(self, fleet: Fleet, machine: Machine) -> None:
        self._clock = _Clock()
        self._fleet = fleet
        many = 1 << 60
        self.router = Router(self._clock, limits=Limits(many, many))
        info = EngineInfo(MODEL, "", "", "", "", many, 1, machine.block_tokens, 1, 1, machine.places, 2 * machine.rows)
        self._names = [str(i) for i in range(len(fleet))]
        self._slots = {name: i for i, name in enumerate(self._names)}
        for name in self._names:
            self.router.register(name, "", 1, info)
        self._beats = 0
        self._ends: list[tuple[float, int]] = []
        self._lease = 0

    def assign(self, request: Arrival) -> int:
        self._advance(request.at)
        assignment = self.router.assign(Query(MODEL, request.prompt_tokens, keys=request.keys.tobytes()))
        self._lease = assignment.lease
        return self._slots[assignment.replica]

    def follow(self, end: float) -> None:
        """When the answer of the latest assignment will have ended."""
        heapq.heappush(self._ends, (end, self._lease))

    def _advance(self, now: float) -> None:
        each = BEAT_S / len(self._fleet)
        while (moment := self._beats * each) <= now:
            self._release(moment)
            self._clock.time = moment
            slot = self._beats % len(self._fleet)
            self.router.beat(self._names[slot], 1, *self._fleet[slot].report(moment))
            self._beats += 1
        self._release(now)
        self._clock.time = now

    def _release(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            moment, lease = heapq.heappop(self._ends)
            self._clock.time = moment
            self.router.release([lease])
