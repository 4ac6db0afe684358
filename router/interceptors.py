"""What happens around every call: identity, request id, deadline, one line in the log, metrics, errors as statuses."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from router.metrics import Metrics
from router.tracing import Span, Tracer, close_call, open_call
from router.validate import valid_request_id
from understudy._status import clipped, to_status
from understudy.errors import FROM_KIND, ConfigError, InternalError, InvalidRequest, Unauthenticated, UnderstudyError

# An identity belongs to calls that touch models; probes bring none.
_OPEN_SERVICES = ("/grpc.health.v1.Health/",)
_OWN_SERVICES = "/understudy.v1."
log = structlog.stdlib.get_logger("router.calls")


@dataclass
class Call:
    """One call as the interceptor sees it. `deadline_s` is what the client left us, None without a deadline."""

    method: str
    request_id: str
    started: float
    deadline_s: float | None
    tenant: str = ""
    salt: str = ""  # of cached prefixes: callers share them where it is equal
    peer: str = ""
    traceparent: str = ""
    notes: dict[str, Any] = field(default_factory=dict)  # what the handler adds to the log line
    span: Span | None = None


current_call: contextvars.ContextVar[Call] = contextvars.ContextVar("current_call")


class Tokens:
    """Bearer tokens and the tenants that they speak for; `shared` are salts of tenants that share cached prefixes.

    Only SHA-256 hashes are kept, and every one is compared, each in constant time.
    """

    def __init__(self, tenants: Mapping[str, str], shared: Mapping[str, str] | None = None) -> None:
        self._hashes = [(hashlib.sha256(t.encode()).digest(), tenant) for t, tenant in tenants.items()]
        self._shared = dict(shared or {})

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """From a file with one `TOKEN TENANT [SALT]` per line; blank lines and lines that begin with # are skipped.

        Raises ConfigError naming the line, never the token.
        """
        tenants: dict[str, str] = {}
        salts: dict[str, str | None] = {}  # by tenant
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"tokens: {path} cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) not in (2, 3):
                raise ConfigError(f"tokens: {path}, line {number}: has {len(words)} words; write TOKEN TENANT [SALT]")
            if words[0] in tenants:
                raise ConfigError(f"tokens: {path}, line {number}: the token is there already; remove one")
            tenants[words[0]] = words[1]
            salt = words[2] if len(words) == 3 else None
            if salts.setdefault(words[1], salt) != salt:
                raise ConfigError(
                    f"tokens: {path}, line {number}: the tenant {words[1]} has another salt above; give all of its "
                    "tokens the same"
                )
        if not tenants:
            raise ConfigError(f"tokens: {path} holds no token, so that nobody could call; write TOKEN TENANT lines")
        return cls(tenants, {tenant: salt for tenant, salt in salts.items() if salt is not None})

    def salt(self, tenant: str) -> str:
        """What keeps a tenant's cached prefixes apart: its own name, or what several share. No name is such a salt."""
        return f"\x1e{self._shared[tenant]}" if tenant in self._shared else tenant

    def tenant(self, token: str) -> str | None:
        """Who the token speaks for."""
        given = hashlib.sha256(token.encode()).digest()
        found = None
        for known, tenant in self._hashes:
            if hmac.compare_digest(known, given):
                found = tenant
        return found


async def abort(context: Any, error: UnderstudyError, request_id: str) -> None:
    """Ends the call with the error. Always raises."""
    code, message, trailing = to_status(error, request_id)
    await context.abort(code, message, (*trailing, ("x-request-id", request_id)))


