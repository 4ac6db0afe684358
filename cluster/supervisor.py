"""One replica's life: its place, its leader, its heartbeat, its end. A plain class; `replica.py` is its Serve shell.

The supervisor is the one who restarts: it kills its leader and fails its health check, and Serve starts the next
replica. It beats for its leader only after the leader has answered, so that a leader that hangs goes silent.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import msgspec

from cluster.roster import Claim, Member, ProcessInfo
from understudy.errors import FROM_KIND, CheckpointError, ConfigError, InternalError, Unavailable, UnderstudyError
from workers.actors import LeaderReport
from workers.engine import EngineStats
from workers.experts.placement import DispatchReport

log = logging.getLogger(__name__)

# What another try cannot mend: the replica says so and stays, instead of being started for ever.
PERMANENT = (CheckpointError.kind, ConfigError.kind)

_LOOK_S = 1.0  # between two looks whether somebody else can go on with the last streams


class LeaderPort(Protocol):
    """A leader in a process of its own. Any call raises ConnectionError when that process is gone."""

    async def start(self) -> LeaderReport: ...

    async def report(self, wanted: int | None = None) -> LeaderReport:
        """With the cache's changes from number `wanted` on."""

    async def drain(self, seconds: float) -> bool: ...

    async def stop(self) -> None: ...

    def awaited(self) -> str:
        """Which of several processes has not answered the question under way; empty where there is but one."""

    def kill(self) -> None:
        """Ends the process now. Idempotent."""


class Companion(Protocol):
    """What has to stand before a leader can, and lives as long."""

    async def prepare(self, claim: Claim) -> None:
        """Returns when the leader may start. Raises an UnderstudyError where it never can."""

    def processes(self) -> tuple[ProcessInfo, ...]:
        """Of all that belongs to it."""

    async def stop(self) -> None:
        """Ends it. Idempotent."""


class RouterLink(Protocol):
    """The router actor, as a supervisor needs it. Any call raises ConnectionError when it cannot be reached."""

    async def claim(self, model: str, holder: str, processes: tuple[ProcessInfo, ...]) -> Claim: ...

    async def announce(self, member: Member, report: LeaderReport | None, node: str) -> int:
        """Registers a ready replica, beats for it, or lets it drain. Which of its cache's changes is wanted next;
        negative where its place has a newer life."""

    async def leave(self, holder: str, claim: Claim | None) -> None: ...

    async def stall(self, replica: str, epoch: int, trouble: str) -> None: ...

    async def alone(self, replica: str, epoch: int) -> bool:
        """Whether no other replica could go on with its streams."""


