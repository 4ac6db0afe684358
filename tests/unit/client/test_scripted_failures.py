"""Whatever a service or a wire does: one unbroken stream with exactly the right tokens, or one clear error.

Each scenario runs with both clients. The table in docs/client.md is of these scenarios.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
from scripted_server import (
    GOAWAY,
    RST_STREAM,
    TEXT,
    Fault,
    FaultyWire,
    Greeting,
    Item,
    Names,
    Script,
    ScriptedServer,
    Way,
    frame,
    hold,
)

from understudy import FinishReason, Retry, _channel, errors
from understudy.testing import FakeServer
from understudy.v1 import inference_pb2 as pb

# Long enough for a machine that is busy with other things; a client that hangs ends with DeadlineExceeded.
DEADLINE_S = 240.0
# The deadline is what ends these: on a busy machine any attempt may fail for other reasons, too.
PATIENT = Retry(attempts=10_000, first_delay_s=0.001, max_delay_s=0.05, resume_attempts=10_000, resume_s=1e9)
FEW = Retry(attempts=8, first_delay_s=0.001, max_delay_s=0.01, resume_attempts=3)
FULL = errors.Overloaded("full", 0.001)
GONE = errors.Unavailable("gone")


# Shorter than a client's own times, for scenes in which one of these passes; too short for a machine that is very busy.
QUICK_TO_PING = {
    "grpc.keepalive_time_ms": 1000,
    "grpc.keepalive_timeout_ms": 1000,
    "grpc.http2.ping_timeout_ms": 1000,
}
QUICK_TO_CONNECT = {"grpc.min_reconnect_backoff_ms": 500, "grpc.max_reconnect_backoff_ms": 100}


# What a call sends, given what it should have sent.


def cut_after(messages: int, *then: Item) -> Script:
    return lambda truth: [*truth[:messages], *then]


def without(*places: int) -> Script:
    return lambda truth: [m for i, m in enumerate(truth) if i not in places]


def twice(place: int) -> Script:
    return lambda truth: [*truth[: place + 1], *truth[place:]]


def swapped(place: int) -> Script:
    return lambda truth: [*truth[:place], truth[place + 1], truth[place], *truth[place + 2 :]]


def other_info(**fields: Any) -> Script:
    def script(truth: list[pb.GenerateResponse]) -> list[Item]:
        message = pb.GenerateResponse()
        message.CopyFrom(truth[0])
        for name, value in fields.items():
            setattr(message.prompt_info, name, value)
        return [message, *truth[1:]]

    return script


def other_tokens(truth: list[pb.GenerateResponse]) -> list[Item]:
    """The second delta once more, but with another token."""
    liar = pb.GenerateResponse(delta=pb.Delta(position=1, text="X", token_ids=[88]))
    return [*truth[:3], liar, *truth[3:]]


def unnumbered(script: Script) -> Script:
    """As a service of before deltas had positions."""

    def stripped(truth: list[pb.GenerateResponse]) -> Iterator[Item]:
        for item in script(truth):
            if isinstance(item, pb.GenerateResponse):
                item.delta.ClearField("position") if item.HasField("delta") else None
            yield item

    return stripped


LATER_EVENT = b"\x9a\x06\x03new"  # field 99 of GenerateResponse
NO_MESSAGE = b"\xff\xff\xff\xff"


# What a wire does, given a DATA frame to the client.


def at(place: int, what: Callable[[Way, bytes, int], object]) -> Fault:
    """`what` is done in place of passing on the DATA frame of that number; the others pass."""

    def fault(way: Way, seen: int, whole: bytes, stream: int) -> None:
        if seen == place:
            what(way, whole, stream)
        else:
            way.send(whole)

    return fault


def reset_within(way: Way, whole: bytes, _stream: int) -> None:
    way.send(whole[: len(whole) // 2])
    way.reset()


def reset_before(way: Way, _whole: bytes, _stream: int) -> None:
    way.reset()


def end(way: Way, _whole: bytes, _stream: int) -> None:
    way.end()


def silence(way: Way, _whole: bytes, _stream: int) -> None:
    way.silence()


def junk(way: Way, _whole: bytes, _stream: int) -> None:
    way.send(b"\xff" * 64)


def stream_reset(code: int) -> Callable[[Way, bytes, int], object]:
    return lambda way, whole, stream: way.send(frame(RST_STREAM, stream, code.to_bytes(4, "big")) + whole)


def go_away(way: Way, whole: bytes, stream: int) -> None:
    """Says that it takes nothing new, goes on, and then closes without the stream's end."""
    way.send(frame(GOAWAY, 0, stream.to_bytes(4, "big") + (0).to_bytes(4, "big") + b"bye") + whole)


