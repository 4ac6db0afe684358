"""Spans by OTLP, to a real collector: from the leader's end of the wire, and what opening and closing cost."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from otlp_collector import Collector

from cluster.telemetry import OtelTracer, open_tracer
from cluster.wire import GrpcReplicaChannel, LeaderServer
from router.tracing import ReplicaTrace
from router.wire import Cancel
from workers.engine import FinishReason, Request, SequenceOutput, StepOutput
from workers.engine.fake import FakeEngine
from workers.engine.loop import EngineLoop

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CONTEXT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


async def test_a_sequence_at_the_leader_is_three_spans(collector: Collector) -> None:
    tracer = open_tracer(collector.endpoint, "replica", "node-1", "demo-0")
    with EngineLoop(FakeEngine()) as loop:
        server = LeaderServer(loop, replica="demo-0", epoch=3, secret="s", tracer=tracer)
        await server.start()
        channel = GrpcReplicaChannel(server.address, gateway="g", secret="s")
        await channel.send(Request("plain", [1, 2, 3], 4))
        await channel.send(Request("told", [1, 2, 3], 4, traceparent=CONTEXT, index=2))
        left = {"plain", "told"}
        async for message in channel.messages():
            if isinstance(message, StepOutput):
                left -= {output.id for output in message.outputs if output.finish is not None}
            if not left:
                break
        await channel.close()
        await server.stop()
    spans = collector.wait(lambda spans: len(spans) >= 3)
    assert [span.name for span in spans] == ["queue", "prefill", "decode"]
    assert {(span.trace, span.parent) for span in spans} == {(TRACE, PARENT)}
    queue, prefill, decode = spans
    assert queue.begin <= queue.end == prefill.begin < prefill.end == decode.begin <= decode.end
    for span in spans:
        about = {"understudy.replica": "demo-0", "understudy.replica.epoch": 3, "understudy.sequence": 2}
        assert about.items() <= span.attributes.items()
        assert span.resource["service.name"] == "understudy"
        assert span.resource["service.instance.id"] == "demo-0"
        assert span.resource["understudy.role"] == "replica"
        assert span.resource["host.name"] == "node-1"
    assert prefill.attributes["gen_ai.usage.input_tokens"] == 3
    assert decode.attributes["gen_ai.usage.output_tokens"] == 4
    assert decode.attributes["gen_ai.response.finish_reasons"] == ["LENGTH"]


async def test_sequences_that_end_otherwise(collector: Collector) -> None:
    """Cancelled while they wait, and left by their gateway while they run."""
    go = asyncio.Event()
    here = asyncio.get_running_loop()

    def sleep(_seconds: float) -> None:
        asyncio.run_coroutine_threadsafe(go.wait(), here).result(60)

    tracer = open_tracer(collector.endpoint, "replica")
    with EngineLoop(FakeEngine(max_running=1, step_s=1.0, sleep=sleep)) as loop:
        server = LeaderServer(loop, replica="r", epoch=1, secret="s", tracer=tracer)
        await server.start()
        channel = GrpcReplicaChannel(server.address, gateway="g", secret="s")
        await channel.send(Request("runs", [1], 500, traceparent=CONTEXT))
        await channel.send(Request("waits", [1], 500, traceparent=CONTEXT))
        await channel.send(Cancel("waits"))
        messages, seen = channel.messages(), set[str]()
        go.set()
        while seen < {"runs", "waits"}:
            message = await anext(messages)
            seen |= {output.id for output in message.outputs} if isinstance(message, StepOutput) else set()
        await messages.aclose()  # type: ignore[attr-defined]
        await channel.close()
        await server.stop()
    spans = collector.wait(lambda spans: len(spans) >= 4)
    assert sorted(span.name for span in spans) == ["decode", "prefill", "queue", "queue"]
    (decode,) = [span for span in spans if span.name == "decode"]
    assert decode.attributes["error.type"] == "CANCELLED"
    assert sorted("error.type" in span.attributes for span in spans if span.name == "queue") == [False, True]


def moments(*outputs: tuple[int, SequenceOutput]) -> list[tuple[str, int, int]]:
    """(name, begin, end) of the spans of a sequence that came at 0, whose outputs came at these nanoseconds."""
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    clock = iter([0, *(at for at, _ in outputs)])
    tracer = OtelTracer(provider)
    trace = ReplicaTrace(tracer, Request("a", [1], 9, traceparent=CONTEXT), "r", 1, lambda: next(clock))
    over = [trace.take(output) for _, output in outputs]
    assert over == [False] * (len(over) - 1) + [True]
    found = [(s.name, s.start_time or 0, s.end_time or 0) for s in exporter.get_finished_spans()]
    tracer.close()
    return found


def test_spans_begin_and_end_where_the_engine_says() -> None:
    first = SequenceOutput("a", [5], cached_tokens=0, computing_us=3)
    last = SequenceOutput("a", [6], finish=FinishReason.EOS)
    assert moments((10_000, first), (25_000, last)) == [
        ("queue", 0, 7_000), ("prefill", 7_000, 10_000), ("decode", 10_000, 25_000)
    ]  # fmt: skip
    only = SequenceOutput("a", [5], finish=FinishReason.LENGTH, computing_us=90)  # longer than it was there: clocks
    assert moments((10_000, only)) == [("queue", 0, 0), ("prefill", 0, 10_000), ("decode", 10_000, 10_000)]
    refused = SequenceOutput("a", [], finish=FinishReason.CANCELLED)
    assert moments((10_000, refused)) == [("queue", 0, 10_000)]


def test_a_collector_that_is_not_there_delays_nobody_for_long() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    tracer = open_tracer(f"http://{address}", "gateway")
    assert tracer is not None
    span = tracer.start("a")
    assert span.context.startswith("00-")
    span.end()
    tracer.close()
    tracer.close()


def test_without_an_endpoint_nothing_is_imported() -> None:
    code = (
        "import sys, cluster.telemetry, router.gateway, cluster.wire\n"
        "assert cluster.telemetry.open_tracer(None, 'gateway') is None\n"
        "print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