class Supervisor:
    """Runs one leader. `start`, then `run` until cancelled, `check` as often as wanted, at last `leave`.

    `holder` names this life. `start_leader` starts the leader's process for a claim. Seconds: `beat_s` between
    heartbeats, `patience_s` until it says that a leader does not answer, `silence_s` until that one counts as dead.
    """

    def __init__(
        self,
        *,
        model: str,
        holder: str,
        node: str,
        start_leader: Callable[[Claim], LeaderPort],
        router: RouterLink,
        beat_s: float = 0.25,
        patience_s: float = 2.0,
        silence_s: float = 10.0,
        companion: Companion | None = None,
    ) -> None:
        self._companion = companion
        self._model = model
        self._holder = holder
        self._node = node
        self._start_leader = start_leader
        self._router = router
        self._beat_s = beat_s
        self._patience_s = patience_s
        self._silence_s = silence_s
        self._leader: LeaderPort | None = None
        self._leader_pid = 0
        self._lost = ""
        self._trouble = ""
        self._wanted = 0  # the first change of the leader's cache that the router does not know
        self.claim: Claim | None = None
        self.report: LeaderReport | None = None

    async def start(self) -> None:
        """Returns when the leader makes tokens, or cannot for a reason that another try would not mend.

        Raises the leader's error, or Unavailable when it is gone.
        """
        self.claim = await self._claim_place()
        if self._companion is not None and not await self._prepare(self._companion, self.claim):
            return
        leader = self._leader = self._start_leader(self.claim)
        starting = asyncio.ensure_future(leader.start())
        try:
            while not starting.done():
                await asyncio.wait([starting], timeout=self._beat_s)
                if not starting.done():
                    await self._glance(leader)
            self.report = starting.result()
        except ConnectionError as error:
            await self._announce_failure(f"the leader's process ended while it was starting: {error}")
            raise Unavailable(self._lost) from error
        finally:
            starting.cancel()
        await self._announce()
        if self.report.stage == "failed" and self.report.error_kind not in PERMANENT:
            raise FROM_KIND.get(self.report.error_kind, InternalError)(self.report.error)

    async def _prepare(self, companion: Companion, claim: Claim) -> bool:
        """Beats meanwhile. False where it cannot be had for a reason that another try would not mend."""
        preparing = asyncio.ensure_future(companion.prepare(claim))
        try:
            while not preparing.done():
                await asyncio.wait([preparing], timeout=self._beat_s)
                await self._announce()
            preparing.result()
        except UnderstudyError as error:
            self.report = LeaderReport("failed", 0.0, 0, error_kind=error.kind, error=error.message)
            await self._announce()
            if error.kind in PERMANENT:
                return False
            raise
        finally:
            preparing.cancel()
        return True

    async def run(self) -> None:
        """Beats until cancelled, or until the leader is lost."""
        while not self._lost:
            await asyncio.sleep(self._beat_s)
            try:
                await self._beat()
            except ConnectionError as error:
                await self._announce_failure(f"the leader is gone: {error}")
                return
            if self.report is not None and self.report.wedged:
                await self._announce_failure(f"one step has been running for {self.report.step_age_s:.0f} s")
            elif self.report is not None and self.report.stage == "failed" and not self._resigned:
                await self._announce_failure(self.report.error)

    def check(self) -> None:
        """Raises Unavailable where this replica should be replaced."""
        if self._lost:
            raise Unavailable(self._lost)

    async def abandon(self) -> None:
        """After `start` has raised: ends the leader and gives the place back, but leaves word of why."""
        leader, self._leader = self._leader, None
        if leader is not None:
            leader.kill()
        if self._companion is not None:
            await self._companion.stop()
        said = msgspec.structs.replace(self._member(), stage="failed", claim=None, processes=())
        with suppress(ConnectionError):
            await self._router.leave(self._holder, self.claim)
            await self._router.announce(said, None, self._node)

    async def leave(self, drain_s: float, last_s: float = 0.0) -> bool:
        """Takes nothing new, lets streams end for up to `drain_s` seconds, or up to `last_s` while nobody else could go
        on with them; stops the leader. True when all ended."""
        leader, self._leader = self._leader, None
        try:
            return leader is None or bool(self._lost) or await self._drain(leader, drain_s, last_s)
        finally:
            if leader is not None:
                leader.kill()
            if self._companion is not None:
                await self._companion.stop()
            with suppress(ConnectionError):
                await self._router.leave(self._holder, self.claim)

    @property
    def _resigned(self) -> bool:
        return self.report is not None and self.report.error_kind in PERMANENT

    async def _drain(self, leader: LeaderPort, seconds: float, last_s: float) -> bool:
        """Whether all streams ended; those of a leader that is gone have."""
        now = asyncio.get_running_loop().time
        with suppress(ConnectionError):
            give_up = now() + last_s
            ended = await self._drain_for(leader, seconds)
            if not ended and now() < give_up and await self._alone():
                log.info("the last replica of its kind: its streams may end for %g s", last_s)
            while not ended and now() < give_up and await self._alone():
                ended = await self._drain_for(leader, _LOOK_S)
            await leader.stop()
            return ended
        return True

    async def _drain_for(self, leader: LeaderPort, seconds: float) -> bool:
        """Beats meanwhile. Raises ConnectionError where the leader is gone, or does not answer."""
        draining = asyncio.ensure_future(leader.drain(seconds))
        try:
            while not draining.done():
                await asyncio.wait([draining], timeout=self._beat_s)
                async with asyncio.timeout(self._silence_s):
                    self.report = await leader.report()
                await self._announce()
            return draining.result()
        except TimeoutError:
            raise ConnectionError(f"no answer for {self._silence_s:g} s") from None
        finally:
            draining.cancel()

    async def _alone(self) -> bool:
        """As far as is known: where the router does not answer, streams are not given up."""
        if self.claim is not None:
            with suppress(ConnectionError):
                return await self._router.alone(self.claim.replica, self.claim.epoch)
        return True

    async def _claim_place(self) -> Claim:
        """A router that has just been started may take a while to answer. Raises ConnectionError after `silence_s`."""
        own = (ProcessInfo("replica", os.getpid(), self._node),)
        try:
            async with asyncio.timeout(self._silence_s):
                while True:
                    with suppress(ConnectionError):
                        return await self._router.claim(self._model, self._holder, own)
                    await asyncio.sleep(self._beat_s)
        except TimeoutError:
            raise ConnectionError(f"the router gave no place for {self._silence_s:g} s") from None

    async def _glance(self, leader: LeaderPort) -> None:
        """How far a leader is that may be too busy to say: importing torch can starve everything else for seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._beat_s):
                self.report = await leader.report()
        await self._announce()

    async def _beat(self) -> None:
        """Asks the leader, then says it. Raises ConnectionError when the leader does not answer any more."""
        if self._leader is None:
            raise ConnectionError("it was not started, or has been stopped")
        asking = asyncio.ensure_future(self._leader.report(self._wanted))
        try:
            async with asyncio.timeout(self._silence_s):
                while not (await asyncio.wait([asking], timeout=self._patience_s))[0]:
                    await self._announce_silence(self._leader)
            self.report = asking.result()
        except TimeoutError:
            raise ConnectionError(f"no answer {self._from(self._leader)}for {self._silence_s:g} s") from None
        finally:
            asking.cancel()
        self._tell_trouble(self.report.trouble)
        await self._announce()

    @staticmethod
    def _from(leader: LeaderPort) -> str:
        """Who of a group does not answer, as words."""
        who = leader.awaited()
        return f"from {who} " if who else ""

    async def _announce_silence(self, leader: LeaderPort) -> None:
        """A leader that does not answer takes no requests meanwhile."""
        if self.claim is not None:
            trouble = f"no answer {self._from(leader)}for {self._patience_s:g} s or longer"
            self._tell_trouble(trouble)
            with suppress(ConnectionError):
                await self._router.stall(self.claim.replica, self.claim.epoch, trouble)

    def _tell_trouble(self, trouble: str) -> None:
        """Once, when it begins and when it ends."""
        if bool(trouble) != bool(self._trouble):
            name = self.claim.replica if self.claim is not None else ""
            log.warning("replica %s %s", name, f"makes no tokens: {trouble}" if trouble else "makes tokens again")
        self._trouble = trouble

    async def _announce(self) -> None:
        """A router that cannot be reached is not this replica's fault: it is told again with the next beat."""
        try:
            self._wanted = await self._router.announce(self._member(), self.report, self._node)
            if self._wanted < 0:
                self._lost = "another replica holds this place"
        except ConnectionError as error:
            log.warning("the router does not answer: %s", error)

    async def _announce_failure(self, why: str) -> None:
        log.error("replica %s: %s", self.claim.replica if self.claim else "", why)
        self._lost = why
        if self._leader is not None:
            self._leader.kill()
        with suppress(ConnectionError):
            await self._router.announce(self._member(), None, self._node)

    def _member(self) -> Member:
        report, replica = self.report, self.claim.replica if self.claim is not None else ""
        processes = [ProcessInfo("replica", os.getpid(), self._node, replica)]
        if report is not None and report.pid and not self._lost:
            processes.append(ProcessInfo("shard", report.pid, self._node, replica))
            processes += [ProcessInfo("shard", pid, node, replica, i) for i, (pid, node) in enumerate(report.ranks, 1)]
        if self._companion is not None:
            processes += self._companion.processes()
        failed = bool(self._lost)
        return Member(
            self._holder,
            "replica",
            "failed" if failed else report.stage if report is not None else "starting",
            tuple(processes),
            done=report.done if report is not None else 0.0,
            model=self._model,
            claim=self.claim,
            error_kind=report.error_kind if report is not None else "",
            error=self._lost or (report.error if report is not None else ""),
        )

    def experts(self) -> DispatchReport | None:
        """What the leader's dispatcher last said, where its experts are elsewhere."""
        return self.report.experts if self.report is not None else None

    @property
    def stats(self) -> EngineStats:
        """The leader's latest counts."""
        return self.report.stats if self.report is not None else EngineStats()
