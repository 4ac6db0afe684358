"""Whether a token can be had, by model, and if not, why: for `grpc.health.v1`, probes, log and metrics.

A model is served while a gateway has a live wire to a replica of it that is well: one whose steps end in time, or
which, when idle, has lately made a token of its own. The service as a whole is while any model is.

Services of the health protocol: "" and `understudy.v1.Inference` for the whole, `understudy.v1.Inference/MODEL` for
one. The words come as trailing metadata, `understudy-trouble`; also where it serves, and something else is wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from grpc_health.v1 import health, health_pb2
from prometheus_client import Gauge

from router.channels import Link
from router.port import ReplicaView, State

log = logging.getLogger(__name__)

TROUBLE_KEY = "understudy-trouble"
USABLE = (State.READY, State.LOST)  # where the wire is alive, whatever the router has or has not heard
_Status = health_pb2.HealthCheckResponse


@dataclass(frozen=True)
class Verdict:
    """`serving`: a token of it can be had. `troubles`: what is wrong, with replicas' names; empty where all is well."""

    serving: bool
    troubles: tuple[str, ...] = ()


def judge(
    model: str, views: Iterable[ReplicaView], links: Iterable[Link], told: Mapping[str, str] | None = None
) -> Verdict:
    """What `views` and wires say of a model; `told` are the words of replicas that are gone, by name."""
    mine = [v for v in views if v.info.model == model]
    alive = {(k.replica, k.epoch) for k in links}
    troubles = [f"{v.replica}: {v.cause or v.state.lower()}" for v in mine if v.state in (State.STALLED, State.LOST)]
    unreached = [v for v in mine if v.state is State.READY and (v.replica, v.epoch) not in alive]
    troubles += [f"{v.replica}: this gateway has no wire to it" for v in unreached]
    well = {v.replica for v in mine if v.state is State.READY}
    troubles += [f"{name}: {words}" for name, words in (told or {}).items() if name not in well]
    serving = any(v.state in USABLE and (v.replica, v.epoch) in alive for v in mine)
    if not serving and not troubles:
        troubles.append(f"no replica of {model} is ready" if mine else f"no replica of {model} is there")
    return Verdict(serving, tuple(troubles))


class Health(health.aio.HealthServicer):
    """The protocol's server, with words. `put` from its event loop."""

    def __init__(self, service: str, gauge: Gauge) -> None:
        super().__init__()
        self._service = service
        self._gauge = gauge
        self.verdicts: dict[str, Verdict] = {}
        self._can_start = False

    @property
    def serving(self) -> bool:
        """Whether a token of any model can be had, if need be after a replica has started."""
        return self._can_start or any(v.serving for v in self.verdicts.values())

    @property
    def troubles(self) -> list[str]:
        """All that is wrong."""
        return [t for v in self.verdicts.values() for t in v.troubles]

    async def put(self, verdicts: Mapping[str, Verdict], can_start: bool = False) -> None:
        """Takes what is true now of every model, and tells those who watch, the log and the gauge. `can_start`: some
        model has its replicas only while they are asked for."""
        self._can_start = can_start
        changed = {name: v for name, v in verdicts.items() if v.serving != self._was(name)}
        worse = {n: v for n, v in verdicts.items() if v.troubles and not self._had_troubles(n)}
        self.verdicts = dict(verdicts)
        for name, verdict in verdicts.items():
            self._gauge.labels(name).set(verdict.serving)
            if name in changed or name in worse:
                why = "; ".join(verdict.troubles)
                level = logging.INFO if verdict.serving and not why else logging.WARNING
                log.log(
                    level, "model %s is %s%s", name, "served" if verdict.serving else "not served", why and f": {why}"
                )
            if name in changed:
                await self.set(f"{self._service}/{name}", _status(verdict.serving))
        for service in ("", self._service):
            await self.set(service, _status(self.serving))

    def _was(self, name: str) -> bool | None:
        return self.verdicts[name].serving if name in self.verdicts else None

    def _had_troubles(self, name: str) -> bool:
        return name in self.verdicts and bool(self.verdicts[name].troubles)

    async def Check(self, request: Any, context: Any) -> Any:
        """See the protocol."""
        troubles = self._troubles_of(request.service)
        if troubles:
            context.set_trailing_metadata(
                ((TROUBLE_KEY, "; ".join(troubles)[:1024].encode("ascii", "replace").decode()),)
            )
        return await super().Check(request, context)

    def _troubles_of(self, service: str) -> list[str]:
        model = service.removeprefix(f"{self._service}/")
        return list(self.verdicts[model].troubles) if model in self.verdicts and model != service else self.troubles

    async def end(self) -> None:
        """The gateway takes nothing new."""
        self._can_start = False
        self.verdicts = {name: Verdict(False, ("the gateway is stopping",)) for name in self.verdicts}
        for service in ("", self._service, *(f"{self._service}/{name}" for name in self.verdicts)):
            await self.set(service, _status(False))


def _status(serving: bool) -> Any:
    return _Status.SERVING if serving else _Status.NOT_SERVING
