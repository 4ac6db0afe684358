"""One rank's tiers behind its device cache: host memory and Redis. Does what step plans say, on threads of its own.

| owns | does not own |
|---|---|
| copies of blocks between the rank's caches, host memory and Redis | which blocks, and when: the plan |
| its threads and connections, the circuit breakers | block ids: the leader's cache manager |

A rank holds the KV heads `heads` (absolute indices) of all `total_heads`. What happens on other threads is told by
`poll`. No failure of Redis is an error here: it is values that were not found.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import numpy as np

from workers.cache.breaker import Breaker
from workers.cache.events import Observer, Tier
from workers.cache.fetcher import Fetcher, HostCopier, Job
from workers.cache.finder import Finder, Search
from workers.cache.host import HostTier
from workers.cache.known import Known
from workers.cache.landing import Caches, Item, Landing
from workers.cache.orders import NEVER, Arrived, Found, Load, Save, StoreConfig, StoreCounts
from workers.cache.rates import FIND_S, HOST_BYTES_S, LATELY_S, STORE_BYTES_S, Rate, Seconds
from workers.cache.remote import Remote
from workers.cache.values import HEADER_BYTES, Seal
from workers.cache.worker import Box, Worker
from workers.cache.writer import Entry, Writer

STAGING_BYTES = 64 << 20  # of slots at least: what is on its way between Redis and the cache lies in them
CLOSE_S = 2.0
GATHERED = 1024  # arrivals that a rank tells at once
GATHER_S = 0.001  # the leader does not wait longer for its own: others may have told theirs

log = logging.getLogger(__name__)
_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.Decoder(list[Arrived]).decode


class Exchange(Protocol):
    """Of `workers.parallel.group.Group`."""

    rank: int

    def exchange(self, message: bytes) -> list[bytes]: ...


def main_group(windows: Sequence[int | None]) -> int:
    """The group whose blocks stand for all where others are told what is where: one that sees everything."""
    return next((g for g, window in enumerate(windows) if window is None), 0)


class BlockStore:
    """Keeps `workers.cache.orders.StorePort` at the leader; at the other ranks it is their part of it.

    `apply`, `gather` and everything else but its threads belong to the engine's thread. `main`: see `main_group`.
    """

    def __init__(
        self,
        caches: Sequence[Caches],
        config: StoreConfig,
        heads: range | None = None,
        total_heads: int | None = None,
        ranks: int = 1,
        main: int = 0,
        clock: Callable[[], float] = time.monotonic,
        remote: Callable[[], Remote] | None = None,
    ) -> None:
        self._caches = caches
        self._heads = range(caches[0].kv_heads) if heads is None else heads
        if any(c.kv_heads != len(self._heads) for c in caches):
            raise ValueError(f"caches of {[c.kv_heads for c in caches]} KV heads cannot hold the heads {self._heads}")
        self.block_bytes = tuple(len(self._heads) * (HEADER_BYTES + c.value_bytes) for c in caches)
        least = min(256, max(16, STAGING_BYTES // sum(self.block_bytes)))
        self.host = HostTier(
            [c.value_bytes for c in caches],
            len(self._heads),
            config.host_bytes or 0,
            keep=bool(config.host_bytes),
            least=least,
            told=main,
        )
        self._counts = StoreCounts()
        self._rates = {Tier.HOST: Rate(HOST_BYTES_S, 8e6), Tier.STORE: Rate(STORE_BYTES_S, 8e6, LATELY_S)}
        self._latency = Seconds(FIND_S)
        self._box: Box[Found | Arrived] = Box()
        self._known = Known()
        self._observer: Observer | None = None
        self._ranks = ranks
        self._mine: deque[Arrived] = deque()  # of several ranks: what this one has not told yet
        self._told: dict[tuple[int, int], list[Arrived]] = {}  # at the leader: what some ranks have told
        self._whole: list[Arrived] = []  # and all
        self._found: list[Found] = []
        self._closed = False
        self._landing = Landing(caches, self.host)
        copier = HostCopier(self._landing, self._box, self._counts, self._rates[Tier.HOST], self.block_bytes)
        self._copier: Worker[Job] = Worker("store-host", copier)
        self._reading, self._writing = Breaker(clock), Breaker(clock)
        self._finder: Finder | None = None
        url = config.url
        if url is None and remote is None:
            return

        def connect() -> Remote:
            return Remote(url or "", config.timeout_s) if remote is None else remote()

        total = total_heads or len(self._heads)
        seal = Seal(config.secret)
        finding, fetching = connect(), connect()
        self._finder = Finder(
            finding, self._box, self._counts, self._reading, self._known, self._latency, total
        )  # fmt: skip
        self._fetcher = Fetcher(
            fetching, self.host, self._landing, self._box, self._counts, self._reading, self._rates[Tier.STORE], seal,
            self._known, self._heads, self.block_bytes,
        )  # fmt: skip
        self._writer = Writer(
            connect(), self.host, self._counts, self._writing, self._known, seal, self._heads, self.block_bytes,
            max(4, least // 2),
        )  # fmt: skip
        self._find: Worker[Search] = Worker("store-find", self._finder, finding.warm)
        self._fetch: Worker[Job] = Worker("store-read", self._fetcher, fetching.warm)

    # What plans say.

    def apply(self, floors: Sequence[tuple[int, int]], saves: Sequence[Save], loads: Sequence[Load]) -> None:
        """What a step plan says, before the step computes anything. Never blocks on Redis."""
        for number, floor in floors:
            self._landing.raise_floor(number, floor)
        try:
            if saves:
                self._save(saves)
            for load in loads:
                self._load(load)
        except Exception:  # a fault of ours, but the step goes on: the store is a help that answers do not depend on
            log.exception("the prefix store cannot do what the step's plan says")

    def _save(self, saves: Sequence[Save]) -> None:
        """Copies blocks into host memory, and queues them for Redis."""
        entries = [Entry(save.key, [None] * len(self._caches)) for save in saves]
        for group, cache in enumerate(self._caches):
            fresh: list[tuple[int, int, bytes]] = []  # block, slot, key
            for save, entry in zip(saves, entries, strict=True):
                block = save.blocks[group]
                if block < 0:
                    continue
                slot = self.host.find(save.key, group)
                if slot is None and (slot := self.host.take(group)) is not None:
                    fresh.append((block, slot, save.key))
                entry.slots[group] = slot
            if fresh:
                arena = self.host.arena(group)
                blocks = np.array([block for block, _, _ in fresh], np.int64)
                cache.export_blocks(blocks, arena.memory, arena.offsets([slot for _, slot, _ in fresh]))
                for _, slot, key in fresh:
                    self.host.publish(key, group, slot)
        for entry in entries:
            if self._finder is not None and any(slot is not None for slot in entry.slots):
                self._writer.offer(entry)
                continue
            if self._finder is not None:
                self._writer.refused += 1
            for group, slot in enumerate(entry.slots):
                if slot is not None:
                    self.host.release(group, slot)

    def _load(self, load: Load) -> None:
        """Begins a load: what host memory has comes from there, the rest from Redis."""
        near, far = Job(load.number, []), Job(load.number, [])
        for fetch in load.fetches:
            item = Item(fetch, [self.host.find(fetch.key, g) if b >= 0 else None for g, b in enumerate(fetch.blocks)])
            (far if item.missing else near).items.append(item)
        self._landing.open(load.number, len(load.fetches))
        if near.items:
            self._copier.put(near)
        if far.items and self._finder is not None:
            self._fetch.put(far)
        elif far.items:  # what was in host memory a moment ago is gone
            for item in far.items:
                self._landing.release(item)
                self._box.put(Arrived(load.number, item.fetch.index, False, Tier.HOST))
            self._landing.over(load.number, len(far.items))

    # What the leader asks: see `StorePort`.

    @property
    def counts(self) -> StoreCounts:
        if self._finder is not None:
            self._counts.store_writes_dropped = self._writer.dropped
        return self._counts

    @property
    def reachable(self) -> bool:
        return self._finder is not None and self._reading.ready

    def has_host(self, key: bytes, group: int) -> bool:
        return self.host.has(key, group)

    def find(self, ticket: int, wanted: Sequence[tuple[bytes, tuple[int, ...]]]) -> None:
        if self._finder is None:
            self._box.put(Found(ticket, [tuple(False for _ in groups) for _, groups in wanted]))
        else:
            self._find.put(Search(ticket, wanted))

    def poll(self) -> list[Found | Arrived]:
        for tier, changes in ((Tier.HOST, self.host.changes()), (Tier.STORE, self._known.changes())):
            if self._observer is not None:
                for present, key in changes:
                    self._observer(tier, present, key)
        if self._ranks == 1:
            return self._box.take()
        self._sort()
        events: list[Found | Arrived] = [*self._found, *self._whole]
        self._found, self._whole = [], []
        return events

    def wait(self, timeout_s: float) -> None:
        self._box.wait(timeout_s if self._ranks == 1 else min(timeout_s, GATHER_S))

    @property
    def gathers(self) -> bool:
        return self._ranks > 1

    def gather(self, group: Exchange) -> None:
        """Tells the other ranks what has arrived here. At the leader, `poll` then has what has arrived everywhere."""
        self._sort()
        mine = [self._mine.popleft() for _ in range(min(len(self._mine), GATHERED))]
        messages = group.exchange(_encode(mine))
        if group.rank:
            return
        for message in messages:
            for event in _decode(message):
                told = self._told.setdefault((event.number, event.index), [])
                told.append(event)
                if len(told) == self._ranks:
                    del self._told[event.number, event.index]
                    ok, tier = all(e.ok for e in told), max(e.tier for e in told)
                    self._whole.append(Arrived(event.number, event.index, ok, tier))

    def _sort(self) -> None:
        """What this rank's threads have left: answers to the leader's questions, and what all ranks have to tell."""
        for event in self._box.take():
            if isinstance(event, Found):
                self._found.append(event)
            else:
                self._mine.append(event)

    def rate(self, tier: Tier) -> float:
        return self._rates[tier].value

    def latency_s(self) -> float:
        return self._latency.value

    def observe(self, observer: Observer) -> None:
        self._observer = observer

    @property
    def busy(self) -> bool:
        """Whether a load is under way or a write waits. For tests."""
        return self._landing.open_loads > 0 or (self._finder is not None and self._writer.waiting)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for number in self._landing.numbers():
            self._landing.raise_floor(number, NEVER)
        self._copier.close(CLOSE_S)
        if self._finder is not None:
            self._writer.close(CLOSE_S)
            for worker in (self._find, self._fetch):
                worker.close(CLOSE_S)
            self._finder.close()
            self._fetcher.close(CLOSE_S)
