"""An expert host: computes rows of the experts that it was given, for engines that are connected. A plain class.

| thread | does |
|---|---|
| of each listening socket | lets engines in that know the secret |
| of each connection | receives rows, computes, sends results |
| of the keeper | packs what was asked for ahead, one expert at a time |
| beat | tells engines whose rows take long that somebody is at it |
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress

import msgspec
import torch
from torch import Tensor

from workers.experts.channel import Channel, ChannelError, Header, Hello, Kind, Listener, welcome
from workers.experts.keeper import Keeper
from workers.experts.placement import HostAddress, HostReport
from workers.experts.shelf import Place, Shelf

log = logging.getLogger(__name__)

BEAT_S = 0.25
_WELCOME_S = 5.0
_places = msgspec.msgpack.Decoder(list[tuple[int, int]])


class ExpertHost:
    """`start`, then `hold` and `keep` as the placement wants it, at last `stop`.

    `life` counts the lives of the host's `name`. `ip` is where it listens for other nodes.
    """

    def __init__(
        self, shelf: Shelf, *, name: str, life: int, secret: str, capacity: int, ip: str = "127.0.0.1", node: str = ""
    ) -> None:
        self._shelf, self._secret, self._node = shelf, secret, node or ip
        self._listener = Listener(ip)
        self.address = HostAddress(name, life, self._listener.local, self._listener.tcp, capacity)
        self._hello = Hello(name, life, shelf.ops.numerics_id, shelf.spec.hidden)
        self._keeper = Keeper(shelf, name)
        self._busy: dict[Channel, tuple[float, Header]] = {}  # since when, and for which question
        self._open: set[Channel] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Listens and loads."""
        for sock in self._listener.sockets:
            self._spawn(self._accept, sock)
        self._keeper.start()
        self._spawn(self._beat)

    def hold(self, places: Iterable[Place]) -> None:
        """See `Keeper.hold`."""
        self._keeper.hold(places)

    def keep(self, places: Iterable[Place]) -> None:
        """See `Keeper.keep`."""
        self._keeper.keep(places)

    def report(self) -> HostReport:
        """What is known right now; quick."""
        return self._keeper.report(self.address, self._node)

    def stop(self) -> None:
        """Closes every connection and waits for the threads. Idempotent."""
        self._stopped.set()
        self._listener.close()
        with self._lock:
            channels = list(self._open)
        for channel in channels:
            channel.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(10.0)
        self._keeper.stop()

    # Threads ------------------------------------------------------------------------------------------------------

    def _spawn(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="expert-host", daemon=True)  # type: ignore[arg-type]
        self._threads = [t for t in self._threads if t.is_alive() or t.ident is None] + [thread]
        thread.start()

    def _accept(self, listening: socket.socket) -> None:
        while not self._stopped.is_set():
            try:
                sock, _ = listening.accept()
            except OSError:
                return
            self._spawn(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        try:
            channel = welcome(sock, self._secret, self._hello, _WELCOME_S)
        except ChannelError as error:
            log.warning("expert host %s let nobody in: %s", self.address.name, error)
            return
        with self._lock:
            if self._stopped.is_set():
                return channel.close()
            self._open.add(channel)
        try:
            buffers = _Buffers()
            while True:
                self._answer(channel, channel.receive(), buffers)
        except ChannelError as error:
            if not self._stopped.is_set():
                log.info("expert host %s: an engine has gone: %s", self.address.name, error)
        finally:
            with self._lock:
                self._open.discard(channel)
                self._busy.pop(channel, None)
            channel.close()

    def _answer(self, channel: Channel, header: Header, buffers: _Buffers) -> None:
        """One frame. Raises ChannelError where the connection is of no use any more."""
        if header.kind is Kind.LOAD:
            try:
                self.hold(_places.decode(channel.read(header.size)))
            except msgspec.MsgspecError as error:
                raise ChannelError(f"a list of experts that cannot be read: {error}") from error
            return
        if header.kind is not Kind.COMPUTE:
            raise ChannelError(f"a frame that a host does not take: {header.kind.name}")
        hidden, dtype = self._shelf.spec.hidden, self._shelf.ops.dtype
        if header.size != 8 * header.slots + header.rows * hidden * dtype.itemsize:
            raise ChannelError(
                f"{header.size} bytes for {header.slots} slots of {header.rows} rows of {hidden} {dtype}"
            )
        payload = buffers.take(header.size)
        channel.read_into(memoryview(payload.numpy()))
        with self._lock:
            self._busy[channel] = time.monotonic(), header
        try:
            result = self._compute(header, payload)
        except Exception as error:  # the engine has to know, and other engines' rows go on
            log.exception("expert host %s cannot compute", self.address.name)
            said = f"{type(error).__name__}: {error}".encode()
            reply, parts = header._replace(kind=Kind.REFUSED, rows=0, size=len(said)), memoryview(said)
        else:
            data = memoryview(result.view(torch.uint8).reshape(-1).numpy())
            reply, parts = header._replace(kind=Kind.RESULT, rows=0, size=len(data)), data
        finally:
            with self._lock:
                self._busy.pop(channel, None)
        channel.send(reply, parts)

    def _compute(self, header: Header, payload: Tensor) -> Tensor:
        """COMPUTE's payload -> [S, H]"""
        slots, shelf = header.slots, self._shelf
        numbers = payload[: 8 * slots].view(torch.int32)
        rows, experts = numbers[:slots], numbers[slots:].numpy()
        x = payload[8 * slots :].view(shelf.ops.dtype).view(header.rows, shelf.spec.hidden)
        return self._keeper.compute(header.layer, x.to(shelf.device), rows.to(shelf.device), experts).cpu()

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_S):
            now = time.monotonic()
            with self._lock:
                late = [(channel, header) for channel, (since, header) in self._busy.items() if now - since > BEAT_S]
            for channel, header in late:
                with suppress(ChannelError):  # its own thread will notice
                    channel.send(header._replace(kind=Kind.BUSY, rows=0, slots=0, size=0))


class _Buffers:
    """Room for one payload at a time, only ever grown; aligned as torch wants it."""

    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        if len(self._room) < size:
            self._room = torch.empty(max(size, 2 * len(self._room)), dtype=torch.uint8)
        return self._room[:size]
