"""A gateway, the router actor's class and leaders in one process, over real wires: models that have no replica yet, and
versions that replace one another. No Ray: what it would carry is awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from cluster.catalog import Texts
from cluster.config import load
from cluster.directory import Directory, DirectoryActor
from cluster.gateway import GatewayApp
from cluster.plan import GatewayPlan, read_text_files
from cluster.roster import Claim, Member, ProcessInfo
from cluster.serve import with_free_ports
from cluster.wire import LeaderServer
from cluster.written import Bounds
from understudy.aio import AsyncClient
from workers.actors import ColdStart, LeaderReport
from workers.engine.fake import FakeEngine
from workers.engine.loop import EngineLoop


class Handle:
    """An actor's handle: `handle.method.remote(...)` is awaited."""

    def __init__(self, actor: DirectoryActor) -> None:
        self._actor = actor

    def __getattr__(self, method: str) -> Any:
        return type("Method", (), {"remote": staticmethod(getattr(self._actor, method))})


class Stage:
    def __init__(self, actor: DirectoryActor, model: Path, gateway: GatewayApp, port: int) -> None:
        self.actor, self.gateway, self.address = actor, gateway, f"127.0.0.1:{port}"
        self.directory = gateway._directory
        self._files = read_text_files(model)
        self._vocabulary = Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab_size()

    @asynccontextmanager
    async def replica(self, name: str, fingerprint: str, generation: int) -> AsyncIterator[Callable[[str], Any]]:
        """A leader that beats until the block ends; gives a way to change its stage."""
        engine = FakeEngine(vocab_size=self._vocabulary, model="text", fingerprint=fingerprint, max_running=4)
        with EngineLoop(engine) as loop:
            server = LeaderServer(loop, replica=name, epoch=1, secret="s")
            address = await server.start()
            stage = ["ready"]

            async def beat() -> None:
                while True:
                    start = ColdStart(1.0, 2.0, 3.0, 0.5, 0.25)
                    report = LeaderReport(stage[0], 1.0, 7, address, loop.info, loop.stats(), cold_start=start)
                    process = ProcessInfo("replica", 7, "n", name)
                    member = Member(name, "replica", stage[0], (process,), 1.0, "text", Claim(name, 1))
                    await self.directory.announce(member, report, "n")
                    await self.directory.lend_texts("text", fingerprint, Texts(generation, self._files))
                    await asyncio.sleep(0.05)

            beating = asyncio.create_task(beat())
            try:
                yield lambda to: stage.__setitem__(0, to)
            finally:
                beating.cancel()
                await asyncio.gather(beating, return_exceptions=True)
                await self.directory.leave(name, Claim(name, 1))
                await server.stop()


@pytest.fixture
async def stage(demo_model: Path) -> AsyncIterator[Stage]:
    ports = {"port": 0, "admin_port": 0, "metrics_port": 0}
    config = with_free_ports(load({"model": [f"text={demo_model}"], "replicas": "0:2"} | ports))
    actor = DirectoryActor()
    directory = Directory(Handle(actor), 30.0)
    plan = GatewayPlan(config, {"text": Bounds(0, 2)}, "s")
    gateway = GatewayApp(plan, directory, holder="g", node="n")
    port = await gateway.start()
    try:
        yield Stage(actor, demo_model, gateway, port)
    finally:
        await gateway.stop(0.0)


async def until(predicate: Callable[[], Any]) -> None:
    while not predicate():  # noqa: ASYNC110  # what is waited for has no event
        await asyncio.sleep(0.02)


async def fingerprint_of(client: AsyncClient, seed: int = 1) -> str:
    done = await client.complete("hello", seed=seed, max_tokens=4, ignore_eos=True)
    return done.prompt.model_fingerprint


async def test_who_asks_before_there_is_a_replica_is_answered_by_the_first(stage: Stage) -> None:
    members = await stage.directory.members()
    assert [(m.role, m.stage) for m in members] == [("gateway", "ready")], "it does not wait for what may be absent"
    async with AsyncClient(stage.address) as client:
        asked = asyncio.create_task(fingerprint_of(client))
        demand = stage.actor._router.demand
        await until(lambda: demand().get("text") and demand()["text"].unserved == 1)
        async with stage.replica("text-0", "old", 1):
            assert await asked == "old"
            status = await stage.gateway._status.status()
            (model,), (replica,) = status.models, status.replicas
            assert (model.replicas_ready, model.replicas_least, model.replicas_most) == (1, 0, 2)
            assert (replica.cold_start.weights_s, replica.cold_start.warm_up_s) == (3.0, 0.25)
            assert demand()["text"].unserved == 0


async def test_a_newer_version_takes_over_and_the_older_one_leaves(stage: Stage) -> None:
    async with AsyncClient(stage.address) as client, stage.replica("text-0", "old", 1) as turn_old:
        assert await fingerprint_of(client) == "old"
        async with stage.replica("text-1", "new", 2):
            models = stage.gateway._gateway.models
            await until(lambda: models.all()[0].info.model_fingerprint == "new")
            found = {await fingerprint_of(client, seed) for seed in range(40)}
            assert found == {"old", "new"}, "requests are spread as replicas are"
            status = await stage.gateway._status.status()
            assert (status.models[0].versions, status.models[0].model_fingerprint) == (2, "new")
            turn_old("draining")
            await until(lambda: models.superseded("text", "old"))
            assert {await fingerprint_of(client, seed) for seed in range(10)} == {"new"}


async def test_another_template_of_the_same_weights_is_taken(stage: Stage) -> None:
    async with stage.replica("text-0", "same", 1):
        await until(lambda: stage.gateway._versions.get(("text", "same")) == 1)
        async with stage.replica("text-1", "same", 2):
            await until(lambda: stage.gateway._versions.get(("text", "same")) == 2)
