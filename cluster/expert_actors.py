"""Expert hosts as Ray actors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from cluster.directory import Directory
from cluster.expert_hosts import ExpertHosts
from cluster.expert_ports import HostPort
from cluster.group import RankGroup
from cluster.plan import EXPERT_HOST_PLACE, ReplicaPlan, node_address
from understudy.errors import FROM_KIND, InternalError
from workers.experts.actor import expert_host_actor
from workers.experts.limits import expert_layers
from workers.experts.placement import HoldOrder, HostReport, rank_of
from workers.experts.process import HostPlan
from workers.model.config import read_spec

_LOOK_S = 0.5  # between two looks whether a group has loaded


async def call_actor(method: Any, *args: object) -> Any:
    """An actor's answer. Raises ConnectionError where the actor is gone."""
    import ray.exceptions

    try:
        return await method.remote(*args)
    except ray.exceptions.RayActorError as error:
        raise ConnectionError(str(error).strip().partition("\n")[0][:200]) from error  # Ray goes on for a page


class RayHost:
    """An expert host's actor as `ExpertHosts` sees it."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def start(self) -> HostReport:
        report, kind, said = await call_actor(self._handle.start)
        if report is None:
            raise FROM_KIND.get(kind, InternalError)(said)
        found: HostReport = report
        return found

    async def report(self) -> HostReport:
        report: HostReport | None = await call_actor(self._handle.report)
        if report is None:
            raise ConnectionError("it was never started")
        return report

    async def hold(self, places: list[tuple[int, int]]) -> None:
        await call_actor(self._handle.hold, msgspec.msgpack.encode(places))

    async def keep(self, places: list[tuple[int, int]]) -> None:
        await call_actor(self._handle.keep, msgspec.msgpack.encode(places))

    def kill(self) -> None:
        import ray

        ray.kill(self._handle, no_restart=True)


class RankHost:
    """A rank of a replica's own group as `ExpertHosts` sees it. It starts and ends with the group."""

    def __init__(self, group: Callable[[], RankGroup | None], rank: int) -> None:
        self._group, self._rank = group, rank

    async def start(self) -> HostReport:
        """Waits until the group has loaded."""
        while True:
            report = await self._tell(None)
            if report is not None:
                return report
            await asyncio.sleep(_LOOK_S)

    async def report(self) -> HostReport:
        report = await self._tell(None)
        if report is None:
            raise ConnectionError("its group is gone")
        return report

    async def hold(self, places: list[tuple[int, int]]) -> None:
        await self._tell(HoldOrder(tuple(places)))

    async def keep(self, places: list[tuple[int, int]]) -> None:
        await self._tell(HoldOrder(tuple(places), kept=True))

    def kill(self) -> None:
        """Its group does."""

    async def _tell(self, order: HoldOrder | None) -> HostReport | None:
        group = self._group()
        return None if group is None else await group.experts(self._rank, order)


def open_ranks(plan: ReplicaPlan, router: Directory, group: Callable[[], RankGroup | None]) -> ExpertHosts:
    """The ranks of one replica as hosts of its experts; `group` once there is one."""

    def start(name: str, _life: int) -> RankHost:
        return RankHost(group, rank_of(name))

    return _hosts(plan, router, plan.engine.tensor_parallel, start, at_ranks=True)


def open_hosts(plan: ReplicaPlan, router: Directory) -> ExpertHosts:
    """The hosts of one replica, not yet started."""
    engine = plan.engine
    # On one machine Ray's count of CPUs decides nothing: threads do. In a cluster it keeps hosts apart.
    cpus = 0.01 if plan.loopback else float(plan.host_threads or 1)

    def start(name: str, life: int) -> RayHost:
        host = HostPlan(
            model_dir=engine.model_dir,
            name=name,
            life=life,
            secret=plan.secret,
            dtype=engine.dtype,
            device=engine.device,
            kernels=engine.kernels,
            threads=plan.host_threads,
            neighbours=plan.expert_hosts * plan.replicas.most if plan.loopback else 1,
        )
        resources = EXPERT_HOST_PLACE if plan.by_role else {}
        actor = expert_host_actor(num_cpus=cpus, num_gpus=plan.leader_gpus, resources=resources)
        return RayHost(actor.remote(host, plan.loopback))

    return _hosts(plan, router, plan.expert_hosts, start)


def _hosts(
    plan: ReplicaPlan, router: Directory, count: int, start: Callable[[str, int], HostPort], at_ranks: bool = False
) -> ExpertHosts:
    layers, experts = expert_layers(read_spec(Path(plan.engine.model_dir)))
    return ExpertHosts(
        model=plan.model,
        layers=layers,
        experts=experts,
        count=count,
        secret=plan.secret,
        start_host=start,
        router=router,
        node=node_address(plan.loopback),
        dispatch_silence_s=plan.heartbeat_timeout,
        at_ranks=at_ranks,
    )
