"""Which replica takes a request: pure functions of what is known. A simulation of a thousand replicas runs them too.

The expected time to a request's first token at a replica, in seconds, is

    max(what is ahead, until a place among the running is free)
    + (prompt - device - host - store) * slow / rate
    + host / host's rate + store / store's rate

`device`, `host` and `store` are the tokens of the prompt that the replica need not compute (`router.index`); loading
never costs more than computing would. `rate` is how many rows a second its steps have when they compute prompts. Each
running sequence takes one row of every step, beside at most `rows` of prompts: `slow` is 1 + running / rows. What is
ahead is the same sum over the prompts that wait there and were given to it since it last reported, less what it must
have done since then.

What counts besides the time is how much of it is the prompt's own: a replica that computes a prefix which another one
has makes everybody wait who comes after. So these seconds weigh `1 + CROWDING`, and a prefix that is in demand spreads
once waiting for it costs more than that. (Replayed traces: 1 did better than 0 and 0.3 where replicas were busy.)

Priority: a request is urgent (above 0), normal (0) or low (below). Engines take prompts by priority, so only what is of
its own class or above is ahead of it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum

import numpy as np
from numpy.typing import NDArray

from workers.engine import EngineInfo, EngineStats

PREFILL_RATE = 2000.0  # rows per second, where nobody has measured any
HOST_SPEED = 10.0  # what loading is taken to be, in multiples of computing, until it was measured
STORE_SPEED = 2.0
CROWDING = 1.0
NEAR = 0.05  # times that differ by no more than this share are equal: the least loaded of them is chosen

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Class(IntEnum):
    """A request's class of priority; also a row of `Fleet.ahead`."""

    LOW = 0
    NORMAL = 1
    URGENT = 2

    @classmethod
    def of(cls, priority: int) -> Class:
        return cls((priority >= 0) + (priority > 0))


class Reason(StrEnum):
    """Why a replica was chosen: a prefix that it has, or the least to wait for; SPREAD where another one has more of
    the prefix itself, and would take longer; ONLY where there was no choice."""

    DEVICE = "device"
    HOST = "host"
    STORE = "store"
    LEAST_WORK = "least_work"
    SPREAD = "spread"
    ONLY = "only"


class Fleet:
    """What is known of replicas: arrays with an entry for each slot, R of them. Moments are seconds of one clock.

    `ready_until` is the moment from which it counts as lost, -inf where it takes nothing. `ahead[c]` is the moment at
    which it will have computed all prompts of class c and above. `running`, `waiting` and `queued` (prompt tokens) are
    as reported, `granted` and `granted_tokens` are given to it and not yet in those. `assigned` is work in seconds that
    it ever got, and `stay` how long a sequence stays, in seconds. `places` run at once, `rows` of prompts in a step,
    `block_tokens`: what the replica is. Rates in tokens per second.
    """

    def __init__(self, slots: int = 4) -> None:
        self.ready_until = np.full(slots, -np.inf)
        self.ahead = np.zeros((len(Class), slots))
        self.running, self.waiting, self.granted = np.zeros((3, slots), np.int64)
        self.queued, self.granted_tokens = np.zeros((2, slots), np.int64)
        self.places, self.rows, self.block_tokens = np.ones((3, slots), np.int64)
        self.rate, self.host_rate, self.store_rate = np.ones((3, slots))
        self.assigned, self.stay = np.zeros((2, slots))

    def __len__(self) -> int:
        return len(self.ready_until)

    def larger(self, slots: int) -> Fleet:
        """The same with more slots."""
        result = Fleet(slots)
        for name, old in vars(self).items():
            getattr(result, name)[..., : len(self)] = old
        return result

    def clear(self, slot: int) -> None:
        """Nobody has this slot."""
        for name, fresh in vars(Fleet(1)).items():
            getattr(self, name)[..., slot] = fresh[..., 0]

    def enter(self, slot: int, info: EngineInfo) -> None:
        """A replica begins with this slot."""
        self.clear(slot)
        self.places[slot], self.rows[slot] = max(info.max_running, 1), rows_of(info)
        self.block_tokens[slot] = info.block_tokens
        self.put_rates(slot, PREFILL_RATE)

    def put_rates(self, slot: int, rate: float, host: float = 0.0, store: float = 0.0) -> None:
        """Tokens per second; 0: not known."""
        self.rate[slot] = rate
        self.host_rate[slot] = host or rate * HOST_SPEED
        self.store_rate[slot] = store or rate * STORE_SPEED

    def hear(self, slot: int, stats: EngineStats) -> None:
        """What a replica reports, but for `ahead`."""
        self.running[slot], self.waiting[slot] = stats.running, stats.waiting
        self.queued[slot] = stats.waiting_prefill_tokens

    @property
    def sequences(self) -> Ints:
        """Sequences that are there, or will be once what was granted has arrived. [R]"""
        return self.running + self.waiting + self.granted

    @property
    def queue(self) -> Ints:
        """Sequences that wait for others to end, or will. [R]"""
        return np.maximum(self.sequences - np.maximum(self.places, self.running), 0)

    @property
    def pace(self) -> Floats:
        """Seconds for each prompt token. [R]"""
        return (1 + (self.running + self.granted) / self.rows) / self.rate

    def pace_of(self, slot: int) -> float:
        """One of `pace`."""
        return float((1 + (self.running[slot] + self.granted[slot]) / self.rows[slot]) / self.rate[slot])


