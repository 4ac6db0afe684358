"""What can be done to a running service, and how to see that it has got over it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
from service_process import Service

from understudy.errors import UnderstudyError
from understudy.v1 import admin_pb2

KINDS = ("leader", "shard", "expert host", "supervisor", "gateway", "router", "controller", "redis")
_ROLES = {"expert_host": "expert host", "replica": "supervisor"}


@dataclass(frozen=True)
class Target:
    """A process that something is done to."""

    kind: str
    pid: int
    place: str = ""  # the replica that it belongs to


@dataclass(frozen=True)
class Fault:
    """`how` is kill or stop; `moment` of `time.monotonic`."""

    how: str
    targets: tuple[Target, ...]
    moment: float
    seconds: float = 0.0  # that they were stopped for

    @property
    def kind(self) -> str:
        return " + ".join(sorted(t.kind for t in self.targets)) + (", stopped" if self.how == "stop" else "")


def targets(service: Service) -> list[Target]:
    """Every process of the service that may fall."""
    found = []
    for p in service.status().processes:
        kind = _ROLES.get(p.role, p.role)
        if kind == "shard" and p.rank == 0:
            kind = "leader"
        found.append(Target(kind, p.pid, p.replica))
    found += [Target("controller", p.pid) for p in service.processes() if "ServeController" in _title(p)]
    return [t for t in found if t.kind in KINDS]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class Director:
    """Draws what happens next, each of `kinds` as often as the others; one fault in `pairs_every` is of two processes
    at once, one in `stops_every` stops a process and lets it go on."""

    def __init__(
        self, service: Service, seed: int, *, kinds: Sequence[str] = KINDS, pairs_every: int = 6, stops_every: int = 5
    ) -> None:
        self._service, self._dice, self._all = service, random.Random(seed), kinds
        self._pairs_every, self._stops_every = pairs_every, stops_every
        self._count = 0
        self._kinds: list[str] = []

    def chance(self) -> float:
        """Seconds to wait, by chance."""
        return self._dice.uniform(0.0, 3.0)

    def strike(self) -> Fault:
        """Kills, or stops and lets go on; returns when that is done."""
        here = targets(self._service)
        self._count += 1
        if self._count % self._stops_every == 0:
            return self._stop(self._draw(here))
        chosen = [self._draw(here)]
        if self._count % self._pairs_every == 0:
            chosen.append(self._draw([t for t in here if t.pid != chosen[0].pid]))
        moment = time.monotonic()
        for target in chosen:
            _signal(target, signal.SIGKILL)
        return Fault("kill", tuple(chosen), moment)

    def _draw(self, here: list[Target]) -> Target:
        present = {t.kind for t in here}
        while True:
            if not self._kinds:
                self._kinds = self._dice.sample(self._all, len(self._all))
            kind = self._kinds.pop()
            if kind in present:
                return self._dice.choice([t for t in here if t.kind == kind])

    def _stop(self, target: Target) -> Fault:
        seconds, moment = self._dice.uniform(1.0, 6.0), time.monotonic()
        _signal(target, signal.SIGSTOP)
        time.sleep(seconds)
        _signal(target, signal.SIGCONT)
        return Fault("stop", (target,), moment, seconds)


def _signal(target: Target, number: int) -> None:
    try:
        os.kill(target.pid, number)
    except ProcessLookupError:
        return  # it has just ended: of the fault before, or as its replica's companion


def missing(service: Service, wanted: Mapping[str, int], killed: set[int], gateways: int, hosts: int) -> str:
    """What there should be still; empty when the service has so many of everything, and knows of none that was
    killed."""
    try:
        status = service.status()
    except (UnderstudyError, OSError) as error:
        return f"no status: {error}"
    if known := killed & {p.pid for p in status.processes}:
        return f"the status still names {known}"
    for name, count in wanted.items():
        ready = [r for r in status.replicas if r.model == name and r.state == admin_pb2.REPLICA_STATE_READY]
        if len(ready) < count:
            return f"{len(ready)} of {count} replicas of {name}"
    alive = [p for p in status.processes if p.role == "gateway" and psutil.pid_exists(p.pid)]
    if len(alive) < gateways:
        return f"{len(alive)} of {gateways} gateways"
    for placement in status.experts:
        if sum(h.state == "ready" for h in placement.hosts) < hosts:
            return f"expert hosts of {placement.replica}"
    if not any(p.role == "redis" and psutil.pid_exists(p.pid) for p in status.processes):
        return "Redis"
    if not any("ServeController" in _title(p) for p in service.processes()):
        return "the Serve controller"
    return ""


def memory_of(service: Service) -> int:
    """Bytes that the service's processes have to themselves, and their share of what they have together."""
    total = 0
    for process in [psutil.Process(service.process.pid), *service.processes()]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total
