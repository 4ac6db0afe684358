"""The wire between an engine and an expert host: frames of raw bytes over a blocking socket. Nothing is unpickled.

A frame is a header of 32 bytes and its payload. Both ends prove that they know the secret before the first frame.
On one node it is a Unix socket in Linux's abstract namespace, whose name is gone with its process; between nodes TCP.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import struct
import threading
from contextlib import suppress
from enum import IntEnum
from hashlib import sha256
from typing import NamedTuple

import msgspec

MAGIC = b"UEX1"
MAX_FRAME = 1 << 31
_HEADER = struct.Struct("<4sBxHQIIQ")
_BUFFER = 4 << 20
_NONCE, _PROOF = 16, 32


class Kind(IntEnum):
    """COMPUTE: int32 [S] rows and int32 [S] experts of S slots, then x [T, H]; RESULT: y [S, H]. BUSY: still computing.
    REFUSED: why, in UTF-8. LOAD: (layer, expert) pairs in msgpack, to be there soon."""

    COMPUTE = 1
    RESULT = 2
    BUSY = 3
    REFUSED = 4
    LOAD = 5


class Header(NamedTuple):
    """`sequence` numbers an engine's exchanges: an answer carries that of its question."""

    kind: Kind
    layer: int
    sequence: int
    rows: int
    slots: int
    size: int  # bytes of the payload


class Hello(msgspec.Struct, frozen=True):
    """What a host says of itself once the other end is known. Its results have the bits of engines with the same
    `numerics_id`."""

    name: str
    life: int
    numerics_id: str
    hidden: int


class ChannelError(ConnectionError):
    """The other end is gone, silent, or not the one that was meant."""


class Channel:
    """One end of a connection. One thread receives; several may send."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()
        self._header = bytearray(_HEADER.size)

    def set_timeout(self, seconds: float | None) -> None:
        """Of every send and receive from now on; None: for ever."""
        self._socket.settimeout(seconds)

    def send(self, header: Header, *parts: memoryview) -> None:
        """Writes a frame whose payload are `parts` (bytes, contiguous) one after the other. Raises ChannelError."""
        self.send_all(self.frame(header, *parts))

    @staticmethod
    def frame(header: Header, *parts: memoryview) -> list[memoryview]:
        """For `send_all` and `send_some`, whose callers send nothing else until all of it is sent."""
        return [memoryview(_HEADER.pack(MAGIC, *header)), *(part for part in parts if len(part))]

    def send_all(self, left: list[memoryview]) -> None:
        """Writes what is left and empties the list. Raises ChannelError."""
        try:
            with self._sending:
                while left:
                    _shorten(left, self._socket.sendmsg(left))
        except OSError as error:
            raise ChannelError(f"cannot send: {error}") from error

    def send_some(self, left: list[memoryview]) -> None:
        """Writes what the kernel has room for and shortens the list by it; for a channel with a timeout. Raises
        ChannelError."""
        try:
            with self._sending:
                while left:
                    _shorten(left, os.writev(self._socket.fileno(), left))  # `sendmsg` would wait for room
        except BlockingIOError:
            return
        except OSError as error:
            raise ChannelError(f"cannot send: {error}") from error

    def receive(self) -> Header:
        """The next frame's header; its payload has to be read next. Raises ChannelError."""
        self.read_into(memoryview(self._header))
        magic, kind, *numbers = _HEADER.unpack(self._header)
        if magic != MAGIC or numbers[-1] > MAX_FRAME:
            raise ChannelError("what came is no frame")
        try:
            return Header(Kind(kind), *numbers)
        except ValueError as error:
            raise ChannelError(f"a frame of unknown kind: {kind}") from error

    def read_into(self, buffer: memoryview) -> None:
        """Fills the buffer with what comes next. Raises ChannelError."""
        try:
            while len(buffer):
                got = self._socket.recv_into(buffer, 0, socket.MSG_WAITALL)
                if not got:
                    raise ChannelError("the other end has closed")
                buffer = buffer[got:]
        except OSError as error:
            raise ChannelError(f"cannot receive: {error}") from error

    def read(self, size: int) -> bytes:
        """The next `size` bytes. Raises ChannelError."""
        data = bytearray(size)
        self.read_into(memoryview(data))
        return bytes(data)

    def close(self) -> None:
        """Ends the connection, and whatever waits on it. Idempotent."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Listener:
    """Where a host waits: on its node's own socket and, with an `ip`, on a TCP port."""

    def __init__(self, ip: str) -> None:
        self.local = f"understudy-{secrets.token_hex(16)}" if hasattr(socket, "AF_UNIX") else ""
        self._sockets = []
        if self.local:
            unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            unix.bind(f"\0{self.local}")
            self._sockets.append(unix)
        tcp = socket.create_server((ip, 0), family=socket.AF_INET6 if ":" in ip else socket.AF_INET)
        self._sockets.append(tcp)
        port = tcp.getsockname()[1]
        self.tcp = f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
        for each in self._sockets:
            each.listen(16)

    @property
    def sockets(self) -> list[socket.socket]:
        """To accept on."""
        return self._sockets

    def close(self) -> None:
        """Idempotent."""
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # wakes a thread that accepts
            each.close()