def byte_by_byte(way: Way, _seen: int, whole: bytes, _stream: int) -> None:
    for i in range(len(whole)):
        way.send(whole[i : i + 1])


def also(first: Fault, second: Fault) -> Fault:
    """`first` passes its frame on in any case."""

    def fault(way: Way, seen: int, whole: bytes, stream: int) -> None:
        first(way, seen, whole, stream) if seen == 3 else second(way, seen, whole, stream)

    return fault


# Scenarios: addresses to connect to, made within a stack of contexts, and what the caller sees.


@dataclass(frozen=True)
class Scene:
    """`addresses` starts what a client connects to. `error` None: the whole answer. `said` is in the error's text, and
    `text` is what had come by then; None: some of the answer. `calls` counts those that reached the scripted servers,
    where it is certain."""

    addresses: Callable[[ExitStack, list[FakeServer]], Any]
    error: type[errors.UnderstudyError] | None = None
    said: str = ""
    text: str | None = ""
    calls: int | None = None
    timeout: float = DEADLINE_S
    retry: Retry = PATIENT
    options: Mapping[str, int] = field(default_factory=dict)  # of the channel, in place of the client's own


def served(*scripts: Script, always: Script | None = None, **scene: Any) -> Scene:
    """One server whose calls follow these scripts."""

    def addresses(stack: ExitStack, servers: list[FakeServer]) -> str:
        server = ScriptedServer(*scripts)
        server.always = always
        servers.append(stack.enter_context(server))
        return server.address

    return Scene(addresses, **scene)


def wired(*faults: Fault | None, always: Fault | None = None, **scene: Any) -> Scene:
    """An honest server behind a wire whose connections have these faults."""

    def addresses(stack: ExitStack, servers: list[FakeServer]) -> str:
        server = stack.enter_context(ScriptedServer())
        servers.append(server)
        return stack.enter_context(FaultyWire(server.address, *faults, always=always)).address

    return Scene(addresses, **scene)


def beside(word: bytes | None, **scene: Any) -> Scene:
    """Somebody who is no Understudy (None: nobody) at the first address, a good server at the second."""

    def addresses(stack: ExitStack, servers: list[FakeServer]) -> list[str]:
        servers.append(stack.enter_context(ScriptedServer()))
        return [_stranger(stack, word), servers[0].address]

    return Scene(addresses, **scene)


def alone(word: bytes | None, **scene: Any) -> Scene:
    return Scene(lambda stack, _: _stranger(stack, word), errors.Unavailable, retry=FEW, **scene)


def _stranger(stack: ExitStack, word: bytes | None) -> str:
    if word is not None:
        return stack.enter_context(Greeting(word)).address
    with Greeting() as gone:
        return gone.address


