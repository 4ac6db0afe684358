"""An engine's connections to expert hosts: which are there, which are lost, and those that come back."""

from __future__ import annotations

import logging
import threading
import time

import msgspec
import numpy as np
from numpy.typing import NDArray

from workers.experts.channel import Channel, ChannelError, Header, Kind, connect
from workers.experts.placement import ExpertsPlan, HostAddress, HostsView

log = logging.getLogger(__name__)

_RETRY_S = 0.25
_CONNECT_S = 2.0


class Link:
    """A connection to one life of a host. Used by the engine's thread."""

    def __init__(self, channel: Channel, address: HostAddress) -> None:
        self.address = address
        self._channel = channel
        self._room = np.empty(0, np.uint8)

    def ask(self, layer: int, sequence: int, rows: int, slots: int, *parts: memoryview) -> None:
        """Sends rows. Raises ChannelError."""
        size = sum(len(part) for part in parts)
        self._channel.send(Header(Kind.COMPUTE, layer, sequence, rows, slots, size), *parts)

    def load(self, places: list[tuple[int, int]]) -> None:
        """Tells the host what will be wanted. Raises ChannelError."""
        data = msgspec.msgpack.encode(places)
        self._channel.send(Header(Kind.LOAD, 0, 0, 0, 0, len(data)), memoryview(data))

    def take(self, sequence: int, slots: NDArray[np.int64], out: NDArray[np.uint8], wait_s: float) -> str:
        """Receives the answer to `sequence` into the rows `slots` of `out` [S, bytes of a row]; what the host said,
        where it refuses.

        What is older is dropped. Raises ChannelError where the host is silent, or busy for more than `wait_s`.
        """
        end = time.monotonic() + wait_s
        width = out.shape[1]
        while True:
            header = self._channel.receive()
            if header.kind is Kind.BUSY:
                if time.monotonic() > end:
                    raise ChannelError(f"busy with the same rows for more than {wait_s:g} s")
                continue
            if header.sequence != sequence:  # of a step that failed
                self._payload(header.size)
                continue
            if header.kind is Kind.REFUSED:
                return bytes(self._payload(header.size)).decode(errors="replace")
            if header.kind is not Kind.RESULT or header.size != len(slots) * width:
                raise ChannelError(f"{header.kind.name} of {header.size} bytes for {len(slots)} slots of {width}")
            out[slots] = self._payload(header.size).reshape(len(slots), width)
            return ""

    def _payload(self, size: int) -> NDArray[np.uint8]:
        if len(self._room) < size:
            self._room = np.empty(max(size, 2 * len(self._room)), np.uint8)
        self._channel.read_into(self._room.data[:size])
        return self._room[:size]

    def close(self) -> None:
        self._channel.close()


class Links:
    """The hosts of an engine. `present` and `get` are for the engine's thread, the others for any.

    A thread of its own connects to hosts that are lost, so that no step waits for a connection.
    """

    def __init__(self, plan: ExpertsPlan, numerics_id: str, hidden: int) -> None:
        self._plan, self._numerics_id, self._hidden = plan, numerics_id, hidden
        self._view = plan.view
        self._offered: HostsView | None = plan.view
        self._links: dict[str, Link] = {}
        self._fresh: dict[str, Link] = {}  # connected, not yet in use
        self._changed = threading.Condition()
        self._events = self._seen = 0  # changes, and those that `adopt` knew of
        self._closed = False
        self._connect_all(plan.view)
        self._mending = threading.Thread(target=self._mend, name="expert-links", daemon=True)
        self._mending.start()

    def offer(self, view: HostsView) -> None:
        """Connects to new hosts, then keeps the view for `adopt`. An older one is ignored."""
        with self._changed:
            known = self._offered if self._offered is not None else self._view
            if view.number <= known.number:
                return
        self._connect_all(view)
        with self._changed:
            self._offered = view
            self._note()

    def adopt(self) -> HostsView | None:
        """Takes new connections into use, and the latest view, which is returned where there is one."""
        with self._changed:
            view, self._offered = self._offered, None
            self._seen = self._events
            if view is not None:
                self._view = view
            wanted = {h.name: h.life for h in self._view.hosts}
            for name, link in [*self._links.items()]:
                if wanted.get(name) != link.address.life:
                    self._links.pop(name).close()
            for name, link in [*self._fresh.items()]:
                if wanted.get(name) == link.address.life and name not in self._links:
                    self._links[name] = self._fresh.pop(name)
            return view

    def present(self) -> frozenset[str]:
        """Names of the hosts that rows can go to."""
        return frozenset(self._links)

    def get(self, name: str) -> Link | None:
        return self._links.get(name)

    def lost(self) -> tuple[str, ...]:
        """Names of hosts that cannot be reached."""
        with self._changed:
            return tuple(h.name for h in self._view.hosts if h.name not in self._links and h.name not in self._fresh)

    def lose(self, link: Link, why: str) -> None:
        """A host broke off or is silent. What it sends later goes nowhere."""
        log.warning("expert host %s is lost: %s", link.address.name, why)
        link.close()
        with self._changed:
            if self._links.get(link.address.name) is link:
                del self._links[link.address.name]
            self._note()

    def ask_to_load(self, name: str, places: list[tuple[int, int]]) -> None:
        """Tells a host what will be wanted of it."""
        link = self._links.get(name)
        if link is not None:
            try:
                link.load(places)
            except ChannelError as error:
                self.lose(link, str(error))

    def wait(self, seconds: float) -> None:
        """Until something changes that `adopt` does not know, or so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._events != self._seen, seconds)

    def _note(self) -> None:
        self._events += 1
        self._changed.notify_all()

    def close(self) -> None:
        """Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._mending.join(2 * _CONNECT_S)
        for link in (*self._links.values(), *self._fresh.values()):
            link.close()
        self._links.clear()
        self._fresh.clear()

    def _connect_all(self, view: HostsView) -> None:
        for address in view.hosts:
            with self._changed:
                known = [link.address.life for link in self._known(address.name)]
            if address.life not in known:
                self._try(address)

    def _known(self, name: str) -> list[Link]:
        return [link for link in (self._links.get(name), self._fresh.get(name)) if link is not None]

    def _try(self, address: HostAddress) -> None:
        try:
            link = self._connect(address)
        except ChannelError as error:
            log.debug("expert host %s cannot be reached: %s", address.name, error)
            return
        with self._changed:
            if self._closed:
                link.close()
                return
            old, self._fresh[address.name] = self._fresh.get(address.name), link
            if old is not None:
                old.close()
            self._note()

    def _connect(self, address: HostAddress) -> Link:
        channel, hello = connect(address.local, address.tcp, self._plan.secret, _CONNECT_S)
        wanted = (address.name, address.life, self._numerics_id, self._hidden)
        said = (hello.name, hello.life, hello.numerics_id, hello.hidden)
        if said != wanted:
            channel.close()
            log.error("expert host %s is %s, and %s is wanted", address.name, said, wanted)
            raise ChannelError(f"it is {said}, and {wanted} is wanted")
        channel.set_timeout(self._plan.silence_s)
        return Link(channel, address)

    def _mend(self) -> None:
        while True:
            with self._changed:
                self._changed.wait(_RETRY_S)
                if self._closed:
                    return
                view = self._offered if self._offered is not None else self._view
                missing = [h for h in view.hosts if h.life not in [k.address.life for k in self._known(h.name)]]
            for address in missing:
                self._try(address)
