"""Where a client connects to and how: channel options, credentials, typed names of the calls."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.wrappers_pb2 import Int64Value, StringValue

from understudy._attempts import Attempts
from understudy._request import GenerateOptions, Metadata, Prompt, call_metadata, generate_request
from understudy._stream import StreamState
from understudy.errors import ConfigError, InternalError
from understudy.types import Health, Retry, Tls
from understudy.v1 import admin_pb2, inference_pb2

MAX_MESSAGE_BYTES = 64 << 20
INFERENCE = "understudy.v1.Inference"

# Pings let a client notice within 15 s that the other side is gone without a word, also while nothing is sent.
OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # In later versions of gRPC this is what counts, a minute unless it is told.
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Our own backoff decides when to try again; the channel's must not be the longer one.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Despite its name, how long one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", 3_000),
    # Where a name has several addresses: calls take turns among those that can be reached.
    ("grpc.lb_policy_name", "round_robin"),
)

Req = TypeVar("Req", bound=Message)
Res = TypeVar("Res", bound=Message)
Chan = TypeVar("Chan")


@dataclass(frozen=True)
class Method(Generic[Req, Res]):
    """A call's path and the types of its messages: what the generated stubs know, but typed."""

    path: str
    request: type[Req]
    response: type[Res]

    @property
    def service(self) -> str:
        """Full name of the service that it belongs to."""
        return self.path.split("/")[1]

    def serialize(self, message: Req) -> bytes:
        return message.SerializeToString()

    def parse(self, data: bytes) -> Res | DecodeError:
        """The message, or why the bytes are none: gRPC's two clients each make something else of an exception here."""
        try:
            return self.response.FromString(data)
        except DecodeError as error:
            return error

    def parse_request(self, data: bytes) -> Req:
        return self.request.FromString(data)

    def serialize_response(self, message: Res) -> bytes:
        return message.SerializeToString()


GENERATE = Method(f"/{INFERENCE}/Generate", inference_pb2.GenerateRequest, inference_pb2.GenerateResponse)
TOKENIZE = Method(f"/{INFERENCE}/Tokenize", inference_pb2.TokenizeRequest, inference_pb2.TokenizeResponse)
DETOKENIZE = Method(f"/{INFERENCE}/Detokenize", inference_pb2.DetokenizeRequest, inference_pb2.DetokenizeResponse)
LIST_MODELS = Method(f"/{INFERENCE}/ListModels", inference_pb2.ListModelsRequest, inference_pb2.ListModelsResponse)
GET_STATUS = Method("/understudy.v1.Admin/GetStatus", admin_pb2.GetStatusRequest, admin_pb2.GetStatusResponse)
SCALE_EXPERTS = Method(
    "/understudy.v1.Admin/ScaleExperts", admin_pb2.ScaleExpertsRequest, admin_pb2.ScaleExpertsResponse
)
# `HealthCheckRequest` is one string and `HealthCheckResponse` one enum, both field 1: on the wire they are these
# wrappers, and a client needs no package for them.
HEALTH = Method("/grpc.health.v1.Health/Check", StringValue, Int64Value)


def readable(message: Res | DecodeError) -> Res:
    """What `Method.parse` gave. Raises InternalError where it is no message."""
    if isinstance(message, DecodeError):
        raise InternalError(f"the service sent bytes that are no message of this API: {message}")
    return message


def health(message: Int64Value) -> Health:
    """The answer of `HEALTH`."""
    return list(Health)[message.value] if 0 <= message.value < len(Health) else Health.UNKNOWN


class Endpoint(Generic[Chan]):
    """Addresses, identity and patience of a client; what `Client` and `AsyncClient` have in common."""

    def __init__(
        self,
        address: str | Sequence[str] = "127.0.0.1:50051",
        *,
        token: str | None = None,
        tls: Tls | bool = False,
        timeout: float | None = None,
        retry: Retry | None = None,
    ) -> None:
        """`address` is `host:port`, or several, in a sequence or with commas between them; calls take turns among them
        and go on at the next when one fails. A name that has several addresses counts as one: calls take turns among
        those that can be reached.

        `token` is a bearer token. `tls` is True (the system's roots) or the PEM files. `timeout` is every call's
        in seconds unless the call has its own; None is no deadline.
        """
        self.addresses = _split(address) if isinstance(address, str) else tuple(address)
        if not self.addresses or not all(self.addresses):
            raise ConfigError(f"address: expected host:port, or several, not {address!r}")
        self._token = token
        self._tls = Tls() if tls is True else tls or None
        self._timeout = timeout
        self._retry = retry or Retry()
        self._chance = random.Random()
        self._turn = self._chance.randrange(len(self.addresses))
        self._channels: dict[int, Chan] = {}
        self._closed = False
        self._lock = threading.Lock()

    def _connect(self, address: str, options: list[tuple[str, Any]]) -> Chan:
        """A new channel to an address."""
        raise NotImplementedError

    def _channel_to(self, index: int) -> Chan:
        """The channel to the address of that index, opened on first use."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the client is closed")
            if index not in self._channels:
                self._channels[index] = self._connect(self.addresses[index], self._options())
            return self._channels[index]

    def _take_channels(self) -> list[Chan]:
        """All channels, to be closed; the client opens none any more."""
        with self._lock:
            self._closed = True
            channels, self._channels = list(self._channels.values()), {}
            return channels

    def _attempts(self, timeout: float | None, retry: Retry | None = None) -> Attempts:
        """A new call: where it begins and when it must be over."""
        timeout = self._timeout if timeout is None else timeout
        deadline = None if timeout is None else time.monotonic() + timeout
        self._turn += 1
        return Attempts(retry or self._retry, len(self.addresses), self._turn, deadline, self._chance)

    def _once_each(self, timeout: float | None) -> Attempts:
        """A new call that tries each address once at most."""
        return self._attempts(timeout, Retry(attempts=len(self.addresses)))

    def _start(self, prompt: Prompt, options: GenerateOptions) -> tuple[StreamState, Metadata]:
        """A new answer, and what its calls carry."""
        request = generate_request(prompt, options)
        metadata = call_metadata(self._token, request.request_id, options.get("traceparent"))
        return StreamState(request, self._attempts(options.get("timeout"))), metadata

    def _credentials(self) -> grpc.ChannelCredentials | None:
        """None for plaintext. ConfigError where a file cannot be read or half of a pair is missing."""
        if self._tls is None:
            return None
        if (self._tls.cert is None) != (self._tls.key is None):
            raise ConfigError("tls.cert, tls.key: give both (mutual TLS) or neither")
        return grpc.ssl_channel_credentials(
            root_certificates=_read("tls.ca", self._tls.ca),
            private_key=_read("tls.key", self._tls.key),
            certificate_chain=_read("tls.cert", self._tls.cert),
        )

    def _options(self) -> list[tuple[str, Any]]:
        name = self._tls.server_name if self._tls else None
        return [*OPTIONS, *([("grpc.ssl_target_name_override", name)] if name else [])]


def _split(addresses: str) -> tuple[str, ...]:
    # gRPC's own lists, such as ipv4:10.0.0.1:80,10.0.0.2:80, are one target.
    return (addresses,) if addresses.startswith(("ipv4:", "ipv6:")) else tuple(a.strip() for a in addresses.split(","))


def _read(key: str, path: str | Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path}: {error.strerror}") from error
