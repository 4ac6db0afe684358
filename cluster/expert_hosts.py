"""The expert hosts of one replica: starts them, watches them, brings new placements into force. A plain class.

| owns | does not own |
|---|---|
| the hosts' processes, their lives, the order in which a placement comes into force | the placement: the router |
| what the leader is told of addresses | what happens to rows whose host is lost: the leader's dispatcher |

A placement comes into force so: hosts load what they gain beside what they serve; when all of them have, the leader is
told, and applies it between two steps; then hosts give back what they no longer need.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from cluster.expert_ports import ExpertsRouter, HostPort, LeaderPlaces
from cluster.roster import Claim, ProcessInfo
from router.rebalance import ExpertsReport, HostState
from understudy.errors import ConfigError, Unavailable, UnderstudyError
from workers.experts.placement import (
    DispatchReport,
    ExpertsPlan,
    HostReport,
    HostsView,
    Placement,
    rank_name,
    spread_placement,
)

log = logging.getLogger(__name__)

_AGAIN_S = (0.0, 1.0, 3.0, 10.0, 30.0)  # before a lost host is started again, by failures in a row


@dataclass
class _Host:
    """A place for a host, and who holds it. `held` and `asked` are (layer, expert)."""

    name: str
    life: int = 0
    port: HostPort | None = None
    report: HostReport | None = None
    heard: float = 0.0
    failures: int = 0
    retry_at: float = 0.0
    asked: set[tuple[int, int]] = field(default_factory=set)
    rows: list[list[int]] = field(default_factory=list)  # of this life, as counted already
    starting: asyncio.Task[None] | None = None
    leaving: bool = False

    @property
    def serving(self) -> bool:
        return self.report is not None


class ExpertHosts:
    """`prepare` before the leader is started, `attach` it then, `stop` at last.

    `layers` and `experts` are the model's: which layers have experts, and how many each. `count` hosts are wanted.
    `start_host` makes the process of a host's name and life. `at_ranks`: the hosts are the ranks of the leader's group,
    which come and go with it and have loaded their experts when it starts. Seconds: `beat_s` between two looks,
    `silence_s` until a host that does not answer is replaced.
    """

    def __init__(
        self,
        *,
        model: str,
        layers: tuple[int, ...],
        experts: tuple[int, ...],
        count: int,
        secret: str,
        start_host: Callable[[str, int], HostPort],
        router: ExpertsRouter,
        node: str = "",
        beat_s: float = 0.5,
        silence_s: float = 5.0,
        dispatch_silence_s: float = 2.0,
        at_ranks: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model, self._layers, self._experts, self._secret = model, layers, experts, secret
        self._start_host, self._router, self._node, self._clock = start_host, router, node, clock
        self._beat_s, self._silence_s, self._dispatch_silence_s = beat_s, silence_s, dispatch_silence_s
        self._at_ranks = at_ranks
        self._claim: Claim | None = None
        self._hosts: dict[str, _Host] = {}
        self._lives: dict[str, int] = {}
        self._rows = [[0] * count for count in experts]
        self._target: Placement | None = None
        self._in_force = spread_placement(layers, experts, count) if at_ranks else None
        self._told: HostsView | None = None  # the last that the leader was given
        self._numbers = 0
        self._failure: UnderstudyError | None = None
        self._leader: LeaderPlaces | None = None
        self._tending: asyncio.Task[None] | None = None
        self._dispatch: Callable[[], DispatchReport | None] = lambda: None
        self._scale(count)

    # What a supervisor asks -------------------------------------------------------------------------------------------

    async def prepare(self, claim: Claim) -> None:
        """Returns when every host listens and the router has placed the experts, which are then being loaded.

        Raises the first host's error, or Unavailable where a host's process ended.
        """
        self._claim = claim
        if self._at_ranks:  # they load with the leader
            return
        while True:
            await self.tend()
            if self._failure is not None:
                raise self._failure
            if self._target is not None and all(h.serving for h in self._hosts.values()):
                self._in_force = self._target
                self._told = self._view(self._target)
                return
            await asyncio.sleep(self._beat_s / 5)

    @property
    def plan(self) -> ExpertsPlan:
        """For the engine's configuration. Only after `prepare`."""
        if self._told is None:
            raise RuntimeError("the expert hosts are not prepared")
        return ExpertsPlan(self._told, self._secret, silence_s=self._dispatch_silence_s)

    def attach(self, leader: LeaderPlaces, dispatch: Callable[[], DispatchReport | None]) -> None:
        """Whom to tell of placements, and what its dispatcher last said of itself. From now on hosts are looked after
        until `stop`."""
        self._leader, self._dispatch = leader, dispatch
        self._tending = asyncio.create_task(self._run(), name="expert hosts")

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._beat_s)
            try:
                await self.tend()
            except Exception:
                log.exception("the expert hosts could not be looked after; trying again")

    def processes(self) -> tuple[ProcessInfo, ...]:
        """Of all hosts that live, but for ranks, which are told as such."""
        if self._at_ranks:
            return ()
        replica = self._claim.replica if self._claim is not None else ""
        return tuple(
            ProcessInfo("expert_host", h.report.pid, h.report.node, replica, i)
            for i, h in enumerate(self._hosts.values())
            if h.report is not None
        )

    async def stop(self) -> None:
        """Ends every host. Idempotent."""
        if self._tending is not None:
            self._tending.cancel()
            await asyncio.gather(self._tending, return_exceptions=True)
        hosts, self._hosts = list(self._hosts.values()), {}
        for host in hosts:
            self._end(host)
            if host.starting is not None:
                host.starting.cancel()
        await asyncio.gather(*(h.starting for h in hosts if h.starting is not None), return_exceptions=True)

    # One look ---------------------------------------------------------------------------------------------------------

    async def tend(self) -> None:
        """Hears everybody, asks the router, and takes the next step towards what it answers."""
        await asyncio.gather(*(self._hear(host) for host in [*self._hosts.values()]))
        for host in self._hosts.values():
            if host.port is None and not host.leaving and self._clock() >= host.retry_at:
                self._begin(host)
        await self._ask_router()
        await self._load()
        await self._switch()
        await self._settle()

    async def _hear(self, host: _Host) -> None:
        if host.port is None or host.report is None:
            return
        try:
            async with asyncio.timeout(self._beat_s * 4):
                report = await host.port.report()
        except TimeoutError:
            if self._clock() - host.heard > self._silence_s:
                self._lose(host, f"no answer for {self._silence_s:g} s")
            return
        except ConnectionError as error:
            self._lose(host, str(error))
            return
        host.report, host.heard = report, self._clock()
        self._count(host, report)
        if report.failure:
            log.error("expert host %s: %s", host.name, report.failure)

    def _count(self, host: _Host, report: HostReport) -> None:
        for row, old, new in zip(self._rows, host.rows, report.rows, strict=True):
            for expert in range(len(row)):
                row[expert] += new[expert] - old[expert]
        host.rows = [list(row) for row in report.rows]

    def _begin(self, host: _Host) -> None:
        host.life = self._lives[host.name] = self._lives.get(host.name, 0) + 1
        host.asked, host.rows = set(), [[0] * count for count in self._experts]
        host.port = self._start_host(host.name, host.life)
        host.starting = asyncio.create_task(self._started(host, host.port), name=f"expert host {host.name}")

    async def _started(self, host: _Host, port: HostPort) -> None:
        try:
            report = await port.start()
        except UnderstudyError as error:
            self._failure = self._failure or error
            self._lose(host, error.message)
        except ConnectionError as error:
            if self._in_force is None:
                self._failure = self._failure or Unavailable(f"expert host {host.name} ended while it started: {error}")
            self._lose(host, str(error))
        else:
            if host.port is port:
                host.report, host.heard, host.failures = report, self._clock(), 0
                host.rows = [list(row) for row in report.rows]  # of ranks, which only seemed lost, not nothing

    def _lose(self, host: _Host, why: str) -> None:
        log.warning("expert host %s (life %d) is lost: %s", host.name, host.life, why)
        self._end(host)
        host.retry_at = self._clock() + _AGAIN_S[min(host.failures, len(_AGAIN_S) - 1)]
        host.failures += 1

    def _end(self, host: _Host) -> None:
        port, host.port, host.report = host.port, None, None
        host.asked = set()
        if port is not None:
            port.kill()

    # Towards a placement ----------------------------------------------------------------------------------------------

    async def _ask_router(self) -> None:
        if self._claim is None or not any(h.serving for h in self._hosts.values()):
            return
        if self._in_force is None and not all(h.serving for h in self._hosts.values()):
            return  # the first placement is over all of them
        states = tuple(self._state(h) for h in self._hosts.values())
        rows = tuple(map(tuple, self._rows))
        report = ExpertsReport(
            self._model, self._claim.replica, self._claim.epoch, self._layers, self._experts, states, rows,
            self._in_force, self._at_ranks,
        )  # fmt: skip
        try:
            order = await self._router.experts(report)
        except ConnectionError as error:
            log.warning("the router does not answer: %s; the last placement stays", error)
            return
        if order.problem and self._in_force is None:
            self._failure = self._failure or ConfigError(order.problem)
        if order.placement is not None:
            self._target = order.placement
        if order.hosts is not None and not self._at_ranks:
            self._scale(order.hosts)

    def _state(self, host: _Host) -> HostState:
        report = host.report
        if report is None:
            # One that is being replaced keeps its part: it comes back sooner than others could load it.
            capacity = self._capacity(host.name) if not host.leaving else 0
            return HostState(host.name, host.life, "starting" if host.failures == 0 else "lost", capacity=capacity)
        loading = not self._loaded([host.name])
        return HostState(
            host.name,
            host.life,
            "leaving" if host.leaving else "loading" if loading else "ready",
            report.node,
            report.pid,
            report.held,
            report.address.capacity,
            sum(map(sum, report.rows)),
        )

    def _capacity(self, name: str) -> int:
        """What a host that is not there had room for when it was; 0 for one that is new, or fails again and again."""
        if self._hosts[name].failures >= len(_AGAIN_S) or self._told is None:
            return 0
        return next((h.capacity for h in self._told.hosts if h.name == name), 0)

    def _scale(self, count: int) -> None:
        """Adds places for hosts, or has the last ones leave."""
        staying = [h for h in self._hosts.values() if not h.leaving]
        for host in staying[count:]:
            host.leaving = True
        for host in [h for h in self._hosts.values() if h.leaving][: max(0, count - len(staying))]:
            host.leaving = False
        missing = count - sum(not h.leaving for h in self._hosts.values())
        number = 0
        while missing > 0:
            name = rank_name(number) if self._at_ranks else f"h{number}"
            if name not in self._hosts:
                self._hosts[name] = _Host(name)
                missing -= 1
            number += 1

    async def _load(self) -> None:
        """Has every host load what it will have, beside what it has."""
        for host in self._serving():
            wanted = self._needed(host.name)
            gains = sorted(wanted - host.asked)
            if gains and host.port is not None:
                with suppress(ConnectionError):  # the next look will see it
                    await host.port.hold(gains)
                    host.asked |= set(gains)

    def _needed(self, name: str) -> set[tuple[int, int]]:
        return {
            place for placement in (self._in_force, self._target) if placement is not None
            for place in placement.held_by(name)
        }  # fmt: skip

    async def _switch(self) -> None:
        """Tells the leader, once all that the target needs is there."""
        target, leader, told = self._target, self._leader, self._told
        if target is None or leader is None:
            return
        if told is None:  # of ranks, once all have said who they are
            if self._in_force is not None and len(self._serving()) == len(self._hosts):
                await self._tell(leader, self._view(self._in_force))
            return
        current = self._view(target)
        if target.version == told.placement.version:
            back = [h.name for h in current.hosts if h not in told.hosts]
            if not back or not (self._loaded(back) or self._must_come_back()):
                return
        elif len(current.hosts) < len(target.hosts) or not self._loaded(target.hosts):
            return
        await self._tell(leader, current)

    async def _tell(self, leader: LeaderPlaces, view: HostsView) -> None:
        with suppress(ConnectionError):
            await leader.place_experts(view)
            self._told = view
            log.info("placement %d over %d hosts is handed to the leader", view.placement.version, len(view.hosts))

    def _loaded(self, names: Iterable[str]) -> bool:
        for name in names:
            host = self._hosts.get(name)
            if host is None or host.report is None or not self._needed(name) <= host.asked:
                return False
            if host.report.held < max(host.report.asked, len(self._needed(name))):
                return False
        return True

    def _must_come_back(self) -> bool:
        """Whether steps wait: some experts have no host with room for them."""
        dispatch = self._dispatch()
        return dispatch is not None and dispatch.homeless > 0

    async def _settle(self) -> None:
        """When the leader applies what it was told: gives back what is in no placement, and lets leaving hosts go."""
        dispatch, told = self._dispatch(), self._told
        if dispatch is None or told is None or dispatch.view != told.number:
            return
        self._in_force = placement = told.placement
        if self._target is None or self._target.version != placement.version:
            return
        if dispatch.lost or len(told.hosts) < len(placement.hosts):
            return  # others stand in for a host that is lost
        for host in self._serving():
            needed = self._needed(host.name)
            if host.port is not None and host.report is not None and host.report.asked > len(needed):
                with suppress(ConnectionError):
                    await host.port.keep(sorted(needed))
                    host.asked &= needed
        for name in [h.name for h in self._hosts.values() if h.leaving and not self._needed(h.name)]:
            log.info("expert host %s leaves", name)
            self._end(self._hosts.pop(name))

    def _view(self, placement: Placement) -> HostsView:
        """Of a placement and the hosts as they are; with a number of its own where something is new."""
        hosts = tuple(
            h.report.address for h in self._hosts.values() if h.report is not None and h.name in placement.hosts
        )
        told = self._told
        if told is None or (told.placement.version, told.hosts) != (placement.version, hosts):
            self._numbers += 1
        return HostsView(self._numbers, placement, hosts)

    def _serving(self) -> list[_Host]:
        return [h for h in self._hosts.values() if h.serving]
