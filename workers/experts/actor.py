"""The Ray shell of an expert host."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from workers.experts.placement import HostReport
from workers.experts.process import HostPlan, HostProcess

_places = msgspec.msgpack.Decoder(list[tuple[int, int]])


class ExpertHostActor:
    """`HostProcess` for a supervisor on any node. Methods are coroutines: one thread runs them all, and what takes long
    has one of its own. `loopback`: the whole service is on this machine."""

    def __init__(self, plan: HostPlan, loopback: bool) -> None:
        import ray

        ip = "127.0.0.1" if loopback else str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        self._process = HostProcess(plan, ip)

    async def start(self) -> tuple[HostReport | None, str, str]:
        """See `HostProcess.start`."""
        return await asyncio.to_thread(self._process.start)

    async def report(self) -> HostReport | None:
        """See `HostProcess.report`."""
        return self._process.report()

    async def hold(self, places: bytes) -> None:
        """See `ExpertHost.hold`."""
        self._process.hold(_places.decode(places))

    async def keep(self, places: bytes) -> None:
        """See `ExpertHost.keep`."""
        self._process.keep(_places.decode(places))


def expert_host_actor(*, num_cpus: float, num_gpus: float = 0.0, resources: dict[str, float] | None = None) -> Any:
    """`ExpertHostActor` as a Ray actor class with its resources named, away from its siblings where there are nodes.
    It is never restarted: its supervisor starts another."""
    import ray

    return ray.remote(ExpertHostActor).options(
        num_cpus=num_cpus, num_gpus=num_gpus, resources=resources or {}, max_restarts=0, scheduling_strategy="SPREAD"
    )
