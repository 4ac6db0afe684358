"""What a step plan says about the prefix store, and what the tiers answer. Plain data and one protocol; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from workers.cache.events import Observer, Tier

NEVER = 1 << 62  # a floor that leaves nothing of a load


class StoreConfig(msgspec.Struct, frozen=True):
    """The tiers behind the device's cache. `host_bytes` of host memory (None: from the machine; 0: nothing is found
    there); `url` of a Redis, or None. `secret` keys the checksums of what lies in it, and `timeout_s` is how long it
    may be silent in an answer."""

    host_bytes: int | None = None
    url: str | None = None
    secret: bytes | None = None
    timeout_s: float = 1.0

    def __repr__(self) -> str:  # passwords and secrets reach no log
        return f"StoreConfig(host_bytes={self.host_bytes}, redis={'yes' if self.url else 'no'})"


@dataclass(slots=True)
class Save:
    """A full block whose values are to be kept: `blocks[g]` holds it in group g; -1: not of this group."""

    key: bytes
    blocks: tuple[int, ...]


@dataclass(slots=True)
class Fetch:
    """A block whose values are to be fetched into `blocks[g]` of group g (-1: not of this group). `index` is its place
    in the sequence."""

    index: int
    key: bytes
    blocks: tuple[int, ...]


@dataclass(slots=True)
class Load:
    """Blocks of one sequence to fetch, in this order: the last of them first. `number` is never used again."""

    number: int
    fetches: list[Fetch]


@dataclass(slots=True)
class Found:
    """The answer to `StorePort.find`: for each key and each of its groups, whether the shared store has all heads."""

    ticket: int
    present: list[tuple[bool, ...]]


@dataclass(slots=True)
class Arrived:
    """A fetch is over. `ok`: every rank has the block in its cache; else whatever is there means nothing."""

    number: int
    index: int
    ok: bool
    tier: Tier


@dataclass(slots=True)
class StoreCounts:
    """Of one rank, since the start. Blocks of several groups count once; seconds are those of copying or waiting for
    bytes. A bad value is one that was there and did not verify; a miss one that was expected and was not there."""

    host_loaded_bytes: int = 0
    host_load_seconds: float = 0.0
    store_loaded_bytes: int = 0
    store_load_seconds: float = 0.0
    store_bad_values: int = 0
    store_misses: int = 0
    store_written_bytes: int = 0
    store_writes_dropped: int = 0  # blocks
    store_failures: int = 0  # times that Redis failed or did not answer


class StorePort(Protocol):
    """The tiers of all ranks, as the leader sees them, on the engine's thread.

    `workers.cache.store.BlockStore` keeps it. Where there are several ranks, `find` and `has_host` are the leader's own
    (it asks for every head, not only for its own), and `poll` passes an `Arrived` on when all ranks have told it, `ok`
    where all were.
    """

    @property
    def block_bytes(self) -> Sequence[int]:
        """Of each group: what one rank loads for a block."""

    @property
    def counts(self) -> StoreCounts: ...

    @property
    def gathers(self) -> bool:
        """Whether other ranks have to be asked what has arrived: by `StepPlan.gather`."""

    @property
    def reachable(self) -> bool:
        """Whether there is a shared store that answers, as far as is known."""

    def has_host(self, key: bytes, group: int) -> bool: ...

    def find(self, ticket: int, wanted: Sequence[tuple[bytes, tuple[int, ...]]]) -> None:
        """Looks keys, each in some groups, up in the shared store; `poll` gives `Found` later. Never blocks."""

    def poll(self) -> list[Found | Arrived]:
        """What has happened since the last call."""

    def wait(self, timeout_s: float) -> None:
        """Until `poll` would give something, at most `timeout_s` seconds."""

    def rate(self, tier: Tier) -> float:
        """Bytes that one rank loads from a tier per second, as measured lately."""

    def latency_s(self) -> float:
        """Seconds from `find` to `Found`, as measured lately."""

    def observe(self, observer: Observer) -> None:
        """Who is told of blocks that host memory and shared store hold, from `poll`."""

    def close(self) -> None:
        """Writes what waits, for a short while, and ends threads and connections. Idempotent."""