Handler = Callable[[Any, Any], Awaitable[Any]]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every call. `tokens` None lets everybody in, as the tenant ''.

    `max_message_bytes` bounds a request; the transport's own limit must lie above it. With mutual TLS and no tokens,
    the tenant is the client certificate's common name. `tracer` makes a span of every call.
    """

    def __init__(
        self, metrics: Metrics, tokens: Tokens | None, max_message_bytes: int, tracer: Tracer | None = None
    ) -> None:
        self._metrics = metrics
        self._tracer = tracer
        self._tokens = tokens
        self._max_bytes = max_message_bytes

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(details)
        if handler is None or details.method.startswith(_OPEN_SERVICES):
            return handler
        metadata = {k: v for k, v in details.invocation_metadata or () if isinstance(v, str)}
        if not details.method.startswith(_OWN_SERVICES):
            return self._guarded(handler, metadata)
        if handler.unary_stream is not None:
            run = self._around(details.method, handler.unary_stream, handler.request_deserializer, metadata)
            return grpc.unary_stream_rpc_method_handler(run, None, handler.response_serializer)
        run = self._around(details.method, handler.unary_unary, handler.request_deserializer, metadata)
        return grpc.unary_unary_rpc_method_handler(run, None, handler.response_serializer)

    def _guarded(self, handler: Any, metadata: Mapping[str, str]) -> Any:
        """Somebody else's service, such as reflection: only the token is checked."""
        try:
            self._tenant(metadata)
        except UnderstudyError as error:
            problem = error

            async def refuse(_requests: Any, context: Any) -> None:
                await abort(context, problem, secrets.token_hex(8))

            return grpc.stream_stream_rpc_method_handler(refuse)
        return handler

    def _tenant(self, metadata: Mapping[str, str], context: Any = None) -> str:
        if self._tokens is None:
            return _certificate_name(context) if context is not None else ""
        scheme, _, token = metadata.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("no bearer token; send the metadata 'authorization: Bearer TOKEN'")
        tenant = self._tokens.tenant(token.strip())
        if tenant is None:
            raise Unauthenticated("the bearer token is unknown")
        return tenant

    def _around(self, method: str, inner: Handler, parse: Any, metadata: Mapping[str, str]) -> Handler:
        async def run(raw: bytes, context: Any) -> Any:
            call = Call(
                method.rpartition("/")[2],
                secrets.token_hex(8),
                time.monotonic(),
                context.time_remaining(),
                peer=context.peer(),
                traceparent=metadata.get("traceparent", "")[:64],
            )
            if self._tracer is not None:
                call.span = open_call(self._tracer, call, method)
            reset = current_call.set(call)
            outcome = "INTERNAL"
            try:
                call.tenant = self._tenant(metadata, context)
                call.salt = call.tenant if self._tokens is None else self._tokens.salt(call.tenant)
                call.request_id = valid_request_id(metadata.get("x-request-id", ""))
                result = await inner(self._parsed(raw, parse), context)
                outcome = "OK"
                return result
            except UnderstudyError as error:
                outcome = error.kind
                call.notes["error"] = clipped(error.message)
                await abort(context, error, call.request_id)
            except asyncio.CancelledError:
                outcome = "CANCELLED"
                raise
            except Exception as error:
                log.exception("a call failed unexpectedly", request_id=call.request_id, method=call.method)
                call.notes["error"] = type(error).__name__
                hidden = InternalError(f"a fault of the service; its log tells more about request {call.request_id}")
                await abort(context, hidden, call.request_id)
            finally:
                current_call.reset(reset)
                self._tell(call, outcome)

        return run

    def _parsed(self, raw: bytes, parse: Any) -> Any:
        if len(raw) > self._max_bytes:
            raise InvalidRequest(f"the message has {len(raw)} bytes; at most {self._max_bytes} are allowed")
        try:
            return parse(raw)
        except DecodeError as error:
            raise InvalidRequest(
                "the message cannot be read: it is not of this method's type, or one of its strings is not UTF-8"
            ) from error

    def _tell(self, call: Call, outcome: str) -> None:
        seconds = time.monotonic() - call.started
        self._metrics.requests.labels(call.method, outcome).inc()
        self._metrics.duration.labels(call.method).observe(seconds)
        if call.span is not None:
            code = grpc.StatusCode.OK if outcome == "OK" else getattr(grpc.StatusCode, FROM_KIND[outcome].code)
            close_call(call.span, call, outcome, code.value[0])
        log.info(
            "call",
            method=call.method,
            outcome=outcome,
            request_id=call.request_id,
            tenant=call.tenant,
            peer=call.peer,
            seconds=round(seconds, 6),
            **({"traceparent": call.traceparent} if call.traceparent else {}),
            **call.notes,
        )


def _certificate_name(context: Any) -> str:
    """Common name of a verified client certificate; '' without one."""
    names: Sequence[bytes] = context.auth_context().get("x509_common_name", ())
    return names[0].decode("utf-8", "replace") if names else ""
