"""Whoever waits can be interrupted, and then nothing runs on for nobody."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest

from understudy import AsyncClient, AsyncStream, Client, Retry, errors
from understudy.testing import FakeServer

# So long a wait that a test which sits it out fails by its own time limit.
LONG = Retry(first_delay_s=3600, max_delay_s=3600, resume_s=1e9)
SOON = 0.2


def test_ctrl_c_while_waiting_cancels_though_the_stream_is_kept(server: FakeServer) -> None:
    server.hold_after(2)
    with Client(server.address) as client:
        stream = client.generate("Hi")
        assert next(stream).text == "H"
        timer = threading.Timer(SOON, os.kill, (os.getpid(), signal.SIGINT))

        def wait() -> None:
            timer.start()
            next(stream)

        with pytest.raises(KeyboardInterrupt):
            wait()
        timer.join()
        assert server.cancelled.wait(10)


def test_a_cancelled_task_cancels_though_the_stream_is_kept(server: FakeServer) -> None:
    server.hold_after(2)

    async def scene() -> bool:
        async with AsyncClient(server.address) as client:
            stream = client.generate("Hi")
            assert (await anext(stream)).text == "H"
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await asyncio.to_thread(server.cancelled.wait, 10)

    assert asyncio.run(scene())


def test_another_thread_ends_the_wait_for_the_next_try(server: FakeServer) -> None:
    server.break_after(2)
    with Client(server.address, retry=LONG) as client:
        stream = client.generate("Hi")
        assert next(stream).text == "H"
        timer = threading.Timer(SOON, stream.cancel)
        timer.start()
        with pytest.raises(errors.Cancelled):
            list(stream)
        timer.join()
    assert stream.text == "H"
    assert len(server.calls) == 1


def test_another_task_ends_the_wait_for_the_next_try(server: FakeServer) -> None:
    server.break_after(2)

    async def scene() -> AsyncStream:
        async with AsyncClient(server.address, retry=LONG) as client:
            stream = client.generate("Hi")
            assert (await anext(stream)).text == "H"
            asyncio.get_running_loop().call_later(SOON, stream.cancel)
            with pytest.raises(errors.Cancelled):
                [piece async for piece in stream]
            return stream

    assert asyncio.run(scene()).text == "H"
    assert len(server.calls) == 1


def test_a_task_that_is_cancelled_together_with_its_stream_is_cancelled(server: FakeServer) -> None:
    server.hold_after(2)

    async def scene() -> None:
        async with AsyncClient(server.address) as client:
            stream = client.generate("Hi")
            await anext(stream)
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            stream.cancel()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert task.cancelled()

    asyncio.run(scene())


def test_closing_the_client_ends_its_streams(server: FakeServer) -> None:
    server.hold_after(2)
    client = Client(server.address)
    timer = threading.Timer(SOON, client.close)
    timer.start()
    with pytest.raises(errors.Cancelled):
        client.complete("Hi")
    timer.join()


def test_closing_an_async_client_ends_its_streams_and_no_task(server: FakeServer) -> None:
    server.hold_after(2)

    async def scene() -> None:
        client = AsyncClient(server.address)
        reading = asyncio.ensure_future(client.complete("Hi"))
        async with asyncio.timeout(10):
            while not server.calls:  # noqa: ASYNC110  # the server lives in other threads
                await asyncio.sleep(0.001)
        await client.close()
        with pytest.raises(errors.Cancelled):
            await reading
        assert not reading.cancelled()

    asyncio.run(scene())


def test_many_threads_share_a_client() -> None:
    with FakeServer(lambda request, index: request.text * 3) as server, Client(server.address) as client:
        texts: dict[int, str] = {}

        def ask(k: int) -> None:
            texts[k] = client.complete(f"<{k}>").text

        threads = [threading.Thread(target=ask, args=(k,)) for k in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts == {k: f"<{k}>" * 3 for k in range(12)}
