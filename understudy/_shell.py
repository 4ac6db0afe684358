"""What `Stream` and `AsyncStream` share: everything but waiting."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import DecodeError

from understudy import errors
from understudy._attempts import Again
from understudy._channel import GENERATE, Endpoint, Method, readable
from understudy._request import Metadata
from understudy._status import from_rpc
from understudy._stream import StreamState
from understudy.types import Completion, Finish, Piece, PromptInfo
from understudy.v1 import inference_pb2 as pb

Wake = TypeVar("Wake", threading.Event, asyncio.Event)


class StreamShell(Generic[Wake]):
    """One answer: what it has shown so far, and the call that brings the rest.

    A broken stream goes on at the next address by itself, with no gap and nothing twice. Iterating raises an
    `UnderstudyError`; what had come until then stays readable.
    """

    _over = True
    _method: Method[Any, Any] = GENERATE

    def __init__(self, client: Endpoint[Any], state: StreamState, metadata: Metadata, wake: Wake) -> None:
        self._client = client
        self._state = state
        self._metadata = metadata
        self._wake: Wake = wake
        self._open()
        self._over = False

    @property
    def prompt(self) -> PromptInfo | None:
        """What the service made of the prompt; None until it said so."""
        return self._state.prompt

    @property
    def text(self) -> str:
        """The text of the first sequence so far."""
        return self._state.text(0)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The token ids of the first sequence so far."""
        return self._state.token_ids(0)

    @property
    def finish(self) -> Finish | None:
        """Why the first sequence ended; None while it goes on."""
        return self._state.finish(0)

    @property
    def finishes(self) -> tuple[Finish, ...]:
        """Of all sequences that have ended, in the order of their index."""
        return self._state.finishes()

    def completion(self) -> Completion:
        """The whole answer, after the stream was read to its end; RuntimeError before."""
        return self._state.completion()

    def cancel(self) -> None:
        """Ends the answer. Whoever reads on gets `Cancelled`, unless all had come already."""
        self._state.cancelled = True
        self._wake.set()
        self._call.cancel()

    def _open(self) -> None:
        """Begins an attempt."""
        if self._state.cancelled:  # while it waited
            self._over = True
            raise errors.Cancelled("the caller cancelled")
        attempts = self._state.attempts
        self._address = attempts.address
        channel = self._client._channel_to(self._address)
        call = channel.unary_stream(self._method.path, self._method.serialize, self._method.parse)
        timeout = attempts.remaining(time.monotonic())
        self._call: Any = call(self._state.request(), timeout=timeout, metadata=self._metadata)
        if self._state.cancelled:  # while it was opened
            self._call.cancel()

    def _receive(self, response: pb.GenerateResponse | pb.ChatResponse | DecodeError) -> Piece | None:
        """The piece that a response brings, if any. An UnderstudyError is for `_after`."""
        message: pb.GenerateResponse | pb.ChatResponse = readable(response)
        return self._state.receive(message)

    def _after(self, error: grpc.RpcError | errors.UnderstudyError | None) -> Again | None:
        """The call ended, or sent what cannot be taken: None where the answer is over, raises where it failed, else
        when to `_open` again."""
        self._over = True
        if isinstance(error, errors.UnderstudyError):
            self._call.cancel()
            meant: errors.UnderstudyError | None = error
        else:
            meant = from_rpc(error, self._client.addresses[self._address]) if error else None
        again = self._state.ended(meant, time.monotonic())
        self._over = again is None
        return again
