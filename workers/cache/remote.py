"""One thread's way to Redis: which values are there, fetching them, putting them; one server or a Cluster's many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from workers.cache.wire import MISSING, ReplyError, Servers, StoreError, Wire, open_servers

REDIRECTS = ("MOVED", "ASK", "CLUSTERDOWN", "TRYAGAIN", "READONLY", "MASTERDOWN", "LOADING")


@dataclass(slots=True)
class Asked:
    """Values that were asked for and have not been received: `parts` are each command's server and names."""

    parts: list[tuple[str, list[int]]]
    into: Sequence[memoryview]


class Remote:
    """Connects when it is first used. Every method raises StoreError when the servers cannot be reached or do not
    answer within `timeout_s` (without a byte of progress); the next call connects anew. For one thread."""

    def __init__(
        self, url: str, timeout_s: float = 1.0, opened: Callable[[str, float], Servers] = open_servers
    ) -> None:
        self._url, self._timeout_s, self._opened = url, timeout_s, opened
        self._servers: Servers | None = None
        self._wires: dict[str, Wire] = {}
        self._stale = False  # a server said that names have moved

    def warm(self) -> None:
        """Connects, so that the first who asks need not wait for it. What goes wrong shows when something is asked."""
        with suppress(StoreError), self._guarded() as servers:
            self._wire(servers, servers.node(b""))

    def touch(self, blocks: Sequence[Sequence[bytes]]) -> list[int]:
        """How many of each block's names are there; those count as used now. One block's names have one slot."""
        with self._guarded() as servers:
            asked: dict[str, list[int]] = {}
            for i, names in enumerate(blocks):
                asked.setdefault(servers.node(names[0]), []).append(i)
            for node, rows in asked.items():
                self._wire(servers, node).send([(b"TOUCH", *blocks[i]) for i in rows])
            found = [0] * len(blocks)
            for node, rows in asked.items():
                for i in rows:
                    found[i] = self._integer(self._wires[node])
            return found

    def ask(self, names: Sequence[bytes], into: Sequence[memoryview]) -> Asked:
        """Asks for values; `receive` gets them. More may be asked for meanwhile: answers come in that order."""
        with self._guarded() as servers:
            parts: dict[tuple[str, bytes], list[int]] = {}
            for i, name in enumerate(names):
                slot = b"" if servers.one_command() else name[: name.index(b"}")]
                parts.setdefault((servers.node(name), slot), []).append(i)
            asked = Asked([(node, rows) for (node, _), rows in parts.items()], into)
            for node, rows in asked.parts:
                self._wire(servers, node).send([(b"MGET", *[names[i] for i in rows])])
            return asked

    def receive(self, asked: Asked) -> list[int]:
        """Every value that was asked for into its place: OK, MISSING or WRONG_SIZE for each."""
        with self._guarded():
            found = [MISSING] * len(asked.into)
            for node, rows in asked.parts:
                if node not in self._wires:
                    raise StoreError("the connection was lost after the values were asked for")
                try:
                    states = self._wires[node].values([asked.into[i] for i in rows])
                except ReplyError as error:
                    self._note(error)
                    continue
                for i, state in zip(rows, states, strict=True):
                    found[i] = state
            return found

    def put(self, values: Sequence[tuple[bytes, memoryview]]) -> list[str]:
        """Writes values; for each '' or why it was refused."""
        with self._guarded() as servers:
            rows: dict[str, list[int]] = {}
            for i, (name, _) in enumerate(values):
                rows.setdefault(servers.node(name), []).append(i)
            said = [""] * len(values)
            for node, mine in rows.items():
                wire = self._wire(servers, node)
                wire.send([(b"SET", *values[i]) for i in mine])
                for i in mine:
                    try:
                        wire.reply()
                    except ReplyError as error:
                        self._note(error)
                        said[i] = str(error)
            return said

    def close(self) -> None:
        """Closes connections. Idempotent."""
        for wire in self._wires.values():
            wire.close()
        self._wires.clear()

    @contextmanager
    def _guarded(self) -> Iterator[Servers]:
        try:
            if self._servers is None:
                self._servers = self._opened(self._url, self._timeout_s)
            if self._stale:
                self._servers.refresh()
                self._stale = False
            yield self._servers
        except Exception as error:  # redis-py has several trees of errors, and sockets another
            self.close()
            self._servers = None
            raise error if isinstance(error, StoreError) else StoreError(f"{type(error).__name__}: {error}") from error

    def _wire(self, servers: Servers, node: str) -> Wire:
        wire = self._wires.get(node)
        if wire is None:
            wire = self._wires[node] = Wire(servers.connect(node))
        return wire

    def _integer(self, wire: Wire) -> int:
        try:
            return int(wire.reply())
        except ReplyError as error:
            self._note(error)
            return 0

    def _note(self, error: ReplyError) -> None:
        if str(error).partition(" ")[0] in REDIRECTS:
            self._stale = True
