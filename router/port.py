"""What gateways ask a router, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

import msgspec

from router.index import IndexStats
from workers.engine import EngineInfo, EngineStats


class Query(msgspec.Struct, frozen=True):
    """What an assignment depends on.

    `exclude` are lives (replica, epoch) that just failed this request. Where `fingerprint` and `numerics_id` are set,
    only replicas with both will do (a stream that goes on). `keys` name the prompt's full blocks, first one first:
    `workers.cache.events.hints`. `sequences` go there together, and share the prompt. `together`: how many suspects may
    be at one replica, this request included; 0: it is none (`router.suspects`). `request` names who asks, so that one
    that asks again and again while there is no replica counts once.
    """

    model: str
    prompt_tokens: int
    exclude: tuple[tuple[str, int], ...] = ()
    fingerprint: str = ""
    numerics_id: str = ""
    keys: bytes = b""
    sequences: int = 1
    priority: int = 0
    together: int = 0
    request: str = ""


class Assignment(msgspec.Struct, frozen=True):
    """Which replica takes the request. Its messages count only while its epoch is `epoch`. `reason` is a word of
    `policy.Reason`, or says that the gateway decided alone."""

    replica: str
    address: str
    epoch: int
    lease: int
    reason: str = ""


class State(StrEnum):
    """Life of a replica, in the words of the Admin API."""

    READY = "READY"
    STALLED = "STALLED"
    DRAINING = "DRAINING"
    LOST = "LOST"


class ReplicaView(msgspec.Struct, frozen=True):
    """A replica as the router sees it. `cause` says why it is not READY, where somebody knows."""

    replica: str
    address: str
    epoch: int
    state: State
    info: EngineInfo
    stats: EngineStats
    silent_s: float
    node: str = ""
    cause: str = ""


class RouterFigures(msgspec.Struct, frozen=True):
    """What a router has done since it began. `decisions` by `policy.Reason`; `refused` requests found no room;
    `reused_tokens` of prompts were taken to be on the chosen replica's device, in its host's memory, in the store;
    `suspects` are under way now (`router.suspects`)."""

    decisions: dict[str, int]
    refused: int
    reused_tokens: dict[str, int]
    leases: int
    index: IndexStats
    suspects: int = 0


class RouterPort(Protocol):
    """What a gateway asks a router. Errors are those of `Router`; ConnectionError when it cannot be reached."""

    async def assign(self, query: Query) -> Assignment: ...

    async def release(self, leases: Sequence[int]) -> None:
        """The streams of these assignments have ended. Unknown ones are ignored."""

    async def clear(self, leases: Sequence[int]) -> None:
        """These were suspects and have got on. Unknown ones are ignored."""

    async def replicas(self) -> list[ReplicaView]:
        """Everything that is registered, lost ones included."""
