"""The client of this project against the gateway of this project."""

from __future__ import annotations

import asyncio

import pytest
from router_stage import EOS, Stage, says, until

from router.dispatch import Patience
from understudy import AsyncClient, errors

IMPATIENT = Patience(first=0.05, again=0.05, retry=0.01)


def client(stage: Stage) -> AsyncClient:
    assert stage.gateway is not None
    return AsyncClient(f"127.0.0.1:{stage.gateway.port}")


async def test_pieces_and_the_whole(stage: Stage) -> None:
    stage.add_replica(answer=says("Hello, wörld!"))
    await stage.open()
    async with client(stage) as c:
        whole = await c.complete("hi", stop="rld", logprobs=1)
        assert whole.choices[0].text == "Hello, wö"
        assert list(whole.choices[0].token_ids) == [*"Hello, wörld".encode()]
        async with c.generate("hi", temperature=0.5) as stream:
            text = "".join([piece.text async for piece in stream])
        assert text == "Hello, wörld!"
        assert stream.token_ids[-1] == EOS
        assert (await c.tokenize("hé")).token_ids == (*"hé".encode(),)
        assert await c.detokenize([104, 105]) == "hi"
        assert [m.name for m in await c.models()] == ["fake"]


async def test_errors_arrive_as_what_they_are(stage: Stage) -> None:
    await stage.open()
    async with client(stage) as c:
        with pytest.raises(errors.InvalidRequest, match=r"sampling\.top_p: is 2") as caught:
            await c.complete("hi", top_p=2.0)
        assert caught.value.field == "sampling.top_p"
        with pytest.raises(errors.ModelNotFound):
            await c.complete("hi", model="nope")


async def test_a_stream_that_no_replica_could_carry_is_taken_up_by_the_client(stage: Stage) -> None:
    """All replicas are gone for longer than the gateway waits: the client resumes, and its caller sees one stream."""
    gate = stage.gate()
    replica = stage.add_replica(step_s=1.0, sleep=gate)
    gateway = await stage.open(patience=IMPATIENT)
    gate.let(7)

    async def come_back() -> None:
        """A new life, once the gateway has given the stream up."""
        failed = gateway.metrics.requests.labels("Generate", "UNAVAILABLE")._value
        await until(lambda: failed.get() >= 1)
        gate.open()
        stage.add_replica(epoch=2)

    async with client(stage) as c:
        stream = c.generate("hi", seed=3, max_tokens=30, ignore_eos=True)
        ids: list[int] = []
        coming_back = None
        async for piece in stream:
            ids += piece.token_ids
            if len(ids) == 7 and coming_back is None:
                replica.kill()
                coming_back = asyncio.create_task(come_back())
        assert coming_back is not None
        await coming_back
        assert len(ids) == 30
        again = await c.complete("hi", seed=3, max_tokens=30, ignore_eos=True)
        assert list(again.choices[0].token_ids) == ids
