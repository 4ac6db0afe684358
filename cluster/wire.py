"""The stream between a gateway and a replica's leader, over gRPC: `router.wire` messages as bytes, both ways.

One message per engine step and gateway: the engine thread appends the step's output and wakes the event loop once;
encoding and sending happen there. What has gathered meanwhile travels together, as a list, so that a receiver that
cannot keep up gets fewer and larger parts. A gateway that says nothing for the lease loses its session, and with it its
sequences and their blocks, for a reader that died is not always told to the sender.

| owns | does not own |
|---|---|
| the server, its streams, leases and beats | the engine loop: whoever made it stops it |
| a session per stream, closed with it | which replica a request goes to |
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
import msgspec

from router.tracing import ReplicaTrace, Tracer
from router.wire import Beat, Cancel, Down, Hello, Ping, Up, encode
from understudy.errors import Unavailable, UnderstudyError
from workers.engine import FinishReason, Request, SequenceOutput, StepOutput
from workers.engine.loop import EngineLoop, Session

log = logging.getLogger(__name__)

_SERVICE = "understudy.internal.Wire"
_METHOD = "Stream"
_PATH = f"/{_SERVICE}/{_METHOD}"
_SECRET = "understudy-secret"
_GATEWAY = "understudy-gateway"
_down = msgspec.msgpack.Decoder(list[Down])
_up = msgspec.msgpack.Decoder(list[Up])
_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.optimization_target", "latency"),
    ("grpc.use_local_subchannel_pool", 1),
]


class _Outbox:
    """Messages that wait for one event loop; `put_threadsafe` may be called from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Any] = deque()
        self._ready = asyncio.Event()

    def put(self, message: Any) -> None:
        self._waiting.append(message)
        self._ready.set()

    def wake(self) -> None:
        """Ends a `take` that waits."""
        self._ready.set()

    def put_threadsafe(self, message: Any) -> None:
        self._loop.call_soon_threadsafe(self.put, message)

    async def take(self, timeout_s: float | None = None) -> list[Any]:
        """All that waits, as soon as there is something; nothing after `timeout_s` seconds."""
        if not self._waiting:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._ready.wait()
        self._ready.clear()
        taken = list(self._waiting)
        self._waiting.clear()
        return taken


