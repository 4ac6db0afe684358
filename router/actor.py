"""The Ray shell around `Router`: a named, detached actor that every deployment finds and none owns.

Everything crosses as msgpack, refusals included, so that no exception of ours is pickled. After a restart the actor
knows nobody: a beat of an unknown replica answers False, and the replica registers again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Sequence
from typing import Any, NoReturn

import msgspec

from router.admission import Limits
from router.port import Assignment, Query, ReplicaView, RouterFigures
from router.state import Router
from understudy.errors import FROM_KIND, InternalError, Overloaded, UnderstudyError
from workers.cache.events import Changes
from workers.engine import EngineInfo, EngineStats

ACTOR_NAME = "understudy-router"


class Refusal(msgspec.Struct, frozen=True, tag=True):
    """An error of the tree, as data."""

    kind: str
    message: str
    retry_after_s: float = 0.0


class Granted(msgspec.Struct, frozen=True, tag=True):
    """An assignment, as the answer to a query."""

    assignment: Assignment


class Registration(msgspec.Struct, frozen=True):
    """A replica is ready."""

    replica: str
    address: str
    epoch: int
    info: EngineInfo
    node: str = ""


class Report(msgspec.Struct, frozen=True):
    """A replica lives."""

    replica: str
    epoch: int
    stats: EngineStats
    changes: Changes | None = None
    trouble: str = ""


_encode = msgspec.msgpack.encode
_query = msgspec.msgpack.Decoder(Query)
_reply = msgspec.msgpack.Decoder(Granted | Refusal)
_registration = msgspec.msgpack.Decoder(Registration)
_report = msgspec.msgpack.Decoder(Report)
_figures = msgspec.msgpack.Decoder(RouterFigures)
_views = msgspec.msgpack.Decoder(list[ReplicaView])


def _raise(refusal: Refusal) -> NoReturn:
    if refusal.kind == Overloaded.kind:
        raise Overloaded(refusal.message, refusal.retry_after_s)
    raise FROM_KIND.get(refusal.kind, InternalError)(refusal.message)


class _MonotonicTime:
    def now(self) -> float:
        return time.monotonic()


class RouterActor:
    """The actor's class; `create` turns it into an actor. Methods are coroutines, so that one thread runs them all."""

    def __init__(self, heartbeat_timeout: float = 2.0, limits: dict[str, Any] | None = None) -> None:
        self._router = Router(_MonotonicTime(), heartbeat_timeout=heartbeat_timeout, limits=Limits(**(limits or {})))

    async def register(self, registration: bytes) -> bool:
        r = _registration.decode(registration)
        return self._router.register(r.replica, r.address, r.epoch, r.info, r.node)

    async def beat(self, report: bytes) -> bool:
        r = _report.decode(report)
        return self._router.beat(r.replica, r.epoch, r.stats, r.changes, r.trouble)

    async def stall(self, replica: str, epoch: int, trouble: str) -> None:
        self._router.stall(replica, epoch, trouble)

    async def wanted(self, replica: str, epoch: int) -> int:
        return self._router.wanted(replica, epoch)

    async def drain(self, replica: str, epoch: int) -> None:
        self._router.drain(replica, epoch)

    async def unregister(self, replica: str, epoch: int) -> None:
        self._router.unregister(replica, epoch)

    async def assign(self, query: bytes) -> bytes:
        try:
            return _encode(Granted(self._router.assign(_query.decode(query))))
        except UnderstudyError as error:
            retry = error.retry_after_s if isinstance(error, Overloaded) else 0.0
            return _encode(Refusal(error.kind, error.message, retry))

    async def release(self, leases: list[int]) -> None:
        self._router.release(leases)

    async def clear(self, leases: list[int]) -> None:
        self._router.clear(leases)

    async def snapshot(self) -> bytes:
        return _encode(self._router.snapshot())

    async def figures(self) -> bytes:
        return _encode(self._router.figures())

    async def pid(self) -> int:
        """The actor's process, for operators."""
        import os

        return os.getpid()


