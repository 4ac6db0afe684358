"""Spans of a call: what its parts took, and what happened meanwhile.

Whoever makes spans is passed in as a `Tracer`; without one there is None in its place, and a stream pays one attribute
check per batch of tokens. Attributes have the names of OpenTelemetry's conventions for RPC and generative AI where
there are some.

| span | begins | ends |
|---|---|---|
| the call, `understudy.v1.Inference/Generate` | the call arrives | its status is sent |
| `route` | the router is asked | a replica is granted, or none |
| `replica`, one per sequence and attempt | the request is sent there | its end, or the loss of it |
| `queue`, then `prefill`, then `decode`, at the replica | it arrives | first step, first token, last token |
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from router.port import Assignment
from understudy.errors import UnderstudyError
from workers.engine import FinishReason, Request, SequenceOutput

if TYPE_CHECKING:
    from router.interceptors import Call

Value = str | int | float | bool | Sequence[str]
Kind = Literal["server", "client", "internal"]
PROVIDER = "understudy"
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_OPERATIONS = {"Generate": "text_completion", "Chat": "chat"}


class Span(Protocol):
    """One span under way. Its methods never fail and never wait."""

    @property
    def context(self) -> str:
        """Its W3C `traceparent`; empty where it is not recorded, and then nothing below it is."""

    def set(self, attributes: Mapping[str, Value]) -> None: ...

    def event(self, name: str, attributes: Mapping[str, Value]) -> None: ...

    def end(self, error: str = "", at_ns: int | None = None) -> None:
        """Ends it, at a moment of the wall clock or now. `error` is a kind of error. Idempotent."""


class Tracer(Protocol):
    """Makes spans."""

    def start(
        self,
        name: str,
        parent: str = "",
        kind: Kind = "internal",
        attributes: Mapping[str, Value] | None = None,
        at_ns: int | None = None,
    ) -> Span:
        """A span that begins now, or at a moment of the wall clock. `parent` is a `traceparent`; empty: a new trace."""

    def close(self) -> None:
        """Exports what is left, for 2 s at most. Idempotent; blocks."""


def valid_traceparent(given: str) -> str:
    """`given` where it is a W3C trace context, else nothing: what cannot be read is as if it were not there."""
    return given if _TRACEPARENT.fullmatch(given) else ""


# The call.


def open_call(tracer: Tracer, call: Call, path: str) -> Span:
    """The span of a call, of the trace that its client said."""
    service, _, method = path.strip("/").partition("/")
    attributes: dict[str, Value] = {
        "rpc.system": "grpc",
        "rpc.service": service,
        "rpc.method": method,
        "client.address": call.peer,
    }
    if method in _OPERATIONS:
        attributes |= {"gen_ai.operation.name": _OPERATIONS[method], "gen_ai.provider.name": PROVIDER}
    return tracer.start(f"{service}/{method}", valid_traceparent(call.traceparent), "server", attributes)


def close_call(span: Span, call: Call, outcome: str, code: int) -> None:
    """Ends it. `outcome` is OK or a kind of error, `code` gRPC's number of the status."""
    notes, attributes = call.notes, dict[str, Value]()
    attributes |= {"rpc.grpc.status_code": code, "gen_ai.response.id": call.request_id}
    for key, name in _OF_NOTES.items():
        if key in notes:
            attributes[name] = notes[key]
    if finish := notes.get("finish"):
        attributes["gen_ai.response.finish_reasons"] = finish.split(",")
    if call.tenant:
        attributes["understudy.tenant"] = call.tenant
    span.set(attributes)
    span.end("" if outcome == "OK" else outcome)


_OF_NOTES = {
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
}


# A stream at the gateway.


@dataclass(slots=True)
class _Attempt:
    span: Span
    index: int
    tokens: int  # passed on
    begun: bool = False


