"""Connections cut at any byte, within a frame or between two: the caller still sees one whole answer."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from understudy import FinishReason, Retry
from understudy.testing import FakeServer

TEXT = "Zwölf 🎭 Boxkämpfer jagen Viktor über den großen Sylter Deich. " * 3
PATIENT = Retry(attempts=10_000, first_delay_s=0.001, max_delay_s=0.02, resume_attempts=10_000)


class CuttingProxy:
    """Passes bytes on to `target`; resets each connection once it has passed on as many as `limits` says next."""

    def __init__(self, target: str, limits: list[int]) -> None:
        host, port = target.split(":")
        self._target = (host, int(port))
        self._limits = limits
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._open: list[socket.socket] = []
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._open += [client, server]
                limit = self._limits.pop() if self._limits else None
                for source, sink, bound in ((client, server, None), (server, client, limit)):
                    self._threads.append(threading.Thread(target=self._pump, args=(source, sink, bound)))
                    self._threads[-1].start()

    def _pump(self, source: socket.socket, sink: socket.socket, left: int | None) -> None:
        with contextlib.suppress(OSError):  # either side has closed
            while data := source.recv(65536):
                if left is not None and len(data) >= left:
                    self.cuts += 1
                    sink.sendall(data[:left])
                    break
                left = None if left is None else left - len(data)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        # A closed listener does not wake its accept(); one that is shut down does.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
        for end in (self._listener, *self._open):
            end.close()


@pytest.fixture
def proxied() -> Iterator[tuple[FakeServer, CuttingProxy]]:
    chance = random.Random(4)
    with FakeServer(TEXT) as server:
        proxy = CuttingProxy(server.address, [chance.randrange(1, 2500) for _ in range(25)])
        yield server, proxy
        proxy.close()


def test_cuts_at_any_byte_are_not_seen(connect: Any, proxied: tuple[FakeServer, CuttingProxy]) -> None:
    server, proxy = proxied
    client = connect(proxy.address, retry=PATIENT)
    while proxy.cuts < 25:
        done = client.call("complete", "Hi", logprobs=0)
        assert done.text == TEXT
        assert done.token_ids == tuple(map(ord, TEXT))
        assert [p.token_id for p in done.logprobs] == list(done.token_ids)
        assert done.finish.reason is FinishReason.EOS
        assert done.finish.usage.completion_tokens == len(TEXT)
    assert any(call.message.HasField("resume") for call in server.calls)
