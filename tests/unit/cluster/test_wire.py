"""The wire between gateway and leader, over real gRPC on loopback, with the fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest

from cluster.wire import GrpcReplicaChannel, LeaderServer
from router.wire import Beat, Cancel, Hello, Ping, Up, encode
from workers.engine import FinishReason, Request, SequenceOutput, StepOutput
from workers.engine.fake import FakeEngine
from workers.engine.loop import EngineLoop


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def leader(engine: FakeEngine | None = None, **kwargs: object) -> AsyncIterator[LeaderServer]:
    with EngineLoop(engine or FakeEngine()) as loop:
        server = LeaderServer(loop, replica="r0", epoch=3, secret="s", **kwargs)  # type: ignore[arg-type]
        await server.start()
        try:
            yield server
        finally:
            await server.stop()
    loop._engine.check_idle()


def connect(server: LeaderServer, gateway: str = "g0", secret: str = "s", ping_s: float = 0.05) -> GrpcReplicaChannel:
    return GrpcReplicaChannel(server.address, gateway=gateway, secret=secret, ping_s=ping_s)


async def until(predicate: object) -> None:
    while not predicate():  # type: ignore[operator]  # noqa: ASYNC110  # what is waited for has no event
        await asyncio.sleep(0.01)


async def tokens(channel: GrpcReplicaChannel, *ids: str) -> dict[str, list[int]]:
    """What every sequence made, once all have finished."""
    made: dict[str, list[int]] = {i: [] for i in ids}
    open_ = set(ids)
    async for message in channel.messages():
        if isinstance(message, StepOutput):
            for output in message.outputs:
                made[output.id] += output.token_ids
                if output.finish is not None:
                    open_.discard(output.id)
        if not open_:
            return made
    raise AssertionError("the stream ended")


async def test_sequences_stream_one_message_per_step() -> None:
    async with leader(FakeEngine(step_s=0.01)) as server:
        channel = connect(server)
        messages = channel.messages()
        hello = await anext(messages)
        assert isinstance(hello, Hello)
        assert (hello.replica, hello.epoch) == ("r0", 3)
        assert hello.info.model == "fake"
        for i in range(16):
            await channel.send(Request(f"a{i}", [1, 2, 3], 40))
        steps: list[StepOutput] = []
        finished = 0
        async for message in messages:
            if isinstance(message, StepOutput):
                steps.append(message)
                finished += sum(o.finish is not None for o in message.outputs)
            if finished == 16:
                break
        assert len({s.step for s in steps}) == len(steps), "two messages for one step"
        assert len(steps) < 16 * 40 / 4, "a step's tokens travel together"
        by_id = {i: [t for s in steps for o in s.outputs if o.id == i for t in o.token_ids] for i in ("a0", "a15")}
        assert len(by_id["a0"]) == 40
        assert by_id["a0"] == by_id["a15"]
        await channel.close()
        await until(lambda: not server.gateways)


async def test_two_gateways_may_use_the_same_ids() -> None:
    async with leader() as server:
        one, two = connect(server, "g1"), connect(server, "g2")
        await one.send(Request("a", [1], 5))
        await two.send(Request("a", [2], 7))
        a, b = await asyncio.gather(tokens(one, "a"), tokens(two, "a"))
        assert (len(a["a"]), len(b["a"])) == (5, 7)
        assert server.gateways == ["g1", "g2"]
        await one.close()
        await two.close()


async def test_a_cancelled_sequence_is_reported_and_frees_its_place() -> None:
    async with leader(FakeEngine(step_s=0.002)) as server:
        channel = connect(server)
        await channel.send(Request("a", [1], 2000))
        cancelled = False
        async for message in channel.messages():
            if isinstance(message, StepOutput):
                if message.outputs[0].finish is not None:
                    assert message.outputs[0].finish is FinishReason.CANCELLED
                    break
                if not cancelled:
                    cancelled = True
                    await channel.send(Cancel("a"))
        assert server.loop.stats().running == 0
        await channel.close()


async def test_beats_come_without_work() -> None:
    async with leader(beat_s=0.01) as server:
        channel = connect(server)
        seen: list[Up] = []
        async for message in channel.messages():
            seen.append(message)
            if len(seen) == 4:
                break
        assert isinstance(seen[0], Hello)
        assert all(isinstance(m, Beat) and m.epoch == 3 for m in seen[1:])
        await channel.close()


async def test_a_beat_tells_what_keeps_the_engine_from_making_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    async with leader(beat_s=0.01) as server:
        channel = connect(server)
        messages = channel.messages()
        assert isinstance(await anext(messages), Hello)
        well = await anext(messages)
        assert isinstance(well, Beat)
        assert well.trouble == ""
        monkeypatch.setattr(EngineLoop, "trouble", lambda self: "a step has been running for 9.0 s")
        while not (beat := await anext(messages)).trouble:
            assert isinstance(beat, Beat)
        assert beat.trouble == "a step has been running for 9.0 s"
        await channel.close()


async def test_the_lease_ends_a_silent_gateways_session() -> None:
    clock = Clock()
    async with leader(FakeEngine(step_s=0.001, max_context=10**6), clock=clock, lease_s=5.0, beat_s=0.01) as server:
        channel = connect(server, ping_s=1000.0)
        await channel.send(Request("a", [1], 900_000))
        await until(lambda: server.loop.stats().running == 1)

        async def wait() -> None:
            async for _ in channel.messages():
                clock.now += 1.0

        with pytest.raises(ConnectionError, match="no ping for 5 s"):
            await wait()
        await until(lambda: server.loop.stats().running == 0)
        with pytest.raises(ConnectionError):
            await channel.send(Request("b", [1], 1))
        await channel.close()


async def test_a_gateway_that_does_not_read_loses_its_session() -> None:
    """A stopped process: flow control lets nothing through to it any more, and a write would wait for ever."""
    large = StepOutput(0, [SequenceOutput("b", [], error="x" * (1 << 20))])
    async with (
        leader(FakeEngine(step_s=0.001, max_context=10**6), lease_s=0.2) as server,
        grpc.aio.insecure_channel(server.address) as raw,
    ):
        call = raw.stream_stream("/understudy.internal.Wire/Stream")(metadata=(("understudy-secret", "s"),))
        await call.write(encode([Request("a", [1], 900_000)]))
        await until(lambda: server.loop.stats().running == 1)
        (stream,) = server._streams
        while server.gateways:
            stream._heard = server.clock()  # as if it pinged: the lease alone would not end it
            stream._outbox.put(large)
            await asyncio.sleep(0.001)
        await until(lambda: server.loop.stats().running == 0)
        call.cancel()


async def test_pings_keep_the_lease() -> None:
    clock = Clock()
    async with leader(clock=clock, lease_s=5.0, beat_s=1.0) as server:
        channel = connect(server, ping_s=1000.0)
        messages = channel.messages()
        await anext(messages)
        stream = next(iter(server._streams))
        for _ in range(20):
            clock.now += 4.0
            before = stream._heard
            await channel.send(Ping("g0"))
            await until(lambda before=before: stream._heard > before)
        assert server.gateways == ["g0"]
        await channel.close()


async def test_a_gateway_that_goes_away_frees_its_sequences() -> None:
    async with leader(FakeEngine(step_s=0.001, max_context=10**6)) as server:
        channel = connect(server)
        await channel.send(Request("a", [1], 900_000))
        await until(lambda: server.loop.stats().running == 1)
        await channel.close()
        await until(lambda: server.loop.stats().running == 0 and not server.gateways)


async def test_a_lost_leader_is_a_connection_error() -> None:
    async with leader(FakeEngine(step_s=0.001, max_context=10**6)) as server:
        channel = connect(server)
        await channel.send(Request("a", [1], 900_000))

        async def stop_at_first_token() -> None:
            async for message in channel.messages():
                if isinstance(message, StepOutput):
                    await server.stop()

        with pytest.raises(ConnectionError):
            await stop_at_first_token()
        with pytest.raises(ConnectionError):
            await channel.send(Ping("g0"))
        await channel.close()
        await channel.close()


async def test_nobody_listening_is_a_connection_error(unused_port: int) -> None:
    channel = GrpcReplicaChannel(f"127.0.0.1:{unused_port}", gateway="g", secret="s")
    with pytest.raises(ConnectionError, match="UNAVAILABLE"):
        await anext(channel.messages())
    await channel.close()


@pytest.mark.parametrize("secret", ["", "other"])
async def test_another_clusters_secret_is_refused(secret: str) -> None:
    async with leader() as server:
        channel = connect(server, secret=secret)
        with pytest.raises(ConnectionError, match="another cluster"):
            await anext(channel.messages())
        assert server.gateways == []
        await channel.close()


async def test_bytes_of_another_version_are_refused() -> None:
    async with leader() as server, grpc.aio.insecure_channel(server.address) as raw:
        call = raw.stream_stream("/understudy.internal.Wire/Stream")(metadata=(("understudy-secret", "s"),))
        await call.write(b"\xc1 not msgpack")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await until(lambda: not server.gateways)


async def test_a_draining_leader_sends_requests_elsewhere() -> None:
    async with leader() as server:
        channel = connect(server)
        await anext(channel.messages())
        assert await asyncio.to_thread(server.loop.drain, 0.0)
        await channel.send(Request("a", [1], 5))
        async for message in channel.messages():
            if isinstance(message, StepOutput):
                (output,) = message.outputs
                assert output.finish is FinishReason.CANCELLED
                assert "draining" in output.error
                break
        await channel.close()
