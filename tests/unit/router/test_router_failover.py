"""Replicas fall; streams go on."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import pytest
from router_stage import Answer, Stage, problem, until

from router.admission import Limits
from router.channels import Timing
from router.clock import LoopClock
from router.dispatch import Patience
from router.port import State
from router.state import Router
from understudy.v1 import inference_pb2 as pb

LENGTH = 40
REQUEST = pb.GenerateRequest(
    text="hi",
    stopping=pb.Stopping(max_tokens=LENGTH, ignore_eos=True),
    sampling=pb.Sampling(seed=11),
    response=pb.ResponseOptions(logprobs=1),
)


async def begin(stage: Stage, tokens: int) -> tuple[grpc.aio.UnaryStreamCall, list[pb.GenerateResponse]]:
    """A stream of which this many tokens have arrived."""
    call = stage.stub.Generate(REQUEST)
    messages: list[pb.GenerateResponse] = []
    while len(Answer(messages).ids) < tokens:
        messages.append(await call.read())
    return call, messages


async def rest_of(call: grpc.aio.UnaryStreamCall, messages: list[pb.GenerateResponse]) -> Answer:
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return Answer(messages)


def running_on(stage: Stage) -> str:
    (name,) = [n for n, r in stage.replicas.items() if r.loop._owners]
    return name


async def expected(stage: Stage) -> list[int]:
    for gate in stage.gates:
        gate.open()
    return (await stage.generate(REQUEST)).ids


@pytest.mark.parametrize("how", ["killed", "silent", "cancelled", "failed"])
async def test_a_stream_goes_on_at_another_replica_token_for_token(stage: Stage, how: str) -> None:
    gates = {name: stage.gate() for name in ("r0", "r1")}
    for name, gate in gates.items():
        stage.add_replica(name, step_s=1.0, sleep=gate)
    timing = Timing(ping_s=0.02, heartbeat_timeout=0.5 if how == "silent" else 30.0)
    gateway = await stage.open(timing=timing)
    for gate in gates.values():
        gate.let(13)
    call, messages = await begin(stage, 13)
    first = running_on(stage)
    replica = stage.replicas[first]
    if how == "killed":
        replica.kill()
    elif how == "silent":
        replica.silent = True
    elif how == "cancelled":  # by the replica itself, as at the end of a drain
        (owner,) = replica.loop._owners.values()
        owner.session.cancel(owner.id)
    else:
        (inner,) = replica.loop._owners
        replica.engine.fail_sequence(inner, "the forward failed")  # type: ignore[attr-defined]
    for gate in gates.values():
        gate.open()
    answer = await rest_of(call, messages)
    assert (len(answer.ids), answer.reason) == (LENGTH, "LENGTH")
    assert answer.finish.usage.completion_tokens == LENGTH
    # A machine that is slow enough makes others look silent too: one more move, and the same answer.
    assert gateway.dispatcher.failovers >= 1 if how == "silent" else gateway.dispatcher.failovers == 1
    assert answer.ids == await expected(stage)
    logprobs = [p.token_id for d in answer.deltas for p in d.logprobs]
    assert logprobs == answer.ids


async def test_the_only_replica_comes_back_with_a_new_life(stage: Stage) -> None:
    gate = stage.gate()
    stage.add_replica(step_s=1.0, sleep=gate)
    await stage.open()
    gate.let(5)
    call, messages = await begin(stage, 5)
    stage.replicas["r0"].kill()
    gate.open()
    stage.add_replica(epoch=2)
    answer = await rest_of(call, messages)
    assert answer.reason == "LENGTH"
    assert answer.ids == await expected(stage)


async def test_nobody_is_left_to_go_on(stage: Stage) -> None:
    gate = stage.gate()
    replica = stage.add_replica(step_s=1.0, sleep=gate)
    await stage.open(patience=Patience(first=0.05, again=0.05, retry=0.01))
    gate.let(5)
    call, messages = await begin(stage, 5)
    replica.kill()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rest_of(call, messages)
    code, _, info, _ = problem(caught.value)
    assert (code, info.reason) == ("UNAVAILABLE", "UNAVAILABLE")
    with pytest.raises(grpc.aio.AioRpcError, match="no replica can take this stream"):
        await stage.generate(REQUEST)


@pytest.mark.parametrize("other", [{"numerics_id": "another"}, {"fingerprint": "another"}])
async def test_no_stream_goes_on_with_other_weights_or_arithmetic(stage: Stage, other: dict[str, str]) -> None:
    gate = stage.gate()
    replica = stage.add_replica(step_s=1.0, sleep=gate)
    gateway = await stage.open(patience=Patience(first=0.05, again=0.05, retry=0.01))
    gate.let(5)
    call, messages = await begin(stage, 5)
    different = stage.add_replica("r1", **other)
    gateway.put_model(replace(gateway.models.all()[0], info=different.loop.info), order=1)
    replica.kill()
    stage.router.lose("r0")
    with pytest.raises(grpc.aio.AioRpcError, match="same weights and arithmetic"):
        await rest_of(call, messages)
    await gateway.refresh()  # which versions have replicas
    fresh = await stage.generate(REQUEST)
    assert fresh.infos[0].numerics_id == different.loop.info.numerics_id
    assert fresh.infos[0].model_fingerprint == different.loop.info.model_fingerprint


async def test_an_engine_that_fails_twice_on_a_request_ends_it(stage: Stage) -> None:
    gates = {name: stage.gate() for name in ("r0", "r1")}
    for name, gate in gates.items():
        stage.add_replica(name, step_s=1.0, sleep=gate)
    gateway = await stage.open()
    for gate in gates.values():
        gate.let(2)
    call, messages = await begin(stage, 2)
    for _ in range(2):
        await until(lambda: any(r.loop._owners for r in stage.replicas.values()))
        name = running_on(stage)
        (inner,) = stage.replicas[name].loop._owners
        stage.replicas[name].engine.fail_sequence(inner, "secret detail")  # type: ignore[attr-defined]
        gates[name].let(2)
        await until(lambda name=name: not stage.replicas[name].loop._owners)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rest_of(call, messages)
    code, message, info, _ = problem(caught.value)
    assert (code, info.reason) == ("INTERNAL", "INTERNAL")
    assert "secret" not in message
    assert gateway.dispatcher.failovers == 1


async def test_a_client_that_goes_away_while_its_stream_waits_for_a_replica(stage: Stage) -> None:
    gate = stage.gate()
    replica = stage.add_replica(step_s=1.0, sleep=gate)
    gateway = await stage.open()
    gate.let(3)
    call, _ = await begin(stage, 3)
    replica.kill()
    await until(lambda: gateway.dispatcher.failovers == 1)
    call.cancel()
    await until(lambda: not gateway.dispatcher.streams)


async def test_a_deadline_ends_the_wait_for_a_replica(stage: Stage) -> None:
    replica = stage.add_replica()
    await stage.open()
    replica.kill()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stage.stub.Generate(REQUEST, timeout=0.5):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_replica_that_drains_sends_its_requests_elsewhere(stage: Stage) -> None:
    """The router has not heard of it yet: the replica refuses, and the stream begins at another."""
    for name in ("r0", "r1"):
        stage.add_replica(name)
    gateway = await stage.open()
    await until(lambda: len(gateway.pool.alive()) == 2)
    assert stage.replicas["r0"].loop.drain(0)
    answers = await asyncio.gather(*(stage.generate(REQUEST) for _ in range(4)))
    assert all(a.ids == answers[0].ids and a.reason == "LENGTH" for a in answers)
    assert stage.replicas["r0"].loop.stats().generated_tokens == 0


async def test_without_its_router_a_gateway_chooses_by_itself(stage: Stage) -> None:
    for name in ("r0", "r1"):
        stage.add_replica(name)
    gateway = await stage.open()
    await until(lambda: len(gateway.pool.alive()) == 2)
    plain = await stage.generate(REQUEST)
    stage.router.reachable = False
    answers = await asyncio.gather(*(stage.generate(REQUEST) for _ in range(8)))
    assert all(a.ids == plain.ids for a in answers)
    stage.router.reachable = True
    stage.router.lose("r0")
    stage.router.lose("r1")  # as a router that has just begun anew
    assert (await stage.generate(REQUEST)).ids == plain.ids


async def test_a_replica_that_only_the_router_misses_goes_on(stage: Stage) -> None:
    stage.router.router = Router(LoopClock(), heartbeat_timeout=0.05)
    stage.add_replica()
    gateway = await stage.open(patience=Patience(first=0.05, retry=0.01))
    await until(gateway.pool.alive)
    plain = await stage.generate(REQUEST)
    stage.router.deaf = True
    await until(lambda: stage.router.router.snapshot()[0].state is State.LOST)
    await gateway.refresh()
    assert (await stage.generate(REQUEST)).ids == plain.ids
    stage.replicas["r0"].kill()
    with pytest.raises(grpc.aio.AioRpcError, match="no replica of 'fake' is ready"):
        await stage.generate(REQUEST)
    stage.router.deaf = False


async def test_stopping_a_gateway_tells_its_streams(stage: Stage) -> None:
    gate = stage.gate()
    stage.add_replica(step_s=1.0, sleep=gate)
    gateway = await stage.open()
    gate.let(3)
    call, messages = await begin(stage, 3)
    await gateway.stop()
    with pytest.raises(grpc.aio.AioRpcError, match="gateway is stopping") as caught:
        await rest_of(call, messages)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert len(Answer(messages).ids) == 3


async def test_a_request_that_kills_replicas_does_not_kill_them_all(stage: Stage) -> None:
    gate = stage.gate()
    names = [f"r{i}" for i in range(5)]
    for name in names:
        stage.add_replica(name, step_s=1.0, sleep=gate)
    gateway = await stage.open()

    async def die_of_it() -> None:
        for _ in range(2):
            await until(lambda: any(r.loop._owners for r in stage.replicas.values() if not r.dead))
            next(r for r in stage.replicas.values() if r.loop._owners and not r.dead).kill()

    dying = asyncio.create_task(die_of_it())
    code, message, info, _ = await stage.refused(text="poison", request_id="poison")
    await dying
    assert (code, info.reason) == ("INTERNAL", "INTERNAL")
    assert "request poison is not tried again: 2 times its replica failed" in message
    assert sum(r.dead for r in stage.replicas.values()) == 2
    assert gateway.dispatcher.failovers == 1
    gate.open()
    assert (await stage.generate(REQUEST)).reason == "LENGTH"


async def test_a_full_service_says_when_to_come_back(stage: Stage) -> None:
    gate = stage.gate()
    stage.router.router = Router(LoopClock(), limits=Limits(max_waiting=1))
    stage.add_replica(step_s=1.0, sleep=gate, max_running=1)
    await stage.open()
    loop = stage.replicas["r0"].loop
    calls = [stage.stub.Generate(REQUEST)]
    await until(lambda: len(loop._owners) == 1 and loop.stats().waiting == 0)  # its step has begun, and stays
    calls.append(stage.stub.Generate(REQUEST))
    await until(lambda: loop.stats().waiting == 1)
    code, _, info, (retry,) = await stage.refused()
    assert (code, info.reason) == ("RESOURCE_EXHAUSTED", "OVERLOADED")
    assert retry.retry_delay.ToMilliseconds() >= 500
    for call in calls:
        call.cancel()
