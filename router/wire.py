"""What travels between a gateway and a replica's leader, and the channel that carries it.

A gateway holds one long-lived channel per leader. Down it go `Request`, `Cancel` and `Ping`; up come `Hello`, then
one `StepOutput` per engine step with all of that step's tokens for this gateway, and `Beat` when there is nothing
else to say. Encoded as msgpack with a tag (`encode_up`, ...). `cluster` brings the implementation over gRPC,
`router.fakes` one in memory.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

from workers.engine import EngineInfo, EngineStats, Request, StepOutput


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Ends a sequence whose client is gone or whose text is complete."""

    id: str


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The gateway lives. A leader that hears nothing for its lease cancels what that gateway asked for."""

    gateway: str


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """First message up: which leader this is."""

    replica: str
    epoch: int
    info: EngineInfo


class Beat(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The leader lives; its engine's last step and counts, and what keeps it from making tokens."""

    epoch: int
    stats: EngineStats
    trouble: str = ""


Down = Request | Cancel | Ping
Up = Hello | StepOutput | Beat

_encoder = msgspec.msgpack.Encoder()
_down = msgspec.msgpack.Decoder(Down)
_up = msgspec.msgpack.Decoder(Up)
encode = _encoder.encode
decode_down = _down.decode
decode_up = _up.decode


class ReplicaChannel(Protocol):
    """A gateway's end of the wire to one leader. Used from one event loop."""

    async def send(self, message: Down) -> None:
        """Queues a message. Raises ConnectionError when the wire is broken."""

    def messages(self) -> AsyncIterator[Up]:
        """Everything that comes up, in order; ends, or raises ConnectionError, when the wire breaks."""

    async def close(self) -> None:
        """Idempotent."""
