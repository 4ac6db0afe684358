"""What `understudy status` shows: the router's view of the replicas, and the roster's of the processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from cluster.catalog import Catalog, Known
from cluster.directory import Directory
from cluster.roster import Claim, Member
from router.admin import experts_message, replica_message, router_message
from router.port import ReplicaView, State
from understudy import __version__
from understudy.errors import ModelNotFound
from understudy.v1 import admin_pb2 as pb
from workers.engine import EngineInfo

_STARTING = ("starting", "loading", "warming", "ready")


class ClusterStatus:
    """Keeps `router.admin.StatusSource`. `known` is what was last heard of models; `started` is a moment of `clock`."""

    def __init__(
        self, directory: Directory, catalog: Catalog, started: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._directory = directory
        self.known = Known(catalog)
        self._started = started
        self._clock = clock

    async def status(self) -> pb.GetStatusResponse:
        """A snapshot. Raises ConnectionError when the router cannot be reached."""
        views = await self._directory.replicas()
        members = await self._directory.members()
        response = describe(views, members, self.known)
        response.experts.extend(experts_message(v) for v in await self._directory.expert_views())
        response.uptime_s = max(0.0, self._clock() - self._started)
        response.router.CopyFrom(router_message(await self._directory.figures()))
        response.processes.add(role="router", pid=await self._directory.pid(), node=_router_node(members))
        return response

    async def scale_experts(self, model: str, hosts: int) -> str:
        """See `router.admin.StatusSource`."""
        name = only_model(model, self.known.catalog.models)
        await self._directory.scale_experts(name, hosts)
        return name


def only_model(model: str, wanted: Mapping[str, object]) -> str:
    """The model that is meant. Raises ModelNotFound."""
    if model in wanted:
        return model
    if not model and len(wanted) == 1:
        return next(iter(wanted))
    raise ModelNotFound(f"{model!r} is not one of {', '.join(wanted)}" if model else f"name one of {', '.join(wanted)}")


def describe(views: Sequence[ReplicaView], members: Sequence[Member], known: Known) -> pb.GetStatusResponse:
    """Models, replicas and processes, from what router and roster know."""
    response = pb.GetStatusResponse(version=__version__)
    for name, bounds in known.catalog.bounds().items():
        infos = [v.info for v in views if v.info.model == name]
        ready = [v.info for v in views if v.info.model == name and v.state is State.READY]
        shown = max(ready or infos, key=lambda i: _generation(known, i), default=None)
        message = response.models.add(
            name=name,
            model_fingerprint=shown.model_fingerprint if shown else "",
            numerics_id=shown.numerics_id if shown else "",
            replicas_ready=len(ready),
            replicas_wanted=wanted_of(known, name),
            replicas_least=bounds.least,
            replicas_most=bounds.most,
            versions=len({i.model_fingerprint for i in infos}),
        )
        decision = known.decisions.get(name)
        if decision is not None and not bounds.fixed:
            message.scaling.reason, message.scaling.detail = decision.why, decision.said
            message.scaling.age_s = decision.age_s
    for v in views:
        shown_replica = replica_message(v)
        if (start := known.starts.get(v.replica)) is not None:
            shown_replica.cold_start.CopyFrom(pb.ColdStart(**msgspec.structs.asdict(start)))
        response.replicas.append(shown_replica)
    registered = {(v.replica, v.epoch) for v in views}
    for member in members:
        claim = member.claim
        if claim is not None and (claim.replica, claim.epoch) not in registered:
            response.replicas.append(_unregistered(member, claim))
        for p in member.processes:
            response.processes.add(role=p.role, pid=p.pid, node=p.node, replica=p.replica, rank=p.rank)
    return response


def wanted_of(known: Known, model: str) -> int:
    """How many replicas a model should have now."""
    bounds = known.catalog.bounds()[model]
    decision = known.decisions.get(model)
    return bounds.first if bounds.fixed or decision is None else decision.wanted


def _generation(known: Known, info: EngineInfo) -> int:
    return known.versions.get(info.model, {}).get(info.model_fingerprint, 0)


def _unregistered(member: Member, claim: Claim) -> pb.Replica:
    """A replica that the router does not know, or no more."""
    state = pb.REPLICA_STATE_STARTING if member.stage in _STARTING else pb.REPLICA_STATE_LOST
    return pb.Replica(
        id=claim.replica,
        model=member.model,
        epoch=claim.epoch,
        state=state,
        node=member.processes[0].node if member.processes else "",
        cause=member.error or member.stage,
    )


def _router_node(members: Sequence[Member]) -> str:
    """The router has no better way to say it: on one node it is everybody's."""
    nodes = {p.node for m in members for p in m.processes}
    return nodes.pop() if len(nodes) == 1 else ""