def rows_of(info: EngineInfo) -> int:
    """Rows of prompts in a step beside decoding ones: see `workers.engine.scheduler`."""
    return max((info.chunk_tokens + 1) // 2, 1)


@dataclass(frozen=True)
class Reuse:
    """Tokens of a prompt that each replica need not compute, by where they are. [R]"""

    device: Ints
    host: Ints
    store: Ints

    @property
    def total(self) -> Ints:
        return self.device + self.host + self.store


@dataclass(frozen=True)
class Outlook:
    """What a request has to expect at each replica, in seconds: until it is its turn, and for its own prompt. [R]"""

    wait: Floats
    work: Floats

    @property
    def first_token(self) -> Floats:
        return self.wait + self.work


def outlook(fleet: Fleet, now: float, prompt_tokens: int, rank: Class, reuse: Reuse | None = None) -> Outlook:
    """See the top of this file."""
    wait = np.maximum(fleet.ahead[rank] - now, 0)
    over = fleet.sequences - fleet.places + 1
    if over.max() > 0:  # somewhere a place has to become free
        over = np.clip(over, 0, 1) if rank is Class.URGENT else np.maximum(over, 0)
        wait = np.maximum(wait, over * fleet.stay / fleet.places)
    pace = fleet.pace
    if reuse is None:
        return Outlook(wait, prompt_tokens * pace)
    work = np.maximum(prompt_tokens - reuse.total, 1) * pace
    work += reuse.host * np.minimum(1 / fleet.host_rate, pace) + reuse.store * np.minimum(1 / fleet.store_rate, pace)
    return Outlook(wait, work)


def choose(fleet: Fleet, expected: Outlook, allowed: Mask) -> int:
    """The slot with the least expected time, and of about equal ones that with the fewest sequences, then that which
    got the least so far, then the first. At least one is `allowed`."""
    cost = np.where(allowed, expected.first_token + CROWDING * expected.work, np.inf)
    least = cost.min()
    near = np.flatnonzero(cost <= (1 + NEAR) * least)
    if len(near) > 1:
        sequences = fleet.sequences[near]
        near = near[sequences == sequences.min()]
    return int(near[fleet.assigned[near].argmin()])


def reason(chosen: int, allowed: Mask, reuse: Reuse | None) -> Reason:
    """Why `choose` chose this one."""
    if np.count_nonzero(allowed) == 1:
        return Reason.ONLY
    if reuse is None:
        return Reason.LEAST_WORK
    total = reuse.total
    most = int(total[allowed].max())
    if most == 0:
        return Reason.LEAST_WORK
    own = reuse.device + reuse.host  # the store's is everybody's
    if own[chosen] < own[allowed].max():
        return Reason.SPREAD
    tiers = (reuse.device[chosen], reuse.host[chosen], reuse.store[chosen])
    return (Reason.DEVICE, Reason.HOST, Reason.STORE)[int(np.argmax(tiers))]


def choose_of_two(
    stats: Sequence[EngineStats], infos: Sequence[EngineInfo], prompt_tokens: int, rng: random.Random
) -> int:
    """The better of two drawn at random, by what is reported alone: what keeps several choosers with stale counts from
    all going one way."""
    drawn = list(range(len(stats))) if len(stats) <= 2 else rng.sample(range(len(stats)), 2)
    rng.shuffle(drawn)
    fleet = Fleet(len(drawn))
    for slot, i in enumerate(drawn):
        fleet.enter(slot, infos[i])
        fleet.hear(slot, stats[i])
        fleet.ahead[:, slot] = stats[i].waiting_prefill_tokens * fleet.pace[slot]
    allowed = np.ones(len(drawn), np.bool_)
    return drawn[choose(fleet, outlook(fleet, 0.0, prompt_tokens, Class.LOW), allowed)]
