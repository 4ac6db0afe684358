"""A collector of spans: the real OTLP service over gRPC, which keeps what it is sent."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class Got:
    """A span as it came, with its process's resource. Ids are hexadecimal, moments nanoseconds."""

    name: str
    trace: str
    id: str
    parent: str
    begin: int
    end: int
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    resource: dict[str, Any]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Listens on a free port of loopback while its `with` statement lasts."""

    def __init__(self) -> None:
        self.spans: list[Got] = []
        self._more = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._more:
            for of in request.resource_spans:
                resource = _values(of.resource.attributes)
                self.spans += [_got(span, resource) for scope in of.scope_spans for span in scope.spans]
            self._more.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait(self, condition: Callable[[list[Got]], object], seconds: float = 60.0) -> list[Got]:
        """Every span so far, once `condition` holds of them. TimeoutError."""
        with self._more:
            if not self._more.wait_for(lambda: condition(self.spans), seconds):
                raise TimeoutError(f"spans that came: {[span.name for span in self.spans]}")
            return list(self.spans)

    def __enter__(self) -> Collector:
        self._server.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.stop(None).wait()


def _got(span: Any, resource: dict[str, Any]) -> Got:
    return Got(
        span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(),
        span.start_time_unix_nano, span.end_time_unix_nano, _values(span.attributes),
        [(event.name, _values(event.attributes)) for event in span.events], resource,
    )  # fmt: skip


def _values(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    which = value.WhichOneof("value")
    if which == "array_value":
        return [_value(v) for v in value.array_value.values]
    return getattr(value, which) if which else None
