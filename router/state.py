"""The router's knowledge and its one decision, as a plain class: no Ray, no network, the clock is an argument."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import msgspec

from router.admission import Limits, admit
from router.policy import Candidate, choose
from understudy.errors import ModelNotFound, Unavailable
from workers.engine import EngineInfo, EngineStats

LEASE_S = 60.0  # a grant whose replica reports nothing is forgotten after this


class Query(msgspec.Struct, frozen=True):
    """What an assignment depends on.

    `exclude` are lives (replica, epoch) that just failed this request. Where `fingerprint` and `numerics_id` are set,
    only replicas with both will do (a stream that goes on). `keys` are the prompt's block keys, for choosing by cached
    prefix. `sequences` go there together, and share the prompt.
    """

    model: str
    prompt_tokens: int
    exclude: tuple[tuple[str, int], ...] = ()
    fingerprint: str = ""
    numerics_id: str = ""
    keys: tuple[bytes, ...] = ()
    sequences: int = 1


class Assignment(msgspec.Struct, frozen=True):
    """Which replica takes the request. Its messages count only while its epoch is `epoch`."""

    replica: str
    address: str
    epoch: int
    lease: int


class State(StrEnum):
    """Life of a replica, in the words of the Admin API."""

    READY = "READY"
    DRAINING = "DRAINING"
    LOST = "LOST"


class ReplicaView(msgspec.Struct, frozen=True):
    """A replica as the router sees it."""

    replica: str
    address: str
    epoch: int
    state: State
    info: EngineInfo
    stats: EngineStats
    silent_s: float
    node: str = ""


class RouterPort(Protocol):
    """What a gateway asks a router. Errors are those of `Router`; ConnectionError when it cannot be reached."""

    async def assign(self, query: Query) -> Assignment: ...

    async def release(self, leases: Sequence[int]) -> None:
        """The streams of these assignments have ended. Unknown ones are ignored."""

    async def replicas(self) -> list[ReplicaView]:
        """Everything that is registered, lost ones included."""


class TimeSource(Protocol):
    def now(self) -> float: ...


@dataclass
class _Lease:
    replica: str
    tokens: int
    sequences: int
    granted_at: float


@dataclass
class _Entry:
    address: str
    epoch: int
    info: EngineInfo
    node: str
    last_heard: float
    draining: bool = False
    stats: EngineStats = field(default_factory=EngineStats)
    prefill_rate: float = 0.0
    rate_since: float = 0.0


class Router:
    """Knows every replica and grants requests to them.

    A replica registers, then beats; after `heartbeat_timeout` seconds of silence it counts as lost until it beats
    again. A grant counts against its replica at once, and until the replica's own counts must include it: the first
    report later than `settle_s` after it. So several gateways do not all pick the one idle replica, and a gateway that
    dies leaves nothing behind.
    """

    def __init__(
        self,
        clock: TimeSource,
        *,
        heartbeat_timeout: float = 2.0,
        settle_s: float = 0.25,
        limits: Limits | None = None,
    ) -> None:
        self._clock = clock
        self._timeout = heartbeat_timeout
        self._settle_s = settle_s
        self._limits = limits if limits is not None else Limits()
        self._replicas: dict[str, _Entry] = {}
        self._leases: dict[int, _Lease] = {}
        self._numbers = itertools.count(1)

    # What replicas say.

    def register(self, replica: str, address: str, epoch: int, info: EngineInfo, node: str = "") -> bool:
        """A replica is ready. False, and nothing changes, where a newer epoch of it is known."""
        known = self._replicas.get(replica)
        if known is not None and known.epoch > epoch:
            return False
        if known is None or known.epoch < epoch:
            self._drop_leases(replica)
        now = self._clock.now()
        self._replicas[replica] = _Entry(address, epoch, info, node, now, rate_since=now)
        return True

    def beat(self, replica: str, epoch: int, stats: EngineStats) -> bool:
        """A replica lives; its counts. False where it is not registered with that epoch: it must register again."""
        entry = self._replicas.get(replica)
        if entry is None or entry.epoch != epoch:
            return False
        now = self._clock.now()
        self._measure(entry, stats, now)
        entry.stats, entry.last_heard = stats, now
        settled = [
            n
            for n, lease in self._leases.items()
            if lease.replica == replica and lease.granted_at + self._settle_s <= now
        ]
        for number in settled:
            del self._leases[number]
        return True

    def drain(self, replica: str, epoch: int) -> None:
        """A replica takes nothing new."""
        entry = self._replicas.get(replica)
        if entry is not None and entry.epoch == epoch:
            entry.draining = True

    def unregister(self, replica: str, epoch: int) -> None:
        """A replica is gone on purpose. Ignored where a newer epoch of it is known."""
        entry = self._replicas.get(replica)
        if entry is not None and entry.epoch <= epoch:
            del self._replicas[replica]
            self._drop_leases(replica)

    # What gateways ask.

    def assign(self, query: Query) -> Assignment:
        """The replica that should give the first token soonest.

        Raises ModelNotFound, Unavailable when none that fits is ready, Overloaded when all queues are full.
        """
        self._expire()
        granted = self._granted()
        candidates = [self._candidate(name, granted.get(name, (0, 0))) for name in self._fitting(query)]
        rate = max((self._replicas[c.replica].prefill_rate for c in candidates), default=0.0)
        chosen = choose(admit(candidates, self._limits, rate), query.prompt_tokens)
        entry, number = self._replicas[chosen.replica], next(self._numbers)
        self._leases[number] = _Lease(chosen.replica, query.prompt_tokens, query.sequences, self._clock.now())
        return Assignment(chosen.replica, entry.address, entry.epoch, number)

    def release(self, leases: Sequence[int]) -> None:
        """The streams of these assignments have ended. Unknown ones are ignored."""
        for number in leases:
            self._leases.pop(number, None)

    def snapshot(self) -> list[ReplicaView]:
        """Every replica, in the order of registration."""
        now = self._clock.now()
        return [
            ReplicaView(name, e.address, e.epoch, self._state(e), e.info, e.stats, now - e.last_heard, e.node)
            for name, e in self._replicas.items()
        ]

    @property
    def leases(self) -> int:
        """Grants that still count."""
        return len(self._leases)

    # How.

    def _state(self, entry: _Entry) -> State:
        if self._clock.now() - entry.last_heard > self._timeout:
            return State.LOST
        return State.DRAINING if entry.draining else State.READY

    def _fitting(self, query: Query) -> list[str]:
        of_model = {n: e for n, e in self._replicas.items() if e.info.model == query.model}
        if not of_model:
            raise ModelNotFound(f"no replica serves a model named {query.model!r}")
        ready = {
            n: e for n, e in of_model.items() if self._state(e) is State.READY and (n, e.epoch) not in query.exclude
        }
        if not ready:
            raise Unavailable(f"no replica of {query.model!r} is ready; try again shortly")
        same = [
            n
            for n, e in ready.items()
            if (not query.fingerprint or e.info.model_fingerprint == query.fingerprint)
            and (not query.numerics_id or e.info.numerics_id == query.numerics_id)
        ]
        if not same:
            raise Unavailable(
                f"no ready replica of {query.model!r} has the same weights and arithmetic as this stream's first; "
                "try again shortly"
            )
        return same

    def _granted(self) -> dict[str, tuple[int, int]]:
        """Grants that still count, by replica: how many sequences, and their prompt tokens."""
        counts: dict[str, tuple[int, int]] = {}
        for lease in self._leases.values():
            number, tokens = counts.get(lease.replica, (0, 0))
            counts[lease.replica] = number + lease.sequences, tokens + lease.tokens
        return counts

    def _candidate(self, name: str, granted: tuple[int, int]) -> Candidate:
        stats, slots = self._replicas[name].stats, self._replicas[name].info.max_running
        return Candidate(name, stats.running, stats.waiting, stats.waiting_prefill_tokens, *granted, slots=slots)

    def _expire(self) -> None:
        """Forgets grants whose replica never reported again. They are kept in the order of granting."""
        before = self._clock.now() - LEASE_S
        while self._leases:
            number, lease = next(iter(self._leases.items()))
            if lease.granted_at >= before:
                return
            del self._leases[number]

    def _drop_leases(self, replica: str) -> None:
        self._leases = {n: lease for n, lease in self._leases.items() if lease.replica != replica}

    @staticmethod
    def _measure(entry: _Entry, stats: EngineStats, now: float) -> None:
        """Prompt tokens per second between reports, smoothed; an idle replica measures nothing."""
        made = stats.computed_prompt_tokens - entry.stats.computed_prompt_tokens
        seconds = now - entry.rate_since
        if made > 0 and seconds > 0:
            rate = made / seconds
            entry.prefill_rate = rate if entry.prefill_rate == 0 else 0.7 * entry.prefill_rate + 0.3 * rate
        entry.rate_since = now
