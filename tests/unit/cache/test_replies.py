"""Replies of a Redis that a test plays, in pieces of any size: by the kernels' receiver and without it."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from workers.cache import wire as module
from workers.cache.receive import make_receiver
from workers.cache.wire import MISSING, OK, WRONG_SIZE, ReplyError, StoreError, Wire


class Connection:
    """What `Wire` uses of redis-py's."""

    def __init__(self, end: socket.socket) -> None:
        self._sock = end

    def connect(self) -> None:
        pass

    def disconnect(self) -> None:
        self._sock.close()


Send = Callable[[bytes], None]


@pytest.fixture(params=["native", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(module, "make_receiver", lambda *_: None)
    elif make_receiver(0, bytearray(1)) is None:
        pytest.skip("no C++ compiler here: the kernels cannot be built")
    return str(request.param)


@contextmanager
def talk(says: Callable[[Send], None], timeout_s: float = 30.0) -> Iterator[Wire]:
    """A wire whose other end says something and then closes."""
    mine, theirs = socket.socketpair()
    mine.settimeout(timeout_s)
    wire = Wire(Connection(mine))

    def speak() -> None:
        with theirs:
            says(theirs.sendall)

    speaker = threading.Thread(target=speak)
    speaker.start()
    try:
        yield wire
    finally:
        wire.close()
        speaker.join(30)


def reply(values: list[bytes | None]) -> bytes:
    return b"*%d\r\n" % len(values) + b"".join(
        b"$-1\r\n" if v is None else b"$%d\r\n%s\r\n" % (len(v), v) for v in values
    )


def places(sizes: list[int]) -> list[memoryview]:
    return [memoryview(bytearray(size)) for size in sizes]


@pytest.mark.parametrize("seed", range(30))
def test_values_in_any_pieces(way: str, seed: int) -> None:
    """Three replies one after the other, of sizes around those of the buffers, cut anywhere."""
    dice = random.Random(seed)
    sizes = [0, 1, 2, 7, 100, 505, 511, 512, 513, 4096, 70_000]
    said: list[list[bytes | None]] = []
    wanted: list[list[int]] = []
    for _ in range(3):
        wanted.append(dice.choices(sizes, k=dice.randrange(1, 12)))
        said.append(
            [dice.choice([None, dice.randbytes(size + 3)]) if dice.random() < 0.3 else dice.randbytes(size)
             for size in wanted[-1]]
        )  # fmt: skip
    stream = b"".join(map(reply, said))

    def says(send: Send) -> None:
        left = memoryview(stream)
        while left:
            size = dice.choice([1, 2, 3, 600, 30_000]) if dice.random() < 0.9 else len(left)
            send(bytes(left[:size]))
            left = left[size:]

    with talk(says) as wire:
        for values, want in zip(said, wanted, strict=True):
            into = places(want)
            expected = [
                MISSING if v is None else OK if len(v) == n else WRONG_SIZE for v, n in zip(values, want, strict=True)
            ]
            assert wire.values(into) == expected
            for place, value, state in zip(into, values, expected, strict=True):
                assert bytes(place) == (value if state == OK else bytes(len(place)))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"*2\r\n$3\r\nabc\r\n:5\r\n", "not a reply to what was asked: ':5'"),
        (b"*2\r\n$3\r\nabc\r\n" + b"x" * 600, "line of a reply is too long"),
        (b"*3\r\n", "not a reply to what was asked: '\\*3'"),
        (b"*2\r\n$3\r\nabc\r\n$3\r\nab", "closed"),
        (b"*2\r\n$3\r\nabc\r\n$", "closed"),
        (b"", "closed"),
    ],
)
def test_what_is_no_reply(way: str, said: bytes, words: str) -> None:
    with talk(lambda send: send(said)) as wire, pytest.raises(StoreError, match=words):
        wire.values(places([3, 3]))


def test_an_error_leaves_the_connection_in_use(way: str) -> None:
    with talk(lambda send: send(b"-MOVED 7 elsewhere\r\n" + reply([b"abc"]))) as wire:
        with pytest.raises(ReplyError, match="MOVED 7 elsewhere"):
            wire.values(places([3]))
        assert wire.values(places([3])) == [OK]


def test_silence_ends(way: str) -> None:
    heard = threading.Event()

    def says(send: Send) -> None:
        send(b"*1\r\n$3\r\na")
        heard.wait(30)

    with talk(says, timeout_s=0.05) as wire:
        with pytest.raises(StoreError, match=r"no byte through for 0.05 s"):
            wire.values(places([3]))
        heard.set()


def test_a_reset_is_told(way: str) -> None:
    asked = threading.Event()

    def says(send: Send) -> None:
        send(b"*1\r\n$3\r\na")
        asked.wait(30)  # and closes without having read what was asked

    with talk(says) as wire:
        wire.send([(b"MGET", b"name")])
        asked.set()
        with pytest.raises((StoreError, ConnectionError), match="reset by peer"):
            wire.values(places([3]))
