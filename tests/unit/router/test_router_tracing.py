"""Spans of a call, through the real gateway, told to OpenTelemetry in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from router_stage import Answer, Stage, until

from cluster.telemetry import OtelTracer
from router.tracing import valid_traceparent
from understudy.v1 import inference_pb2 as pb
from workers.engine import Request

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{CALLER}-01", f"00-{TRACE}-{CALLER}-00"


class Told:
    """Finished spans, by name."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = OtelTracer(provider)

    def __getitem__(self, name: str) -> list[ReadableSpan]:
        return [s for s in self.exporter.get_finished_spans() if s.name == name]

    @property
    def call(self) -> ReadableSpan:
        (span,) = self["understudy.v1.Inference/Generate"]
        return span


@pytest.fixture
def told() -> Iterator[Told]:
    told = Told()
    yield told
    told.tracer.close()


def events(span: ReadableSpan) -> list[tuple[str, dict[str, Any]]]:
    return [(e.name, dict(e.attributes or {})) for e in span.events]


def parent_of(span: ReadableSpan) -> int:
    assert span.parent is not None
    return span.parent.span_id


async def generate(stage: Stage, traceparent: str = SAMPLED, **fields: Any) -> Answer:
    request = pb.GenerateRequest(**({"text": "hi", "stopping": pb.Stopping(max_tokens=6, ignore_eos=True)} | fields))
    call = stage.stub.Generate(request, metadata=[("traceparent", traceparent)] if traceparent else [])
    return Answer([message async for message in call])


def requests(stage: Stage) -> list[Request]:
    return [m for r in stage.replicas.values() for c in r.channels for m in c.sent if isinstance(m, Request)]


async def test_an_answered_call(stage: Stage, told: Told) -> None:
    stage.add_replica("r0", epoch=7)
    await stage.open(tracer=told.tracer)
    await generate(stage, request_id="mine")
    await until(lambda: told["understudy.v1.Inference/Generate"])
    call, (route,), (replica,) = told.call, told["route"], told["replica"]
    assert {f"{s.context.trace_id:032x}" for s in told.exporter.get_finished_spans()} == {TRACE}
    assert f"{parent_of(call):016x}" == CALLER
    assert parent_of(route) == parent_of(replica) == call.context.span_id
    attributes = dict(call.attributes)
    assert attributes.pop("client.address").startswith("ipv4:127.0.0.1:")
    assert attributes == {
        "rpc.system": "grpc",
        "rpc.service": "understudy.v1.Inference",
        "rpc.method": "Generate",
        "rpc.grpc.status_code": 0,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "understudy",
        "gen_ai.request.model": "fake",
        "gen_ai.response.id": "mine",
        "gen_ai.response.finish_reasons": ("LENGTH",),
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 6,
    }
    assert events(call) == []
    assert route.attributes["understudy.replica"] == "r0"
    assert route.attributes["understudy.route.reason"] == "only"
    assert route.attributes["understudy.route.lease"] == 1
    assert replica.attributes["understudy.replica.epoch"] == 7
    assert replica.attributes["gen_ai.usage.output_tokens"] == 6
    assert [name for name, _ in events(replica)] == ["first_token", "finish"]
    assert events(replica)[0][1] == {f"understudy.cached_tokens.{tier}": 0 for tier in ("device", "host", "store")}
    # The replica is told whose child its spans are.
    (request,) = requests(stage)
    assert request.traceparent == f"00-{TRACE}-{replica.context.span_id:016x}-01"


async def test_a_failover_is_an_event_of_the_call(stage: Stage, told: Told) -> None:
    gates = {name: stage.gate() for name in ("r0", "r1")}
    for name, gate in gates.items():
        stage.add_replica(name, step_s=1.0, sleep=gate)
    await stage.open(tracer=told.tracer)
    for gate in gates.values():
        gate.let(4)
    call = stage.stub.Generate(
        pb.GenerateRequest(
            text="hi", stopping=pb.Stopping(max_tokens=9, ignore_eos=True), sampling=pb.Sampling(seed=11)
        ),
        metadata=[("traceparent", SAMPLED)],
    )
    messages: list[pb.GenerateResponse] = []
    while len(Answer(messages).ids) < 4:
        messages.append(await call.read())
    (first,) = [name for name, replica in stage.replicas.items() if replica.loop._owners]
    second = "r1" if first == "r0" else "r0"
    stage.replicas[first].kill()
    for gate in gates.values():
        gate.open()
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    assert len(Answer(messages).ids) == 9
    await until(lambda: told["understudy.v1.Inference/Generate"])
    ((name, about),) = events(told.call)
    assert name == "failover"
    assert "ended" in about.pop("understudy.failover.cause")
    assert about == {
        "understudy.failover.from": first,
        "understudy.failover.to": second,
        "understudy.failover.tokens": 4,
        "understudy.sequence": 0,
    }
    left, taken = sorted(told["replica"], key=lambda s: s.start_time)
    assert (left.attributes["understudy.replica"], left.attributes["error.type"]) == (first, "REPLICA_LOST")
    assert taken.attributes["understudy.replica"] == second
    assert taken.attributes["understudy.tokens.before"] == 4
    assert "error.type" not in taken.attributes
    assert len(told["route"]) == 2


