"""Redis as the store needs it: many values per command, received straight into memory that is there already.

redis-py makes the connections (TLS, passwords, Sentinel, Cluster's map of slots); this file speaks RESP 2 over their
sockets, because a client library copies every value into an object of its own first.
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Sequence
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from workers.cache.receive import BROKEN, CLOSED, SILENT, make_receiver, why

OK, MISSING, WRONG_SIZE = 1, 0, -1  # what became of a value that was asked for
_IOV = 256  # buffers of one sendmsg; the kernel takes 1,024


class StoreError(Exception):
    """Redis cannot be reached, does not answer in time, or refuses. Connections are closed by then."""


class Wire:
    """One connection. Requests and their replies are in order; any exception leaves it unusable."""

    def __init__(self, connection: Any) -> None:
        connection.connect()
        self._connection = connection
        self._socket: socket.socket = connection._sock
        self._timeout_s = _wait_in_the_kernel(self._socket)
        self._buffer = bytearray(512)
        self._view = memoryview(self._buffer)
        self._begin = self._end = 0
        self._scratch = memoryview(bytearray(1 << 16))
        plain = not isinstance(self._socket, ssl.SSLSocket)
        self._receiver = make_receiver(self._socket.fileno(), self._buffer) if plain else None

    def close(self) -> None:
        self._connection.disconnect()

    def send(self, commands: Sequence[Sequence[bytes | memoryview]]) -> None:
        """Sends commands without copying large arguments."""
        parts: list[bytes | memoryview] = []
        small = bytearray()
        for command in commands:
            small += b"*%d\r\n" % len(command)
            for argument in command:
                small += b"$%d\r\n" % len(argument)
                if len(argument) < 4096:
                    small += argument
                else:
                    parts += [bytes(small), argument]
                    small.clear()
                small += b"\r\n"
        parts.append(bytes(small))
        if isinstance(self._socket, ssl.SSLSocket):
            for part in parts:
                self._socket.sendall(part)
            return
        while parts:
            try:
                sent = self._socket.sendmsg(parts[:_IOV])
            except BlockingIOError:
                raise self._silent() from None
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if sent:
                parts[0] = memoryview(parts[0])[sent:]

    def reply(self) -> int | str:
        """An integer, or a status. Raises ReplyError for an error."""
        line = self._line()
        if line[:1] == b":":
            return int(line[1:])
        if line[:1] == b"+":
            return line[1:].decode()
        raise self._error(line)

    def text(self) -> bytes:
        """A short value. Raises ReplyError for an error."""
        line = self._line()
        if line[:1] != b"$":
            raise self._error(line)
        found = bytearray(int(line[1:]))
        self._fill(memoryview(found))
        self._skip(2)
        return bytes(found)

    def values(self, into: Sequence[memoryview]) -> list[int]:
        """The reply to an MGET: each value into its place; OK, MISSING or WRONG_SIZE for each.

        Raises ReplyError for an error.
        """
        line = self._line()
        if line[:1] != b"*" or int(line[1:]) != len(into):
            raise self._error(line)
        if self._receiver is not None:
            outcome, states, self._begin, self._end = self._receiver.values(into, self._begin, self._end)
            if outcome:
                raise self._went_wrong(outcome)
            return states
        found = []
        for place in into:
            line = self._line()
            size = int(line[1:])
            if line[:1] != b"$":
                raise self._error(line)
            if size < 0:
                found.append(MISSING)
                continue
            if size == len(place):
                self._fill(place)
                self._skip(2)
            else:
                self._skip(size + 2)
            found.append(OK if size == len(place) else WRONG_SIZE)
        return found

    def _went_wrong(self, outcome: int) -> Exception:
        if outcome == CLOSED:
            return StoreError("Redis closed the connection")
        if outcome == SILENT:
            return self._silent()
        if outcome == BROKEN:
            return StoreError(why())
        return self._error(self._line())

    def _error(self, line: bytes) -> Exception:
        said = line.decode(errors="replace")
        return ReplyError(said[1:]) if line[:1] == b"-" else StoreError(f"not a reply to what was asked: {said[:80]!r}")

    def _line(self) -> bytes:
        while (at := self._buffer.find(b"\r\n", self._begin, self._end)) < 0:
            if self._begin:
                rest = bytes(self._view[self._begin : self._end])
                self._buffer[: len(rest)] = rest
                self._begin, self._end = 0, len(rest)
            if self._end == len(self._buffer):
                raise StoreError("a line of a reply is too long")
            self._end += self._receive(self._view[self._end :])
        line = bytes(self._view[self._begin : at])
        self._begin = at + 2
        return line

    def _fill(self, place: memoryview) -> None:
        at = min(len(place), self._end - self._begin)
        place[:at] = self._view[self._begin : self._begin + at]
        self._begin += at
        while at < len(place):
            at += self._receive(place[at:])

    def _skip(self, size: int) -> None:
        while size:
            part = self._scratch[: min(size, len(self._scratch))]
            self._fill(part)
            size -= len(part)

    def _receive(self, place: memoryview) -> int:
        try:
            count = self._socket.recv_into(place)
        except BlockingIOError:
            raise self._silent() from None
        if not count:
            raise StoreError("Redis closed the connection")
        return count

    def _silent(self) -> StoreError:
        return StoreError(f"Redis let no byte through for {self._timeout_s:g} s")


def _wait_in_the_kernel(sock: socket.socket) -> float:
    """Leaves a socket's timeout to the kernel: Python's own asks before every read whether there is something, and
    gives its lock away twice. In seconds; 0: none."""
    timeout_s = sock.gettimeout()
    if timeout_s and not isinstance(sock, ssl.SSLSocket):
        value = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
        sock.settimeout(None)
    return timeout_s or 0.0


class ReplyError(Exception):
    """Redis answered with an error; the connection goes on."""


class Servers(Protocol):
    """Where the names of values lie, and how to get there. Errors are those of redis-py, or OSError."""

    def node(self, name: bytes) -> str:
        """The server that has `name`; one word for each server."""

    def connect(self, node: str) -> Any:
        """A new connection of redis-py's to a server, not yet opened."""

    def refresh(self) -> None:
        """A server said that a name is elsewhere, or is gone: looks again."""

    def one_command(self) -> bool:
        """Whether any names of one server may stand in one command."""


