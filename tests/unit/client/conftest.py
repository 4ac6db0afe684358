"""One face for both clients, so that one suite proves them alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from understudy import AsyncClient, AsyncStream, Client, Piece, Retry, Stream
from understudy.testing import FakeServer

# As many tries as a channel's own backoff may take on a busy machine: 50 ms after its first failure, a second at most.
FAST = Retry(first_delay_s=0.001, max_delay_s=0.02, resume_attempts=10_000)


class Sync:
    """`Client` as it is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.client = Client(*args, **kwargs)

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.client, name)(*args, **kwargs)

    def open(self, *args: Any, **kwargs: Any) -> Stream:
        return self.client.generate(*args, **kwargs)

    def next(self, stream: Stream) -> Piece:
        return next(stream)

    def read(self, stream: Stream) -> list[Piece]:
        return list(stream)

    def leave(self, stream: Stream) -> None:
        with stream:
            pass

    def close(self) -> None:
        self.client.close()


class Async:
    """`AsyncClient`, each operation run to its end in one event loop."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._runner = asyncio.Runner()
        self.client = AsyncClient(*args, **kwargs)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(coroutine)

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self.run(getattr(self.client, name)(*args, **kwargs))

    def open(self, *args: Any, **kwargs: Any) -> AsyncStream:
        async def generate() -> AsyncStream:
            return self.client.generate(*args, **kwargs)

        return self.run(generate())

    def next(self, stream: AsyncStream) -> Piece:
        return self.run(anext(stream))

    def read(self, stream: AsyncStream) -> list[Piece]:
        async def gather() -> list[Piece]:
            return [piece async for piece in stream]

        return self.run(gather())

    def leave(self, stream: AsyncStream) -> None:
        async def leave() -> None:
            async with stream:
                pass

        self.run(leave())

    def close(self) -> None:
        self.run(self.client.close())
        self._runner.close()


@pytest.fixture(params=[Sync, Async], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes a client of either kind, as `Client(...)` would, with short waits unless told otherwise."""
    made = []

    def make(*args: Any, **kwargs: Any) -> Any:
        made.append(request.param(*args, **({"retry": FAST} | kwargs)))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer("Hello, world") as running:
        yield running