class StreamTrace:
    """One stream's spans, below that of its call. `router.stream` says what happens; see `stream_trace`."""

    def __init__(self, tracer: Tracer, call: Span) -> None:
        self._tracer = tracer
        self._call = call
        self._attempts: dict[str, _Attempt] = {}
        self._lost: dict[int, dict[str, Value]] = {}  # by sequence: what is known of a failover that is not over

    @contextmanager
    def route(self, prompt_tokens: int, excluded: int) -> Iterator[Callable[[Assignment], None]]:
        """Around the question to the router; what it yields is told the answer."""
        asked = {"gen_ai.usage.input_tokens": prompt_tokens, "understudy.route.excluded": excluded}
        span = self._tracer.start("route", self._call.context, attributes=asked)

        def answer(to: Assignment) -> None:
            span.set(
                _place(to) | {"understudy.route.reason": to.reason or "unknown", "understudy.route.lease": to.lease}
            )

        try:
            yield answer
        except BaseException as error:
            span.end(kind_of(error))
            raise
        span.end()

    def sent(self, attempt: str, index: int, tokens: int, to: Assignment) -> str:
        """A sequence is sent to a replica after so many tokens; the context that goes with it."""
        attributes = _place(to) | {"understudy.sequence": index, "understudy.tokens.before": tokens}
        if lost := self._lost.pop(index, None):
            self._call.event("failover", lost | {"understudy.failover.to": to.replica})
        span = self._tracer.start("replica", self._call.context, "client", attributes)
        self._attempts[attempt] = _Attempt(span, index, tokens)
        return span.context

    def came(self, attempt: str, tokens: int, cached: tuple[int, int, int] | None) -> None:
        """So many more tokens, the prompt's cached ones (device, host, store) with the first of them."""
        at = self._attempts.get(attempt)
        if at is None:
            return
        at.tokens += tokens
        if at.begun or not tokens:
            return
        at.begun = True
        told: dict[str, Value] = {}
        if cached is not None:
            told = {f"understudy.cached_tokens.{tier}": n for tier, n in zip(_TIERS, cached, strict=True)}
            at.span.set(told | {"gen_ai.usage.cache_read.input_tokens": sum(cached)})
        at.span.event("first_token", told)

    def finished(self, attempt: str, reason: FinishReason) -> None:
        """The sequence has ended there as it should."""
        if (at := self._attempts.pop(attempt, None)) is not None:
            at.span.event("finish", {"gen_ai.response.finish_reasons": [reason.name]})
            self._end(at, "")

    def lost(self, attempt: str, replica: str, cause: str) -> None:
        """The sequence has to go on elsewhere."""
        if (at := self._attempts.pop(attempt, None)) is None:
            return
        self._lost[at.index] = {
            "understudy.failover.cause": cause,
            "understudy.failover.from": replica,
            "understudy.failover.tokens": at.tokens,
            "understudy.sequence": at.index,
        }
        self._end(at, "REPLICA_LOST")

    def left(self, attempt: str) -> None:
        """Nothing more is wanted there: the client is gone or too slow, or a stop string was found."""
        if (at := self._attempts.pop(attempt, None)) is not None:
            self._end(at, "")

    def close(self) -> None:
        """Tells what never found another place."""
        lost, self._lost = self._lost, {}
        for told in lost.values():
            self._call.event("failover", told | {"understudy.failover.to": ""})

    @staticmethod
    def _end(at: _Attempt, error: str) -> None:
        at.span.set({"gen_ai.usage.output_tokens": at.tokens})
        at.span.end(error)


_TIERS = ("device", "host", "store")


def stream_trace(tracer: Tracer | None, call: Span | None) -> StreamTrace | None:
    """None where nobody wants spans of this call."""
    return StreamTrace(tracer, call) if tracer is not None and call is not None and call.context else None


def kind_of(error: BaseException) -> str:
    """The word for an error that a span carries."""
    return error.kind if isinstance(error, UnderstudyError) else type(error).__name__


def _place(to: Assignment) -> dict[str, Value]:
    return {"understudy.replica": to.replica, "understudy.replica.epoch": to.epoch}


# A sequence at the replica.


class ReplicaTrace:
    """Spans of one sequence in the leader's process, made when they are over, from three moments: it came, its first
    output came, its last did; and how long it had been computed by its first output. `wall` gives nanoseconds."""

    def __init__(
        self, tracer: Tracer, request: Request, replica: str, epoch: int, wall: Callable[[], int] = time.time_ns
    ) -> None:
        self._tracer = tracer
        self._parent = request.traceparent
        self._about: dict[str, Value] = {
            "understudy.replica": replica,
            "understudy.replica.epoch": epoch,
            "understudy.sequence": request.index,
        }
        self._prompt = {
            "gen_ai.usage.input_tokens": len(request.prompt),
            "understudy.tokens.before": len(request.generated),
        }
        self._wall = wall
        self._since = wall()
        self._waiting = True
        self._tokens = 0

    def take(self, output: SequenceOutput) -> bool:
        """An output of it; True when it was the last."""
        now = self._wall()
        self._tokens += len(output.token_ids)
        if self._waiting:
            if output.finish is not None and not output.token_ids:  # it never got its turn
                self._over(now, output.finish)
                return True
            self._waiting = False
            began = max(self._since, now - output.computing_us * 1000)
            self._span("queue", self._since, began)
            if output.computing_us:
                cached = [output.cached_tokens or 0, output.cached_host, output.cached_store]
                told = {f"understudy.cached_tokens.{tier}": n for tier, n in zip(_TIERS, cached, strict=True)}
                self._span("prefill", began, now, self._prompt | told)
            self._since = now
        if output.finish is None:
            return False
        self._over(now, output.finish)
        return True

    def abandon(self) -> None:
        """Its gateway is gone."""
        self._over(self._wall(), FinishReason.CANCELLED)

    def _over(self, now: int, finish: FinishReason) -> None:
        failed = "" if finish in _GOOD else finish.name
        if self._waiting:
            self._span("queue", self._since, now, error=failed)
        else:
            counted = {"gen_ai.usage.output_tokens": self._tokens, "gen_ai.response.finish_reasons": [finish.name]}
            self._span("decode", self._since, now, counted, failed)

    def _span(
        self, name: str, begin: int, end: int, attributes: Mapping[str, Any] | None = None, error: str = ""
    ) -> None:
        about = self._about | dict(attributes or {})
        self._tracer.start(name, self._parent, attributes=about, at_ns=begin).end(error, end)


_GOOD = (FinishReason.EOS, FinishReason.STOP_TOKEN, FinishReason.LENGTH)
