"""The threads that bring blocks to the device's cache: from host memory, and from Redis through it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from workers.cache.breaker import Breaker
from workers.cache.events import Tier
from workers.cache.host import HostTier
from workers.cache.known import Known
from workers.cache.landing import Item, Landing
from workers.cache.orders import Arrived, Found, StoreCounts
from workers.cache.rates import Rate
from workers.cache.remote import Asked, Remote
from workers.cache.values import Seal, value_name
from workers.cache.wire import MISSING, OK, StoreError
from workers.cache.worker import Box, Worker

BATCH_BYTES = 2 << 20  # of one command at most
BATCH_S = 0.02  # and as much as comes in this time, so that a slow store is noticed in time
HOST_BATCH = 8  # blocks that are imported at once

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Job:
    """Items of one load that come from one tier, in the order in which they are wanted."""

    number: int
    items: list[Item]


@dataclass(slots=True)
class _Batch:
    items: list[Item]
    asked: Asked
    begun: float
    states: list[int] = field(default_factory=list)


class HostCopier:
    """Imports what host memory has."""

    def __init__(
        self, landing: Landing, box: Box[Found | Arrived], counts: StoreCounts, rate: Rate, bytes: Sequence[int]
    ) -> None:
        self._landing, self._box, self._counts, self._rate, self._bytes = landing, box, counts, rate, bytes

    def __call__(self, job: Job) -> None:
        for at in range(0, len(job.items), HOST_BATCH):
            items = job.items[at : at + HOST_BATCH]
            begun = time.perf_counter()
            took = self._landing.land(job.number, items)
            seconds = time.perf_counter() - begun
            size = sum(size_of(i, self._bytes) for i, landed in zip(items, took, strict=True) if landed)
            self._counts.host_loaded_bytes += size
            self._counts.host_load_seconds += seconds
            self._rate.add(size, seconds)
            for item in items:
                self._landing.release(item)
            self._box.put_all(
                Arrived(job.number, item.fetch.index, landed, Tier.HOST)
                for item, landed in zip(items, took, strict=True)
            )
            self._landing.over(job.number, len(items))


class Fetcher:
    """Receives values from Redis into slots of the host tier; checks and imports them on another thread.

    The next command is sent before the reply to the last is read, so that Redis always has work.
    """

    def __init__(
        self,
        remote: Remote,
        host: HostTier,
        landing: Landing,
        box: Box[Found | Arrived],
        counts: StoreCounts,
        breaker: Breaker,
        rate: Rate,
        seal: Seal,
        known: Known,
        heads: range,
        bytes: Sequence[int],
    ) -> None:
        self._known = known
        self._remote, self._host, self._landing, self._box, self._counts = remote, host, landing, box, counts
        self._breaker, self._rate, self._seal, self._heads, self._bytes = breaker, rate, seal, heads, bytes
        self._room = threading.Semaphore(2)  # batches that wait to be imported
        self._lander: Worker[tuple[int, _Batch]] = Worker("store-land", self._land)
        self._received = 0.0  # when the last reply was read: the next was under way from then on

    def __call__(self, job: Job) -> None:
        left = list(reversed(job.items))  # its end is next
        pending: _Batch | None = None
        try:
            if not self._breaker.allows():
                return
            while left or pending is not None:
                batch = self._ask(job.number, left) if left else None
                if pending is not None:
                    ready, pending = pending, batch
                    self._receive(job.number, ready)
                else:
                    pending = batch
            self._breaker.succeeded()
        except StoreError as error:
            self._counts.store_failures += 1
            self._breaker.failed()
            log.warning("loading from the prefix store failed: %s", error)
        finally:
            self._give_up(job.number, [*(pending.items if pending is not None else ()), *left])

    def close(self, timeout_s: float) -> None:
        """Once nothing is handed to it any more."""
        self._lander.close(timeout_s)
        self._remote.close()

    def _ask(self, number: int, left: list[Item]) -> _Batch | None:
        """Asks for the next items, as many as make a batch; None where nothing of them is wanted any more."""
        items: list[Item] = []
        size, most = 0, min(BATCH_BYTES, int(self._rate.value * BATCH_S))
        while left and (not items or size < most):
            item = left.pop()
            if self._landing.wanted(number, item.fetch.index) and self._take_slots(item):
                items.append(item)
                size += size_of(item, self._bytes)
            else:
                self._give_up(number, [item])
        if not items:
            return None
        names, places = [], []
        for item in items:
            for group in self._fetched(item):
                slot = item.slots[group]
                assert slot is not None
                places += self._host.arena(group).values(slot)
                names += [value_name(item.fetch.key, group, head) for head in self._heads]
        try:
            return _Batch(items, self._remote.ask(names, places), time.perf_counter())
        except StoreError:
            self._give_up(number, items)
            raise

    def _take_slots(self, item: Item) -> bool:
        """A slot for each group whose values are to be had; False where host memory is all in use."""
        for group in item.missing:
            item.slots[group] = self._host.take(group)
            if item.slots[group] is None:
                return False
            item.fetched |= 1 << group
        return True

    def _fetched(self, item: Item) -> Iterator[int]:
        return (g for g in range(len(item.slots)) if item.fetched >> g & 1)

    def _receive(self, number: int, batch: _Batch) -> None:
        """Reads a reply, and hands it on to be checked and imported while the next is read."""
        try:
            batch.states = self._remote.receive(batch.asked)
        except Exception:
            self._give_up(number, batch.items)
            raise
        now = time.perf_counter()
        seconds, self._received = now - max(batch.begun, self._received), now
        size = sum(len(p) for p, s in zip(batch.asked.into, batch.states, strict=True) if s == OK)
        self._counts.store_loaded_bytes += size
        self._counts.store_load_seconds += seconds
        self._rate.add(size, seconds)
        self._room.acquire()
        self._lander.put((number, batch))

    def _land(self, arrived: tuple[int, _Batch]) -> None:
        """On the other thread: imports what verifies."""
        number, batch = arrived
        places = iter(zip(batch.asked.into, batch.states, strict=True))
        took: set[int] = set()
        try:
            good = [item for item in batch.items if self._verifies(item, places)]
            took = {id(i) for i, t in zip(good, self._landing.land(number, good), strict=True) if t}
        finally:
            self._room.release()
            for item in batch.items:
                self._landing.release(item)
            self._box.put_all(Arrived(number, i.fetch.index, id(i) in took, Tier.STORE) for i in batch.items)
            self._landing.over(number, len(batch.items))

    def _verifies(self, item: Item, places: Iterator[tuple[memoryview, int]]) -> bool:
        """Whether every head of every group is there and right; what is goes to the host tier too."""
        good = True
        for group in self._fetched(item):
            whole = True
            for head in self._heads:
                value, state = next(places)
                if state == MISSING:
                    self._counts.store_misses += 1
                    whole = False
                elif state != OK or not self._seal.verifies(value, item.fetch.key, group, head):
                    self._counts.store_bad_values += 1
                    self._known.suspect(item.fetch.key)
                    whole = False
            slot = item.slots[group]
            if whole and slot is not None:
                self._host.publish(item.fetch.key, group, slot)
            good = good and whole
        return good

    def _give_up(self, number: int, items: Sequence[Item]) -> None:
        for item in items:
            self._landing.release(item)
        if items:
            self._box.put_all(Arrived(number, item.fetch.index, False, Tier.STORE) for item in items)
            self._landing.over(number, len(items))


def size_of(item: Item, bytes: Sequence[int]) -> int:
    """Bytes of an item, all wanted groups."""
    return sum(size for size, block in zip(bytes, item.fetch.blocks, strict=True) if block >= 0)
