"""A gateway's wires to the replicas' leaders: one channel each, one reader that hands every step's tokens to their
streams, one writer, one heartbeat.

| owns | does not own |
|---|---|
| connections, their tasks, which attempt waits for which id | which replica a request goes to: the router |
| when a silent wire counts as broken | what happens to its streams then: `dispatch` |
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from router.clock import Clock, sleep
from router.port import Assignment
from router.wire import Beat, Cancel, Down, Hello, Ping, ReplicaChannel, Up
from workers.engine import EngineStats, FinishReason, Request, SequenceOutput, StepOutput

log = logging.getLogger(__name__)

Connect = Callable[[str, str], Awaitable[ReplicaChannel]]  # replica id, address


@dataclass(frozen=True)
class Timing:
    """Seconds: between pings, of silence until a leader counts as lost, for connecting."""

    ping_s: float = 0.25
    heartbeat_timeout: float = 2.0
    connect_timeout: float = 5.0


class Attempt:
    """One request on one replica: what came up and was not yet taken.

    `stream` names the request, of which several sequences may be under way. At most `limit` tokens wait here. A stream
    whose client reads slower is parked: it is cancelled at the replica and `parked` is set; whoever follows it asks
    again, from where it stopped, once its client has caught up.
    """

    __slots__ = ("_limit", "_wake", "crowd", "id", "lost", "outputs", "parked", "step", "stream", "tokens")

    def __init__(self, id: str, wake: Callable[[], None], limit: int, stream: str = "") -> None:
        self.id = id
        self.stream = stream
        self.outputs: list[SequenceOutput] = []
        self.tokens = 0
        self.step = 0
        self.lost: str | None = None  # why no more will come
        self.crowd = 0  # requests under which wire or step broke: perhaps this one is the reason; 0: none of them
        self.parked = False
        self._wake = wake
        self._limit = limit

    def put(self, step: int, output: SequenceOutput) -> bool:
        """Takes an output; False when this was more than may wait."""
        self.outputs.append(output)
        self.tokens += len(output.token_ids)
        self.step = step
        self.parked = output.finish is None and self.tokens >= self._limit
        self._wake()
        return not self.parked

    def fail(self, why: str, crowd: int) -> None:
        self.lost = why
        self.crowd = crowd
        self._wake()

    def take(self) -> list[SequenceOutput]:
        """All that has come since the last time, in order."""
        outputs, self.outputs, self.tokens = self.outputs, [], 0
        return outputs


class Link:
    """One wire to one leader, from Hello until it breaks. Made by `ChannelPool`."""

    def __init__(
        self,
        channel: ReplicaChannel,
        messages: AsyncIterator[Up],
        hello: Hello,
        gateway: str,
        clock: Clock,
        timing: Timing,
    ) -> None:
        self.replica, self.epoch, self.info = hello.replica, hello.epoch, hello.info
        self.stats = EngineStats()
        self.lost: str | None = None
        self._channel = channel
        self._messages = messages
        self._gateway = gateway
        self._clock = clock
        self._timing = timing
        self._heard = clock.now()
        self._attempts: dict[str, Attempt] = {}
        self._out: deque[Down] = deque()
        self._out_ready = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins to read, write and watch."""
        for name, work in (("read", self._read()), ("write", self._write()), ("watch", self._watch())):
            self._tasks.append(asyncio.create_task(work, name=f"{name} {self.replica}"))

    @property
    def attempts(self) -> int:
        """Requests under way here."""
        return len(self._attempts)

    @property
    def silent_s(self) -> float:
        """Seconds since the leader last said anything."""
        return self._clock.now() - self._heard

    def open(self, request: Request, attempt: Attempt) -> None:
        """Sends a request; its tokens reach `attempt`. Raises ConnectionError when the wire is broken."""
        if self.lost is not None:
            raise ConnectionError(self.lost)
        self._attempts[attempt.id] = attempt
        self._post(request)

    def close_attempt(self, attempt: Attempt) -> None:
        """Nothing more is wanted: cancels it at the leader where it is still under way. Idempotent."""
        if self._attempts.pop(attempt.id, None) is not None and self.lost is None:
            self._post(Cancel(attempt.id))

    def _post(self, message: Down) -> None:
        self._out.append(message)
        self._out_ready.set()

    async def _read(self) -> None:
        try:
            async for message in self._messages:
                self._heard = self._clock.now()
                if isinstance(message, StepOutput):
                    self._deliver(message)
                    trouble = message.lost
                elif isinstance(message, Beat) and message.epoch == self.epoch:
                    self.stats, trouble = message.stats, message.trouble
                else:
                    continue
                if trouble:
                    self.break_(trouble)
                    return
            self.break_("its stream ended")
        except ConnectionError as error:
            self.break_(f"its stream broke: {error}")
        except Exception as error:  # a message that cannot be understood: this wire is of no more use
            log.exception("replica %s sent what cannot be understood", self.replica)
            self.break_(f"{type(error).__name__} while reading")

    def _deliver(self, message: StepOutput) -> None:
        attempts = self._attempts
        failed = [o.id for o in message.outputs if o.finish is FinishReason.ERROR]
        crowd = len({attempts[id].stream for id in failed if id in attempts})
        for output in message.outputs:
            attempt = attempts.get(output.id)
            if attempt is None:
                continue  # of an attempt that was given up: ids are never used twice
            if output.finish is not None:
                del attempts[output.id]
                attempt.crowd = crowd if output.finish is FinishReason.ERROR else 0
                attempt.put(message.step, output)
            elif not attempt.put(message.step, output):
                self.close_attempt(attempt)

    async def _write(self) -> None:
        try:
            while True:
                await self._out_ready.wait()
                self._out_ready.clear()
                while self._out:
                    await self._channel.send(self._out.popleft())
        except ConnectionError as error:
            self.break_(f"sending failed: {error}")

    async def _watch(self) -> None:
        """Pings, and breaks the wire when the leader was silent too long."""
        while self.lost is None:
            self._post(Ping(self._gateway))
            await sleep(self._clock, self._timing.ping_s)
            if self.silent_s > self._timing.heartbeat_timeout:
                self.break_(f"silent for {self.silent_s:.1f} s")

    def break_(self, why: str) -> None:
        """The wire is gone: every attempt learns it. Idempotent."""
        if self.lost is not None:
            return
        self.lost = why
        attempts, self._attempts = self._attempts, {}
        if attempts:
            log.warning("replica %s lost with %d streams: %s", self.replica, len(attempts), why)
        crowd = len({attempt.stream for attempt in attempts.values()})
        for attempt in attempts.values():
            attempt.fail(why, crowd)

    async def close(self) -> None:
        """Ends the tasks and the channel. Idempotent."""
        self.break_("closed")
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(self._messages, AsyncGenerator):
            await self._messages.aclose()
        await self._channel.close()


