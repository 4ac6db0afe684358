"""In memory, for tests and measurements: replicas without a network, a router without Ray, a clock without time."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator, Callable, Sequence

from router.port import Assignment, Query, ReplicaView
from router.state import Router
from router.wire import Beat, Cancel, Down, Hello, Ping, Up
from understudy.errors import InvalidRequest, Unavailable
from workers.engine import Engine, FinishReason, SequenceOutput, StepOutput
from workers.engine.loop import EngineLoop


class ManualClock:
    """A clock that moves only when told to."""

    def __init__(self, start: float = 1000.0) -> None:
        self._now = start
        self._order = itertools.count()
        self._timers: list[tuple[float, int, _ManualTimer]] = []

    def now(self) -> float:
        return self._now

    def call_at(self, when: float, callback: Callable[[], object]) -> _ManualTimer:
        timer = _ManualTimer(callback)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    async def advance(self, seconds: float) -> None:
        """Moves on, running each timer at its moment and letting tasks run after each."""
        until = self._now + seconds
        while self._timers and self._timers[0][0] <= until:
            when, _, timer = heapq.heappop(self._timers)
            self._now = max(self._now, when)
            timer.fire()
            await settle()
        self._now = until
        await settle()


class _ManualTimer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self._callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self._callback = None

    def fire(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


async def settle(rounds: int = 20) -> None:
    """Lets tasks that are ready run."""
    for _ in range(rounds):
        await asyncio.sleep(0)


class FakeReplica:
    """A leader in this process: an engine's loop, and channels to it that can be cut or made silent. A step may take
    `stall_floor_s` seconds: tests hold steps for as long as they like."""

    def __init__(
        self, replica: str, engine: Engine, epoch: int = 1, beat_s: float = 0.1, stall_floor_s: float = 300.0
    ) -> None:
        self.replica, self.epoch = replica, epoch
        self.address = f"memory:{replica}"
        self.engine = engine
        self.loop = EngineLoop(engine, name=f"engine {replica}", stall_floor_s=stall_floor_s)
        self.channels: list[MemoryChannel] = []
        self.beat_s = beat_s
        self.silent = False
        self.dead = False

    def connect(self) -> MemoryChannel:
        """A new wire. Raises ConnectionError where the replica is dead."""
        if self.dead:
            raise ConnectionError(f"nothing listens at {self.address}")
        channel = MemoryChannel(self)
        self.channels.append(channel)
        return channel

    def kill(self) -> None:
        """Breaks all wires, as a killed process does."""
        self.dead = True
        for channel in list(self.channels):
            channel.cut()

    def stop(self) -> None:
        """Ends the engine's thread."""
        self.kill()
        self.loop.stop()


class MemoryChannel:
    """A `ReplicaChannel` that hands messages over within one event loop."""

    def __init__(self, replica: FakeReplica) -> None:
        self._replica = replica
        self._loop = asyncio.get_running_loop()
        self._up: asyncio.Queue[Up | None] = asyncio.Queue()
        self._up.put_nowait(Hello(replica.replica, replica.epoch, replica.loop.info))
        self._session = replica.loop.attach(self._from_engine)
        self._beating = self._loop.create_task(self._beat(), name=f"beat {replica.replica}")
        self._cut = False
        self.sent: list[Down] = []  # requests and cancellations, for tests

    def _from_engine(self, output: StepOutput) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._put, output)

    def _put(self, message: Up) -> None:
        if not self._cut and not self._replica.silent:
            self._up.put_nowait(message)

    async def _beat(self) -> None:
        while True:
            self._put(Beat(self._replica.epoch, self._replica.loop.stats(), self._replica.loop.trouble()))
            await asyncio.sleep(self._replica.beat_s)

    async def send(self, message: Down) -> None:
        if self._cut:
            raise ConnectionError("the wire is cut")
        if isinstance(message, Ping):
            return
        self.sent.append(message)
        if isinstance(message, Cancel):
            self._session.cancel(message.id)
            return
        try:
            self._session.submit(message)
        except Unavailable as error:
            refusal = SequenceOutput(message.id, [], finish=FinishReason.CANCELLED, error=error.message)
            self._put(StepOutput(0, [refusal]))
        except InvalidRequest as error:
            refusal = SequenceOutput(message.id, [], finish=FinishReason.ERROR, error=error.message)
            self._put(StepOutput(0, [refusal]))

    async def messages(self) -> AsyncIterator[Up]:
        while (message := await self._up.get()) is not None:
            yield message

    def cut(self) -> None:
        """The wire breaks; what was under way on it is cancelled, as by a leader that misses its gateway."""
        if self._cut:
            return
        self._cut = True
        self._beating.cancel()
        self._session.close()
        self._up.put_nowait(None)
        self._replica.channels.remove(self)

    async def close(self) -> None:
        self.cut()
        await asyncio.gather(self._beating, return_exceptions=True)


class MemoryRouter:
    """A `RouterPort` around a plain `Router` in this process. Replicas of `add` beat whenever they are asked about.

    `reachable` False makes it raise ConnectionError, as an actor that is gone; `deaf` keeps beats from it.
    """

    def __init__(self, router: Router) -> None:
        self.router = router
        self.fakes: dict[str, FakeReplica] = {}
        self.reachable = True
        self.deaf = False

    def add(self, replica: FakeReplica) -> None:
        """Registers a replica."""
        self.fakes[replica.replica] = replica
        self.router.register(replica.replica, replica.address, replica.epoch, replica.loop.info)

    def lose(self, replica: str) -> None:
        """The replica is gone and the router knows it."""
        self.router.unregister(replica, self.fakes.pop(replica).epoch)

    def _beat(self) -> None:
        if not self.reachable:
            raise ConnectionError("the router is gone")
        for name, replica in self.fakes.items():
            if not (self.deaf or replica.dead or replica.silent):
                changes = replica.loop.journal.since(self.router.wanted(name, replica.epoch))
                self.router.beat(name, replica.epoch, replica.loop.stats(), changes, replica.loop.trouble())

    async def assign(self, query: Query) -> Assignment:
        self._beat()
        return self.router.assign(query)

    async def release(self, leases: Sequence[int]) -> None:
        self._beat()
        self.router.release(leases)

    async def clear(self, leases: Sequence[int]) -> None:
        self._beat()
        self.router.clear(leases)

    async def replicas(self) -> list[ReplicaView]:
        self._beat()
        return self.router.snapshot()

    async def connect(self, replica: str, address: str) -> MemoryChannel:
        """What a gateway is given to open wires with."""
        fake = self.fakes.get(replica)
        if fake is None or fake.address != address:
            raise ConnectionError(f"nobody listens at {address}")
        return fake.connect()
