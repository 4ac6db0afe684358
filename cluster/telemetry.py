"""Spans by OpenTelemetry, exported by OTLP. Nothing of it is imported where no endpoint is set."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from router.tracing import Kind, Value
from understudy import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)

SERVICE_NAME = "understudy"
_EXPORT_EVERY_MS = 1000
_QUEUE = 8192  # spans; beyond, new ones are dropped
_EXPORT_S = 5.0  # for one export, its retries included
_LAST_S = 2.0  # for what is left at the end


def open_tracer(endpoint: str | None, role: str, node: str = "", instance: str = "") -> OtelTracer | None:
    """Exports this process's spans to `endpoint`, an OTLP gRPC URL; None without one. Close it.

    `role` is gateway or replica, `instance` which one. What OTEL_… in the environment says about headers, certificates,
    compression, sampling and resources holds.
    """
    if endpoint is None:
        return None
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    about: dict[str, str | int] = {
        "service.name": os.environ.get("OTEL_SERVICE_NAME", SERVICE_NAME),
        "service.version": __version__,
        "service.instance.id": instance or f"{role}-{os.getpid()}",
        "understudy.role": role,
        "process.pid": os.getpid(),
    }
    if node:
        about["host.name"] = node
    provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_S)
    provider.add_span_processor(
        BatchSpanProcessor(exporter, max_queue_size=_QUEUE, schedule_delay_millis=_EXPORT_EVERY_MS)
    )
    log.info("spans go to %s", endpoint)
    return OtelTracer(provider)


class OtelTracer:
    """A `router.tracing.Tracer` over a provider of spans, which it closes."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._closing: threading.Thread | None = None
        self._tracer = provider.get_tracer(SERVICE_NAME, __version__)
        self._extract = TraceContextTextMapPropagator().extract
        self._kinds = {"server": SpanKind.SERVER, "client": SpanKind.CLIENT, "internal": SpanKind.INTERNAL}

    def start(
        self,
        name: str,
        parent: str = "",
        kind: Kind = "internal",
        attributes: Mapping[str, Value] | None = None,
        at_ns: int | None = None,
    ) -> OtelSpan:
        # An empty context and not None: what else is open in this process is nobody's parent here.
        context = self._extract({"traceparent": parent} if parent else {}, context=_empty())
        return OtelSpan(self._tracer.start_span(name, context, self._kinds[kind], attributes, start_time=at_ns))

    def close(self) -> None:
        if self._closing is None:  # a thread, because the provider's own patience is longer and cannot be told
            self._closing = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
            self._closing.start()
        self._closing.join(_LAST_S)


class OtelSpan:
    """A `router.tracing.Span`."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.context = ""
        if span.is_recording():
            of = span.get_span_context()
            self.context = f"00-{of.trace_id:032x}-{of.span_id:016x}-{of.trace_flags:02x}"

    def set(self, attributes: Mapping[str, Value]) -> None:
        self._span.set_attributes(attributes)

    def event(self, name: str, attributes: Mapping[str, Value]) -> None:
        self._span.add_event(name, attributes)

    def end(self, error: str = "", at_ns: int | None = None) -> None:
        if not self._span.is_recording():
            return  # over, or of no interest to anybody
        if error:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end(at_ns)


def _empty() -> Any:
    from opentelemetry.context import Context

    return Context()