class ChannelPool:
    """The links of one gateway, by replica. Used from one event loop."""

    def __init__(self, connect: Connect, gateway: str, clock: Clock, timing: Timing | None = None) -> None:
        self.gateway = gateway
        self._connect = connect
        self._clock = clock
        self._timing = timing if timing is not None else Timing()
        self._links: dict[str, Link] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._numbers = itertools.count(1)

    def attempt_id(self, request_id: str) -> str:
        """An id that no other attempt has, at any gateway."""
        return f"{self.gateway}/{next(self._numbers)}/{request_id}"

    def alive(self) -> list[Link]:
        """Links over which tokens can come."""
        return [link for link in self._links.values() if link.lost is None]

    async def get(self, to: Assignment) -> Link:
        """The link to a replica's current life, connected when needed.

        Raises ConnectionError when it cannot be had or another life answers.
        """
        lock = self._locks.setdefault(to.replica, asyncio.Lock())
        async with lock:
            link = self._links.get(to.replica)
            if link is not None and link.lost is None and link.epoch == to.epoch:
                return link
            if link is not None:
                if link.lost is None and link.epoch > to.epoch:
                    raise ConnectionError(f"replica {to.replica} has epoch {link.epoch}, not {to.epoch}")
                del self._links[to.replica]
                await link.close()
            self._links[to.replica] = link = await self._open(to)
            return link

    async def _open(self, to: Assignment) -> Link:
        connecting = asyncio.create_task(self._greet(to))
        timer = self._clock.call_at(self._clock.now() + self._timing.connect_timeout, connecting.cancel)
        try:
            return await connecting
        except asyncio.CancelledError:
            if connecting.cancelled() and not _being_cancelled():
                raise ConnectionError(f"replica {to.replica} at {to.address} did not answer in time") from None
            connecting.cancel()
            (done,) = await asyncio.gather(connecting, return_exceptions=True)
            if isinstance(done, Link):  # it was made at the very moment at which nobody wanted it any more
                await done.close()
            raise
        finally:
            timer.cancel()

    async def _greet(self, to: Assignment) -> Link:
        channel = await self._connect(to.replica, to.address)
        try:
            await channel.send(Ping(self.gateway))
            messages = channel.messages()
            hello = await anext(messages, None)
            if not isinstance(hello, Hello):
                raise ConnectionError(f"replica {to.replica} at {to.address} did not say hello")
            if (hello.replica, hello.epoch) != (to.replica, to.epoch):
                raise ConnectionError(
                    f"at {to.address} replica {hello.replica} of epoch {hello.epoch} answers, "
                    f"not {to.replica} of epoch {to.epoch}"
                )
        except BaseException:
            await channel.close()
            raise
        link = Link(channel, messages, hello, self.gateway, self._clock, self._timing)
        link.start()
        return link

    async def prune(self) -> None:
        """Closes what is left of broken links."""
        for replica, link in list(self._links.items()):
            if link.lost is not None:
                async with self._locks[replica]:
                    if self._links.get(replica) is link:
                        del self._links[replica]
                await link.close()

    async def close(self) -> None:
        """Closes all links. Idempotent."""
        links, self._links = list(self._links.values()), {}
        for link in links:
            with contextlib.suppress(ConnectionError):
                await link.close()


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
