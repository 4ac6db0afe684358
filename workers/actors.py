"""The Ray shells of this room: the leader of a replica's group, which holds the engine.

`Leader` is a plain class that runs, and is tested, without Ray; `leader_actor` wraps it. How its tokens travel is
passed in as a factory of wire servers, for this room knows no gRPC.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from understudy.errors import Unavailable, UnderstudyError
from workers.cache.events import Changes
from workers.engine import Engine, EngineConfig, EngineInfo, EngineStats
from workers.engine.loop import EngineLoop
from workers.engine.pulse import Pulse, one_sequence
from workers.experts.placement import DispatchReport, HoldOrder, HostReport, HostsView
from workers.parallel.errors import GroupBroken
from workers.parallel.meeting import Meeting, join, offer

if TYPE_CHECKING:
    from workers.parallel.group import Group

log = logging.getLogger(__name__)

Stage = Literal["starting", "loading", "warming", "ready", "draining", "failed"]
Progress = Callable[[int, int], None]  # bytes read, bytes in all
_STOP_S = 10.0  # for the step under way
_LAST_WORDS_S = 0.2  # for what it told last to reach gateways
BuildEngine = Callable[..., Engine]  # of (config, progress), and of a group where there are other ranks


class WireServer(Protocol):
    """Carries an engine loop's sessions to gateways."""

    @property
    def gateways(self) -> list[str]:
        """Who is connected."""

    async def start(self) -> str:
        """Listens; the address as HOST:PORT."""

    async def stop(self, grace_s: float = 0.0) -> None:
        """Ends every session. Idempotent."""


WireFactory = Callable[[EngineLoop], WireServer]


class ColdStart(msgspec.Struct, frozen=True):
    """How long a start took, by its parts, in seconds: until the process ran; importing torch and the engine; kernels,
    and weights read and packed; the rest of the engine, its cache above all; the first tokens, and listening."""

    process_s: float = 0.0
    imports_s: float = 0.0
    weights_s: float = 0.0
    engine_s: float = 0.0
    warm_up_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.process_s + self.imports_s + self.weights_s + self.engine_s + self.warm_up_s


class LeaderReport(msgspec.Struct, frozen=True):
    """A leader as its supervisor sees it. `done` is the share of `stage` in [0, 1]; `step_age_s` is how long the
    step under way has been running, in seconds; `trouble` is what keeps it from making tokens at present; `error` is
    set where `stage` is failed. `changes` of its cache are there where they were asked for."""

    stage: Stage
    done: float
    pid: int
    address: str = ""
    info: EngineInfo | None = None
    stats: EngineStats = msgspec.field(default_factory=EngineStats)
    step_age_s: float = 0.0
    wedged: bool = False
    gateways: int = 0
    error_kind: str = ""
    error: str = ""
    experts: DispatchReport | None = None  # where its experts are elsewhere
    ranks: tuple[tuple[int, str], ...] = ()  # process id and node of rank 1 and the following, where there are some
    changes: Changes | None = None
    trouble: str = ""
    cold_start: ColdStart | None = None  # once it is ready


class RankReport(msgspec.Struct, frozen=True):
    """A rank other than the first. `stage` is starting, loading, ready or failed, then with an error."""

    stage: Stage
    pid: int
    error_kind: str = ""
    error: str = ""


def build_real_engine(config: EngineConfig, progress: Progress, group: Group | None = None) -> Engine:
    """The engine of a checkpoint, at rank 0 of its group. Brings torch into the process; then `progress` hears of
    (0, 1)."""
    from workers.model.ahead import read_ahead

    read_ahead(Path(config.model_dir))
    _kernels_ahead(config)
    import workers.engine.runner  # noqa: F401  -- takes seconds, in which weights and kernels come
    from workers.engine.build import build_engine

    progress(0, 1)
    return build_engine(config, progress, group)


def _kernels_ahead(config: EngineConfig) -> None:
    """Where torch takes seconds to import, building the kernels takes its turn beside it."""
    if config.device == "cpu" and config.kernels in ("auto", "native"):
        from workers.kernels.build import build_ahead

        build_ahead()


