"""The thread that writes blocks to Redis, in batches, and drops them where it falls behind."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from workers.cache.breaker import Breaker
from workers.cache.host import HostTier
from workers.cache.known import Known
from workers.cache.orders import StoreCounts
from workers.cache.remote import Remote
from workers.cache.values import Seal, value_name
from workers.cache.wire import StoreError
from workers.cache.worker import Worker

BATCH_BYTES = 4 << 20

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Entry:
    """A block to write: its slots of the host tier, one per group or None, pinned."""

    key: bytes
    slots: list[int | None]


class Writer:
    """Takes entries, at most `most` that wait. `counts` are changed on two threads, but each field on one."""

    def __init__(
        self,
        remote: Remote,
        host: HostTier,
        counts: StoreCounts,
        breaker: Breaker,
        known: Known,
        seal: Seal,
        heads: range,
        bytes: Sequence[int],
        most: int,
    ) -> None:
        self._remote, self._host, self._counts, self._breaker = remote, host, counts, breaker
        self._known, self._seal, self._heads, self._most = known, seal, heads, most
        self._batch = max(1, BATCH_BYTES // sum(bytes))
        self.refused = 0  # entries that found the queue full; of the engine's thread
        self._dropped = 0
        self._worker: Worker[Entry] = Worker("store-write", self._write, remote.warm)

    @property
    def dropped(self) -> int:
        """Blocks that were not written, for whatever reason."""
        return self.refused + self._dropped

    @property
    def waiting(self) -> bool:
        """Whether entries wait or are being written. For tests."""
        return not self._worker.idle

    def offer(self, entry: Entry) -> bool:
        """Queues an entry; False, and its slots are released, where too many wait."""
        if len(self._worker) < self._most:
            self._worker.put(entry)
            return True
        self.refused += 1
        self._release([entry])
        return False

    def close(self, timeout_s: float) -> None:
        """Writes what waits, and drops what is left of it after `timeout_s`."""
        if not self._worker.close(timeout_s):
            left = self._worker.clear()
            self._dropped += len(left)
            self._release(left)
            self._worker.close(timeout_s)
        self._remote.close()

    def _write(self, first: Entry) -> None:
        entries = [first, *self._worker.take(self._batch - 1)]
        try:
            if self._breaker.allows():
                self._dropped += self._put([e for e in entries if e.key not in self._known])
            else:
                self._dropped += len(entries)
        except StoreError as error:
            self._dropped += len(entries)
            self._counts.store_failures += 1
            self._breaker.failed()
            self._known.forget()
            log.warning("writing to the prefix store failed: %s", error)
        finally:
            self._release(entries)

    def _put(self, entries: list[Entry]) -> int:
        """Writes what is not there already; how many blocks were refused."""
        pieces = [(e, g, slot) for e in entries for g, slot in enumerate(e.slots) if slot is not None]
        if not pieces:
            return 0
        names = [[value_name(e.key, g, head) for head in self._heads] for e, g, _ in pieces]
        there = self._remote.touch(names)
        values: list[tuple[bytes, memoryview]] = []
        owners: list[bytes] = []
        for (entry, group, slot), mine, count in zip(pieces, names, there, strict=True):
            if count == len(mine) and not self._known.suspects(entry.key):
                continue
            for name, head, value in zip(mine, self._heads, self._host.arena(group).values(slot), strict=True):
                self._seal.write(value, entry.key, group, head)
                values.append((name, value))
                owners.append(entry.key)
        said = self._remote.put(values) if values else []
        refused = {key for key, why in zip(owners, said, strict=True) if why}
        self._counts.store_written_bytes += sum(len(v) for (_, v), why in zip(values, said, strict=True) if not why)
        for key in dict.fromkeys(e.key for e in entries):
            if key not in refused:
                self._known.written(key)
        if refused:
            log.warning("the prefix store refused %d blocks: %s", len(refused), next(why for why in said if why))
            self._breaker.failed()
        else:
            self._breaker.succeeded()
        return len(refused)

    def _release(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            for group, slot in enumerate(entry.slots):
                if slot is not None:
                    self._host.release(group, slot)
