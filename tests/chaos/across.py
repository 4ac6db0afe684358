"""A leader or a gateway as a program of its own, for hosts that a network lies between. No Ray.

    python across.py leader NAME HOST MODEL            says its address, then serves until its input ends
    python across.py gateway NAME=ADDRESS NAME=ADDRESS MODEL

The gateway streams eight answers, then says "streaming" once all have begun a second time, waits for a line, says
"ended" with their ends, and, once it has wires to both replicas again, what came of them.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cluster.wire import GrpcReplicaChannel, LeaderServer
from router.channels import Link, Timing
from router.gateway import Gateway
from router.models import TEXT_FILES, ServedModel
from router.port import Assignment, Query, ReplicaView
from router.server import GatewayConfig
from router.state import Router
from understudy.client import Client
from workers.actors import Leader, build_real_engine
from workers.engine import EngineConfig

SECRET, STREAMS, TOKENS = "a secret of two hosts", 8, 300


async def lead(name: str, host: str, model: str) -> None:
    wire = partial(LeaderServer, replica=name, epoch=1, secret=SECRET, host=host)
    leader = Leader(EngineConfig(model, name="text", dtype="float32", threads=1), build_real_engine, wire)
    report = await leader.start()
    _say(report.address or report.error)
    await asyncio.to_thread(sys.stdin.read)
    await leader.stop()


class Known:
    """A router's port that knows two replicas: it hears of each by the gateway's own wire, or by asking whether
    something listens, as a supervisor beside the replica would tell it."""

    def __init__(self, addresses: dict[str, str]) -> None:
        self.addresses = addresses
        self.router = Router(self)
        self.gateway: Gateway | None = None

    def now(self) -> float:
        return time.monotonic()

    async def meet(self) -> None:
        """Learns what the replicas are."""
        for name, address in self.addresses.items():
            channel = GrpcReplicaChannel(address, gateway="meets", secret=SECRET)
            hello = await anext(channel.messages())
            self.router.register(name, address, 1, hello.info)  # type: ignore[union-attr]
            await channel.close()

    async def _hear(self) -> None:
        links: dict[str, Link] = {} if self.gateway is None else {k.replica: k for k in self.gateway.pool.alive()}
        for name, address in self.addresses.items():
            if name in links:
                self.router.beat(name, 1, links[name].stats)
            elif await _listens(address):
                self.router.beat(name, 1, self.router.snapshot()[0].stats)

    async def assign(self, query: Query) -> Assignment:
        await self._hear()
        return self.router.assign(query)

    async def release(self, leases: Sequence[int]) -> None:
        self.router.release(leases)

    async def clear(self, leases: Sequence[int]) -> None:
        self.router.clear(leases)

    async def replicas(self) -> list[ReplicaView]:
        await self._hear()
        return self.router.snapshot()


async def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(0.2):
            _, writer = await asyncio.open_connection(host, int(port))
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


async def serve(addresses: dict[str, str], model: str) -> None:
    known = Known(addresses)
    await known.meet()
    files = {name: (Path(model) / name).read_bytes() for name in TEXT_FILES if (Path(model) / name).is_file()}
    served = ServedModel.from_files(known.router.snapshot()[0].info, files)

    async def connect(_replica: str, address: str) -> GrpcReplicaChannel:
        return GrpcReplicaChannel(address, gateway="crossing", secret=SECRET)

    gateway = Gateway(
        GatewayConfig(port=0, watch_s=0.1), known, connect, [served], timing=Timing(heartbeat_timeout=1.0)
    )
    known.gateway = gateway
    port = await gateway.start()
    while len(gateway.pool.alive()) < len(addresses):
        await gateway.refresh()
        await asyncio.sleep(0.02)
    told = await asyncio.to_thread(play, port)
    told["failovers"] = gateway.dispatcher.failovers
    _say("ended")
    while len(gateway.pool.alive()) < len(addresses):  # noqa: ASYNC110  # the wire is whole again
        await asyncio.sleep(0.02)
    _say(json.dumps(told))
    await gateway.stop()


def _say(text: str) -> None:
    print(f"says {text}", flush=True)  # the log has the same output


def play(port: int) -> dict[str, object]:
    def ask(client: Client, seed: int):  # type: ignore[no-untyped-def]
        return client.generate([1, 2], seed=seed, temperature=1.0, max_tokens=TOKENS, ignore_eos=True, timeout=120)

    with Client(f"127.0.0.1:{port}") as client:
        expected = [s.completion().choices[0].token_ids for s in [_read(ask(client, i)) for i in range(STREAMS)]]
        streams = [ask(client, i) for i in range(STREAMS)]
        for stream in streams:
            next(stream)
        _say("streaming")
        sys.stdin.readline()
        gaps = [0.0] * STREAMS
        readers = [threading.Thread(target=_read, args=(stream, gaps, i)) for i, stream in enumerate(streams)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        got = [s.completion().choices[0].token_ids for s in streams]
    return {"same": got == expected, "longest_pause_s": max(gaps)}


def _read(stream, gaps=None, number=0):  # type: ignore[no-untyped-def]
    last = time.monotonic()
    for _ in stream:
        now = time.monotonic()
        if gaps is not None:
            gaps[number] = max(gaps[number], now - last)
        last = now
    return stream


if __name__ == "__main__":
    if sys.argv[1] == "leader":
        asyncio.run(lead(*sys.argv[2:]))
    else:
        asyncio.run(serve(dict(a.split("=") for a in sys.argv[2:-1]), sys.argv[-1]))