def _two(*scripts: Script, second: Script | None = None) -> Callable[[ExitStack, list[FakeServer]], list[str]]:
    """Two servers; whichever is asked first follows `scripts`, and then the other `second`."""

    def addresses(stack: ExitStack, servers: list[FakeServer]) -> list[str]:
        pair = [stack.enter_context(ScriptedServer()) for _ in range(2)]
        for server, other in (pair, pair[::-1]):

            def first(truth: list[pb.GenerateResponse], other: ScriptedServer = other) -> Iterator[Item]:
                other.scripts.clear()
                if second is not None:
                    other.scripts.append(second)
                yield from scripts[0](truth)

            server.scripts += [first, *scripts[1:]]
        servers += pair
        return [server.address for server in pair]

    return addresses


def _stopping(grace_s: float | None) -> Callable[[ExitStack, list[FakeServer]], list[str]]:
    """Two servers; the one that is asked stops after four messages, and goes on where it may."""

    def addresses(stack: ExitStack, servers: list[FakeServer]) -> list[str]:
        pair = [stack.enter_context(ScriptedServer()) for _ in range(2)]
        for server in pair:

            def script(truth: list[pb.GenerateResponse], server: ScriptedServer = server) -> list[Item]:
                def stop(context: Any) -> None:
                    assert server._server is not None
                    server._server.stop(grace_s)
                    if grace_s is None:
                        hold(context)

                for other in pair:
                    other.scripts.clear()
                return [*truth[:4], stop, *truth[4:]]

            server.scripts.append(script)
        servers += pair
        return [server.address for server in pair]

    return addresses


def _named(*scripts: Script, dead: int = 1) -> Callable[[ExitStack, list[FakeServer]], str]:
    """A name of one server and of `dead` addresses at which nobody listens."""

    def addresses(stack: ExitStack, servers: list[FakeServer]) -> str:
        server = stack.enter_context(ScriptedServer(*scripts))
        servers.append(server)
        names = stack.enter_context(Names(*(f"127.0.0.{2 + i}" for i in range(dead)), "127.0.0.1"))
        return f"dns://{names.authority}/gateways.test:{server.address.rpartition(':')[2]}"

    return addresses