def create(namespace: str, heartbeat_timeout: float = 2.0, limits: Limits | None = None) -> RayRouter:
    """The router of a namespace, started where there is none. Needs an initialized Ray."""
    import ray

    options = {
        "name": ACTOR_NAME,
        "namespace": namespace,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "num_cpus": 0,
    }
    sizes = None if limits is None else dataclasses.asdict(limits)
    return RayRouter(ray.remote(RouterActor).options(**options).remote(heartbeat_timeout, sizes))


def find(namespace: str) -> RayRouter:
    """The router of a namespace. Raises ConnectionError where there is none."""
    import ray

    try:
        return RayRouter(ray.get_actor(ACTOR_NAME, namespace=namespace))
    except ValueError as error:
        raise ConnectionError(f"no router in the namespace {namespace!r}: {error}") from error


def remove(namespace: str) -> None:
    """Ends the router of a namespace for good; nothing where there is none."""
    import ray

    try:
        ray.kill(ray.get_actor(ACTOR_NAME, namespace=namespace), no_restart=True)
    except ValueError:
        return


class RayRouter:
    """The actor's far end: a `RouterPort`, and what replicas tell it. Used from an event loop.

    Raises ConnectionError when the actor does not answer within `timeout_s` seconds, or is dead or restarting.
    """

    def __init__(self, handle: Any, timeout_s: float = 1.0) -> None:
        self._handle = handle
        self._timeout_s = timeout_s

    @property
    def handle(self) -> Any:
        """Ray's handle, which may be sent to other actors."""
        return self._handle

    async def _ask(self, reference: Awaitable[Any]) -> Any:
        import ray.exceptions

        try:
            async with asyncio.timeout(self._timeout_s):
                return await reference
        except TimeoutError as error:
            raise ConnectionError(f"the router did not answer within {self._timeout_s:g} s") from error
        except ray.exceptions.RayError as error:
            raise ConnectionError(f"the router cannot be asked: {error}") from error

    async def register(self, replica: str, address: str, epoch: int, info: EngineInfo, node: str = "") -> bool:
        """See `Router.register`."""
        message = _encode(Registration(replica, address, epoch, info, node))
        return bool(await self._ask(self._handle.register.remote(message)))

    async def beat(
        self, replica: str, epoch: int, stats: EngineStats, changes: Changes | None = None, trouble: str = ""
    ) -> bool:
        """See `Router.beat`."""
        message = _encode(Report(replica, epoch, stats, changes, trouble))
        return bool(await self._ask(self._handle.beat.remote(message)))

    async def stall(self, replica: str, epoch: int, trouble: str) -> None:
        """See `Router.stall`."""
        await self._ask(self._handle.stall.remote(replica, epoch, trouble))

    async def wanted(self, replica: str, epoch: int) -> int:
        """See `Router.wanted`."""
        return int(await self._ask(self._handle.wanted.remote(replica, epoch)))

    async def drain(self, replica: str, epoch: int) -> None:
        """See `Router.drain`."""
        await self._ask(self._handle.drain.remote(replica, epoch))

    async def unregister(self, replica: str, epoch: int) -> None:
        """See `Router.unregister`."""
        await self._ask(self._handle.unregister.remote(replica, epoch))

    async def assign(self, query: Query) -> Assignment:
        """See `Router.assign`."""
        reply = _reply.decode(await self._ask(self._handle.assign.remote(_encode(query))))
        if isinstance(reply, Refusal):
            _raise(reply)
        assignment: Assignment = reply.assignment
        return assignment

    async def release(self, leases: Sequence[int]) -> None:
        """See `Router.release`."""
        await self._ask(self._handle.release.remote(list(leases)))

    async def clear(self, leases: Sequence[int]) -> None:
        """See `Router.clear`."""
        await self._ask(self._handle.clear.remote(list(leases)))

    async def replicas(self) -> list[ReplicaView]:
        """See `Router.snapshot`."""
        return _views.decode(await self._ask(self._handle.snapshot.remote()))

    async def figures(self) -> RouterFigures:
        """See `Router.figures`."""
        return _figures.decode(await self._ask(self._handle.figures.remote()))

    async def pid(self) -> int:
        """The actor's process id."""
        return int(await self._ask(self._handle.pid.remote()))
