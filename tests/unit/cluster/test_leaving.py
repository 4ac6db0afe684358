"""Leaving is not failing: what still streams when a replica's drain time is over goes on at another one. Supervisors,
leaders and a gateway over real wires in one process; no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from test_gateway_learns import Handle, until
from test_supervisor import Port
from tokenizers import Tokenizer

from cluster.catalog import Texts
from cluster.config import load
from cluster.directory import Directory, DirectoryActor
from cluster.gateway import GatewayApp
from cluster.plan import GatewayPlan, read_text_files
from cluster.roster import Claim
from cluster.serve import with_free_ports
from cluster.supervisor import Supervisor
from cluster.wire import LeaderServer
from cluster.written import Bounds
from understudy.aio import AsyncClient
from workers.actors import Leader
from workers.engine import EngineConfig
from workers.engine.fake import FakeEngine

TOKENS, STREAMS = 300, 6


class Stage:
    """A gateway; replicas come by `replica`."""

    def __init__(self, model: Path, directory: Directory, gateway: GatewayApp, port: int) -> None:
        self.directory, self.gateway, self.address = directory, gateway, f"127.0.0.1:{port}"
        self._texts = Texts(1, read_text_files(model))
        self._vocabulary = Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab_size()

    @asynccontextmanager
    async def replica(self, holder: str) -> AsyncIterator[Supervisor]:
        def start(claim: Claim) -> Port:
            wire = partial(LeaderServer, replica=claim.replica, epoch=claim.epoch, secret="s")
            engine = FakeEngine(vocab_size=self._vocabulary, model="text", fingerprint="f", step_s=0.005)
            config = EngineConfig(model_dir="nowhere", name="text")
            return Port(Leader(config, lambda _config, _progress: engine, wire, own_process=False))

        supervisor = Supervisor(
            model="text", holder=holder, node="n", start_leader=start, router=self.directory, beat_s=0.05
        )
        await supervisor.start()
        await self.directory.lend_texts("text", "f", self._texts)
        running = asyncio.create_task(supervisor.run())
        try:
            yield supervisor
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await supervisor.leave(0.0)


@pytest.fixture
async def stage(demo_model: Path) -> AsyncIterator[Stage]:
    ports = {"port": 0, "admin_port": 0, "metrics_port": 0}
    config = with_free_ports(load({"model": [f"text={demo_model}"], "replicas": "2"} | ports))
    directory = Directory(Handle(DirectoryActor()), 30.0)
    gateway = GatewayApp(GatewayPlan(config, {"text": Bounds(2, 2)}, "s"), directory, holder="g", node="n")
    port = await gateway.start()
    try:
        yield Stage(demo_model, directory, gateway, port)
    finally:
        await gateway.stop(0.0)


async def test_streams_that_are_left_when_the_drain_time_is_over_move(stage: Stage) -> None:
    async with AsyncExitStack() as stack:
        supervisors = [await stack.enter_async_context(stage.replica(f"h{i}")) for i in range(2)]
        client = await stack.enter_async_context(AsyncClient(stage.address))
        pool = stage.gateway._gateway.pool
        await until(lambda: len(pool.alive()) == 2)

        async def answer(seed: int, begun: asyncio.Event | None = None) -> tuple[int, ...]:
            stream = client.generate("hello", seed=seed, max_tokens=TOKENS, ignore_eos=True)
            async for _ in stream:
                if begun is not None:
                    begun.set()
            return stream.completion().choices[0].token_ids

        expected = await asyncio.gather(*(answer(seed) for seed in range(STREAMS)))
        begun = [asyncio.Event() for _ in range(STREAMS)]
        answers = [asyncio.create_task(answer(seed, event)) for seed, event in enumerate(begun)]
        for event in begun:
            await event.wait()
        busy = next(s for s in supervisors if any(k.attempts for k in pool.alive() if k.replica == s.claim.replica))
        assert await busy.leave(0.05) is False, "its drain time was too short for its streams"
        assert await asyncio.gather(*answers) == expected
        assert stage.gateway._gateway.dispatcher.failovers >= 1
        assert (await stage.directory.figures()).suspects == 0, "nobody killed it"
