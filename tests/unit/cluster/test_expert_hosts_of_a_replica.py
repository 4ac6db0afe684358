"""A replica's expert hosts without Ray: real hosts in threads of this process, the router's rules, a real engine."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from array import array
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "experts"))
from expert_stage import SECRET, open_host, runner_over
from tiny_mixture import write_mixture

from cluster.expert_hosts import ExpertHosts
from cluster.roster import Claim
from router.rebalance import ExpertsOrder, ExpertsReport, ExpertsView, Rebalancers, Rules
from understudy.errors import CheckpointError, ConfigError, ModelNotFound
from workers.engine.contract import EngineConfig
from workers.engine.plan import Chunk, StepPlan
from workers.engine.runner import Runner
from workers.experts.host import ExpertHost
from workers.experts.limits import check_hosts, expert_layers
from workers.experts.placement import HostReport, HostsView
from workers.model.config import read_spec
from workers.model.spec import DenseFfn

TOKENS = list(range(1, 30))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixture(tmp_path_factory.mktemp("mixture"))


class Port:
    """A host in this process as `ExpertHosts` sees one in another."""

    def __init__(self, host: ExpertHost, may_start: asyncio.Event) -> None:
        self.host, self._may_start = host, may_start
        self.dead = self.stuck = False

    async def _alive(self) -> None:
        if self.stuck:
            await asyncio.Event().wait()
        if self.dead:
            raise ConnectionError("the process is dead")

    async def start(self) -> HostReport:
        await self._may_start.wait()
        await self._alive()
        return self.host.report()

    async def report(self) -> HostReport:
        await self._alive()
        return self.host.report()

    async def hold(self, places: list[tuple[int, int]]) -> None:
        await self._alive()
        self.host.hold(places)

    async def keep(self, places: list[tuple[int, int]]) -> None:
        await self._alive()
        self.host.keep(places)

    def kill(self) -> None:
        self.dead = True
        self.host.stop()


class Stage:
    """One replica with `count` hosts."""

    def __init__(self, path: Path, count: int, capacity: int = 24) -> None:
        self.path, self.capacity, self.now = path, capacity, 0.0
        self.rebalancers = Rebalancers(lambda: self.now, Rules(window_s=5.0, rows_per_host=1))
        self.router_gone = False
        self.ports: dict[tuple[str, int], Port] = {}
        self.failures: dict[tuple[str, int], Exception] = {}
        layers, experts = expert_layers(read_spec(path))
        self.hosts = ExpertHosts(
            model="m", layers=layers, experts=experts, count=count, secret=SECRET, start_host=self.start_host,
            router=self, beat_s=0.02, silence_s=0.1, clock=lambda: self.now,
        )  # fmt: skip
        self.runner: Runner | None = None
        self.may_start = asyncio.Event()
        self.may_start.set()

    def start_host(self, name: str, life: int) -> Port:
        host = open_host(self.path, name, kernels="plain", life=life, capacity=self.capacity)
        port = self.ports[name, life] = Port(host, self.may_start)
        failure = self.failures.get((name, life))
        if failure is not None:

            async def fail() -> HostReport:
                raise failure

            port.start = fail  # type: ignore[method-assign]
        return port

    async def experts(self, report: ExpertsReport) -> ExpertsOrder:
        if self.router_gone:
            raise ConnectionError("the router is gone")
        as_sent = msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=ExpertsReport)
        return msgspec.msgpack.decode(msgspec.msgpack.encode(self.rebalancers.hear(as_sent)), type=ExpertsOrder)

    async def place_experts(self, view: HostsView) -> None:
        assert self.runner is not None
        assert self.runner.experts is not None
        await asyncio.to_thread(self.runner.experts.offer, view)

    async def start(self) -> None:
        await self.hosts.prepare(Claim("m-0", 1))
        self.runner = runner_over(self.path, self.hosts.plan, kernels="plain")
        experts = self.runner.experts
        assert experts is not None
        self.hosts.attach(self, experts.report)

    async def step(self) -> torch.Tensor:
        assert self.runner is not None
        plan = StepPlan(0, [Chunk("s", 0, TOKENS, (array("i", range(2)),), len(TOKENS))])
        return await asyncio.to_thread(self.runner.run, plan)

    async def until(self, predicate: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not predicate():
                self.now += 0.05
                await asyncio.sleep(0.01)

    @property
    def view(self) -> ExpertsView:
        (view,) = self.rebalancers.views()
        return view

    def settled(self, version: int, hosts: int) -> bool:
        view = self.view
        return (
            view.version == view.target == version
            and [h.state for h in view.hosts] == ["ready"] * hosts
            and sum(h.held for h in view.hosts) == view.copies
        )

    async def stop(self) -> None:
        if self.runner is not None:
            self.runner.close()
        await self.hosts.stop()


@pytest.fixture
async def stage(mixture: Path) -> AsyncIterator[Stage]:
    made = Stage(mixture, 2)
    yield made
    await made.stop()


@pytest.fixture(scope="module")
def want(mixture: Path) -> torch.Tensor:
    runner = Runner.from_checkpoint(EngineConfig(model_dir=str(mixture), kernels="plain", threads=1))
    return runner.run(StepPlan(0, [Chunk("s", 0, TOKENS, (array("i", range(2)),), len(TOKENS))]))


async def test_hosts_hold_all_experts_and_are_told_of(stage: Stage, want: torch.Tensor) -> None:
    await stage.start()
    assert torch.equal(await stage.step(), want)
    await stage.until(lambda: stage.settled(1, 2))
    assert stage.view.copies == 27, "one in eight has a second home"
    assert sum(h.rows for h in stage.view.hosts) == 3 * 29 * 2 or await stage.step() is not None
    assert [(p.role, p.replica, p.rank) for p in stage.hosts.processes()] == [
        ("expert_host", "m-0", 0), ("expert_host", "m-0", 1)
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["dead", "stuck"])
async def test_a_lost_host_is_replaced_and_gets_its_experts_back(stage: Stage, want: torch.Tensor, how: str) -> None:
    await stage.start()
    await stage.until(lambda: stage.settled(1, 2))
    first = stage.ports["h0", 1]
    stage.may_start.clear()
    setattr(first, how, True)
    first.host.stop()
    assert torch.equal(await stage.step(), want)
    assert stage.ports["h1", 1].host.report().asked == 24, "the other one stands in"
    stage.may_start.set()
    await stage.until(lambda: stage.view.hosts[0].life == 2 and stage.settled(1, 2))
    assert torch.equal(await stage.step(), want)
    assert stage.ports["h0", 2].host.report().rows != ((0,) * 8,) * 3
    assert stage.ports["h1", 1].host.report().held in (13, 14), "what it stood in for is given back"


async def test_hosts_are_added_and_removed(stage: Stage, want: torch.Tensor) -> None:
    await stage.start()
    await stage.until(lambda: stage.settled(1, 2))
    stage.rebalancers.scale("m", 4)
    await stage.until(lambda: stage.settled(2, 4))
    assert torch.equal(await stage.step(), want)
    stage.rebalancers.scale("m", 1)
    await stage.until(lambda: len(stage.view.hosts) == 1 and stage.settled(3, 1))
    assert torch.equal(await stage.step(), want)
    assert [port.dead for port in stage.ports.values()] == [False, True, True, True]


async def test_without_a_router_the_last_placement_stays_and_hosts_are_replaced(
    stage: Stage, want: torch.Tensor
) -> None:
    await stage.start()
    await stage.until(lambda: stage.settled(1, 2))
    stage.router_gone = True
    first = stage.ports["h0", 1]
    first.dead = True
    first.host.stop()
    assert torch.equal(await stage.step(), want)
    await stage.until(lambda: ("h0", 2) in stage.ports and stage.ports["h0", 2].host.report().held in (13, 14))
    stage.rebalancers = Rebalancers(lambda: stage.now)  # it has lost its memory
    stage.router_gone = False
    await stage.until(lambda: stage.rebalancers.views() and stage.settled(1, 2))
    assert torch.equal(await stage.step(), want)


async def test_all_hosts_lost_at_once(stage: Stage, want: torch.Tensor) -> None:
    await stage.start()
    await stage.until(lambda: stage.settled(1, 2))
    for port in [*stage.ports.values()]:
        port.dead = True
        port.host.stop()
    step = asyncio.create_task(stage.step())
    await stage.until(step.done)
    assert torch.equal(step.result(), want)


async def test_a_host_that_cannot_start_is_the_replicas_error(stage: Stage) -> None:
    stage.failures["h1", 1] = CheckpointError("model.safetensors: is truncated")
    with pytest.raises(CheckpointError, match="truncated"):
        await stage.start()


async def test_hosts_without_room_are_the_replicas_error(mixture: Path) -> None:
    stage = Stage(mixture, 2, capacity=9)
    with pytest.raises(ConfigError, match=r"2 hosts have room for 9, 9 experts of the model's 24; 3 hosts of 9"):
        await stage.start()
    await stage.stop()


async def test_scaling_that_cannot_be_is_refused(stage: Stage) -> None:
    stage.capacity = 12
    with pytest.raises(ModelNotFound, match="--expert-hosts"):
        stage.rebalancers.scale("m", 2)
    await stage.start()
    await stage.until(lambda: stage.settled(1, 2))
    for hosts, words in ((9, "1 to 8"), (0, "1 to 8"), (1, "1 hosts have room for 12 experts of the model's 24")):
        with pytest.raises(ConfigError, match=words):
            stage.rebalancers.scale("m", hosts)


def test_more_hosts_than_experts_and_models_without(mixture: Path) -> None:
    spec = read_spec(mixture)
    check_hosts(spec, 8, "--expert-hosts")
    with pytest.raises(ConfigError, match=r"--expert-hosts = 9: OlmoeForCausalLM has 8 experts in a layer.*at most 8"):
        check_hosts(spec, 9, "--expert-hosts")
    dense = dataclasses.replace(spec, ffn=(DenseFfn(16),) * spec.layers)
    with pytest.raises(ConfigError, match="--expert-hosts = 2: OlmoeForCausalLM has no experts; leave it out"):
        check_hosts(dense, 2, "--expert-hosts")