class _Stream:
    """One gateway's stream on the leader's side."""

    def __init__(self, server: LeaderServer, gateway: str) -> None:
        self._server = server
        self._outbox = _Outbox()
        self._session: Session = server.loop.attach(self._outbox.put_threadsafe)
        self._heard = server.clock()
        self._ended = False
        self._fault = ""
        self._traces: dict[str, ReplicaTrace] = {}  # of the sequences whose spans are wanted
        self.gateway = gateway

    async def read(self, requests: AsyncIterator[bytes]) -> None:
        """Until the gateway has nothing more to say, or says what is no message; then `write` ends, too."""
        try:
            async for data in requests:
                self._heard = self._server.clock()
                for message in _down.decode(data):
                    self._take(message)
            self._ended = True
        except msgspec.DecodeError as error:
            self._fault = f"not a message of this version: {error}"
        except Exception as error:  # the stream ends with it, instead of going on deaf
            log.exception("reading from gateway %s failed", self.gateway)
            self._fault = f"reading failed: {type(error).__name__}"
        self._outbox.wake()

    def _take(self, message: Down) -> None:
        match message:
            case Request() as request:
                self._submit(request)
            case Cancel(id=id):
                self._session.cancel(id)
            case Ping():
                pass

    async def write(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Until `read` has ended, the lease ends, or the gateway has read nothing for as long. The only one that
        touches `context`: gRPC refuses two operations at once."""
        try:
            await self._write(context)
        except TimeoutError:  # what it has not read bounds what waits here
            log.warning("gateway %s has not read for %g s: its session is closed", self.gateway, self._server.lease_s)

    async def _write(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        server = self._server
        await context.write(encode([Hello(server.replica, server.epoch, server.loop.info)]))
        next_beat = server.clock()
        while True:
            messages = await self._outbox.take(max(0.0, next_beat - server.clock()))
            if self._traces:
                self._tell_traces(messages)
            now = server.clock()
            if self._ended:
                return
            if self._fault:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, self._fault)
            if now - self._heard > server.lease_s:
                await context.abort(grpc.StatusCode.ABORTED, f"no ping for {server.lease_s:g} s: the session is closed")
            if now >= next_beat:
                next_beat = now + server.beat_s
                messages.append(Beat(server.epoch, server.loop.stats(), server.loop.trouble()))
            if messages:
                async with asyncio.timeout(server.lease_s):
                    await context.write(encode(messages))

    def close(self) -> None:
        self._session.close()
        for trace in self._traces.values():
            trace.abandon()

    def _tell_traces(self, messages: list[Any]) -> None:
        for message in messages:
            for output in message.outputs if isinstance(message, StepOutput) else ():
                trace = self._traces.get(output.id)
                if trace is not None and trace.take(output):
                    del self._traces[output.id]

    def _submit(self, request: Request) -> None:
        server = self._server
        if request.traceparent and server.tracer is not None:
            self._traces[request.id] = ReplicaTrace(server.tracer, request, server.replica, server.epoch)
        try:
            self._session.submit(request)
        except UnderstudyError as error:
            # CANCELLED says that another replica may do it; ERROR that the request is at fault.
            finish = FinishReason.CANCELLED if isinstance(error, Unavailable) else FinishReason.ERROR
            self._outbox.put(StepOutput(0, [SequenceOutput(request.id, [], finish=finish, error=error.message)]))


class LeaderServer:
    """Serves one engine loop to gateways. Lives on the event loop that `start` runs on.

    `host` is the address it listens on and is reached by; the port is a free one. `secret` is what both ends of a
    cluster know. `lease_s` and `beat_s` are seconds of `clock`; how long a write may take is told by the event loop's.
    `tracer` makes spans of the sequences whose requests ask for them; it is closed with the server.
    """

    def __init__(
        self,
        loop: EngineLoop,
        *,
        replica: str,
        epoch: int,
        secret: str,
        host: str = "127.0.0.1",
        lease_s: float = 10.0,
        beat_s: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
        tracer: Tracer | None = None,
    ) -> None:
        self.loop = loop
        self.tracer = tracer
        self.replica = replica
        self.epoch = epoch
        self.lease_s = lease_s
        self.beat_s = beat_s
        self.clock = clock
        self.address = ""
        self._secret = secret
        self._host = host
        self._streams: set[_Stream] = set()
        self._server: grpc.aio.Server | None = None

    @property
    def gateways(self) -> list[str]:
        """Who is connected."""
        return sorted(s.gateway for s in self._streams)

    async def start(self) -> str:
        """Listens; returns and keeps `address` as HOST:PORT."""
        server = grpc.aio.server(options=[*_OPTIONS, ("grpc.so_reuseport", 0)])
        handler: Any = grpc.stream_stream_rpc_method_handler(self._serve)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler}),))
        host = f"[{self._host}]" if ":" in self._host else self._host
        port = server.add_insecure_port(f"{host}:0")
        await server.start()
        self._server = server
        self.address = f"{host}:{port}"
        return self.address

    async def stop(self, grace_s: float = 0.0) -> None:
        """Ends every stream; each one's session is closed with it. Idempotent."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(grace_s)
            if self.tracer is not None:
                await asyncio.to_thread(self.tracer.close)

    async def _serve(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        said = dict(context.invocation_metadata() or ())
        if not hmac.compare_digest(str(said.get(_SECRET, "")).encode(), self._secret.encode()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this leader belongs to another cluster")
        stream = _Stream(self, str(said.get(_GATEWAY, "")))
        self._streams.add(stream)
        reader = asyncio.create_task(stream.read(requests))
        try:
            await stream.write(context)
        finally:
            self._streams.discard(stream)
            stream.close()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)


class GrpcReplicaChannel:
    """A gateway's end. Connects at once, pings every `ping_s` seconds; made and used on one event loop.

    Keeps `router.wire.ReplicaChannel`.
    """

    def __init__(self, address: str, *, gateway: str, secret: str, ping_s: float = 1.0) -> None:
        self.address = address
        self._gateway = gateway
        self._ping_s = ping_s
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        stream: Any = self._channel.stream_stream(_PATH)
        self._call = stream(metadata=((_SECRET, secret), (_GATEWAY, gateway)))
        self._outbox = _Outbox()
        self._broken = ""
        self._closed = False
        self._writer = asyncio.create_task(self._write())

    async def send(self, message: Down) -> None:
        """Queues a message. Raises ConnectionError when the wire is broken."""
        if self._broken:
            raise ConnectionError(self._broken)
        self._outbox.put(message)

    async def messages(self) -> AsyncIterator[Up]:
        """Everything that comes up, in order. Raises ConnectionError when the wire breaks."""
        try:
            async for data in self._call:
                for message in _up.decode(data):
                    yield message
        except grpc.aio.AioRpcError as error:
            self._break(f"{error.code().name}: {error.details()}")
        except asyncio.CancelledError:
            if not self._closed:  # the reading task is being cancelled, not the channel closed
                self._break("its reader was cancelled")
                raise
        else:
            self._break("the leader ended the stream")
        if not self._closed:
            raise ConnectionError(self._broken)

    async def close(self) -> None:
        """Idempotent. The leader cancels what was asked for over this channel."""
        self._closed = True
        self._break("closed")
        self._writer.cancel()
        self._call.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)
        await self._channel.close()

    async def _write(self) -> None:
        try:
            while True:
                await self._call.write(encode(await self._outbox.take(self._ping_s) or [Ping(self._gateway)]))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self._break(f"cannot send: {error}")

    def _break(self, why: str) -> None:
        if not self._broken:
            self._broken = f"{self.address}: {why}"
            log.debug("wire to %s: %s", self.address, why)