async def test_several_sequences_have_a_span_each(stage: Stage, told: Told) -> None:
    await stage.open(tracer=told.tracer)
    await generate(stage, sampling=pb.Sampling(n=3))
    await until(lambda: told["understudy.v1.Inference/Generate"])
    assert sorted(s.attributes["understudy.sequence"] for s in told["replica"]) == [0, 1, 2]
    assert len(told["route"]) == 1
    assert told.call.attributes["gen_ai.response.finish_reasons"] == ("LENGTH",) * 3


async def test_a_gateway_that_decides_alone_says_so(stage: Stage, told: Told) -> None:
    gateway = await stage.open(tracer=told.tracer)
    await until(gateway.pool.alive)
    stage.router.reachable = False
    await generate(stage)
    await until(lambda: told["understudy.v1.Inference/Generate"])
    (route,) = told["route"]
    assert route.attributes["understudy.route.reason"] == "alone"
    assert route.attributes["understudy.route.lease"] < 0
    stage.router.reachable = True


async def test_errors_have_their_kind(stage: Stage, told: Told) -> None:
    await stage.open(tracer=told.tracer)
    with pytest.raises(grpc.aio.AioRpcError):
        await generate(stage, sampling=pb.Sampling(top_p=7))
    await until(lambda: told["understudy.v1.Inference/Generate"])
    assert told.call.attributes["error.type"] == "INVALID_REQUEST"
    assert told.call.attributes["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert not told["replica"]


async def test_a_client_that_leaves_ends_every_span(stage: Stage, told: Told) -> None:
    gate = stage.gate()
    stage.add_replica("r0", step_s=1.0, sleep=gate)
    await stage.open(tracer=told.tracer)
    gate.let(3)
    stopping, sampling = pb.Stopping(max_tokens=99, ignore_eos=True), pb.Sampling(seed=11)
    call = stage.stub.Generate(pb.GenerateRequest(text="hi", stopping=stopping, sampling=sampling))
    while not (await call.read()).HasField("delta"):
        pass
    call.cancel()
    await until(lambda: told["understudy.v1.Inference/Generate"])
    assert told.call.attributes["error.type"] == "CANCELLED"
    (replica,) = told["replica"]
    assert [name for name, _ in events(replica)] == ["first_token"]


async def test_what_the_caller_does_not_record_is_recorded_nowhere(stage: Stage, told: Told) -> None:
    await stage.open(tracer=told.tracer)
    await generate(stage, UNSAMPLED)
    assert requests(stage)[0].traceparent == ""
    assert told.exporter.get_finished_spans() == ()


@pytest.mark.parametrize(
    "given",
    ["", "00-1-2-01", f"00-{'0' * 32}-{CALLER}-01", f"ff-{TRACE}-{CALLER}-01", f"00-{TRACE.upper()}-{CALLER}-01"],
)
async def test_without_a_trace_that_can_be_read_a_new_one_begins(stage: Stage, told: Told, given: str) -> None:
    assert valid_traceparent(given) == ""
    await stage.open(tracer=told.tracer)
    await generate(stage, given)
    await until(lambda: told["understudy.v1.Inference/Generate"])
    assert told.call.parent is None
    assert {s.context.trace_id for s in told["replica"]} == {told.call.context.trace_id}


async def test_without_a_tracer_nothing_is_made(stage: Stage) -> None:
    gateway = await stage.open()
    streams = []
    opened = gateway.dispatcher.open

    def watched(*args: Any, **kwargs: Any) -> Any:
        streams.append(opened(*args, **kwargs))
        return streams[-1]

    gateway.dispatcher.open = watched  # type: ignore[method-assign]
    await generate(stage)
    assert [stream._trace for stream in streams] == [None]
    assert requests(stage)[0].traceparent == ""
