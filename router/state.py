"""The router's knowledge and its one decision, as a plain class: no Ray, no network, the clock is an argument."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import numpy as np

from router.admission import Limits, admit
from router.demand import DemandMeter, ModelDemand
from router.index import PrefixIndex
from router.ledger import Lease, Ledger
from router.policy import PREFILL_RATE, Class, Fleet, Mask, Reason, Reuse, choose, outlook, reason
from router.port import Assignment, Query, ReplicaView, RouterFigures, State
from router.rates import Rates
from router.suspects import Probation
from understudy.errors import ModelNotFound, Overloaded, Unavailable
from workers.cache.events import Changes
from workers.engine import EngineInfo, EngineStats

LEASE_S = 60.0  # a grant whose replica reports nothing is forgotten after this
MAX_STREAMS = 1 << 18  # streams whose end is waited for; beyond, the oldest are not


class TimeSource(Protocol):
    def now(self) -> float: ...


@dataclass(slots=True)
class _Entry:
    """A replica."""

    slot: int
    address: str
    epoch: int
    info: EngineInfo
    node: str
    last_heard: float
    draining: bool = False
    trouble: str = ""
    stats: EngineStats = field(default_factory=EngineStats)
    rates: Rates = field(default_factory=Rates)
    ledger: Ledger = field(default_factory=Ledger)


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
        index: PrefixIndex | None = None,
    ) -> None:
        self._clock = clock
        self._timeout = heartbeat_timeout
        self._settle_s = settle_s
        self._limits = limits if limits is not None else Limits()
        self._index = index if index is not None else PrefixIndex()
        self._fleet = Fleet()
        self._replicas: dict[str, _Entry] = {}
        self._names: dict[int, str] = {}  # by slot
        self._leases: dict[int, Lease] = {}
        self._streams: dict[int, tuple[int, float]] = {}  # lease -> slot and moment of granting, until released
        self._numbers = itertools.count(1)
        self._probation: Probation[int] = Probation()
        self._same: dict[tuple[str, str, str], Mask] = {}
        self._usual: dict[str, Rates] = {}  # of a model, for replicas that have measured nothing yet
        self._decisions: Counter[str] = Counter(dict.fromkeys(Reason, 0))
        self._reused: Counter[str] = Counter(device=0, host=0, store=0)
        self._refused = 0
        self._asked = DemandMeter()

    # What replicas say.

    def register(self, replica: str, address: str, epoch: int, info: EngineInfo, node: str = "") -> bool:
        """A replica is ready. False, and nothing changes, where a newer epoch of it is known."""
        known = self._replicas.get(replica)
        if known is not None and known.epoch > epoch:
            return False
        now = self._clock.now()
        if known is not None and known.epoch == epoch:  # said twice
            known.address, known.info, known.node, known.draining, known.trouble = address, info, node, False, ""
            self._hear(known, now)
        else:
            if known is not None:
                self._remove(replica, known)
            slot = self._free_slot()
            self._names[slot] = replica
            entry = self._replicas[replica] = _Entry(slot, address, epoch, info, node, now)
            self._fleet.enter(slot, info)
            self._index.add(slot)
            self._put_rates(entry)
            self._hear(entry, now)
        self._same.clear()
        return True

    def beat(
        self, replica: str, epoch: int, stats: EngineStats, changes: Changes | None = None, trouble: str = ""
    ) -> bool:
        """A replica lives; its counts, what has changed in its cache, and what keeps it from making tokens. False where
        it is not registered with that epoch: it must register again."""
        entry = self._replicas.get(replica)
        if entry is None or entry.epoch != epoch:
            return False
        now = self._clock.now()
        if entry.rates.measure(entry.stats, stats):
            self._usual[entry.info.model].measure(entry.stats, stats)
        self._put_rates(entry)
        entry.stats, entry.trouble = stats, trouble
        self._hear(entry, now)
        self._fleet.hear(entry.slot, stats)
        self._settle(entry, now)
        if changes is not None:
            self._index.take(entry.slot, changes)
        return True

    def stall(self, replica: str, epoch: int, trouble: str) -> None:
        """A replica makes no tokens at present, say those who watch it; until it beats again."""
        entry = self._replicas.get(replica)
        if entry is not None and entry.epoch == epoch:
            entry.trouble = trouble
            self._hear(entry, self._clock.now())

    def wanted(self, replica: str, epoch: int) -> int:
        """Which of the cache's changes is to come next; 0, all of them, where nothing is known."""
        entry = self._replicas.get(replica)
        return 0 if entry is None or entry.epoch != epoch else self._index.wanted(entry.slot)

    def drain(self, replica: str, epoch: int) -> None:
        """A replica takes nothing new."""
        entry = self._replicas.get(replica)
        if entry is not None and entry.epoch == epoch:
            entry.draining = True
            self._hear(entry, entry.last_heard)

    def unregister(self, replica: str, epoch: int) -> None:
        """A replica is gone on purpose. Ignored where a newer epoch of it is known."""
        entry = self._replicas.get(replica)
        if entry is not None and entry.epoch <= epoch:
            self._remove(replica, entry)

    # What gateways ask.

    def assign(self, query: Query) -> Assignment:
        """The replica that should give the first token soonest.

        Raises ModelNotFound, Unavailable when none that fits is ready, Overloaded when all queues are full.
        """
        now, rank, fleet = self._clock.now(), Class.of(query.priority), self._fleet
        self._expire(now)
        ready = fleet.ready_until >= now
        try:
            allowed = admit(fleet, self._fitting(query, ready), ready, self._limits, rank, now)
        except Overloaded:
            self._refused += 1
            self._asked.refused(query.model, now)
            raise
        except (ModelNotFound, Unavailable):
            self._asked.unserved(query.model, query.request, now)
            raise
        if query.together:
            allowed &= self._probation.room(len(fleet), query.together)
            if not allowed.any():
                raise Unavailable("others under which a replica was lost are being tried first; try again shortly")
        match = self._index.match(query.keys, len(fleet)) if query.keys else None
        size = fleet.block_tokens
        reuse = None if match is None else Reuse(match.device * size, match.host * size, match.store * size)
        expected = outlook(fleet, now, query.prompt_tokens, rank, reuse)
        slot = choose(fleet, expected, allowed)
        why = reason(slot, allowed, reuse)
        self._decisions[why] += 1
        if reuse is not None:
            for tier in ("device", "host", "store"):
                self._reused[tier] += int(getattr(reuse, tier)[slot])
        granted = self._grant(slot, query, rank, float(expected.work[slot]), now)
        return msgspec.structs.replace(granted, reason=why.value)

    def release(self, leases: Sequence[int]) -> None:
        """The streams of these assignments have ended. Unknown ones are ignored."""
        now = self._clock.now()
        for number in leases:
            self._forget(number)
            self._probation.leave(number)
            self._index.ended(number, now)
            slot, since = self._streams.pop(number, (-1, 0.0))
            if slot >= 0:
                stay = self._fleet.stay
                stay[slot] = now - since if stay[slot] == 0 else 0.9 * stay[slot] + 0.1 * (now - since)

    def clear(self, leases: Sequence[int]) -> None:
        """These were suspects and have got on. Unknown ones are ignored."""
        for number in leases:
            self._probation.leave(number)

    def snapshot(self) -> list[ReplicaView]:
        """Every replica, in the order of registration."""
        now = self._clock.now()
        return [
            ReplicaView(
                name, e.address, e.epoch, self._state(e), e.info, e.stats, now - e.last_heard, e.node, self._cause(e)
            )
            for name, e in self._replicas.items()
        ]

    def alone(self, replica: str, epoch: int) -> bool:
        """Whether no other replica could go on with the streams of this one: none with its weights and arithmetic is
        ready. False where it is not known itself."""
        entry = self._replicas.get(replica)
        if entry is None or entry.epoch != epoch:
            return False
        info = entry.info
        same = self._mask(info.model, info.model_fingerprint, info.numerics_id)
        return not any(
            same[e.slot] and self._state(e) is State.READY for name, e in self._replicas.items() if name != replica
        )

    def figures(self) -> RouterFigures:
        """What it has done so far."""
        return RouterFigures(
            dict(self._decisions), self._refused, dict(self._reused), len(self._leases), self._index.stats(),
            len(self._probation),
        )  # fmt: skip

    def demand(self) -> dict[str, ModelDemand]:
        """What is asked of each model that has a replica, or was asked for."""
        now = self._clock.now()
        self._expire(now)
        entries = [e for e in self._replicas.values() if self._state(e) is State.READY]
        return self._asked.demand(self._fleet, [(e.slot, e.info, e.stats) for e in entries], now)

    @property
    def leases(self) -> int:
        """Grants that still count."""
        return len(self._leases)

    # How.

    def _state(self, entry: _Entry) -> State:
        if self._clock.now() - entry.last_heard > self._timeout:
            return State.LOST
        if entry.trouble:
            return State.STALLED
        return State.DRAINING if entry.draining else State.READY

    def _cause(self, entry: _Entry) -> str:
        silent = self._clock.now() - entry.last_heard
        return f"silent for {silent:.1f} s" if silent > self._timeout else entry.trouble

    def _hear(self, entry: _Entry, now: float) -> None:
        entry.last_heard = now
        takes_none = entry.draining or entry.trouble
        self._fleet.ready_until[entry.slot] = -np.inf if takes_none else now + self._timeout

    def _free_slot(self) -> int:
        slot = next(i for i in itertools.count() if i not in self._names)
        if slot >= len(self._fleet):
            self._fleet = self._fleet.larger(2 * len(self._fleet))
        return slot

    def _remove(self, replica: str, entry: _Entry) -> None:
        for number in list(entry.ledger.open):
            self._forget(number)
        self._streams = {n: s for n, s in self._streams.items() if s[0] != entry.slot}
        del self._replicas[replica], self._names[entry.slot]
        self._fleet.clear(entry.slot)
        self._index.forget(entry.slot)
        self._probation.forget(entry.slot)
        self._same.clear()

    def _fitting(self, query: Query, ready: Mask) -> Mask:
        """Who could take the request. Raises ModelNotFound or Unavailable."""
        of_model = self._mask(query.model)
        if not of_model.any():
            raise ModelNotFound(f"no replica serves a model named {query.model!r}")
        able = ready & of_model
        for name, epoch in query.exclude:
            entry = self._replicas.get(name)
            if entry is not None and entry.epoch == epoch:
                able[entry.slot] = False
        if not able.any():
            raise Unavailable(f"no replica of {query.model!r} is ready; try again shortly")
        if query.fingerprint or query.numerics_id:
            able &= self._mask(query.model, query.fingerprint, query.numerics_id)
            if not able.any():
                raise Unavailable(
                    f"no ready replica of {query.model!r} has the same weights and arithmetic as this stream's first; "
                    "try again shortly"
                )
        return able

    def _mask(self, model: str, fingerprint: str = "", numerics_id: str = "") -> Mask:
        """Slots of replicas of this kind."""
        wanted = (model, fingerprint, numerics_id)
        known = self._same.get(wanted)
        if known is None:
            known = self._same[wanted] = np.zeros(len(self._fleet), np.bool_)
            for e in self._replicas.values():
                its = (e.info.model, e.info.model_fingerprint, e.info.numerics_id)
                known[e.slot] = all(w in ("", i) for w, i in zip(wanted, its, strict=True))
        return known

    def _grant(self, slot: int, query: Query, rank: Class, work: float, now: float) -> Assignment:
        name, number = self._names[slot], next(self._numbers)
        entry, fleet = self._replicas[name], self._fleet
        self._asked.granted(query.model, query.request, work, now)
        saved = max(query.prompt_tokens * fleet.pace_of(slot) - work, 0.0)
        lease = Lease(slot, query.prompt_tokens, work, saved, rank, query.sequences, now)
        self._leases[number] = entry.ledger.open[number] = lease
        self._streams[number] = (slot, now)
        if len(self._streams) > MAX_STREAMS:
            del self._streams[next(iter(self._streams))]
        fleet.granted[slot] += query.sequences
        fleet.granted_tokens[slot] += query.prompt_tokens
        fleet.assigned[slot] += work
        ahead = fleet.ahead[: rank + 1, slot]
        ahead[:] = np.maximum(ahead, now) + work
        if query.together:
            self._probation.enter(number, slot, query.together, now)
        if query.keys:
            self._index.expect(number, slot, query.keys, now)
        return Assignment(name, entry.address, entry.epoch, number)

    def _forget(self, number: int) -> None:
        """A grant does not count any more."""
        lease = self._leases.pop(number, None)
        if lease is not None:
            del self._replicas[self._names[lease.slot]].ledger.open[number]
            self._fleet.granted[lease.slot] -= lease.sequences
            self._fleet.granted_tokens[lease.slot] -= lease.tokens

    def _settle(self, entry: _Entry, now: float) -> None:
        """The replica has reported: which grants it must have counted, and when it will have computed what it has."""
        fleet, slot, stats, ledger = self._fleet, entry.slot, entry.stats, entry.ledger
        for number in ledger.due(now - self._settle_s):
            ledger.settle(self._leases[number])
            self._forget(number)
        ledger.keep(stats.waiting)
        if not (stats.waiting_prefill_tokens or ledger.open):
            fleet.ahead[:, slot] = now
            return
        waiting = (stats.waiting_prefill_tokens, stats.waiting_prefill_normal, stats.waiting_prefill_urgent)
        pace = fleet.pace_of(slot)
        for rank in Class:
            fleet.ahead[rank, slot] = now + ledger.ahead(rank, waiting[rank], pace)

    def _put_rates(self, entry: _Entry) -> None:
        """What the replica has measured; as long as it has not measured much, what others of its model have."""
        own, usual = entry.rates, self._usual.setdefault(entry.info.model, Rates())
        self._fleet.put_rates(
            entry.slot,
            own.prefill.among(usual.prefill.value) or PREFILL_RATE,
            own.host.value or usual.host.value,
            own.store.value or usual.store.value,
        )

    def _expire(self, now: float) -> None:
        """Forgets grants whose replica never reported again. They are kept in the order of granting."""
        self._index.expire(now)
        self._probation.expire(now)
        while self._leases:
            number, lease = next(iter(self._leases.items()))
            if lease.granted_at >= now - LEASE_S:
                return
            self._forget(number)
