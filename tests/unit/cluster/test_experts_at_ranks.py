"""A replica whose ranks have its experts, without Ray: real ranks in threads, the router's rules."""

from __future__ import annotations

import asyncio
import sys
from array import array
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "experts"))
from ranks import Divided, divided_runner
from tiny_mixture import write_mixture

from cluster.expert_actors import RankHost
from cluster.expert_hosts import ExpertHosts
from cluster.group import RankGroup, Ranks
from cluster.roster import Claim
from router.rebalance import ExpertsOrder, ExpertsReport, ExpertsView, Rebalancers, Rules
from understudy.errors import ConfigError
from workers.actors import obey
from workers.engine.contract import EngineConfig
from workers.engine.plan import Chunk, StepPlan
from workers.experts.limits import expert_layers
from workers.experts.placement import HoldOrder, HostReport, HostsView, rank_of
from workers.model.config import read_spec

TOKENS = [3] * 29  # all rows choose the same two experts of each layer, which begin at one rank


class Port:
    """One rank, as far as experts go."""

    def __init__(self, stage: Stage, rank: int) -> None:
        self._stage, self._rank = stage, rank

    async def place_experts(self, view: HostsView) -> None:
        self._stage.told.append((self._rank, view.number))
        self._stage.runner.runners[self._rank].experts.offer(view)  # type: ignore[union-attr]

    async def experts(self, order: HoldOrder | None = None) -> HostReport | None:
        if self._rank == 1:
            await self._stage.awake.wait()
        return obey(self._stage.runner.runners[self._rank].experts, order)


class Stage:
    """One replica over two ranks."""

    def __init__(self, path: Path, runner: Divided) -> None:
        self.runner, self.now = runner, 0.0
        self.told: list[tuple[int, int]] = []
        self.awake = asyncio.Event()  # rank 1
        self.awake.set()
        self.rebalancers = Rebalancers(lambda: self.now, Rules(window_s=5.0, rows_per_host=1))
        layers, experts = expert_layers(read_spec(path))
        self.group = RankGroup(self.place)
        self.hosts = ExpertHosts(
            model="m", layers=layers, experts=experts, count=2, secret="", router=self, beat_s=0.02, silence_s=0.1,
            start_host=lambda name, life: RankHost(lambda: self.group, rank_of(name)), at_ranks=True,
            clock=lambda: self.now,
        )  # fmt: skip

    async def place(self) -> Ranks:
        return Ranks(Port(self, 0), [Port(self, 1)], ["node-a", "node-b"], False, "")  # type: ignore[arg-type,list-item]

    async def experts(self, report: ExpertsReport) -> ExpertsOrder:
        as_sent = msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=ExpertsReport)
        return msgspec.msgpack.decode(msgspec.msgpack.encode(self.rebalancers.hear(as_sent)), type=ExpertsOrder)

    async def start(self) -> None:
        await self.hosts.prepare(Claim("m-0", 1))
        self.hosts.attach(self.group, self.runner.leader.experts.report)  # type: ignore[union-attr]
        for _ in range(3):  # nobody is there yet
            await self.hosts.tend()
        self.group._ranks = await self.place()

    async def step(self) -> torch.Tensor:
        plan = StepPlan(0, [Chunk("s", 0, TOKENS, (array("i", range(2)),), len(TOKENS))])
        return await asyncio.to_thread(self.runner.run, plan)

    @property
    def view(self) -> ExpertsView:
        (view,) = self.rebalancers.views()
        return view

    def settled(self, version: int) -> bool:
        found = self.rebalancers.views()
        return bool(found) and (
            found[0].version == found[0].target == version
            and [h.state for h in found[0].hosts] == ["ready"] * 2
            and sum(h.held for h in found[0].hosts) == found[0].copies
        )

    async def until_settled(self, version: int, want: torch.Tensor | None = None) -> None:
        async with asyncio.timeout(30):
            while not self.settled(version):
                self.now += 0.25
                await asyncio.sleep(0.01)
                if want is not None:
                    assert torch.equal(await self.step(), want)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixture(tmp_path_factory.mktemp("mixture"))


@pytest.fixture
async def stage(mixture: Path) -> AsyncIterator[Stage]:
    config = EngineConfig(
        str(mixture), kernels="plain", threads=1, max_running=4, tensor_parallel=2, expert_parallel=True
    )
    with divided_runner(config) as runner:
        made = Stage(mixture, runner)
        yield made
        await made.hosts.stop()


async def test_the_router_knows_what_lies_where(stage: Stage) -> None:
    await stage.start()
    await stage.step()
    await stage.until_settled(1)
    assert [(h.name, h.node, h.held) for h in stage.view.hosts] == [("r0", "node-a", 12), ("r1", "node-b", 12)]
    assert (stage.view.experts, stage.view.copies, stage.view.wanted) == (24, 24, 2)
    assert stage.hosts.processes() == (), "ranks are told as such"


async def test_hot_experts_move_to_the_other_rank_and_no_bit_changes(stage: Stage) -> None:
    """Two experts of each layer have all rows."""
    await stage.start()
    want = await stage.step()
    await stage.until_settled(1)
    await stage.step()
    await stage.hosts.tend()
    assert stage.view.balance < 0.6
    await stage.until_settled(2, want)
    assert stage.view.balance > 0.95
    assert stage.view.copies > 24, "where there is room some have a second home"
    said = [part.experts.report().version for part in stage.runner.runners]  # type: ignore[union-attr]
    assert said == [2, 2]
    assert [rank for rank, _ in stage.told] == [1, 0, 1, 0], "the leader hears of it last"
    assert [number for _, number in stage.told[::2]] == [number for _, number in stage.told[1::2]]


async def test_a_rank_that_was_slow_counts_nothing_twice(stage: Stage) -> None:
    await stage.start()
    want = await stage.step()
    await stage.until_settled(1)
    await stage.step()
    await stage.hosts.tend()
    counted = sum(map(sum, stage.hosts._rows))
    assert counted == 3 * 2 * len(TOKENS)
    stage.awake.clear()
    async with asyncio.timeout(30):
        while stage.view.hosts[1].state != "lost":
            stage.now += 0.2
            await asyncio.sleep(0.02)
    stage.awake.set()
    await stage.until_settled(1)
    assert sum(map(sum, stage.hosts._rows)) == counted
    assert torch.equal(await stage.step(), want)


async def test_their_number_cannot_be_changed(stage: Stage) -> None:
    await stage.start()
    await stage.step()
    await stage.until_settled(1)
    with pytest.raises(ConfigError, match=r"'m' are at its 2 ranks \(--expert-parallel\), .* --expert-hosts N"):
        stage.rebalancers.scale("m", 3)
