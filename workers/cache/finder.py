"""The thread that asks Redis which blocks it holds."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from workers.cache.breaker import Breaker
from workers.cache.known import Known
from workers.cache.orders import Arrived, Found, StoreCounts
from workers.cache.rates import Seconds
from workers.cache.remote import Remote
from workers.cache.values import value_name
from workers.cache.wire import StoreError
from workers.cache.worker import Box

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Search:
    """Keys to look up, each in some groups."""

    ticket: int
    wanted: Sequence[tuple[bytes, tuple[int, ...]]]


class Finder:
    """A block of a group is there when all `total_heads` values of it are: one head less is a miss of the block."""

    def __init__(
        self,
        remote: Remote,
        box: Box[Found | Arrived],
        counts: StoreCounts,
        breaker: Breaker,
        known: Known,
        latency: Seconds,
        total_heads: int,
    ) -> None:
        self._remote, self._box, self._counts, self._breaker = remote, box, counts, breaker
        self._known, self._latency, self._heads = known, latency, range(total_heads)

    def __call__(self, search: Search) -> None:
        blocks = [
            [value_name(key, group, head) for head in self._heads] for key, groups in search.wanted for group in groups
        ]
        found = [0] * len(blocks)
        try:
            if self._breaker.allows():
                begun = time.perf_counter()
                found = self._remote.touch(blocks)
                self._latency.add(time.perf_counter() - begun)
                self._breaker.succeeded()
        except StoreError as error:
            self._counts.store_failures += 1
            self._breaker.failed()
            self._known.forget()
            log.warning("looking into the prefix store failed: %s", error)
        counts = iter(found)
        present = []
        for key, groups in search.wanted:
            there = tuple(next(counts) == len(self._heads) for _ in groups)
            present.append(there)
            self._known.present(key) if all(there) else self._known.absent(key)
        self._box.put(Found(search.ticket, present))

    def close(self) -> None:
        self._remote.close()