class SingleServer:
    """One Redis, by the URLs of redis-py: redis://, rediss:// and unix://."""

    def __init__(self, url: str, timeout_s: float) -> None:
        from redis.connection import ConnectionPool

        self._pool = ConnectionPool.from_url(url, **_options(timeout_s))

    def node(self, name: bytes) -> str:
        return ""

    def connect(self, node: str) -> Any:
        return self._pool.make_connection()

    def refresh(self) -> None:
        pass

    def one_command(self) -> bool:
        return True


class SentinelServer:
    """The master of a service that Sentinels watch:
    redis+sentinel://[user:password@]host:port[,host:port]/service[/db]; rediss+sentinel:// with TLS."""

    def __init__(self, url: str, timeout_s: float) -> None:
        from redis import sentinel
        from redis.connection import Connection, SSLConnection

        parts = urlsplit(url)
        hosts, service, db = _sentinels(url)
        tls = parts.scheme.startswith("rediss")
        self._service = service
        self._class: Any = SSLConnection if tls else Connection
        self._options = _options(timeout_s) | {"db": db}
        credentials = {"username": parts.username, "password": parts.password}
        given = {k: unquote(v) for k, v in credentials.items() if v}
        self._options |= given
        common = _options(timeout_s) | ({"ssl": True} if tls else {})
        make: Any = sentinel.Sentinel
        self._sentinel = make(hosts, sentinel_kwargs=common | given, **common)

    def node(self, name: bytes) -> str:
        return ""

    def connect(self, node: str) -> Any:
        host, port = self._sentinel.discover_master(self._service)
        return self._class(host=host, port=port, **self._options)

    def refresh(self) -> None:
        pass

    def one_command(self) -> bool:
        return True


class ClusterServers:
    """A Redis Cluster, found by the URL of any of its servers."""

    def __init__(self, url: str, timeout_s: float) -> None:
        from redis.cluster import RedisCluster

        self._cluster: Any = RedisCluster.from_url(url, **_options(timeout_s))
        self._nodes: dict[str, Any] = {}

    def node(self, name: bytes) -> str:
        node = self._cluster.get_node_from_key(name)
        self._nodes[node.name] = node
        return str(node.name)

    def connect(self, node: str) -> Any:
        client = self._nodes[node].redis_connection or self._cluster.get_redis_connection(self._nodes[node])
        return client.connection_pool.make_connection()

    def refresh(self) -> None:
        self._cluster.nodes_manager.initialize()

    def one_command(self) -> bool:
        return False


def check_url(url: str) -> None:
    """Raises ValueError, without the URL, where no server can be named so."""
    scheme = urlsplit(url).scheme
    if scheme in ("redis+sentinel", "rediss+sentinel"):
        _sentinels(url)
        return
    from redis import connection

    if scheme not in ("redis", "rediss", "unix"):
        raise ValueError("must begin with redis://, rediss://, unix://, redis+sentinel:// or rediss+sentinel://")
    parse: Any = connection.parse_url
    options = parse(url)
    if scheme == "unix" and not options.get("path"):
        raise ValueError("names no socket; write unix:///path/to/socket")


def shown_url(url: str) -> str:
    """The URL without its password."""
    parts = urlsplit(url)
    where = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{where}{parts.path}"


def open_servers(url: str, timeout_s: float) -> Servers:
    """Finds out what stands behind a URL: a server, a service of Sentinels or a Cluster.

    Raises OSError or an error of redis-py where it cannot be reached.
    """
    if "+sentinel" in urlsplit(url).scheme:
        return SentinelServer(url, timeout_s)
    single = SingleServer(url, timeout_s)
    wire = Wire(single.connect(""))
    try:
        wire.send([(b"INFO", b"cluster")])
        clustered = b"cluster_enabled:1" in wire.text()
    except ReplyError:  # INFO may be forbidden
        clustered = False
    finally:
        wire.close()
    return ClusterServers(url, timeout_s) if clustered else single


def _sentinels(url: str) -> tuple[list[tuple[str, int]], str, int]:
    """Hosts, service and database of a Sentinel URL."""
    parts = urlsplit(url)
    places = [place.rpartition(":") for place in parts.netloc.rpartition("@")[2].split(",")]
    names = parts.path.strip("/").split("/")
    if not all(host and port.isdigit() for host, _, port in places) or not names[0] or len(names) > 2:
        raise ValueError("is no Sentinel URL; write redis+sentinel://HOST:PORT,HOST:PORT/SERVICE")
    if len(names) == 2 and not names[1].isdigit():
        raise ValueError("names no database by number after the service")
    return [(host.strip("[]"), int(port)) for host, _, port in places], names[0], int(names[1]) if names[1:] else 0


def _options(timeout_s: float) -> dict[str, Any]:
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    retry = Retry(NoBackoff(), 0)
    return {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, "retry": retry, "protocol": 2}