def welcome(sock: socket.socket, secret: str, hello: Hello, timeout_s: float) -> Channel:
    """The host's side of a new connection. Raises ChannelError where the other end does not know the secret."""
    channel = _channel(sock, timeout_s)
    try:
        nonce = secrets.token_bytes(_NONCE)
        _write(sock, MAGIC + nonce)
        theirs = channel.read(_NONCE)
        if not hmac.compare_digest(channel.read(_PROOF), _proof(secret, b"engine", nonce, theirs)):
            raise ChannelError("the other end does not know the secret")
        said = msgspec.msgpack.encode(hello)
        _write(sock, _proof(secret, b"host", theirs, nonce) + struct.pack("<I", len(said)) + said)
        channel.set_timeout(None)  # engines may have nothing to ask; but one that reads nothing is given up
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(timeout_s), 0))
    except BaseException:
        channel.close()
        raise
    return channel


def connect(local: str, tcp: str, secret: str, timeout_s: float) -> tuple[Channel, Hello]:
    """An engine's side: over the node's own socket where the host is on this node. Raises ChannelError."""
    sock = _open(local, tcp, timeout_s)
    channel = _channel(sock, timeout_s)
    try:
        start = channel.read(len(MAGIC) + _NONCE)
        if not start.startswith(MAGIC):
            raise ChannelError("what listens there is no expert host")
        nonce, mine = start[len(MAGIC) :], secrets.token_bytes(_NONCE)
        _write(sock, mine + _proof(secret, b"engine", nonce, mine))
        if not hmac.compare_digest(channel.read(_PROOF), _proof(secret, b"host", mine, nonce)):
            raise ChannelError("the host does not know the secret")
        (size,) = struct.unpack("<I", channel.read(4))
        if size > 1 << 16:
            raise ChannelError("the host's hello is too long")
        return channel, msgspec.msgpack.decode(channel.read(size), type=Hello)
    except msgspec.MsgspecError as error:
        channel.close()
        raise ChannelError(f"the host's hello cannot be read: {error}") from error
    except BaseException:
        channel.close()
        raise


def _open(local: str, tcp: str, timeout_s: float) -> socket.socket:
    if local and hasattr(socket, "AF_UNIX"):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)
        try:
            sock.connect(f"\0{local}")
            return sock
        except OSError:  # on another node, or gone
            sock.close()
    ip, _, port = tcp.rpartition(":")
    try:
        return socket.create_connection((ip.strip("[]"), int(port)), timeout_s)
    except (OSError, ValueError) as error:
        raise ChannelError(f"cannot connect to {tcp}: {error}") from error


def _channel(sock: socket.socket, timeout_s: float) -> Channel:
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER)  # the kernel's own bound may cut it
    sock.settimeout(timeout_s)
    return Channel(sock)


def _shorten(left: list[memoryview], sent: int) -> None:
    while left and sent >= len(left[0]):
        sent -= len(left.pop(0))
    if sent:
        left[0] = left[0][sent:]


def _write(sock: socket.socket, data: bytes) -> None:
    try:
        sock.sendall(data)
    except OSError as error:
        raise ChannelError(f"cannot send: {error}") from error


def _proof(secret: str, side: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.new(secret.encode(), side + first + second, sha256).digest()
