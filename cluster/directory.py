"""The router actor as it runs in a cluster: the router itself, and the roster of who is there.

Named and detached, so that every deployment finds it and an upgrade of any leaves it alone. When it restarts it knows
nobody; within a beat everybody has announced itself again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from cluster.autoscale import Decision
from cluster.catalog import Catalog, Known, Library, Texts
from cluster.roster import Claim, Member, ProcessInfo, Roster
from router.actor import ACTOR_NAME, RayRouter, Refusal, RouterActor
from router.admission import Limits
from router.demand import ModelDemand
from router.rebalance import ExpertsOrder, ExpertsReport, ExpertsView, Rebalancers
from understudy.errors import FROM_KIND, InternalError, UnderstudyError
from workers.actors import LeaderReport

_encode = msgspec.msgpack.encode
_processes = msgspec.msgpack.Decoder(tuple[ProcessInfo, ...])
_member = msgspec.msgpack.Decoder(Member)
_members = msgspec.msgpack.Decoder(list[Member])
_claim = msgspec.msgpack.Decoder(Claim)
_report = msgspec.msgpack.Decoder(LeaderReport)
_experts_report = msgspec.msgpack.Decoder(ExpertsReport)
_order = msgspec.msgpack.Decoder(ExpertsOrder)
_expert_views = msgspec.msgpack.Decoder(list[ExpertsView])
_refusal = msgspec.msgpack.Decoder(Refusal)
_catalog = msgspec.msgpack.Decoder(Catalog)
_known = msgspec.msgpack.Decoder(Known)
_texts = msgspec.msgpack.Decoder(Texts | None)
_decisions = msgspec.msgpack.Decoder(dict[str, Decision])
_demands = msgspec.msgpack.Decoder(dict[str, ModelDemand])


_GONE_S, _LOOK_S = 20.0, 5.0


class DirectoryActor(RouterActor):
    """The actor's class. Everything crosses as msgpack."""

    def __init__(self, heartbeat_timeout: float = 2.0, limits: dict[str, Any] | None = None) -> None:
        super().__init__(heartbeat_timeout, limits)
        first = int(time.time()) if _restarted() else 1
        self._experts, self._placing = Rebalancers(time.monotonic), asyncio.Lock()
        self._library, self._look_again = Library(time.monotonic), 0.0
        self._roster = Roster(time.monotonic, timeout_s=max(5.0, 2.5 * heartbeat_timeout), first_epoch=first)

    async def claim(self, model: str, holder: str, processes: bytes) -> bytes:
        return _encode(self._roster.claim(model, holder, _processes.decode(processes)))

    async def announce(self, member: bytes, report: bytes, node: str) -> int:
        """Keeps the roster, and tells the router what follows: register, beat, drain or forget. The number of the
        cache's change that is wanted next; -1 where the place has a newer life."""
        said = _member.decode(member)
        if not self._roster.announce(said):
            return -1
        if said.claim is None:
            return 0
        decoded = _report.decode(report) if report else None
        self._tell_router(said.claim, said.stage, decoded, node)
        if decoded is not None and decoded.cold_start is not None:
            self._library.started(said.claim.replica, decoded.cold_start)
        return self._router.wanted(said.claim.replica, said.claim.epoch)

    async def leave(self, holder: str, claim: bytes) -> None:
        self._roster.leave(holder)
        if claim:
            place = _claim.decode(claim)
            self._router.unregister(place.replica, place.epoch)
            self._library.left(place.replica)

    async def alone(self, replica: str, epoch: int) -> bool:
        """See `Router.alone`."""
        return self._router.alone(replica, epoch)

    async def members(self) -> bytes:
        return _encode(self._roster.members())

    async def experts(self, report: bytes) -> bytes:
        """What a replica's hosts have computed; the placement that it should have."""
        async with self._placing:  # large ones take a while: beside the loop that answers gateways
            return _encode(await asyncio.to_thread(self._experts.hear, _experts_report.decode(report)))

    async def expert_views(self) -> bytes:
        return _encode(self._experts.views())

    async def scale_experts(self, model: str, hosts: int) -> bytes:
        """How many hosts each replica of the model should have; a refusal, or nothing."""
        try:
            self._experts.scale(model, hosts)
        except UnderstudyError as error:
            return _encode(Refusal(error.kind, error.message))
        return b""

    async def exchange(self, catalog: bytes) -> bytes:
        """See `Library.exchange`."""
        self._forget_gone(time.monotonic())
        return _encode(self._library.exchange(_catalog.decode(catalog)))

    async def has_texts(self, model: str, fingerprint: str, generation: int) -> bool:
        return self._library.has(model, fingerprint, generation)

    async def lend_texts(self, model: str, fingerprint: str, texts: bytes) -> None:
        self._library.lend(model, fingerprint, _texts.decode(texts))

    async def texts(self, model: str, fingerprint: str) -> bytes:
        return _encode(self._library.texts(model, fingerprint))

    async def scale(self, decisions: bytes) -> bytes:
        """Takes what was decided; the demand."""
        self._library.decide(_decisions.decode(decisions))
        return _encode(self._router.demand())

    def _forget_gone(self, now: float) -> None:
        """Replicas that went without a word, and whose place nobody has taken: there may be fewer now."""
        if now < self._look_again:
            return
        self._look_again = now + _LOOK_S
        held = {m.claim for m in self._roster.members()}
        for view in self._router.snapshot():
            if view.silent_s > _GONE_S and Claim(view.replica, view.epoch) not in held:
                self._router.unregister(view.replica, view.epoch)
                self._library.left(view.replica)

    def _tell_router(self, place: Claim, stage: str, report: LeaderReport | None, node: str) -> None:
        router = self._router
        if stage == "failed":
            router.unregister(place.replica, place.epoch)
        elif stage in ("ready", "draining") and report is not None and report.info is not None:
            if not router.beat(place.replica, place.epoch, report.stats, report.changes, report.trouble):
                router.register(place.replica, report.address, place.epoch, report.info, node)
                router.beat(place.replica, place.epoch, report.stats, report.changes, report.trouble)
            if stage == "draining":
                router.drain(place.replica, place.epoch)