SCENES: dict[str, Scene] = {
    # the wire
    "reset-within-a-message": wired(at(3, reset_within), calls=2),
    "reset-before-the-first-message": wired(at(0, reset_before), calls=2),
    "reset-at-every-message": wired(*[at(1, reset_within)] * 2, *[at(2, reset_before)] * 12),
    "closed-between-messages": wired(at(4, end), calls=2),
    "half-open": wired(at(3, silence), options=QUICK_TO_PING),
    "half-open-before-the-first-message": wired(at(0, silence), options=QUICK_TO_PING),
    "half-open-every-time": wired(
        always=at(3, silence), error=errors.DeadlineExceeded, text=None, timeout=2.5, options=QUICK_TO_PING
    ),
    "byte-by-byte": wired(byte_by_byte, calls=1),
    "junk-on-the-wire": wired(at(4, junk), calls=2),
    "goaway-then-closed": wired(also(at(3, go_away), at(6, end)), calls=2),
    **{
        f"stream-reset-{name}": wired(at(3, stream_reset(code)), calls=2)
        for name, code in {"no-error": 0, "internal": 2, "refused": 7, "cancel": 8, "calm-down": 11}.items()
    },
    # order
    "deltas-swapped": served(swapped(2)),
    "finish-before-the-last-delta": served(swapped(len(TEXT))),
    "delta-twice": served(twice(3), calls=1),
    "finish-twice": served(twice(len(TEXT) + 1), calls=1),
    "delta-missing": served(without(4), calls=2),
    "first-delta-missing": served(without(1), calls=2),
    "last-delta-missing": served(without(len(TEXT)), calls=2),
    "delta-missing-every-time": served(
        always=without(1), error=errors.Unavailable, said="tokens from 1 on of sequence 0; 0 had come",
        retry=FEW, calls=4,
    ),
    "other-tokens-in-its-place": served(other_tokens, error=errors.InternalError, said="other tokens", text=TEXT[:2]),
    "unnumbered-delta-missing": served(
        unnumbered(without(4)), error=errors.InternalError, said="after 12 tokens; 11 had come", text="Helo, world"
    ),
    "unnumbered-delta-twice": served(
        unnumbered(twice(3)), error=errors.InternalError, said="after 12 tokens; 13 had come", text="Helllo, world"
    ),
    "prompt-info-twice": served(twice(0), error=errors.InternalError, said="prompt_info twice"),
    "prompt-info-missing": served(without(0), error=errors.InternalError, said="delta before prompt_info"),
    "an-event-of-a-later-version": served(lambda t: [*t[:3], LATER_EVENT, *t[3:]], calls=1),
    "bytes-that-are-no-message": served(
        cut_after(3, NO_MESSAGE), error=errors.InternalError, said="no message of this API", text=TEXT[:2]
    ),
    "end-without-finish": served(
        cut_after(4), error=errors.InternalError, said="before the answer was whole", text="Hel"
    ),
    "finish-and-then-an-error": served(lambda t: [*t, GONE], calls=1),
    # statuses
    "unavailable-before-the-first-token": served(cut_after(0, GONE), cut_after(1, GONE), calls=3),
    "unavailable-after-the-first-token": served(cut_after(2, GONE), cut_after(5, GONE), calls=3),
    "unavailable-at-every-message": served(*[cut_after(2, GONE)] * 30, calls=len(TEXT) + 1),
    "unavailable-every-time": served(
        always=cut_after(0, GONE), error=errors.Unavailable, said="gone", calls=8, retry=FEW
    ),
    "overloaded-before-the-first-token": served(cut_after(0, errors.Overloaded("full", 7.5)), error=errors.Overloaded),
    "overloaded-when-it-would-go-on": served(cut_after(3, GONE), cut_after(0, FULL), cut_after(1, FULL), calls=4),
    "deadline-said-by-the-service": served(
        cut_after(3, errors.DeadlineExceeded("too late")), error=errors.DeadlineExceeded, said="too late", text="He"
    ),
    "never-a-word": served(always=cut_after(0, hold), error=errors.DeadlineExceeded, timeout=0.5),
    "silent-after-some": served(always=cut_after(3, hold), error=errors.DeadlineExceeded, text="He", timeout=0.5),
    # going on elsewhere
    "goes-on-with-other-weights": Scene(
        _two(cut_after(3, GONE), second=other_info(model_fingerprint="other")), calls=3
    ),
    "goes-on-with-another-seed-everywhere": served(
        cut_after(3, GONE), always=other_info(seed=5), error=errors.CannotResume, said="seed 0 and would go on with 5",
        text="He", calls=2,
    ),
    "goes-on-with-another-prompt": served(
        cut_after(3, GONE), lambda t: [pb.GenerateResponse(prompt_info=pb.PromptInfo(prompt_token_ids=[1]))],
        error=errors.CannotResume, text="He",
    ),
    "server-stops-gracefully": Scene(_stopping(30.0), calls=1),
    "server-stops-at-once": Scene(_stopping(None), calls=2),
    # who is there
    "nobody-at-one-address": beside(None, calls=1),
    "nobody-at-all": alone(None, said="127.0.0.1:"),
    "one-accepts-and-never-speaks": beside(b"", calls=1, options=QUICK_TO_CONNECT),
    "accepts-and-never-speaks": alone(b"", said="127.0.0.1:", options=QUICK_TO_CONNECT),
    "one-speaks-http-1": beside(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", calls=1),
    "speaks-http-1": alone(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", said="127.0.0.1:"),
    "a-name-with-a-dead-address": Scene(_named(), calls=1),
    "a-name-with-dead-addresses-and-breaks": Scene(_named(cut_after(2, GONE), cut_after(3, GONE), dead=3), calls=3),
}  # fmt: skip


@pytest.mark.parametrize("name", SCENES)
def test_one_whole_answer_or_one_clear_error(connect: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scene, servers = SCENES[name], list[FakeServer]()
    assert scene.options.keys() <= dict(_channel.OPTIONS).keys()
    monkeypatch.setattr(_channel, "OPTIONS", tuple({**dict(_channel.OPTIONS), **scene.options}.items()))
    with ExitStack() as stack:
        client = connect(scene.addresses(stack, servers), retry=scene.retry, timeout=scene.timeout)
        stream, pieces = client.open("Hi"), []
        try:
            if scene.error is None:
                pieces = client.read(stream)
            else:
                with pytest.raises(scene.error) as caught:
                    client.read(stream)
                assert type(caught.value).__mro__[0] in (scene.error, *scene.error.__subclasses__())
                assert scene.said in str(caught.value)
        finally:
            client.call("close")
    if scene.error is None:
        assert [piece.text for piece in pieces] == list(TEXT)
        assert [piece.token_ids for piece in pieces] == [(ord(c),) for c in TEXT]
        assert stream.finish.reason is FinishReason.EOS
        assert stream.finish.usage.completion_tokens == len(TEXT)
    else:
        assert stream.text == scene.text or (scene.text is None and TEXT.startswith(stream.text))
        assert client.read(stream) == []  # said once
    if scene.calls is not None:
        assert sum(len(server.calls) for server in servers) == scene.calls


def test_an_overloaded_service_says_when_to_come_back(connect: Any) -> None:
    server = ScriptedServer(cut_after(0, errors.Overloaded("full", 7.5)))
    with server, pytest.raises(errors.Overloaded) as caught:
        connect(server.address).call("complete", "Hi")
    assert caught.value.retry_after_s == 7.5


PROCESS = """
import sys
from understudy.testing import FakeServer
with FakeServer(sys.argv[1]) as server:
    server.hold_after(5)
    print(server.address, flush=True)
    sys.stdin.read()
"""


def test_a_gateway_that_is_killed_is_left_for_another(connect: Any) -> None:
    """kill -9 in the middle of a stream: the kernel closes its connection."""
    command = [sys.executable, "-c", PROCESS, TEXT]
    with (
        FakeServer(TEXT) as other,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as gateway,
    ):
        try:
            assert gateway.stdout is not None
            client = connect([gateway.stdout.readline().strip(), other.address], timeout=DEADLINE_S)
            client.client._turn = 1  # the next call begins at the first address
            stream = client.open("Hi")
            head = "".join(client.next(stream).text for _ in range(4))
            gateway.send_signal(signal.SIGKILL)
            assert head + "".join(piece.text for piece in client.read(stream)) == TEXT
            assert [len(s.token_ids) for s in other.calls[0].message.resume.sequences] == [4]
        finally:
            gateway.kill()


def test_a_comma_is_as_good_as_a_list(connect: Any) -> None:
    with FakeServer(TEXT) as one, FakeServer(TEXT) as other:
        client = connect(f"{one.address}, {other.address}")
        for _ in range(4):
            assert client.call("complete", "Hi").text == TEXT
        assert (len(one.calls), len(other.calls)) == (2, 2)


def test_calls_take_turns_among_the_addresses_of_a_name(connect: Any) -> None:
    with FakeServer(TEXT) as one, FakeServer(TEXT) as other:
        ports = [server.address.rpartition(":")[2] for server in (one, other)]
        client = connect(f"ipv4:127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}", timeout=DEADLINE_S)
        while not (one.calls and other.calls):  # until both are connected, calls go to the first that is
            assert client.call("complete", "Hi").text == TEXT
        before = len(one.calls), len(other.calls)
        for _ in range(4):
            client.call("complete", "Hi")
        assert (len(one.calls) - before[0], len(other.calls) - before[1]) == (2, 2)


@pytest.mark.parametrize("nothing", [",", "127.0.0.1:1,", " "])
def test_an_empty_address_among_several_is_refused(connect: Any, nothing: str) -> None:
    with pytest.raises(errors.ConfigError, match="host:port"):
        connect(nothing)