class Leader:
    """Builds an engine in this process and serves it. Its methods run on one event loop.

    `start` returns when the engine makes tokens; `report` answers at any time. `threads` is set before anything
    that reads OMP_NUM_THREADS is imported. A step that runs for longer than `step_timeout_s` seconds is given up.
    `ordered`: when the process was asked for, by the clock on the wall.
    """

    def __init__(
        self,
        config: EngineConfig,
        build: BuildEngine,
        wire: WireFactory,
        *,
        own_process: bool = True,
        step_timeout_s: float = 60.0,
        ordered: float | None = None,
    ) -> None:
        self._process_s = 0.0 if ordered is None else max(0.0, time.time() - ordered)
        self._imported = self._read = 0.0  # moments of the start
        self._cold_start: ColdStart | None = None
        if own_process:
            os.environ["OMP_NUM_THREADS"] = str(config.threads or os.cpu_count() or 1)
        self._config = config
        self._build = build
        self._make_wire = wire
        self._step_timeout_s = step_timeout_s
        self._pulse: asyncio.Task[None] | None = None
        self._stage: Stage = "starting"
        self._done = 0.0
        self._error: BaseException | None = None
        self._address = ""
        self._loop: EngineLoop | None = None
        self._wire: WireServer | None = None
        self._group: Group | None = None
        self._experts: Any = None  # a workers.experts.dispatch.Dispatcher, or a workers.experts.spread.Spread

    async def meet(self, size: int, one_machine: bool, address: str) -> Meeting:
        """Offers a place where the ranks of its group find each other, before anyone is started."""
        return await asyncio.to_thread(offer, size, one_machine, address, self._config.device)

    async def start(self, meeting: Meeting | None = None) -> LeaderReport:
        """Builds, warms up and listens. A failure is reported, not raised: it has to travel as words.

        `meeting`: where the other ranks are, of which this one is the first.
        """
        try:
            self._stage, begun = "loading", time.monotonic()
            engine = await asyncio.to_thread(self._make, meeting)
            built = time.monotonic()
            self._experts = getattr(engine, "experts", None)
            self._loop = EngineLoop(engine, wedged_after_s=self._step_timeout_s, on_error=self._fail)
            self._stage, self._done = "warming", 0.0
            await warm_up(self._loop)
            self._wire = self._make_wire(self._loop)
            self._address = await self._wire.start()
            self._note_start(begun, built)
            self._stage, self._done = "ready", 1.0
            formats = getattr(engine, "formats", None)
            pulse = Pulse(self._loop, prepare=formats.prepare if formats is not None else None)
            self._pulse = asyncio.create_task(pulse.run(), name="pulse")
        except Exception as error:
            if not isinstance(error, UnderstudyError):
                log.exception("the engine could not be built")
            self._fail(error)
            if self._group is not None:  # the others wait for this rank
                self._group.abort(f"rank 0 failed: {error}")
        return self.report_now()

    def _note_start(self, begun: float, built: float) -> None:
        imported, read = self._imported or built, self._read or built
        self._cold_start = start = ColdStart(
            self._process_s, imported - begun, read - imported, built - read, time.monotonic() - built
        )
        log.info(
            "started in %.2f s: process %.2f, imports %.2f, weights %.2f, engine %.2f, first tokens %.2f",
            start.total_s, start.process_s, start.imports_s, start.weights_s, start.engine_s, start.warm_up_s,
        )  # fmt: skip

    def _make(self, meeting: Meeting | None) -> Engine:
        if meeting is None:
            return self._build(self._config, self._progress)
        self._group = join(meeting, 0, self._config.device)
        return self._build(self._config, self._progress, self._group)

    async def report(self, wanted: int | None = None) -> LeaderReport:
        """What is known right now, and the cache's changes from number `wanted` on; quick."""
        return self.report_now(wanted)

    def report_now(self, wanted: int | None = None) -> LeaderReport:
        loop, error = self._loop, self._error
        report = LeaderReport(self._stage, self._done, os.getpid(), self._address)
        if error is not None:
            kind, said = words_of(error)
            report = msgspec.structs.replace(report, error_kind=kind, error=said)
        if loop is None:
            return report
        return msgspec.structs.replace(
            report,
            info=loop.info,
            stats=loop.stats(),
            step_age_s=loop.last_step_age(),
            wedged=loop.wedged,
            trouble=loop.trouble(),
            gateways=len(self._wire.gateways) if self._wire is not None else 0,
            experts=self._experts.report() if self._experts is not None else None,
            changes=None if wanted is None else loop.journal.since(wanted),
            cold_start=self._cold_start,
        )

    async def place_experts(self, view: bytes) -> None:
        """A newer `HostsView`, as msgpack: it takes effect between two steps. Nothing where experts are at home."""
        if self._experts is not None:
            await asyncio.to_thread(self._experts.offer, msgspec.msgpack.decode(view, type=HostsView))

    async def experts(self, order: HoldOrder | None = None) -> HostReport | None:
        """This rank as an expert host of its group, after an order; None where it is not one, or not yet."""
        return obey(self._experts, order)

    async def drain(self, seconds: float) -> bool:
        """Takes nothing new and waits up to `seconds` until all streams have ended; True when they have."""
        if self._loop is None:
            return True
        if self._stage == "ready":
            self._stage = "draining"
        return await asyncio.to_thread(self._loop.drain, time.monotonic() + seconds)

    async def stop(self) -> None:
        """Cancels what is left, so that it goes on elsewhere, and gives everything back; the log says what the engine
        then still holds, or that it did not end. Idempotent."""
        loop, self._loop = self._loop, None
        wire, self._wire = self._wire, None
        if self._pulse is not None:
            self._pulse.cancel()
        if loop is not None:
            if not await asyncio.to_thread(loop.stop, _STOP_S):
                log.error("the engine was left behind: its step did not end within %g s", _STOP_S)
            elif loop.error is not None:
                log.error("the engine did not end well: %s", loop.error)
        if wire is not None:
            await wire.stop(_LAST_WORDS_S)

    def _progress(self, done: int, total: int) -> None:
        self._done = done / total if total else 0.0
        self._read = time.monotonic()
        self._imported = self._imported or self._read

    def _fail(self, error: BaseException) -> None:
        self._error, self._stage = error, "failed"


