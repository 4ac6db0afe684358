"""An engine's connections to expert hosts: which are there, which are lost, and those that come back."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from workers.experts.channel import Channel, ChannelError, Header, Kind, connect
from workers.experts.placement import ExpertsPlan, HostAddress, HostsView

log = logging.getLogger(__name__)

_RETRY_S = 0.25
_CONNECT_S = 2.0


@dataclass(slots=True)
class Question:
    """Rows that one host is to compute. Its results go to the rows `slots` of `out` [S, bytes of a row], unless
    nobody waits for them any more; `refusal` is what the host said instead."""

    layer: int
    sequence: int
    rows: int
    slots: NDArray[np.int64]
    out: NDArray[np.uint8]
    wanted: bool = True
    answered: bool = False
    refusal: str = ""
    unsent: list[memoryview] = field(default_factory=list)


class Link:
    """A connection to one life of a host. Used by the engine's thread.

    A host reads a question only when it has answered the one before. What of a second one finds no room on the way is
    sent after that answer was taken, since otherwise both ends could wait for each other.
    """

    def __init__(self, channel: Channel, address: HostAddress) -> None:
        self.address = address
        self._channel = channel
        self._room = np.empty(0, np.uint8)
        self._open: deque[Question] = deque()  # in the order in which the host answers

    def ask(self, question: Question, *parts: memoryview) -> None:
        """Sends rows, or begins to. Raises ChannelError."""
        q, size = question, sum(len(part) for part in parts)
        frame = Channel.frame(Header(Kind.COMPUTE, q.layer, q.sequence, q.rows, len(q.slots), size), *parts)
        q.unsent = frame
        if not self._open:
            self._channel.send_all(frame)
        elif not self._open[-1].unsent:
            self._channel.send_some(frame)
        self._open.append(q)

    def load(self, places: list[tuple[int, int]]) -> None:
        """Tells the host what will be wanted. Raises ChannelError."""
        data = msgspec.msgpack.encode(places)
        frame = Channel.frame(Header(Kind.LOAD, 0, 0, 0, 0, len(data)), memoryview(data))
        if not self._open:
            self._channel.send_all(frame)
            return
        last = self._open[-1]
        last.unsent.extend(frame)
        if len(last.unsent) == len(frame):
            self._channel.send_some(last.unsent)

    def take(self, question: Question, wait_s: float) -> None:
        """Waits for an answer, and takes those before it. Raises ChannelError where the host is silent, or busy for
        more than `wait_s`."""
        end = time.monotonic() + wait_s
        while not question.answered:
            header = self._channel.receive()
            if header.kind is Kind.BUSY:
                if time.monotonic() > end:
                    raise ChannelError(f"busy with the same rows for more than {wait_s:g} s")
                continue
            self._answer(header)

    def _answer(self, header: Header) -> None:
        q = self._open.popleft() if self._open else None
        if q is None or q.sequence != header.sequence:
            raise ChannelError(f"an answer to question {header.sequence}, which is not the next")
        if header.kind is Kind.REFUSED:
            q.refusal = bytes(self._payload(header.size)).decode(errors="replace")
        else:
            count, width = len(q.slots), q.out.shape[1]
            if header.kind is not Kind.RESULT or header.size != count * width:
                raise ChannelError(f"{header.kind.name} of {header.size} bytes for {count} slots of {width}")
            results = self._payload(header.size)
            if q.wanted:
                q.out[q.slots] = results.reshape(count, width)
        q.answered = True
        self._channel.send_all(q.unsent)  # what was to be loaded
        if self._open:  # which the host reads now
            self._channel.send_all(self._open[0].unsent)

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
