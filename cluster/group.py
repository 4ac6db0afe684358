"""A replica's ranks as one leader: started together, watched together, ended together. A plain class.

Whatever happens to one rank happens to all: nothing can be computed without it, and its supervisor starts another
replica.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import msgspec

from understudy.errors import Unavailable, UnderstudyError
from workers.actors import LeaderReport, RankReport
from workers.experts.placement import HoldOrder, HostReport, HostsView
from workers.parallel.meeting import Meeting

CAUSE_S = 2.0  # after one rank has failed, for the others to say whether it was they who began
GROUP_BROKEN = Unavailable.kind  # of a rank that only says that another one is lost


class RankPort(Protocol):
    """A rank other than the first, in a process of its own. Raises ConnectionError when that process is gone."""

    async def start(self, meeting: Meeting) -> RankReport: ...

    async def report(self) -> RankReport: ...

    async def place_experts(self, view: HostsView) -> None: ...

    async def experts(self, order: HoldOrder | None = None) -> HostReport | None:
        """This rank as a host of whole experts, after an order; None where it is not one, or not yet."""

    def kill(self) -> None:
        """Ends the process now. Idempotent."""


class FirstPort(Protocol):
    """Rank 0, which holds the engine."""

    async def meet(self, size: int, one_machine: bool, address: str) -> Meeting: ...

    async def start(self, meeting: Meeting | None = None) -> LeaderReport: ...

    async def report(self, wanted: int | None = None) -> LeaderReport: ...

    async def drain(self, seconds: float) -> bool: ...

    async def stop(self) -> None: ...

    async def place_experts(self, view: HostsView) -> None: ...

    async def experts(self, order: HoldOrder | None = None) -> HostReport | None: ...

    def kill(self) -> None: ...


class Ranks(msgspec.Struct, frozen=True):
    """The processes of a group, and where they stand. `nodes` are the ranks'."""

    first: FirstPort
    others: Sequence[RankPort]
    nodes: Sequence[str]
    one_machine: bool
    address: str


class RankGroup:
    """See `cluster.supervisor.LeaderPort`. `place` makes the processes; `clear` gives back what they stood on."""

    def __init__(self, place: Callable[[], Awaitable[Ranks]], clear: Callable[[], None] = lambda: None) -> None:
        self._place, self._clear = place, clear
        self._ranks: Ranks | None = None
        self._killed = False
        self._asked: set[int] = set()  # ranks that owe an answer

    async def start(self) -> LeaderReport:
        """Raises ConnectionError that names the rank whose process ended."""
        try:
            ranks = self._ranks = await self._place()
        except UnderstudyError as error:
            return LeaderReport("failed", 0.0, 0, error_kind=error.kind, error=error.message)
        if self._killed:
            self.kill()
            raise ConnectionError("it was ended while its ranks were being placed")
        meeting = await _of_rank(0, ranks.first.meet(1 + len(ranks.others), ranks.one_machine, ranks.address))
        starts = [ranks.first.start(meeting), *(port.start(meeting) for port in ranks.others)]
        tasks = [asyncio.ensure_future(_started(rank, start)) for rank, start in enumerate(starts)]
        try:
            await asyncio.gather(*tasks)
        except _Failed:
            await asyncio.wait(tasks, timeout=CAUSE_S)
            told = [task.exception() for task in tasks if task.done()]
            cause = min((e for e in told if isinstance(e, _Failed)), key=lambda f: (f.kind == GROUP_BROKEN, f.rank))
            return LeaderReport("failed", 0.0, 0, error_kind=cause.kind, error=str(cause))
        finally:
            for task in tasks:
                task.cancel()
        return await self.report()

    async def report(self, wanted: int | None = None) -> LeaderReport:
        """The leader's, and a rank's failure as its own."""
        if self._ranks is None:
            return LeaderReport("starting", 0.0, 0)
        first, *others = await asyncio.gather(
            self._answer(0, self._ranks.first.report(wanted)),
            *(self._answer(1 + i, port.report()) for i, port in enumerate(self._ranks.others)),
        )
        return self._joined(first, others)

    async def _answer(self, rank: int, question: Awaitable[Any]) -> Any:
        self._asked.add(rank)
        answer = await _of_rank(rank, question)
        self._asked.discard(rank)
        return answer

    async def drain(self, seconds: float) -> bool:
        return True if self._ranks is None else await _of_rank(0, self._ranks.first.drain(seconds))

    async def stop(self) -> None:
        """The leader tells the others when it closes."""
        if self._ranks is not None:
            await _of_rank(0, self._ranks.first.stop())

    async def place_experts(self, view: HostsView) -> None:
        """The leader last: by then the others know what its plans will name."""
        if self._ranks is not None:
            others = enumerate(self._ranks.others, 1)
            await asyncio.gather(*(_of_rank(rank, port.place_experts(view)) for rank, port in others))
            await _of_rank(0, self._ranks.first.place_experts(view))

    async def experts(self, rank: int, order: HoldOrder | None = None) -> HostReport | None:
        """What a rank that has whole experts says of itself, after an order; None where it has not loaded yet."""
        if self._ranks is None:
            return None
        port: FirstPort | RankPort = self._ranks.others[rank - 1] if rank else self._ranks.first
        report: HostReport | None = await _of_rank(rank, port.experts(order))
        return None if report is None else msgspec.structs.replace(report, node=self._ranks.nodes[rank])

    def awaited(self) -> str:
        """The ranks that have not answered the question under way."""
        return ", ".join(f"rank {rank}" for rank in sorted(self._asked))

    def kill(self) -> None:
        """Ends every rank's process now. Idempotent."""
        self._killed = True
        if self._ranks is not None:
            self._ranks.first.kill()
            for port in self._ranks.others:
                port.kill()
        self._clear()

    def _joined(self, first: LeaderReport, others: Sequence[RankReport]) -> LeaderReport:
        assert self._ranks is not None
        ranks = tuple((other.pid, node) for other, node in zip(others, self._ranks.nodes[1:], strict=True))
        report = msgspec.structs.replace(first, ranks=ranks)
        for rank, other in enumerate(others, 1):
            if other.stage == "failed" and report.stage != "failed":
                words = f"rank {rank}: {other.error}"
                report = msgspec.structs.replace(report, stage="failed", error_kind=other.error_kind, error=words)
        return report


class _Failed(Exception):
    """A rank said that it cannot start."""

    def __init__(self, rank: int, report: LeaderReport | RankReport) -> None:
        super().__init__(report.error if rank == 0 else f"rank {rank}: {report.error}")
        self.rank, self.kind = rank, report.error_kind


async def _started(rank: int, start: Awaitable[Any]) -> Any:
    report = await _of_rank(rank, start)
    if report.stage == "failed":
        raise _Failed(rank, report)
    return report


async def _of_rank(rank: int, call: Awaitable[Any]) -> Any:
    try:
        return await call
    except ConnectionError as error:
        raise ConnectionError(f"rank {rank}: {error}") from error
