"""What goes wrong between a client and a service, on order: a server that follows scripts, a wire that fails at a
frame, a name with several addresses."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc

from understudy import errors
from understudy._channel import GENERATE
from understudy._status import to_status
from understudy.testing import Call, FakeServer
from understudy.v1 import inference_pb2 as pb

TEXT = "Hello, world"

# What a call sends: messages, bytes in place of one, an error that ends it, or something to do meanwhile.
Item = pb.GenerateResponse | bytes | errors.UnderstudyError | Callable[[grpc.ServicerContext], object]
Script = Callable[[list[pb.GenerateResponse]], Iterable[Item]]


class ScriptedServer(FakeServer):
    """A FakeServer whose Generate calls each follow the next of `scripts`, which is given the true answer's messages:
    PromptInfo, a delta per character of TEXT, Finish. Without a script a call gets the true answer."""

    def __init__(self, *scripts: Script, **options: Any) -> None:
        super().__init__(TEXT, **options)
        self.scripts = deque(scripts)
        self.always: Script | None = None  # where `scripts` is empty

    def _inference(self) -> grpc.GenericRpcHandler:
        generate = grpc.unary_stream_rpc_method_handler(
            self._follow,
            request_deserializer=GENERATE.parse_request,
            response_serializer=lambda item: item if isinstance(item, bytes) else item.SerializeToString(),
        )
        return grpc.method_handlers_generic_handler(GENERATE.service, {"Generate": generate})

    def _follow(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        self.calls.append(Call(request, {}))
        script = self.scripts.popleft() if self.scripts else self.always
        truth = list(self._responses(request))
        for item in script(truth) if script is not None else truth:
            if isinstance(item, errors.UnderstudyError):
                code, message, trailing = to_status(item)
                context.set_trailing_metadata(trailing)
                context.abort(code, message)
            elif callable(item):
                item(context)
            else:
                yield item


def hold(context: grpc.ServicerContext) -> None:
    """Nothing more is sent until the client goes away."""
    gone = threading.Event()
    if context.add_callback(gone.set):
        gone.wait()


# Wires.

DATA, RST_STREAM, GOAWAY = 0, 3, 7


def frame(kind: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame without flags."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, 0]) + struct.pack(">I", stream) + payload


class Cut(Exception):
    """A fault is through with its connection."""


class Way:
    """One connection, as a fault sees it: `send` passes bytes to the client; each way of ending it raises Cut."""

    def __init__(self, client: socket.socket, server: socket.socket, closing: threading.Event) -> None:
        self._client, self._server, self._closing = client, server, closing

    def send(self, data: bytes) -> None:
        self._client.sendall(data)

    def reset(self) -> None:
        """A TCP RST, as a killed machine's kernel or a firewall sends it."""
        self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # A recv() in the other thread holds the socket open: this ends it, and sends nothing.
        self._client.shutdown(socket.SHUT_RD)
        self._client.close()
        raise Cut

    def end(self) -> None:
        """An orderly FIN."""
        raise Cut

    def silence(self) -> None:
        """Half-open: both sockets stay, and nothing comes through any more."""
        self._closing.wait()
        raise Cut


# Given a connection, the number of a DATA frame to the client counted from 0, the frame, and its stream.
Fault = Callable[[Way, int, bytes, int], None]


class FaultyWire:
    """Passes bytes on to `target`, frame by frame towards the client. Each new connection takes the next of `faults`,
    which is asked to pass on its DATA frames; without one all goes through. `always` is for those that come after."""

    def __init__(self, target: str, *faults: Fault | None, always: Fault | None = None) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._faults = deque(faults)
        self._always = always
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                fault = self._faults.popleft() if self._faults else self._always
                self._open.append(client)
                try:
                    server = socket.create_connection(self._target)
                except OSError:
                    client.close()
                    continue
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._open.append(server)
                for work in ((self._up, client, server), (self._down, client, server, fault)):
                    self._threads.append(threading.Thread(target=work[0], args=work[1:]))
                    self._threads[-1].start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
        _shut(server)

    def _down(self, client: socket.socket, server: socket.socket, fault: Fault | None) -> None:
        way, seen = Way(client, server, self._closing), 0
        with contextlib.suppress(OSError, Cut), server.makefile("rb") as source:
            while len(head := source.read(9)) == 9:
                whole = head + source.read(int.from_bytes(head[:3], "big"))
                if fault is not None and head[3] == DATA:
                    fault(way, seen, whole, int.from_bytes(head[5:9], "big"))
                    seen += 1
                else:
                    way.send(whole)
        _shut(client)
        _shut(server)

    def close(self) -> None:
        self._closing.set()
        # A closed listener does not wake its accept(); one that is shut down does.
        _shut(self._listener)
        self._threads[0].join()
        for end in self._open:
            _shut(end)
        for thread in self._threads[1:]:
            thread.join()
        for end in (self._listener, *self._open):
            end.close()

    def __enter__(self) -> FaultyWire:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


class Greeting:
    """Listens, says `word` to whoever connects (nothing, where it is empty), reads and never says more."""

    def __init__(self, word: bytes = b"") -> None:
        self._word = word
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._open.append(client)
                with contextlib.suppress(OSError):
                    client.sendall(self._word)

    def __enter__(self) -> Greeting:
        return self

    def __exit__(self, *exc: object) -> None:
        _shut(self._listener)
        self._thread.join()
        for end in (self._listener, *self._open):
            end.close()


class Names:
    """A DNS server that answers every question for an IPv4 address with all of `addresses`."""

    def __init__(self, *addresses: str) -> None:
        self._addresses = addresses
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.authority = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.asked = 0
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        while True:
            question, who = self._socket.recvfrom(4096)
            if not question:
                return
            end = question.index(b"\0", 12) + 5  # name, type, class
            found = self._addresses if question[end - 4 : end - 2] == b"\0\1" else ()
            self.asked += bool(found)
            records = b"".join(
                b"\xc0\x0c\0\1\0\1" + struct.pack(">IH", 1, 4) + socket.inet_aton(address) for address in found
            )
            head = question[:2] + struct.pack(">HHHHH", 0x8580, 1, len(found), 0, 0)
            self._socket.sendto(head + question[12:end] + records, who)

    def __enter__(self) -> Names:
        return self

    def __exit__(self, *exc: object) -> None:
        host, port = self.authority.split(":")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as waker:
            waker.sendto(b"", (host, int(port)))
        self._thread.join()
        self._socket.close()