class Directory(RayRouter):
    """The actor's far end. Every call raises ConnectionError when the actor cannot be reached."""

    async def claim(self, model: str, holder: str, processes: tuple[ProcessInfo, ...]) -> Claim:
        """See `Roster.claim`."""
        return _claim.decode(await self._ask(self.handle.claim.remote(model, holder, _encode(processes))))

    async def announce(self, member: Member, report: LeaderReport | None, node: str) -> int:
        """See `DirectoryActor.announce`."""
        told = _encode(report) if report is not None else b""
        return int(await self._ask(self.handle.announce.remote(_encode(member), told, node)))

    async def leave(self, holder: str, claim: Claim | None) -> None:
        """See `Roster.leave`."""
        await self._ask(self.handle.leave.remote(holder, _encode(claim) if claim is not None else b""))

    async def alone(self, replica: str, epoch: int) -> bool:
        """See `Router.alone`."""
        return bool(await self._ask(self.handle.alone.remote(replica, epoch)))

    async def members(self) -> list[Member]:
        """See `Roster.members`."""
        return _members.decode(await self._ask(self.handle.members.remote()))

    async def experts(self, report: ExpertsReport) -> ExpertsOrder:
        """See `Rebalancers.hear`."""
        return _order.decode(await self._ask(self.handle.experts.remote(_encode(report))))

    async def expert_views(self) -> list[ExpertsView]:
        """See `Rebalancers.views`."""
        return _expert_views.decode(await self._ask(self.handle.expert_views.remote()))

    async def scale_experts(self, model: str, hosts: int) -> None:
        """See `Rebalancers.scale`."""
        refusal = await self._ask(self.handle.scale_experts.remote(model, hosts))
        if refusal:
            said = _refusal.decode(refusal)
            raise FROM_KIND.get(said.kind, InternalError)(said.message)

    async def exchange(self, catalog: Catalog) -> Known:
        """See `Library.exchange`."""
        return _known.decode(await self._ask(self.handle.exchange.remote(_encode(catalog))))

    async def lend_texts(self, model: str, fingerprint: str, texts: Texts) -> None:
        """Sees to it that the router has the texts of a version, which may be megabytes."""
        if not await self._ask(self.handle.has_texts.remote(model, fingerprint, texts.generation)):
            await self._ask(self.handle.lend_texts.remote(model, fingerprint, _encode(texts)))

    async def texts(self, model: str, fingerprint: str) -> Texts | None:
        """See `Library.texts`."""
        texts: Texts | None = _texts.decode(await self._ask(self.handle.texts.remote(model, fingerprint)))
        return texts

    def scale_now(self, decisions: Mapping[str, Decision], timeout_s: float = 2.0) -> dict[str, ModelDemand]:
        """Tells what was decided; the demand. For a thread without an event loop."""
        return _demands.decode(self._ask_now(self.handle.scale.remote(_encode(dict(decisions))), timeout_s))

    def exchange_now(self, catalog: Catalog, timeout_s: float = 5.0) -> Known:
        """`exchange` for a thread without an event loop."""
        return _known.decode(self._ask_now(self.handle.exchange.remote(_encode(catalog)), timeout_s))

    def members_now(self, timeout_s: float = 5.0) -> list[Member]:
        """`members` for a thread without an event loop."""
        return _members.decode(self._ask_now(self.handle.members.remote(), timeout_s))

    def announce_now(self, member: Member, timeout_s: float = 5.0) -> None:
        """`announce` for a thread without an event loop."""
        self._ask_now(self.handle.announce.remote(_encode(member), b"", ""), timeout_s)

    @staticmethod
    def _ask_now(reference: Any, timeout_s: float) -> Any:
        import ray
        import ray.exceptions

        try:
            return ray.get(reference, timeout=timeout_s)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            raise ConnectionError(f"the router does not answer: {error}") from error


def create(namespace: str, heartbeat_timeout: float, limits: Limits) -> Directory:
    """The directory of a namespace, started where there is none; `limits` are those of each replica's queue."""
    import ray

    options: dict[str, Any] = {"name": ACTOR_NAME, "namespace": namespace, "lifetime": "detached"}
    options |= {"get_if_exists": True, "max_restarts": -1, "num_cpus": 0}
    return Directory(
        ray.remote(DirectoryActor).options(**options).remote(heartbeat_timeout, dataclasses.asdict(limits))
    )


def find(namespace: str) -> Directory:
    """The directory of a namespace. Raises ConnectionError where there is none."""
    import ray

    try:
        return Directory(ray.get_actor(ACTOR_NAME, namespace=namespace))
    except ValueError as error:
        raise ConnectionError(f"no router in the namespace {namespace!r}: {error}") from error


def _restarted() -> bool:
    import ray

    return ray.is_initialized() and bool(ray.get_runtime_context().was_current_actor_reconstructed)
