"""A replica's ranks as one leader, without Ray: what happens to one happens to all, and is said with its cause."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from cluster.group import RankGroup, Ranks
from understudy.errors import ConfigError, Unavailable
from workers.actors import LeaderReport, RankReport
from workers.experts.placement import HostsView
from workers.parallel.meeting import Meeting


class Process:
    """A rank's process: `says` is what its start answers, once `gate` is open."""

    def __init__(self, rank: int, says: tuple[str, str] = ("", ""), gate: asyncio.Event | None = None) -> None:
        self.rank, self.says, self.gate = rank, says, gate
        self.dead = ""
        self.kills = self.stops = 0
        self.meeting: Meeting | None = None

    def _report(self) -> LeaderReport | RankReport:
        kind, error = self.says
        stage = "failed" if kind else "ready"
        if self.rank == 0:
            return LeaderReport(stage, 1.0, 100, error_kind=kind, error=error)
        return RankReport(stage, 100 + self.rank, kind, error)

    async def _alive(self) -> None:
        if self.dead:
            raise ConnectionError(self.dead)

    async def meet(self, size: int, one_machine: bool, address: str) -> Meeting:
        await self._alive()
        return Meeting("shared" if one_machine else "gloo", size, address)

    async def start(self, meeting: Meeting | None = None) -> LeaderReport | RankReport:
        self.meeting = meeting
        if self.gate is not None:
            await self.gate.wait()
        await self._alive()
        return self._report()

    async def report(self, wanted: int | None = None) -> LeaderReport | RankReport:
        await self._alive()
        return self._report()

    async def drain(self, seconds: float) -> bool:
        await self._alive()
        return True

    async def stop(self) -> None:
        self.stops += 1

    async def place_experts(self, view: HostsView) -> None: ...

    def kill(self) -> None:
        self.kills += 1


def group(processes: list[Process], clear: Callable[[], None] = lambda: None) -> RankGroup:
    async def place() -> Ranks:
        nodes = [f"node-{p.rank}" for p in processes]
        return Ranks(processes[0], processes[1:], nodes, True, "127.0.0.1")  # type: ignore[arg-type]

    return RankGroup(place, clear)


async def test_all_meet_at_one_place_and_are_reported_as_one() -> None:
    processes = [Process(rank) for rank in range(3)]
    report = await group(processes).start()
    assert {p.meeting for p in processes} == {Meeting("shared", 3, "127.0.0.1")}
    assert (report.stage, report.pid, report.ranks) == ("ready", 100, ((101, "node-1"), (102, "node-2")))


async def test_the_rank_that_began_it_is_named_not_those_that_lost_it() -> None:
    gate = asyncio.Event()
    processes = [Process(0, ("UNAVAILABLE", "rank 2 has given up")), Process(1, ("UNAVAILABLE", "rank 2 has given up"))]
    processes.append(Process(2, ("CHECKPOINT", "model.safetensors: is truncated"), gate))
    starting = asyncio.ensure_future(group(processes).start())
    await asyncio.sleep(0)
    gate.set()
    report = await starting
    assert (report.stage, report.error_kind) == ("failed", "CHECKPOINT")
    assert report.error == "rank 2: model.safetensors: is truncated"


async def test_a_rank_whose_process_ends_is_named() -> None:
    processes = [Process(rank) for rank in range(2)]
    whole = group(processes)
    await whole.start()
    processes[1].dead = "the actor died"
    with pytest.raises(ConnectionError, match="rank 1: the actor died"):
        await whole.report()
    processes[0].dead, processes[1].dead = "killed", ""
    with pytest.raises(ConnectionError, match="rank 0: killed"):
        await whole.drain(1)


async def test_a_rank_that_fails_later_is_the_groups_failure() -> None:
    processes = [Process(rank) for rank in range(2)]
    whole = group(processes)
    await whole.start()
    processes[1].says = ("INTERNAL", "MemoryError: no memory")
    report = await whole.report()
    assert (report.stage, report.error_kind, report.error) == ("failed", "INTERNAL", "rank 1: MemoryError: no memory")


async def test_killing_ends_every_rank_and_gives_the_place_back() -> None:
    cleared: list[bool] = []
    processes = [Process(rank) for rank in range(3)]
    whole = group(processes, lambda: cleared.append(True))
    await whole.start()
    whole.kill()
    assert [p.kills for p in processes] == [1, 1, 1]
    assert cleared == [True]


async def test_a_group_that_has_no_place_says_so_and_one_ended_meanwhile_ends_its_ranks() -> None:
    async def none() -> Ranks:
        raise ConfigError("tensor_parallel: 4 ranks do not fit")

    report = await RankGroup(none).start()
    assert (report.stage, report.error_kind) == ("failed", ConfigError.kind)
    gate, processes = asyncio.Event(), [Process(0), Process(1)]

    async def late() -> Ranks:
        await gate.wait()
        return Ranks(processes[0], processes[1:], ["n", "n"], True, "127.0.0.1")  # type: ignore[arg-type]

    whole = RankGroup(late)
    starting = asyncio.ensure_future(whole.start())
    await asyncio.sleep(0)
    whole.kill()
    gate.set()
    with pytest.raises(ConnectionError, match="while its ranks were being placed"):
        await starting
    assert [p.kills for p in processes] == [1, 1]
    assert Unavailable.kind == "UNAVAILABLE"