class Rank:
    """Holds one part of a model, and computes what rank 0 tells. Its methods run on one event loop."""

    def __init__(self, config: EngineConfig, rank: int, *, own_process: bool = True) -> None:
        if own_process:
            os.environ["OMP_NUM_THREADS"] = str(config.threads or os.cpu_count() or 1)
        self._config, self._rank = config, rank
        self._experts: Any = None  # as a Leader's
        self._stage: Stage = "starting"
        self._error: BaseException | None = None
        self._group: Group | None = None

    async def start(self, meeting: Meeting) -> RankReport:
        """Loads its part, then follows in a thread of its own until rank 0 closes or the group breaks."""
        self._stage = "loading"
        try:
            runner = await asyncio.to_thread(self._load, meeting)
        except Exception as error:
            if not isinstance(error, UnderstudyError | GroupBroken):
                log.exception("rank %d could not be built", self._rank)
            self._fail(error)
            if self._group is not None:
                self._group.abort(f"rank {self._rank} failed: {error}")
            return self.report_now()
        self._stage, self._experts = "ready", runner.experts
        threading.Thread(target=self._follow, args=(runner,), name=f"rank {self._rank}", daemon=True).start()
        return self.report_now()

    async def report(self) -> RankReport:
        """What is known right now; quick."""
        return self.report_now()

    async def place_experts(self, view: bytes) -> None:
        """See `Leader.place_experts`. With experts on hosts ranks need not change over in the same step: rows are the
        same wherever they are computed. Where the ranks have them, rank 0's plans say when."""
        if self._experts is not None:
            await asyncio.to_thread(self._experts.offer, msgspec.msgpack.decode(view, type=HostsView))

    async def experts(self, order: HoldOrder | None = None) -> HostReport | None:
        """See `Leader.experts`."""
        return obey(self._experts, order)

    def report_now(self) -> RankReport:
        kind, said = words_of(self._error) if self._error is not None else ("", "")
        return RankReport(self._stage, os.getpid(), kind, said)

    def _load(self, meeting: Meeting) -> Any:
        _kernels_ahead(self._config)
        from workers.engine.build import build_rank

        self._group = join(meeting, self._rank, self._config.device)
        return build_rank(self._config, self._group)

    def _follow(self, runner: Any) -> None:
        try:
            runner.follow()
        except Exception as error:  # a thread has no caller: it is kept, told and logged
            log.error("rank %d stops: %s", self._rank, error)
            self._fail(error)
        finally:
            runner.close()

    def _fail(self, error: BaseException) -> None:
        self._error, self._stage = error, "failed"


def obey(experts: Any, order: HoldOrder | None) -> HostReport | None:
    """What a rank that has whole experts does with an order, and its report then."""
    if experts is None or not hasattr(experts, "host"):
        return None
    if order is not None:
        (experts.keep if order.kept else experts.hold)(list(order.places))
    report: HostReport = experts.host("")
    return report


def words_of(error: BaseException) -> tuple[str, str]:
    """Kind and words of an error that has to travel."""
    if isinstance(error, UnderstudyError):
        return error.kind, error.message
    if isinstance(error, GroupBroken):
        return Unavailable.kind, str(error)
    return "INTERNAL", f"{type(error).__name__}: {error}"


async def warm_up(loop: EngineLoop) -> None:
    """One short sequence through the whole engine, so that the first caller does not wait for first-time costs.

    Raises RuntimeError when it fails.
    """
    error = await one_sequence(loop, "warm-up", 2)
    if error:
        raise RuntimeError(f"the engine cannot make a token: {error}")


def rank_actor(*, num_cpus: float, num_gpus: float = 0.0, **options: Any) -> Any:
    """`Rank` as a Ray actor class with its resources named."""
    import ray

    return ray.remote(Rank).options(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0, **options)


def leader_actor(*, num_cpus: float, num_gpus: float = 0.0, **options: Any) -> Any:
    """`Leader` as a Ray actor class with its resources named. It is never restarted: its supervisor starts another."""
    import ray

    return ray.remote(Leader).options(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0, **options)
